"""No eviction and no order, found by enumeration, beats the offline optima."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.prefix_cache import replay_prompts, synthetic_trace
from jpaged.simulator.costs.chips import find_chip
from jpaged.simulator.costs.roofline import Roofline
from jpaged.simulator.costs.served_models import served_model
from jpaged.simulator.optimum import alone_seconds, belady_hits, best_order
from jpaged.simulator.simulate import simulate
from jpaged.simulator.systems.registry import find_system
from jpaged.simulator.workloads.workload import Workload

pytestmark = pytest.mark.long


def most_hits(prompts, capacity: int) -> int:
    """Return the most blocks found in total, over all choices of what to keep."""

    @functools.cache
    def best(number: int, kept: frozenset) -> int:
        if number == len(prompts):
            return 0
        prompt = prompts[number]
        lead = list(itertools.takewhile(kept.__contains__, prompt))
        there = kept | set(prompt)
        size = min(capacity, len(there))
        # Keeping more is never worse, so only full caches are tried.
        choices = itertools.combinations(sorted(there), size)
        after = max(best(number + 1, frozenset(choice)) for choice in choices)
        return len(lead) + after

    return best(0, frozenset())


# A tree of blocks: the children of b are 2b + 1 and 2b + 2, so paths share prefixes.
def path_to(block: int) -> tuple[int, ...]:
    path = [block]
    while path[-1]:
        path.append((path[-1] - 1) // 2)
    return tuple(reversed(path))


@given(
    ends=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    capacity=st.integers(0, 4),
)
def test_no_eviction_finds_more_blocks(ends, capacity):
    prompts = [path_to(end) for end in ends]
    assert belady_hits(prompts, capacity).sum() == most_hits(prompts, capacity)


def test_the_prefix_cache_finds_at_most_the_optimum():
    prompts = [prompt.hash_ids for prompt in synthetic_trace(200, 16, seed=0)]
    distinct = len(set(itertools.chain(*prompts)))
    for capacity in (50, 200, distinct):
        hits, _, _ = replay_prompts(prompts, capacity)
        optimum = belady_hits(prompts, capacity)
        assert hits.sum() <= optimum.sum()
    np.testing.assert_array_equal(hits, optimum)


def test_evicting_the_block_with_the_nearest_use_is_worse():
    # With space for one of two blocks, keeping the wrong one finds fewer.
    prompts = [(1,), (2,), (1,), (1,), (2,)]
    assert belady_hits(prompts, 1).tolist() == [0, 0, 1, 1, 0]
    assert most_hits(tuple(prompts), 1) == 2


def test_a_negative_capacity_raises():
    with pytest.raises(ValueError, match="capacity: expected at least 0, got -1"):
        belady_hits([(1,)], -1)


def test_equal_ids_after_different_prefixes_are_different_blocks():
    assert belady_hits([(1, 2), (3, 2), (3, 2, 2), (1, 2)], 9).tolist() == [0, 0, 2, 2]


COST = Roofline.of(served_model("opt-13b"), find_chip("a100-40g"), 1, step_s=0.002)


def test_a_request_alone_meets_the_bound():
    # Each request runs alone: the bound is met, up to the clock's microseconds.
    far = Workload(np.array([0.0, 100.0, 200.0]), [5, 300, 1], [9, 1, 60])
    system = find_system("vllm", far, 4096, max_num_seqs=8, max_model_len=512)
    took = simulate(system, far, COST).end_times - far.arrivals
    np.testing.assert_allclose(took, alone_seconds(far, COST), atol=60e-6)
    # Together they delay each other, and none is faster.
    near = Workload(np.zeros(3), [5, 300, 1], [9, 1, 60])
    took = simulate(system, near, COST).end_times
    assert (took >= alone_seconds(near, COST) - 60e-6).all()
    assert took.sum() > 1.01 * alone_seconds(near, COST).sum()


def test_only_the_last_token_of_a_prompt_that_may_be_cached_counts():
    one = Workload(np.zeros(1), [64], [5])
    shared = one.with_shared_prefix(32, 16)
    short = Workload(np.zeros(1), [63], [6])  # one prompt token fewer, one decoded more
    (mine,), (other,) = alone_seconds(shared, COST), alone_seconds(short, COST)
    (whole,) = alone_seconds(one, COST)
    prompt = simulate(
        find_system("vllm", short, 4096, max_num_seqs=8, max_model_len=512), short, COST
    ).times_to_first_token[0]
    assert mine == pytest.approx(other - prompt, abs=20e-6)
    assert mine < whole


def test_the_best_order_with_one_row_is_smiths_rule():
    # All requests wait from the start and run one after the other. The sum of weighted
    # end times is least if the shortest time over weight comes first (Smith 1956); the
    # weight is 1 / output length.
    jobs = Workload(np.zeros(4), [8, 8, 8, 8], [12, 3, 20, 6])
    ratio = alone_seconds(jobs, COST) * jobs.output_lens
    engine = find_system("vllm", jobs, 1024, max_num_seqs=1)
    order, outcome = best_order(engine, jobs, COST)
    assert order == tuple(np.argsort(ratio))
    fcfs = simulate(engine, jobs, COST)
    assert outcome.normalized_latencies.mean() < 0.8 * fcfs.normalized_latencies.mean()


def test_too_many_requests_to_order_raise():
    many = Workload(np.zeros(8), np.ones(8, int), np.ones(8, int))
    engine = find_system("vllm", many, 1024, max_num_seqs=1)
    with pytest.raises(ValueError, match=r"at most 7 requests, .* got 8"):
        best_order(engine, many, COST)
