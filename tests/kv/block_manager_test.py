"""Block manager: slow model, enumeration, hand-computed steps and planted faults."""

import dataclasses
import itertools
import json
import subprocess
import sys
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.kv import block_manager
from jpaged.kv.block_manager import NO_BLOCK, BlockState
from jpaged.kv.free_blocks import lowest_free_blocks
from tests.support import block_manager_model
from tests.support.paths import ROOT

# Small, so that the pool and the tables both become full; 3 does not divide 32.
SIZES = dict(num_blocks=9, block_size=3, max_seqs=4, max_blocks_per_seq=4)
MAX_SEQS = SIZES["max_seqs"]
OPERATIONS = block_manager_model.jitted_operations()


def i32(*values: int) -> jax.Array:
    return jnp.asarray(np.array(values, np.int32))


def arrays(state: BlockState) -> list[list[int]]:
    return [leaf.tolist() for leaf in jax.tree.leaves(state)]


# Comparison with the slow model.


class BlockManagerMachine(stateful.RuleBasedStateMachine):
    """After any sequence of operations, arrays, model and memory are equal."""

    per_row = st.lists(st.integers(0, 7), min_size=MAX_SEQS, max_size=MAX_SEQS)

    def __init__(self) -> None:
        super().__init__()
        self.checked = block_manager_model.Checked(OPERATIONS, **SIZES)

    @stateful.rule(num_tokens=per_row)
    def append(self, num_tokens: list[int]) -> None:
        self.checked.append(num_tokens)

    @stateful.rule()
    def decode(self) -> None:
        histories = self.checked.model.histories
        self.checked.append([int(len(history) > 0) for history in histories])

    @stateful.rule(row=st.integers(0, MAX_SEQS - 1), count=st.integers(-2, 13))
    def append_to_one(self, row: int, count: int) -> None:
        self.checked.append([count if r == row else 0 for r in range(MAX_SEQS)])

    @stateful.rule(
        parents=st.lists(st.integers(-2, 5), min_size=MAX_SEQS, max_size=MAX_SEQS)
    )
    def fork(self, parents: list[int]) -> None:
        self.checked.fork(parents)

    @stateful.rule(row=st.integers(0, MAX_SEQS - 1))
    def all_rows_continue_one(self, row: int) -> None:
        self.checked.fork([row] * MAX_SEQS)

    @stateful.rule(
        rows=st.lists(st.booleans(), min_size=MAX_SEQS, max_size=MAX_SEQS),
    )
    def free(self, rows: list[bool]) -> None:
        self.checked.free(rows)

    @stateful.rule(
        lens=st.lists(st.integers(-1, 12), min_size=MAX_SEQS, max_size=MAX_SEQS)
    )
    def truncate(self, lens: list[int]) -> None:
        self.checked.truncate(lens)

    @stateful.rule(order=per_row)
    def check_exclusive_blocks(self, order: list[int]) -> None:
        self.checked.check_exclusive_blocks(order)


BlockManagerMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
test_any_operations_equal_the_slow_model = BlockManagerMachine.TestCase


def test_long_walk_with_refusals_and_copies_equals_the_model():
    checked = block_manager_model.Checked(OPERATIONS, **SIZES)
    block_manager_model.random_walk(checked, np.random.default_rng(0), 600)
    assert checked.num_refused > 20
    assert checked.num_copies > 20


def test_walk_over_several_bit_words_with_the_larger_search_equals_the_model(
    monkeypatch,
):
    # With 0 prompt blocks, already a few tokens use the search for many blocks.
    monkeypatch.setattr(block_manager, "_PROMPT_BLOCKS", 0)
    operations = block_manager_model.jitted_operations()
    sizes = dict(num_blocks=70, block_size=2, max_seqs=6, max_blocks_per_seq=20)
    checked = block_manager_model.Checked(operations, **sizes)
    rng = np.random.default_rng(1)
    for _ in range(25):
        checked.append(rng.integers(0, 16, 6).tolist())
        block_manager_model.random_walk(checked, rng, 3)
    assert checked.num_refused > 5
    assert checked.num_copies > 5


