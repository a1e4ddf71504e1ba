"""Policies: which requests are admitted first, compared with sorting in Python."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import policies, scheduler
from jpaged.config import EngineConfig
from jpaged.kv import block_manager
from jpaged.scheduler import RUNNING, WAITING

CONFIG = EngineConfig(
    num_blocks=64,
    block_size=4,
    max_num_seqs=3,
    max_model_len=64,
    max_num_batched_tokens=256,
    max_num_requests=8,
)
ARRIVALS = [4, 0, 3, 1, 2, 5, 6, 7]
PRIORITIES = [0, 2, -1, 2, 1, 0, 3, 3]
LENGTHS = [9, 17, 5, 30, 5, 12, 40, 6]
CACHED = [8, 0, 4, 16, 0, 8, 36, 4]


def cube_root_of_length(waiting: policies.Waiting) -> jax.Array:
    return jnp.cbrt(waiting.prompt_lens.astype(jnp.float32))


def longest_not_cached(waiting: policies.Waiting) -> jax.Array:
    return waiting.cached_lens - waiting.prompt_lens


def nan_for_odd_lengths(waiting: policies.Waiting) -> jax.Array:
    odd = waiting.prompt_lens % 2 == 1
    return jnp.where(odd & (waiting.prompt_lens > 8), jnp.nan, 0.0)


# Each policy, and its sort key in Python.
CASES = {
    "fcfs": lambda i: 0,
    "priority": lambda i: PRIORITIES[i],
    "shortest_prompt": lambda i: LENGTHS[i],
    "longest_prefix": lambda i: -CACHED[i],
    cube_root_of_length: lambda i: LENGTHS[i],
    longest_not_cached: lambda i: CACHED[i] - LENGTHS[i],
    nan_for_odd_lengths: lambda i: LENGTHS[i] % 2 == 1 and LENGTHS[i] > 8,
}


def by_number(waiting: policies.Waiting) -> jax.Array:
    """All policies of `CASES` in one program: the first parameter selects one."""
    scores = [policies.find(policies.ADMISSION, policy)(waiting) for policy in CASES]
    number = waiting.parameters[0].astype(jnp.int32)
    return jnp.stack([score.astype(jnp.float32) for score in scores])[number]


BY_NUMBER = dataclasses.replace(CONFIG, policy=by_number, policy_parameters=(0.0,))


@functools.partial(jax.jit, static_argnames="config")
def schedule(num_tokens, cached, is_waiting, scheduler_params, config=BY_NUMBER):
    """One step of an engine without running requests."""
    queue = dataclasses.replace(
        scheduler.init_queue(8),
        status=jnp.where(is_waiting, WAITING, scheduler.EMPTY),
        arrivals=jnp.array(ARRIVALS),
        priorities=jnp.array(PRIORITIES),
        prompt_lens=num_tokens,
        num_tokens=num_tokens,
    )
    blocks = block_manager.init_state(
        num_blocks=config.num_blocks, block_size=4, max_seqs=3, max_blocks_per_seq=16
    )
    # No row uses the last 16 blocks, and they store the cached prefix.
    first = max(config.num_blocks - 16, 0)
    tables = jnp.broadcast_to(first + jnp.arange(16, dtype=jnp.int32), (8, 16))
    hits = scheduler.Hits(tables, cached)
    rows = jnp.full((3,), scheduler.NO_REQUEST)
    return scheduler.schedule(
        queue, rows, blocks, config, hits, scheduler_params=scheduler_params
    )


def admit_all(policy, **changes):
    config = dataclasses.replace(BY_NUMBER, **changes)
    number = jnp.array([list(CASES).index(policy)], jnp.float32)
    settings = dataclasses.replace(config.scheduler_params, parameters=number)
    is_waiting = jnp.ones((8,), jnp.bool_)
    return schedule(jnp.array(LENGTHS), jnp.array(CACHED), is_waiting, settings)


@pytest.mark.parametrize("policy", CASES)
def test_requests_are_admitted_by_score_and_then_by_arrival(policy):
    queue, rows, blocks, plan = admit_all(policy)
    key = CASES[policy]
    order = sorted(range(8), key=lambda i: (key(i), ARRIVALS[i]))
    assert rows.tolist() == order[:3]
    assert np.flatnonzero(queue.status == RUNNING).tolist() == sorted(order[:3])
    # Cached tokens are mapped, and the rest is computed.
    assert blocks.context_lens.tolist() == [CACHED[i] for i in order[:3]]
    assert plan.num_tokens.tolist() == [LENGTHS[i] - CACHED[i] for i in order[:3]]
    assert queue.num_cached.tolist() == [
        CACHED[i] if i in order[:3] else 0 for i in range(8)
    ]


def test_names_are_those_of_the_policies():
    for kind in policies.KINDS:
        assert kind.policies[kind.default].__name__ == kind.default
        for name, policy in kind.policies.items():
            assert policies.find(kind, name) is policy
            assert policy.__name__ == name


def test_a_prompt_gets_at_most_max_prompt_chunk_tokens_per_step():
    _, rows, _, plan = admit_all("fcfs", max_prompt_chunk=7)
    left = [LENGTHS[i] - CACHED[i] for i in rows.tolist()]
    assert max(left) > 7
    assert plan.num_tokens.tolist() == [min(n, 7) for n in left]


def test_unused_cached_blocks_count_as_free_until_they_are_mapped():
    config = dataclasses.replace(CONFIG, num_blocks=10, watermark=0.0)
    num_tokens = jnp.array([8, 36] + [0] * 6)  # request 1 arrived first
    cached = jnp.array([0, 16] + [0] * 6)
    settings = config.scheduler_params
    _, rows, blocks, plan = schedule(
        num_tokens, cached, num_tokens > 0, settings, config
    )
    # Of 10 blocks, request 1 maps 4 cached ones and needs 5 more. Request 0 needs 2.
    assert rows.tolist() == [1, -1, -1]
    assert block_manager.num_free_blocks(blocks) == 6
    kept = jnp.arange(10) < 4
    _, appended = block_manager.append(blocks, plan.num_tokens, kept)
    assert appended.ok


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("lifo", "expected one of ('fcfs', 'priority', 'shortest_prompt'"),
        (3, "or a function of policies.Requests, got 3"),
        (lambda w: jnp.float32(1), "of shape (8,) for the example, got float32"),
        (lambda w: w.arrivals.astype(jnp.complex64), "expected a real number"),
        (lambda w: w.prompt_lens / w.num_preemptions * 0, "got NaN among"),
        (lambda w: w, "of shape (8,) for the example, got Requests"),
    ],
)
def test_a_policy_without_a_real_number_per_sequence_raises(policy, message):
    with pytest.raises(ValueError, match="policy: expected") as error:
        dataclasses.replace(CONFIG, policy=policy)
    assert message in str(error.value)


@pytest.mark.parametrize("cap", [0, -1, 2.5, True])
def test_max_prompt_chunk_is_at_least_one_token(cap):
    with pytest.raises(ValueError, match="max_prompt_chunk: expected an integer"):
        dataclasses.replace(CONFIG, max_prompt_chunk=cap)
