"""The decode loop schedules the steps that the scheduler would, and no others.

Logits are random, so no model runs: tables, lengths and blocks decide the schedule.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model
from jpaged.config import EngineConfig
from jpaged.engine import bookkeeping, decode_loop, features, programs
from jpaged.engine.features import Features
from jpaged.kv import block_manager
from jpaged.params import SamplingParams
from tests.support.engine.configs import QUICKLY
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

CONFIG = EngineConfig(
    num_blocks=14,  # too few for all sequences
    block_size=4,
    max_num_seqs=4,
    max_model_len=32,
    max_num_batched_tokens=16,
    max_num_requests=12,
    enable_prefix_caching=True,
)
USED = Features(sampling=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    return load_model(checkpoints.write_tiny_llama(folder, num_hidden_layers=1))


def jitted(function):
    return jax.jit(function, compiler_options=QUICKLY)


SCHEDULE, DECODE = jitted(programs.schedule), jitted(programs.decode)
SETTLE = jitted(bookkeeping.settle)


def next_step(state, scheduled, unsettled):
    return decode_loop.next_step(
        state, scheduled, unsettled, jnp.bool_(True), state.config
    )


def differences(ours, theirs) -> list[str]:
    """The names of the arrays that differ.

    `settle` records events and inserts blocks into the prefix cache after the loop, so
    the timeline and the cache differ before it.
    """
    ours, theirs = (
        (dataclasses.replace(state, timeline=None, prefix_cache=None), scheduled)
        for state, scheduled in (ours, theirs)
    )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(ours),
        jax.tree_util.tree_leaves_with_path(theirs),
        strict=True,
    )
    return [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in pairs
        if not np.array_equal(a, b)
    ]


def walk(model, step, seed: int) -> tuple[list[str], int, int]:
    """Compare `step` with the scheduler after each step of a random load.

    Returns:
      The names of arrays that differ, and the numbers of plain and of other steps.
    """
    rng = np.random.default_rng(seed)
    state, arrival, plain, others = engine.init(model, CONFIG), 0, 0, 0
    vocabulary = model.config.vocab_size
    for _ in range(60):
        if rng.random() < 0.15 and arrival < 4:
            params = SamplingParams(
                n=int(rng.integers(1, 3)),
                seed=arrival,
                max_tokens=int(rng.integers(2, 20)),
            )
            prompt = rng.integers(2, vocabulary, rng.integers(1, 12)).tolist()
            state, _ = engine.submit(state, [prompt], params, arrivals=[arrival])
            arrival += 1
        view, scheduled, size = SCHEDULE(features.view(state, USED))
        if not size.is_live:
            continue
        logits = rng.normal(size=(CONFIG.max_num_logits, vocabulary))
        view, unsettled = DECODE(view, scheduled, jnp.asarray(logits, jnp.float32))
        settled = SETTLE(view, unsettled)
        *ours, is_plain = step(view, scheduled, unsettled)
        *theirs, size = SCHEDULE(settled)
        if is_plain:
            plain += 1
            if found := differences(ours, theirs):
                return found, plain, others
        else:
            others += 1
        state = features.merge(state, settled)
    return [], plain, others


def test_plain_steps_are_those_of_the_scheduler(model):
    step, plain, others = jitted(next_step), 0, 0
    for seed in range(8):
        found, *counts = walk(model, step, seed)
        assert found == []
        plain, others = plain + counts[0], others + counts[1]
    assert plain > 40
    assert others > 10


def always_fits(monkeypatch):
    append_one = block_manager.append_one
    monkeypatch.setattr(
        block_manager,
        "append_one",
        lambda *args: (append_one(*args)[0], jnp.bool_(True)),
    )


def always_keeps_rows(monkeypatch):
    monkeypatch.setattr(decode_loop, "_keeps_rows", lambda *_: jnp.bool_(True))


def repeats_positions(monkeypatch):
    step = decode_loop.next_step

    def faulty(state, scheduled, *rest):
        state, found, is_plain = step(state, scheduled, *rest)
        return state, dataclasses.replace(found, batch=scheduled.batch), is_plain

    monkeypatch.setattr(decode_loop, "next_step", faulty)


@pytest.mark.parametrize(
    "fault",
    [always_fits, always_keeps_rows, repeats_positions],
)
def test_a_planted_fault_is_found(model, monkeypatch, fault):
    fault(monkeypatch)
    # A new function, because jax caches the program without the fault.
    step = jitted(lambda *args: next_step(*args))
    assert any(walk(model, step, seed)[0] for seed in range(8))