def test_every_sequence_of_operations_on_a_tiny_pool_equals_the_model():
    sizes = dict(num_blocks=3, block_size=2, max_seqs=2, max_blocks_per_seq=2)
    rows = range(-1, 2)
    calls: list[tuple[str, tuple[int, ...]]] = [
        *(("append", counts) for counts in [(1, 0), (0, 1), (1, 1), (3, 0), (0, 2)]),
        *(("fork", parents) for parents in itertools.product(rows, rows)),
        *(("truncate", lengths) for lengths in [(1, 4), (4, 1), (2, 1), (0, 2)]),
    ]
    batched = {
        name: jax.jit(jax.vmap(getattr(block_manager, name), (0, None)))
        for name in ("append", "blocks_needed", "fork", "truncate")
    }
    start = block_manager_model.Checked(OPERATIONS, **sizes)
    seen = {json.dumps(arrays(start.state))}
    level, depth = [start], 0
    while level:  # until no call leads to a new state, so sequences of any length
        depth += 1
        following = []
        for name, arguments in calls:
            results = in_one_batch(batched[name], level, arguments)
            if name == "append":
                needed = in_one_batch(batched["blocks_needed"], level, arguments)
            for index, before in enumerate(level):
                after = before.branch()
                if name == "append":
                    after.check_append(list(arguments), *results[index], needed[index])
                else:
                    getattr(after.model, name)(list(arguments))
                    after.state = results[index]
                    after.check()
                # Later results depend only on the arrays, so sequences that lead to
                # the same arrays are continued once.
                key = json.dumps(arrays(after.state))
                if key not in seen:
                    seen.add(key)
                    following.append(after)
        level = following
    assert len(seen) > 150
    assert depth > 5


def in_one_batch(
    function: Callable, level: list[block_manager_model.Checked], arguments: tuple
) -> list:
    """The function's result for each state, computed in batches of one size."""
    size, results = 64, []
    for first in range(0, len(level), size):
        states = [checked.state for checked in level[first : first + size]]
        padded = states + states[-1:] * (size - len(states))
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
        result = jax.device_get(function(batch, i32(*arguments)))
        for index in range(len(states)):
            results.append(jax.tree.map(lambda x, i=index: x[i], result))
    return results


# Hand-computed steps.


def test_copy_on_write_step_by_step():
    state = block_manager.init_state(
        num_blocks=6, block_size=2, max_seqs=3, max_blocks_per_seq=3
    )
    # Row 0 gets 3 tokens: blocks 0 (full) and 1 (half full).
    state, appended = OPERATIONS.append(state, i32(3, 0, 0))
    assert appended.copy_src.tolist() == [NO_BLOCK] * 3
    # All three rows share them.
    state = OPERATIONS.fork(state, i32(0, 0, 0))
    assert state.ref_counts.tolist() == [3, 3, 0, 0, 0, 0]
    # Row 1 writes alone. Two other rows use block 1, so row 1 gets block 2, a copy.
    state, appended = OPERATIONS.append(state, i32(0, 1, 0))
    assert appended.copy_src.tolist() == [NO_BLOCK, 1, NO_BLOCK]
    assert appended.copy_dst.tolist() == [NO_BLOCK, 2, NO_BLOCK]
    assert state.ref_counts.tolist() == [3, 2, 1, 0, 0, 0]
    # Rows 0 and 2 write together: row 0 gets block 3, a copy. Row 2 is then the last
    # owner and writes in place. Block 2 of row 1 is full, so row 1 gets block 4 too.
    assert OPERATIONS.blocks_needed(state, i32(1, 1, 1)).tolist() == [1, 1, 0]
    state, appended = OPERATIONS.append(state, i32(1, 1, 1))
    assert appended.copy_src.tolist() == [1, NO_BLOCK, NO_BLOCK]
    assert appended.copy_dst.tolist() == [3, NO_BLOCK, NO_BLOCK]
    assert state.block_tables.tolist() == [[0, 3, -1], [0, 2, 4], [0, 1, -1]]
    assert state.ref_counts.tolist() == [3, 1, 1, 1, 1, 0]
    # A copy and a new block in one call: row 0 is cut inside the shared block 0 and
    # then appends 3 tokens.
    state = OPERATIONS.truncate(state, i32(1, 5, 4))
    assert state.ref_counts.tolist() == [3, 1, 1, 0, 1, 0]
    state, appended = OPERATIONS.append(state, i32(3, 0, 0))
    assert appended.copy_src.tolist() == [0, NO_BLOCK, NO_BLOCK]
    assert appended.copy_dst.tolist() == [3, NO_BLOCK, NO_BLOCK]
    assert state.block_tables.tolist() == [[3, 5, -1], [0, 2, 4], [0, 1, -1]]
    assert state.ref_counts.tolist() == [2, 1, 1, 1, 1, 1]


