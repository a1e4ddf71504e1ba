"""The baselines match slow models in plain Python, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.simulator.systems import buddy, orca
from jpaged.simulator.systems.base import SimulatedRequest
from jpaged.simulator.systems.buddy import NO_CHUNK, BuddyState
from jpaged.simulator.systems.contiguous import Contiguous
from jpaged.simulator.systems.fastertransformer import FasterTransformer
from jpaged.simulator.systems.no_evict import NoEvict
from jpaged.simulator.systems.orca import Orca
from jpaged.simulator.workloads.workload import Workload
from tests.support.baselines_model import (
    Buddy,
    SlowContiguous,
    SlowFasterTransformer,
    SlowNoEvict,
    SlowOrca,
    SlowRequest,
)

SLOTS, MAX_LEN, CHUNK, SEQS, TOKENS, WIDTH = 248, 64, 4, 9, 70, 3


# ---- the buddy allocator


@functools.cache
def compiled():
    functions = (buddy.allocate_chunk, buddy.free_chunk, buddy.num_available)
    return tuple(map(jax.jit, functions))


def as_set(state: BuddyState) -> set[tuple[int, int]]:
    orders = np.asarray(state.orders)
    found = {(unit, 2 ** int(order)) for unit, order in enumerate(orders) if order >= 0}
    counts = [
        sum(size == 2**k for _, size in found) for k in range(state.num_free.size)
    ]
    assert state.num_free.tolist() == counts
    return found


def walk(moves, num_units=45, num_orders=4) -> int:
    """Allocate and free in both allocators; return the number of failed allocations."""
    allocate, free, num_available = compiled()
    state, slow = buddy.init_buddy(num_units, num_orders), Buddy(num_units, 1, 8)
    allocated, num_failed = [], 0
    for is_free, number in moves:
        if is_free and allocated:
            begin, order = allocated.pop(number % len(allocated))
            state = free(state, jnp.int32(begin), jnp.int32(order))
            slow.release((begin, 2**order))
        else:
            order = number % num_orders
            expected = slow.allocate(2**order)
            available = num_available(state, jnp.int32(order))
            state, begin = allocate(state, jnp.int32(order))
            assert (int(available) > 0) == (expected is not None)
            if expected is None:
                assert int(begin) == NO_CHUNK
                num_failed += 1
            else:
                assert (int(begin), 2**order) == expected
                allocated.append((int(begin), order))
        assert as_set(state) == slow.free
    for begin, order in allocated:
        state = free(state, jnp.int32(begin), jnp.int32(order))
    assert as_set(state) == as_set(buddy.init_buddy(num_units, num_orders))
    return num_failed


@settings(max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 99)), max_size=60))
def test_the_buddy_allocator_matches_sets_of_chunks(moves):
    walk(moves)


def test_the_buddy_allocator_runs_out_of_memory_and_recovers():
    rng = np.random.default_rng(0)
    moves = [(bool(rng.random() < 0.4), int(n)) for n in rng.integers(0, 99, 200)]
    assert walk(moves) > 10


def test_num_available_is_the_number_of_chunks_that_can_be_allocated():
    state = buddy.init_buddy(45, 4)
    allocate, free, num_available = compiled()
    # Allocate all units and free most of them, so that chunks of all sizes are free.
    begins = []
    for _ in range(45):
        state, begin = allocate(state, jnp.int32(0))
        begins.append(int(begin))
    assert sorted(begins) == list(range(45))
    for begin in begins:
        if begin % 11:
            state = free(state, jnp.int32(begin), jnp.int32(0))
    for order in range(4):
        count, rest = 0, state
        while True:
            rest, begin = allocate(rest, jnp.int32(order))
            if int(begin) == NO_CHUNK:
                break
            count += 1
        assert int(num_available(state, jnp.int32(order))) == count


def test_adjacent_chunks_that_are_not_buddies_do_not_merge():
    # Units 1 and 2 of 4 are free: neighbours, but halves of different pairs.
    state = buddy.init_buddy(4, 3)
    for _ in range(4):
        state, _ = buddy.allocate_chunk(state, jnp.int32(0))
    for begin in (1, 2):
        state = buddy.free_chunk(state, jnp.int32(begin), jnp.int32(0))
    assert as_set(state) == {(1, 1), (2, 1)}
    state = buddy.free_chunk(state, jnp.int32(0), jnp.int32(0))
    assert as_set(state) == {(0, 2), (2, 1)}


def test_buddy_allocators_work_under_vmap():
    state = jax.tree.map(lambda x: jnp.stack([x, x]), buddy.init_buddy(12, 3))
    state, begin = jax.vmap(buddy.allocate_chunk)(state, jnp.array([0, 2]))
    assert begin.tolist() == [0, 0]
    one, two = (jax.tree.map(lambda x, n=n: x[n], state) for n in range(2))
    assert as_set(one) == {(1, 1), (2, 2), (4, 4), (8, 4)}
    assert as_set(two) == {(4, 4), (8, 4)}


@pytest.mark.parametrize("sizes", [(0, 1), (4, 0), (4, 32)])
def test_an_allocator_without_units_or_orders_raises(sizes):
    with pytest.raises(ValueError, match="num_units, num_orders: expected"):
        buddy.init_buddy(*sizes)


# ---- the systems


@functools.cache
def jitted(system):
    return jax.jit(system.submit), jax.jit(system.begin_step), jax.jit(system.end_step)


def request(index, prompt, output, samples=1, beams=0) -> SimulatedRequest:
    numbers = (index, prompt, output, samples, beams)
    return SimulatedRequest(*map(jnp.int32, numbers), content=jnp.zeros(0, jnp.int32))


def drive(system, slow, arrivals, max_steps=4000):
    """Compare both, step by step, with requests (step, prompt, output, sequences)."""
    submit, begin, end = jitted(system)
    state = system.init()
    todo = list(enumerate(arrivals))
    step = num_stuck = num_together = 0
    finished = []
    while todo or bool(system.has_work(state)):
        while todo and todo[0][1][0] <= step:
            number, (_, prompt, output, num_seqs) = todo[0]
            state, ok = submit(state, request(number, prompt, output, num_seqs))
            if not ok:
                break
            slow.waiting.append(SlowRequest(number, prompt, output, num_seqs))
            todo.pop(0)
        step += 1
        assert step < max_steps
        has_work = bool(system.has_work(state))
        assert has_work == bool(slow.waiting or slow.running)
        if not has_work:
            continue
        scheduled, load, usage = begin(state)
        state, progress = end(scheduled)
        rows, copied, expected, first, ended = slow.step()
        taking = np.asarray(load.query_lens) > 0
        found = zip(
            np.asarray(load.query_lens)[taking].tolist(),
            np.asarray(load.context_lens)[taking].tolist(),
            strict=True,
        )
        assert sorted(found) == rows
        assert not np.asarray(load.context_lens)[~taking].any()
        assert int(load.num_logits) == len(rows)
        assert int(load.num_copied_tokens) == copied
        usage = {name: int(value) for name, value in usage._asdict().items()}
        assert {name: usage[name] for name in expected} == expected
        assert sum(expected.values()) == system.num_slots
        numbers = np.asarray(progress.requests)
        assert sorted(numbers[np.asarray(progress.has_first)].tolist()) == first
        assert sorted(numbers[np.asarray(progress.has_ended)].tolist()) == ended
        assert usage["num_waiting"] == len(slow.waiting)
        finished += ended
        num_stuck += bool(slow.waiting)
        num_together += usage["num_requests"] > 1
    assert sorted(finished) == list(range(len(arrivals)))
    assert (jax.tree.leaves(state.memory)[0] == system.init().memory.orders).all()
    return num_stuck, num_together


def pair(name):
    """Return a small system and its slow model."""
    if name == "contiguous":
        system = Contiguous(SLOTS, MAX_LEN, SEQS, TOKENS, WIDTH)
        return system, SlowContiguous(SLOTS, MAX_LEN, SEQS, TOKENS)
    if name == "fastertransformer":
        system = FasterTransformer(SLOTS + 70, MAX_LEN, SEQS, WIDTH)
        return system, SlowFasterTransformer(SLOTS + 70, MAX_LEN, SEQS)
    if name.startswith("no_evict"):
        limit = MAX_LEN if name == "no_evict_max" else None
        system = NoEvict(SLOTS + 3, limit, CHUNK, MAX_LEN, SEQS, TOKENS, WIDTH)
        return system, SlowNoEvict(SLOTS + 3, limit, CHUNK, MAX_LEN, SEQS, TOKENS)
    system = Orca(SLOTS, name, MAX_LEN, CHUNK, SEQS, TOKENS, WIDTH)
    return system, SlowOrca(SLOTS, name, MAX_LEN, CHUNK, SEQS, TOKENS)


NAMES = [
    "max",
    "pow2",
    "oracle",
    "contiguous",
    "fastertransformer",
    "no_evict",
    "no_evict_max",
]


@st.composite
def arrivals(draw):
    rows, step = [], 0
    for _ in range(draw(st.integers(1, 14))):
        step += draw(st.sampled_from([0, 0, 0, 1, 4, 30]))
        prompt = draw(st.integers(1, 40))
        output = draw(st.integers(1, MAX_LEN - prompt))
        rows.append((step, prompt, output, draw(st.integers(1, WIDTH))))
    return rows


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(rows=arrivals())
def test_every_step_matches_the_slow_model(name, rows):
    drive(*pair(name), rows)


def crowd(count=40, seed=0):
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.integers(0, 60, count))
    prompts = rng.integers(1, 33, count)
    outputs = rng.integers(1, 31, count)
    seqs = rng.integers(1, WIDTH + 1, count)
    columns = (steps, prompts, outputs, seqs)
    rows = list(zip(*(c.tolist() for c in columns), strict=True))
    # The last prompts exceed the tokens of a step together, but fit into memory.
    return rows + [(1000, 40, 4, 1)] * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_crowd_of_requests_matches_the_slow_model(name):
    num_stuck, num_together = drive(*pair(name), crowd())
    assert num_stuck > 20
    assert num_together > 20


def fault_estimate(monkeypatch):
    monkeypatch.setattr(orca, "_ceil_log2", lambda n: 33 - jax.lax.clz(n - 1))


def fault_no_merge(monkeypatch):
    def free(state, begin, order):
        return BuddyState(
            state.orders.at[begin].set(order), state.num_free.at[order].add(1)
        )

    monkeypatch.setattr(buddy, "free_chunk", free)


def fault_leak(monkeypatch):
    monkeypatch.setattr(Orca, "_release_memory", lambda self, state, is_released: state)


def fault_prompt_tokens(monkeypatch):
    monkeypatch.setattr(Orca, "_max_step_tokens", property(lambda self: 10**6))


@pytest.mark.parametrize(
    "fault", [fault_estimate, fault_no_merge, fault_leak, fault_prompt_tokens]
)
def test_a_planted_fault_breaks_the_match(fault, monkeypatch):
    fault(monkeypatch)
    jitted.cache_clear()
    with pytest.raises(AssertionError):
        drive(*pair("pow2"), crowd(), max_steps=1500)
    jitted.cache_clear()


def run_saturated(system, count, lengths):
    """Return the usage of each step while more requests wait than fit."""
    submit, begin, end = jitted(system)
    state, number, seen = system.init(), 0, []
    for _ in range(count):
        ok = True
        while ok:
            prompt, output = lengths[number % len(lengths)]
            state, ok = submit(state, request(number, prompt, output))
            number += int(ok)
        scheduled, _, usage = begin(state)
        state, _ = end(scheduled)
        seen.append({name: int(value) for name, value in usage._asdict().items()})
    return seen


def test_orca_max_batches_seven_requests_as_in_the_paper():
    # OPT-13B on an A100-40GB: 12 GiB of keys and values, 800 KiB per token.
    system = Orca(num_slots=12 * 2**20 // 800, reserve="max")
    assert system.num_slots == 15728
    lengths = [(161, 12), (35, 27), (500, 6), (9, 33)]
    for usage in run_saturated(system, 60, lengths):
        assert usage["num_requests"] == 7
        assert usage["external"] == 15728 - 7 * 2048  # 8.9 %, figure 2
        assert usage["free"] == 0
    oracle = Orca(num_slots=15728, reserve="oracle")
    usage = run_saturated(oracle, 40, lengths)
    assert all(one["internal"] == 0 for one in usage)
    assert max(one["num_requests"] for one in usage) > 30


def test_max_num_seqs_limits_the_running_sequences():
    system = Orca(num_slots=15728, reserve="oracle", max_num_seqs=5)
    usage = run_saturated(system, 20, [(20, 12)])
    assert {one["num_requests"] for one in usage} == {5}
    # Memory does not prevent the next admission.
    assert all(one["free"] > 0 for one in usage)


# ---- beams


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_forks_are_the_beams_minus_the_continued_beams(probability):
    width, count = 4, 4000
    widths = jnp.full(count, width)
    forks = orca.num_forks(jax.random.key(0), widths, (count, 6), probability)
    forks = np.asarray(forks)
    # By hand: the probabilities that no other beam continues p, and that p does not.
    by_others = (1 - probability / width) ** (width - 1)
    by_itself = probability * (1 - 1 / width)
    assert forks.min() >= 0
    assert forks.max() <= width - 1
    assert forks.mean() == pytest.approx(width * by_others * by_itself, abs=0.05)


def test_beams_copy_whole_chunks_after_the_prompt():
    system = Orca(SLOTS, "max", MAX_LEN, CHUNK, SEQS, TOKENS, WIDTH, 1.0)
    submit, begin, end = jitted(system)
    state, _ = submit(system.init(), request(0, 20, 40, 1, 3))
    copied = []
    for _ in range(40):
        scheduled, load, usage = begin(state)
        state, progress = end(scheduled)
        copied.append(int(load.num_copied_tokens))
        assert int(usage.num_blocks) == 3 * MAX_LEN
    assert bool(progress.has_ended.any())
    assert copied[:2] == [0, 2 * 20]
    assert set(copied[2:]) == {0, MAX_LEN, 2 * MAX_LEN}
    none = Orca(SLOTS, "max", MAX_LEN, CHUNK, SEQS, TOKENS, WIDTH, 0.0)
    submit, begin, end = jitted(none)
    state, _ = submit(none.init(), request(0, 20, 40, 1, 3))
    for number in range(5):
        scheduled, load, _ = begin(state)
        state, _ = end(scheduled)
        assert int(load.num_copied_tokens) == (40 if number == 1 else 0)


# ---- bad input


def workload(prompt=10, output=10, samples=1):
    return Workload(
        np.zeros(2),
        np.array([1, prompt]),
        np.array([1, output]),
        num_samples=np.array([1, samples]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_request_that_can_never_be_served_raises(name):
    system, _ = pair(name)
    system.check(workload(output=MAX_LEN - 10, samples=WIDTH))
    with pytest.raises(ValueError, match=r"64 tokens, prompt and output.*request 1"):
        system.check(workload(output=MAX_LEN))
    with pytest.raises(ValueError, match=r"at most 3 sequences.*request 1"):
        system.check(workload(samples=WIDTH + 1))


@pytest.mark.parametrize("system", [Orca, Contiguous, FasterTransformer])
def test_a_request_larger_than_memory_raises(system):
    small = system(130, max_len=64, max_num_seqs=8, max_seqs_per_request=8)
    small.check(workload(samples=2))
    with pytest.raises(ValueError, match=r"slots per request.*request 1.*num_slots"):
        small.check(workload(samples=3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Orca(5000, "half"),
            "reserve: expected max, pow2 or oracle, got 'half'",
        ),
        (lambda: Orca(5000, max_len=100), "max_len: expected a power of two, got 100"),
        (lambda: Orca(5000, min_chunk=3), "min_chunk: expected a power of two, got 3"),
        (lambda: Orca(5000, min_chunk=4096), "min_chunk: expected at most max_len"),
        (lambda: Orca(1000), "num_slots: expected at least max_len .2048., got 1000"),
        (lambda: Orca(5000, fork_probability=2.0), "expected a probability, got 2.0"),
        (lambda: Contiguous(5000, max_num_seqs=0), "max_num_seqs: expected at least 1"),
        (
            lambda: Contiguous(5000, max_num_batched_tokens=100),
            "max_num_batched_tokens: expected at least max_len",
        ),
        (lambda: FasterTransformer(100), "num_slots: expected at least max_len"),
    ],
)
def test_invalid_sizes_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_output_longer_than_the_output_limit_raises():
    workload = Workload(np.zeros(2), [5, 5], [6, 9])
    with pytest.raises(ValueError, match=r"output_limit: .*got 8, but 9 at index 1"):
        NoEvict(4096, output_limit=8).check(workload)
    NoEvict(4096, output_limit=9).check(workload)
