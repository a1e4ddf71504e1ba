"""The request table's functions against slow Python versions, sequence by sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import scheduler
from jpaged.config import EngineConfig
from jpaged.engine import request_table, sharing
from jpaged.engine.request_table import (
    DEAD_END,
    LENGTH,
    NO_ALGORITHM,
    STOP,
    RequestTable,
    SampledTokens,
)
from tests.support import scheduler_driver

TABLE_SIZE, LENGTH_LIMIT, STOP_IDS = 10, 8, 2
CONFIG = EngineConfig(
    num_blocks=8,
    block_size=4,
    max_num_seqs=4,
    max_model_len=LENGTH_LIMIT,
    max_num_batched_tokens=8,
    max_num_requests=TABLE_SIZE,
    max_num_stop_ids=STOP_IDS,
    num_logprobs=2,
    num_mask_words=2,
)
SEEDS = range(30)
reassign_sources = jax.jit(functools.partial(sharing.reassign_sources))
inherit = jax.jit(functools.partial(request_table.inherit))
extend = jax.jit(functools.partial(request_table.extend))
COLUMNS = ("tokens", "logprobs", "ranks", "top_ids", "top_logprobs")
NUMBERS = ("finish_reasons", "first_steps", "last_steps")


def random_table(rng: np.random.Generator, num_logprobs: int = 2) -> RequestTable:
    """Sequences over a vocabulary of two, with random values after their ends."""
    config = dataclasses.replace(CONFIG, num_logprobs=num_logprobs)
    empty = request_table.init_table(config)

    def some(column: jax.Array) -> jax.Array:
        return jnp.asarray(rng.integers(0, 9, column.shape).astype(column.dtype))

    leaders = np.sort(rng.integers(0, 3, TABLE_SIZE)) * 3
    lens = rng.integers(1, LENGTH_LIMIT, TABLE_SIZE)
    prompt_lens = np.minimum(rng.integers(1, 5, TABLE_SIZE), lens)
    queue = dataclasses.replace(
        empty.queue,
        status=jnp.full((TABLE_SIZE,), scheduler.RUNNING, jnp.int32),
        leaders=jnp.asarray(leaders, jnp.int32),
        num_tokens=jnp.asarray(lens, jnp.int32),
        prompt_lens=jnp.asarray(prompt_lens, jnp.int32),
        sources=jnp.asarray(rng.integers(0, TABLE_SIZE, TABLE_SIZE), jnp.int32),
        shared_lens=jnp.asarray(rng.integers(0, 3, TABLE_SIZE), jnp.int32),
        has_ended=jnp.asarray(rng.random(TABLE_SIZE) < 0.2),
    )
    stop_ids = np.where(rng.random((TABLE_SIZE, STOP_IDS)) < 0.5, -1, 1)
    limits = lens + rng.integers(1, 3, TABLE_SIZE)
    params = dataclasses.replace(
        empty.params,
        token_limits=jnp.asarray(np.minimum(limits, LENGTH_LIMIT), jnp.int32),
        stop_ids=jnp.asarray(stop_ids, jnp.int32),
        algorithms=jnp.asarray(rng.integers(-1, 2, TABLE_SIZE), jnp.int32),
    )
    tokens = rng.integers(0, 2, (TABLE_SIZE, LENGTH_LIMIT))
    columns = {
        name: some(getattr(empty, name)) for name in (*COLUMNS, "masks", *NUMBERS)
    }
    columns["tokens"] = jnp.asarray(tokens, jnp.int32)
    return dataclasses.replace(empty, queue=queue, params=params, **columns)


def as_lists(table: RequestTable) -> dict[str, np.ndarray]:
    """All columns that may change, by name, as writable arrays."""
    found = {
        name: np.array(getattr(table, name)) for name in (*COLUMNS, "masks", *NUMBERS)
    }
    for field in dataclasses.fields(table.queue):
        found[f"queue.{field.name}"] = np.array(getattr(table.queue, field.name))
    return found


def assert_equal(table: RequestTable, expected: dict[str, np.ndarray]) -> None:
    got = as_lists(table)
    for name, column in expected.items():
        np.testing.assert_array_equal(got[name], column, err_msg=name)


def some_indices(rng: np.random.Generator, size: int) -> np.ndarray:
    """Sequence indices in random order, with padding between them."""
    seq_indices = rng.permutation(TABLE_SIZE)[:size]
    return np.where(rng.random(size) < 0.3, TABLE_SIZE, seq_indices).astype(np.int32)


def table_of(histories: list[list[int]], leaders: list[int], **columns) -> RequestTable:
    """A table of these sequences; all others have no source."""
    table = request_table.init_table(CONFIG)
    tokens = np.full((TABLE_SIZE, LENGTH_LIMIT), 7, np.int32)
    for seq_index, history in enumerate(histories):
        tokens[seq_index, : len(history)] = history
    lens = np.ones(TABLE_SIZE, np.int32)
    lens[: len(histories)] = [len(history) for history in histories]
    columns = dict(leaders=leaders, **columns)
    changed = {name: np.array(getattr(table.queue, name)) for name in columns}
    for name, values in columns.items():
        changed[name][: len(values)] = values
    queue = dataclasses.replace(table.queue, num_tokens=lens, **changed)
    return dataclasses.replace(table, queue=queue, tokens=tokens)


def reassigned(table: RequestTable, *lost: int) -> list[tuple[int, int]]:
    """Source and shared tokens of the sequences that have lost their blocks."""
    seq_indices = np.full(4, TABLE_SIZE, np.int32)
    seq_indices[: len(lost)] = lost
    queue = reassign_sources(table, seq_indices).queue
    pairs = zip(queue.sources.tolist(), queue.shared_lens.tolist(), strict=True)
    pairs = list(pairs)
    return [pairs[seq_index] for seq_index in lost]


# ---- reassign_sources


def test_each_sequence_maps_the_lower_one_with_the_longest_common_prefix():
    histories = [[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 8], [1, 9, 5, 8]]
    table = table_of(histories, [0, 0, 0, 0])
    assert reassigned(table, 3, 0, 2, 1) == [(0, 1), (0, 0), (1, 3), (0, 2)]


def test_at_least_one_token_is_left_to_compute():
    histories = [[1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5]]
    table = table_of(histories, [0, 0, 0])
    assert reassigned(table, 0, 1, 2) == [(0, 0), (0, 2), (0, 2)]


def test_the_first_keeps_its_source_and_others_without_a_common_prefix_lose_theirs():
    table = table_of(
        [[1, 2, 3], [1, 2, 3], [4, 2, 3]],
        [0, 0, 0],
        sources=[9, 0, 1],
        shared_lens=[2, 2, 2],
    )
    assert reassigned(table, 0, 1, 2) == [(9, 2), (0, 2), (1, 0)]


def test_a_sequence_that_has_ended_is_no_source():
    histories = [[1, 2, 3], [1, 2, 3], [1, 2, 3]]
    table = table_of(
        histories,
        [0, 0, 0],
        sources=[0, 0, 0],
        shared_lens=[0, 2, 2],
        has_ended=[True, False, False],
    )
    assert reassigned(table, 0, 1, 2) == [(0, 0), (0, 0), (1, 2)]


def test_sequences_of_two_requests_share_nothing():
    table = table_of([[1, 2, 3]] * 4, [0, 0, 2, 2], sources=[0, 0, 2, 2])
    assert reassigned(table, 0, 1, 2, 3) == [(0, 0), (0, 2), (2, 0), (2, 2)]


def test_a_sequence_that_keeps_its_blocks_is_no_source():
    table = table_of([[1, 2, 3]] * 3, [0, 0, 0], sources=[0, 0, 0], shared_lens=[0, 1])
    assert reassigned(table, 1, 2) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("seed", SEEDS)
def test_new_sources_equal_a_comparison_token_by_token(seed):
    rng = np.random.default_rng(seed)
    table, seq_indices = random_table(rng), some_indices(rng, 8)
    expected = as_lists(table)
    queue = {name[6:]: column for name, column in expected.items() if "queue." in name}
    lens, tokens = queue["num_tokens"], expected["tokens"]
    histories = [tokens[p, : lens[p]].tolist() for p in range(TABLE_SIZE)]
    lost = {int(seq_index) for seq_index in seq_indices if seq_index < TABLE_SIZE}
    for seq_index, pair in scheduler_driver.new_sources(lost, histories, queue).items():
        queue["sources"][seq_index], queue["shared_lens"][seq_index] = pair
    assert_equal(reassign_sources(table, seq_indices), expected)


# ---- inherit


def test_two_sequences_can_swap_their_histories():
    table = table_of([[1, 2, 3], [4, 5]], [0, 0], has_ended=[True, False])
    seq_indices, parents = np.array([1, 0, TABLE_SIZE]), np.array([0, 1, 0])
    table = inherit(table, seq_indices.astype(np.int32), parents.astype(np.int32))
    assert table.tokens[0, :2].tolist() == [4, 5]
    assert table.tokens[1, :3].tolist() == [1, 2, 3]
    assert table.queue.num_tokens[:2].tolist() == [2, 3]
    assert table.queue.has_ended[:2].tolist() == [False, True]


@pytest.mark.parametrize("seed", SEEDS)
def test_inheriting_copies_the_history_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    table, seq_indices = random_table(rng), some_indices(rng, 6)
    parents = rng.integers(0, TABLE_SIZE, 6).astype(np.int32)
    before, expected = as_lists(table), as_lists(table)
    moved = (*COLUMNS, *NUMBERS, "queue.num_tokens", "queue.has_ended")
    for seq_index, parent in zip(seq_indices, parents, strict=True):
        for name in moved:
            if seq_index < TABLE_SIZE:
                expected[name][seq_index] = before[name][parent]
    assert_equal(inherit(table, seq_indices, parents), expected)


# ---- extend


def slow_extend(
    table: RequestTable, new: SampledTokens, step: int
) -> tuple[dict[str, np.ndarray], list[bool]]:
    """Append to one sequence after the other, or end it without a token."""
    found, params, ended = as_lists(table), table.params, []
    for number, seq_index in enumerate(np.asarray(new.seq_indices).tolist()):
        if seq_index == TABLE_SIZE:
            ended.append(False)
            continue
        token, length = (
            int(new.tokens[number]),
            int(found["queue.num_tokens"][seq_index]),
        )
        reason = None
        if bool(new.is_dead_end[number]):
            reason = DEAD_END
        else:
            given = zip(
                (*COLUMNS, "masks"),
                (
                    new.tokens,
                    new.logprobs,
                    new.ranks,
                    new.top_ids,
                    new.top_logprobs,
                    new.masks,
                ),
                strict=True,
            )
            for name, values in given:
                if found[name].shape[1] and values[number].size:
                    found[name][seq_index, length] = values[number]
            found["queue.num_tokens"][seq_index] += 1
            found["last_steps"][seq_index] = step
            if length == found["queue.prompt_lens"][seq_index]:
                found["first_steps"][seq_index] = step
            if token in params.stop_ids[seq_index].tolist():
                reason = STOP
            elif length + 1 >= int(params.token_limits[seq_index]):
                reason = LENGTH
        ended.append(reason is not None)
        if reason is not None:
            found["finish_reasons"][seq_index] = reason
            found["queue.has_ended"][seq_index] = True
            # Sequences of an algorithm finish together, which `extend` does not decide.
            if int(params.algorithms[seq_index]) == NO_ALGORITHM:
                found["queue.status"][seq_index] = scheduler.FINISHED
    return found, ended


@pytest.mark.parametrize("seed", SEEDS)
def test_extending_equals_appending_one_sequence_at_a_time(seed):
    rng = np.random.default_rng(seed)
    kept = 2 * (seed % 2)
    table, seq_indices = random_table(rng, kept), some_indices(rng, 6)
    new = SampledTokens(
        seq_indices=jnp.asarray(seq_indices),
        tokens=jnp.asarray(rng.integers(0, 3, 6), jnp.int32),
        logprobs=jnp.asarray(-rng.random(6), jnp.float32),
        ranks=jnp.asarray(rng.integers(1, 9, 6), jnp.int32),
        top_ids=jnp.asarray(rng.integers(0, 9, (6, kept)), jnp.int32),
        top_logprobs=jnp.asarray(-rng.random((6, kept)), jnp.float32),
        masks=jnp.asarray(rng.integers(0, 2**32, (6, 2)), jnp.uint32),
        is_dead_end=jnp.asarray(rng.random(6) < 0.2),
    )
    expected, ended = slow_extend(table, new, step=5)
    table, got = extend(table, new, jnp.int32(5))
    assert got.tolist() == ended
    assert_equal(table, expected)


def test_at_the_limit_a_sampled_sequence_finishes_and_one_of_an_algorithm_only_ends():
    table = table_of([[1], [1]], [0, 1])
    limits = table.params.token_limits.at[:2].set(2)
    algorithms = table.params.algorithms.at[:2].set(jnp.array([NO_ALGORITHM, 0]))
    params = dataclasses.replace(
        table.params, token_limits=limits, algorithms=algorithms
    )
    status = table.queue.status.at[:2].set(scheduler.RUNNING)
    queue = dataclasses.replace(table.queue, status=status)
    table = dataclasses.replace(table, params=params, queue=queue)
    new = SampledTokens.zeros(jnp.arange(2, dtype=jnp.int32), CONFIG.num_logprobs)
    table, ended = extend(table, new, jnp.int32(0))
    assert ended.tolist() == [True, True]
    assert table.queue.has_ended[:2].tolist() == [True, True]
    assert table.queue.status[:2].tolist() == [scheduler.FINISHED, scheduler.RUNNING]
    assert table.finish_reasons[:2].tolist() == [LENGTH, LENGTH]