def test_a_full_shared_block_is_not_copied():
    checked = block_manager_model.Checked(OPERATIONS, **SIZES)
    checked.append([3, 0, 0, 0])
    checked.fork([0, 0, 0, 0])
    checked.append([1, 1, 1, 1])
    assert checked.num_copies == 0
    assert checked.state.block_tables[:, 0].tolist() == [0, 0, 0, 0]


def test_one_append_can_fill_a_whole_table_from_non_contiguous_blocks():
    state = block_manager.init_state(
        num_blocks=100, block_size=4, max_seqs=3, max_blocks_per_seq=90
    )
    state, _ = OPERATIONS.append(state, i32(1, 1, 1))
    state = OPERATIONS.free(state, jnp.array([False, True, False]))
    state, appended = OPERATIONS.append(state, i32(0, 4 * 90, 0))
    assert appended.ok
    assert state.block_tables[1].tolist() == [1, *range(3, 92)]
    assert block_manager.violations(state) == []


@pytest.mark.parametrize(
    ("num_tokens", "reason"),
    [
        ((13, 0, 0, 0), "a table has only 12 slots"),
        ((2**31 - 1, 0, 0, 0), "the length would overflow int32"),
        ((2**31 - 1,) * 4, "the sum of lengths would overflow int32"),
        ((9, 9, 7, 3), "10 blocks are needed and the pool has 9"),
        ((-1, 0, 0, 0), "the number is negative"),
    ],
)
def test_a_refused_append_changes_nothing(num_tokens: tuple[int, ...], reason: str):
    state = block_manager.init_state(**SIZES)
    after, appended = OPERATIONS.append(state, i32(*num_tokens))
    assert not appended.ok, reason
    assert arrays(after) == arrays(state)
    assert appended.copy_src.tolist() == appended.copy_dst.tolist() == [NO_BLOCK] * 4


def test_append_can_use_the_last_free_block_and_is_then_refused():
    state = block_manager.init_state(**SIZES)
    state, appended = OPERATIONS.append(state, i32(9, 9, 6, 3))
    assert appended.ok
    assert OPERATIONS.num_free_blocks(state) == 0
    same, appended = OPERATIONS.append(state, i32(1, 0, 0, 0))
    assert not appended.ok
    assert arrays(same) == arrays(state)
    _, appended = OPERATIONS.append(state, i32(0, 0, 0, 0))
    assert appended.ok


def test_fork_from_an_invalid_parent_empties_the_row_and_truncate_never_grows():
    checked = block_manager_model.Checked(OPERATIONS, **SIZES)
    checked.append([2, 2, 2, 2])
    checked.truncate([3, 2, -1, 1])
    assert checked.state.context_lens.tolist() == [2, 2, 2, 1]
    checked.fork([4, -5, 2, 2**31 - 1])
    assert checked.state.context_lens.tolist() == [0, 0, 2, 0]


def test_slots_of_invalid_rows_and_positions_are_negative():
    state = block_manager.init_state(**SIZES)
    state, _ = OPERATIONS.append(state, i32(4, 12, 0, 0))
    rows = i32(0, 0, 0, 1, 1, 1, 2, 4, -1, 2**31 - 1)
    positions = i32(3, 5, 6, 11, 12, -1, 0, 0, 0, 0)
    slots = OPERATIONS.slots(state, rows, positions)
    # Row 0 uses blocks 0 and 1, row 1 uses blocks 2 to 5, with 3 slots per block.
    assert slots.tolist() == [3, 5, -1, 17, -1, -1, -1, -1, -1, -1]


# Inside programs.


def test_vmap_equals_a_loop_over_the_states():
    rng = np.random.default_rng(2)
    states = []
    for seed in range(6):
        checked = block_manager_model.Checked(OPERATIONS, **SIZES)
        block_manager_model.random_walk(checked, np.random.default_rng(seed), 8)
        states.append(checked.state)
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    lens = jnp.asarray(rng.integers(-1, 5, (len(states), MAX_SEQS)).astype(np.int32))
    names = ("append", "fork", "truncate", "free", "blocks_needed", "exclusive_blocks")
    for name in names:
        arguments = lens > 2 if name == "free" else lens
        together = jax.jit(jax.vmap(getattr(block_manager, name)))(batch, arguments)
        function = getattr(OPERATIONS, name)
        alone = [function(s, a) for s, a in zip(states, arguments, strict=True)]
        alone = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
        jax.tree.map(np.testing.assert_array_equal, together, alone)


