"""Policies: who is admitted first, against sorting in Python."""

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


@functools.partial(jax.jit, static_argnames="config")
def admit(lengths: jax.Array, cached: jax.Array, config: EngineConfig):
    """One step with an empty engine and everybody waiting."""
    queue = dataclasses.replace(
        scheduler.init_queue(8),
        status=jnp.full((8,), WAITING),
        arrivals=jnp.array(ARRIVALS),
        priorities=jnp.array(PRIORITIES if config.uses_priorities else [0] * 8),
        prompt_lens=lengths,
        num_tokens=lengths,
    )
    blocks = block_manager.init_state(
        num_blocks=64, block_size=4, max_seqs=3, max_blocks_per_seq=16
    )
    # Blocks 48 to 63 are nobody's and hold what is cached.
    tables = jnp.broadcast_to(48 + jnp.arange(16, dtype=jnp.int32), (8, 16))
    hits = scheduler.Hits(tables, cached)
    rows = jnp.full((3,), scheduler.NO_REQUEST)
    return scheduler.schedule(queue, rows, blocks, config, hits)


def admitted(policy, **changes):
    config = dataclasses.replace(CONFIG, policy=policy, **changes)
    return admit(jnp.array(LENGTHS), jnp.array(CACHED), config)


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        ("fcfs", lambda i: 0),
        ("priority", lambda i: PRIORITIES[i]),
        ("shortest_prompt", lambda i: LENGTHS[i]),
        ("longest_prefix", lambda i: -CACHED[i]),
        (cube_root_of_length, lambda i: LENGTHS[i]),
        (longest_not_cached, lambda i: CACHED[i] - LENGTHS[i]),
        (nan_for_odd_lengths, lambda i: LENGTHS[i] % 2 == 1 and LENGTHS[i] > 8),
    ],
)
def test_the_rows_go_to_the_first_by_score_and_then_by_arrival(policy, key):
    queue, rows, blocks, plan = admitted(policy)
    order = sorted(range(8), key=lambda i: (key(i), ARRIVALS[i]))
    assert rows.tolist() == order[:3]
    assert np.flatnonzero(queue.status == RUNNING).tolist() == sorted(order[:3])
    # What is cached is mapped, and the rest computed.
    assert blocks.context_lens.tolist() == [CACHED[i] for i in order[:3]]
    assert plan.num_tokens.tolist() == [LENGTHS[i] - CACHED[i] for i in order[:3]]
    assert queue.num_cached.tolist() == [
        CACHED[i] if i in order[:3] else 0 for i in range(8)
    ]


def test_a_prompt_gets_no_more_tokens_in_a_step_than_the_cap():
    _, rows, _, plan = admitted("fcfs", max_prompt_chunk=7)
    left = [LENGTHS[i] - CACHED[i] for i in rows.tolist()]
    assert max(left) > 7
    assert plan.num_tokens.tolist() == [min(n, 7) for n in left]


def test_cached_blocks_that_nobody_uses_are_counted_as_taken():
    # 10 blocks, four of them cached: a prompt that maps these needs all ten.
    config = dataclasses.replace(CONFIG, num_blocks=10, watermark=0.0)
    blocks = block_manager.init_state(
        num_blocks=10, block_size=4, max_seqs=3, max_blocks_per_seq=16
    )
    queue = dataclasses.replace(
        scheduler.init_queue(8),
        status=jnp.array([WAITING, WAITING] + [scheduler.EMPTY] * 6),
        arrivals=jnp.arange(8),
        prompt_lens=jnp.array([36, 8] + [0] * 6),
        num_tokens=jnp.array([36, 8] + [0] * 6),
    )
    tables = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (8, 16))
    hits = scheduler.Hits(tables, jnp.array([16, 0] + [0] * 6))
    rows = jnp.full((3,), scheduler.NO_REQUEST)
    _, rows, blocks, plan = scheduler.schedule(queue, rows, blocks, config, hits)
    assert rows.tolist() == [0, -1, -1]  # 9 blocks for it, and 2 do not fit beside
    assert block_manager.num_free_blocks(blocks) == 6
    kept = jnp.arange(10) < 4
    _, appended = block_manager.append(blocks, plan.num_tokens, kept)
    assert appended.ok


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("lifo", "expected one of ('fcfs', 'priority', 'shortest_prompt'"),
        (3, "or a function of policies.Waiting, got 3"),
        (lambda w: jnp.float32(1), r"of shape (8,) for the example, got float32"),
        (lambda w: w.arrivals.astype(jnp.complex64), "expected a real number"),
        (lambda w: w.prompt_lens / w.num_preemptions * 0, "got NaN among"),
    ],
)
def test_a_policy_that_cannot_order_is_refused_at_once(policy, message):
    with pytest.raises(ValueError, match="policy: expected") as error:
        dataclasses.replace(CONFIG, policy=policy)
    assert message in str(error.value)


@pytest.mark.parametrize("cap", [0, -1, 2.5, True])
def test_a_cap_on_prompt_chunks_is_at_least_one_token(cap):
    with pytest.raises(ValueError, match="max_prompt_chunk: expected an integer"):
        dataclasses.replace(CONFIG, max_prompt_chunk=cap)
