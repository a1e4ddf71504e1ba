"""Policies that try to keep a run from ending: the scheduler makes progress anyway."""

import dataclasses
import itertools
import random

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import scheduler
from jpaged.config import EngineConfig
from jpaged.policies import YIELD, Requests, Rows
from jpaged.scheduler import RUNNING
from tests.support.scheduler_driver import Driver, RequestSpec, jitted_operations


def noise(arrivals, total):
    """Numbers from 0 to 96 that change with every token."""
    return (arrivals * 7919 + total * 104729) % 97


def scores(requests: Requests):
    """A hostile policy; its parameter selects one of `HOSTILE`."""
    total = jnp.sum(requests.num_tokens)
    some = noise(requests.arrivals, total).astype(jnp.float32)
    newest = -requests.arrivals.astype(jnp.float32)
    options = {
        "noise": some,
        "yields": jnp.where(some > 48, YIELD, some),
        "all yield": jnp.full_like(some, YIELD),
        "newest first": jnp.where(requests.is_waiting, newest, -newest),
        "nan": jnp.full_like(some, jnp.nan),
        "the oldest yields": jnp.where(newest == jnp.max(newest), YIELD, -YIELD),
    }
    assert list(options) == HOSTILE
    return jnp.stack(list(options.values()))[requests.parameters[0].astype(jnp.int32)]


def tokens(rows: Rows):
    """A hostile split of the budget: nothing, too little, too much, anything."""
    some = noise(rows.requests.arrivals, jnp.sum(rows.requests.num_tokens))
    options = [jnp.zeros_like(some), some - 1000, some + 1000, some % 3, 0 * some, some]
    return jnp.stack(options)[rows.parameters[0].astype(jnp.int32)]


HOSTILE = ["noise", "yields", "all yield", "newest first", "nan", "the oldest yields"]
CONFIG = EngineConfig(
    num_blocks=10,
    block_size=4,
    max_num_seqs=4,
    max_model_len=32,
    max_num_batched_tokens=10,
    max_num_requests=24,
    max_num_prefixes=1,
    watermark=0.0,
    policy=scores,
    policy_parameters=(0.0,),
    preemption_policy=scores,
    preemption_parameters=(0.0,),
    budget_policy=tokens,
    budget_parameters=(0.0,),
)


@pytest.fixture(scope="module")
def operations():
    """One program for all hostile policies: which one is data."""
    return jitted_operations()


def random_requests(seed):
    rng = random.Random(seed)
    found = []
    for _ in range(7):
        outputs = tuple(rng.randint(1, 8) for _ in range(rng.choice([1, 1, 2, 3])))
        found.append(
            RequestSpec(
                prompt=rng.randint(1, 20),
                outputs=outputs,
                is_lockstep=len(outputs) > 1 and rng.random() < 0.5,
            )
        )
    return found


def first_of(driver):
    """The sequences of the running request that comes first, by arrival."""
    running = sorted(driver.running(), key=lambda p: (driver.queue["arrivals"][p], p))
    leaders = driver.queue["leaders"]
    return [p for p in running if leaders[p] == leaders[running[0]]] if running else []


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_policy_keeps_a_run_from_ending(operations, hostile):
    number = float(HOSTILE.index(hostile))
    num_preempted = 0
    for seed in range(3):
        driver = Driver(CONFIG, operations)
        mode = jnp.array([number], jnp.float32)
        settings = dataclasses.replace(
            CONFIG.scheduler_params, parameters=mode, preemption=mode, budget=mode
        )
        driver.arguments = (settings, driver.arguments[1])
        prefix = driver.pin(5)
        driver.submit(*filter(driver.is_accepted, random_requests(seed)))
        for step in itertools.count():
            assert step < 400
            live = np.isin(driver.queue["status"], (scheduler.WAITING, RUNNING))
            if not live.any():
                break
            first = [p for p in first_of(driver) if p != prefix]
            was_pinned = driver.queue["status"][prefix] == RUNNING
            planned = driver.step()
            # The first request keeps its rows and computes something.
            if first and not was_pinned:
                is_lockstep = driver.queue["is_lockstep"][first[0]]
                kept = first if is_lockstep else first[:1]
                assert set(kept) <= driver.running()
                assert any(planned.get(p) for p in first)
            driver.commit()
        num_preempted += driver.num_preempted
        assert driver.num_free() == CONFIG.num_blocks - 2  # those of the prefix
    assert num_preempted > 0 or hostile == "nan"


def test_the_first_of_the_running_requests_never_yields(operations):
    config = dataclasses.replace(CONFIG, max_num_seqs=1)
    for count in (1, 2):
        driver = Driver(config, operations)
        mode = jnp.array([float(HOSTILE.index("the oldest yields"))], jnp.float32)
        settings = dataclasses.replace(
            config.scheduler_params, preemption=mode, budget=jnp.array([2.0])
        )
        driver.arguments = (settings, driver.arguments[1])
        driver.submit(*[RequestSpec(prompt=3, outputs=(4,))] * count)
        driver.finish()
        assert driver.num_preempted == 0  # the first of those that run never yields