def test_a_donated_loop_of_steps_equals_single_calls():
    def step(state: BlockState) -> BlockState:
        num_tokens = (state.context_lens > 0).astype(jnp.int32)
        state, appended = block_manager.append(state, num_tokens)
        parents = jnp.where(appended.ok, i32(1, 0, 1, 3), i32(0, 1, NO_BLOCK, 3))
        return block_manager.fork(state, parents)

    state, _ = OPERATIONS.append(block_manager.init_state(**SIZES), i32(1, 2, 0, 4))
    expected, single = state, jax.jit(step)
    for _ in range(12):
        expected = single(expected)
    loop = jax.jit(
        lambda state: lax.fori_loop(0, 12, lambda _, s: step(s), state),
        donate_argnums=0,
    )
    after = loop(state)
    assert state.ref_counts.is_deleted()
    assert arrays(after) == arrays(expected)
    assert block_manager.violations(after) == []


def test_each_operation_compiles_once_for_all_values():
    operations = block_manager_model.jitted_operations()
    checked = block_manager_model.Checked(operations, **SIZES)
    block_manager_model.random_walk(checked, np.random.default_rng(3), 60)
    counts = {name: f._cache_size() for name, f in vars(operations).items()}
    assert counts == dict.fromkeys(counts, 1)


def test_operations_on_device_arrays_transfer_nothing_to_the_host():
    state = block_manager.init_state(**SIZES)
    one, parents = i32(1, 1, 1, 1), i32(0, 0, 0, 0)
    OPERATIONS.fork(OPERATIONS.append(state, one)[0], parents)
    with jax.transfer_guard("disallow"):
        OPERATIONS.fork(OPERATIONS.append(state, one)[0], parents)


# Error messages.


def test_violations_describe_each_inconsistency():
    state, _ = OPERATIONS.append(block_manager.init_state(**SIZES), i32(4, 3, 0, 0))
    assert block_manager.violations(state) == []

    def broken(**changes: jax.Array) -> str:
        (sentence,) = block_manager.violations(dataclasses.replace(state, **changes))
        return sentence

    refs, tables, lens = state.ref_counts, state.block_tables, state.context_lens
    assert broken(ref_counts=refs.at[0].set(2)) == (
        "block 0: 1 table entries point at it, its reference count is 2"
    )
    assert "reference count is -1" in broken(ref_counts=refs.at[8].set(-1))
    assert broken(context_lens=lens.at[2].set(-1)) == (
        "row 2: length -1 does not fit the block table"
    )
    assert "after its 0 tokens" in broken(block_tables=tables.at[3, 1].set(5))
    assert "contains invalid block numbers" in broken(context_lens=lens.at[1].set(4))
    assert broken(
        block_tables=tables.at[0, 1].set(0), ref_counts=refs.at[:2].set(i32(2, 0))
    ) == ("row 0: blocks [0] occur twice")
    out_of_range = broken(
        block_tables=tables.at[0, 1].set(9), ref_counts=refs.at[1].set(0)
    )
    assert out_of_range == "row 0: [0, 9] contains invalid block numbers"


def test_errors_name_the_argument_with_expected_and_given_values():
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        block_manager.init_state(**(SIZES | dict(block_size=0)))
    with pytest.raises(ValueError, match=r"num_blocks \* block_size: .*2\*\*31"):
        block_manager.init_state(**(SIZES | dict(num_blocks=2**29, block_size=4)))
    state = block_manager.init_state(**SIZES)
    with pytest.raises(ValueError, match=r"num_tokens: .*\(4,\).*got int32.*\(3,\)"):
        block_manager.append(state, i32(1, 2, 3))
    with pytest.raises(ValueError, match=r"parents: expected integer.*got float32"):
        block_manager.fork(state, jnp.zeros((4,)))
    with pytest.raises(ValueError, match=r"rows: expected bool.*got int32"):
        block_manager.free(state, i32(0, 0, 0, 1))


# The tests must find each planted fault.


def fork_that_loses_a_reference(state: BlockState, parents: jax.Array) -> BlockState:
    after = block_manager.fork(state, parents)
    is_shared = after.ref_counts > 1
    lost = is_shared & (jnp.cumsum(is_shared) == 1)
    refs = after.ref_counts - lost.astype(jnp.int32)
    return dataclasses.replace(after, ref_counts=refs)


def append_that_skips_copies(state: BlockState, num_tokens: jax.Array):
    unshared = dataclasses.replace(state, ref_counts=jnp.minimum(state.ref_counts, 1))
    after, appended = block_manager.append(unshared, num_tokens)
    refs = after.ref_counts + state.ref_counts - unshared.ref_counts
    return dataclasses.replace(after, ref_counts=refs), appended


def append_that_does_not_announce_copies(state: BlockState, num_tokens: jax.Array):
    after, appended = block_manager.append(state, num_tokens)
    none = jnp.full_like(appended.copy_src, NO_BLOCK)
    return after, dataclasses.replace(appended, copy_src=none, copy_dst=none)


def append_that_swaps_two_destinations(state: BlockState, num_tokens: jax.Array):
    after, appended = block_manager.append(state, num_tokens)
    is_copy = appended.copy_dst != NO_BLOCK
    dst = jnp.where(is_copy, jnp.max(appended.copy_dst), NO_BLOCK)
    return after, dataclasses.replace(appended, copy_dst=dst)


def append_that_keeps_lengths_when_refused(state: BlockState, num_tokens: jax.Array):
    after, appended = block_manager.append(state, num_tokens)
    lens = state.context_lens + num_tokens
    return dataclasses.replace(after, context_lens=lens), appended


def truncate_that_keeps_references(state: BlockState, context_lens: jax.Array):
    after = block_manager.truncate(state, context_lens)
    return dataclasses.replace(after, ref_counts=state.ref_counts)


def free_that_ignores_the_last_row(state: BlockState, rows: jax.Array) -> BlockState:
    return block_manager.free(state, rows.at[-1].set(False))


def exclusive_blocks_that_count_shared_ones_twice(state: BlockState, order: jax.Array):
    del order
    return cdiv(state.context_lens, state.block_size)


def slots_one_too_far(state: BlockState, rows: jax.Array, positions: jax.Array):
    return block_manager.slots(state, rows, positions + 1)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("fork", fork_that_loses_a_reference),
        ("append", append_that_skips_copies),
        ("append", append_that_does_not_announce_copies),
        ("append", append_that_swaps_two_destinations),
        ("append", append_that_keeps_lengths_when_refused),
        ("truncate", truncate_that_keeps_references),
        ("free", free_that_ignores_the_last_row),
        ("exclusive_blocks", exclusive_blocks_that_count_shared_ones_twice),
        ("slots", slots_one_too_far),
    ],
)
def test_a_planted_fault_is_found(name: str, fault: Callable):
    # The other operations are compiled already.
    operations = types.SimpleNamespace(**vars(OPERATIONS))
    setattr(operations, name, jax.jit(fault))
    checked = block_manager_model.Checked(operations, **SIZES)
    with pytest.raises(AssertionError):
        block_manager_model.random_walk(checked, np.random.default_rng(0), 100)


def free_blocks_with_one_wrong(free_bits, count):
    return lowest_free_blocks(free_bits, count).at[2].add(1)


def demand_without_copies(state, num_tokens):
    needed = ORIGINAL_DEMAND(state, num_tokens)
    return needed._replace(copies=jnp.zeros_like(needed.copies))


ORIGINAL_DEMAND = block_manager.demand


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("lowest_free_blocks", free_blocks_with_one_wrong),
        ("demand", demand_without_copies),
    ],
)
def test_a_fault_planted_inside_append_is_found(monkeypatch, name, fault):
    monkeypatch.setattr(block_manager, name, fault)
    operations = block_manager_model.jitted_operations()
    checked = block_manager_model.Checked(operations, **SIZES)
    with pytest.raises(AssertionError):
        block_manager_model.random_walk(checked, np.random.default_rng(0), 100)


def test_the_benchmark_prints_one_json_object_last():
    command = [sys.executable, "-m", "experiments.bench_block_manager"]
    command += ["--rows=8", "--num_blocks=64,100", "--max_blocks_per_seq=16"]
    command += ["--operations=fork", "--iterations=2", "--repeats=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"device", "versions", "rows"} <= set(result)
    assert {row["num_blocks"] for row in result["rows"]} == {64, 100}
