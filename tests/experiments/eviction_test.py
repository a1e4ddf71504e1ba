"""The runner `eviction`: hits of all policies equal those of a slow cache in Python."""

import random

import numpy as np
import pytest

from experiments import eviction as runner
from experiments import prefix_cache
from jpaged.policies import EVICTION
from jpaged.simulator.optimum import belady_hits
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long


class Node:
    """A cached block with what policies read."""

    def __init__(self, parent, depth, now, floor):
        self.parent, self.depth, self.inserted = parent, depth, now
        self.last_used, self.num_uses, self.floor = now, 1, floor
        self.children = 0


SCORES = {
    "lru": lambda node, now: node.last_used,
    "fifo": lambda node, now: node.inserted,
    "lfu": lambda node, now: (
        node.num_uses - (now - node.last_used) / (now - node.last_used + 1)
    ),
    "gdsf": lambda node, now: (
        node.floor + node.num_uses * (1 + 0.1 * node.depth * runner.BLOCK_SIZE / 1000)
    ),
}


def slow_hits(prompts, capacity, policy):
    """Evicts one leaf after another: the one with the smallest score."""
    kept: dict[tuple, Node] = {}
    hits, floor = [], 0.0
    for now, prompt in enumerate(prompts):
        paths = [tuple(prompt[: depth + 1]) for depth in range(len(prompt))]
        hits.append(sum(path in kept for path in paths))
        for depth, path in enumerate(paths):
            if path in kept:
                kept[path].num_uses += 1
                kept[path].floor, kept[path].last_used = floor, now
            else:
                parent = kept.get(path[:-1])
                kept[path] = Node(parent, depth, now, floor)
                if parent:
                    parent.children += 1
        highest = floor
        while len(kept) > capacity:
            leaves = [path for path, node in kept.items() if not node.children]
            scores = {path: SCORES[policy](kept[path], now) for path in leaves}
            least = min(scores.values())
            path = max((p for p in leaves if scores[p] == least), key=len)
            node = kept.pop(path)
            if node.parent:
                node.parent.children -= 1
            highest = max(highest, least)
        floor = highest
    return hits


def distinct_prompts(number, seed):
    """Conversations of one block more per round, so that few scores are equal."""
    rng = random.Random(seed)
    talks, prompts = [], []
    for block in range(number):
        if not talks or rng.random() < 0.3:
            talks.append([])
        talk = rng.choice(talks[-6:])
        talk.append(block)
        prompts.append(list(talk))
    return prompts


@pytest.mark.parametrize("policy", EVICTION.policies)
def test_hits_equal_those_of_a_slow_cache(policy):
    prompts = distinct_prompts(150, seed=2)
    found = runner.hit_ratios(prompts, 25, [policy])
    expected = np.sum(slow_hits(prompts, 25, policy)) / sum(map(len, prompts))
    assert found[policy] == pytest.approx(expected)
    assert 0.2 < found[policy] <= found["belady"] <= found["unlimited"]


def test_a_policy_of_one_s_own_compiles_once_for_all_parameters():
    def by_depth(blocks):
        return blocks.parameters[0] * blocks.depths.astype("float32")

    prompts = distinct_prompts(60, seed=1)
    before = prefix_cache.replay_requests._cache_size()
    shallow, deep = (
        prefix_cache.replay_prompts(prompts, 10, by_depth, (sign,))[0].sum()
        for sign in (-1.0, 1.0)
    )
    assert prefix_cache.replay_requests._cache_size() == before + 1
    assert shallow != deep
    assert max(shallow, deep) <= belady_hits(prompts, 10).sum()


def test_the_runner_compares_all_policies_on_a_generated_trace(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "eviction.png"
    status, out, _ = call_experiment(
        "eviction", "--num_requests=40", "--capacity_blocks=25", f"--plot={plot}"
    )
    assert status == 0
    (row,) = last_json(out)["rows"]
    assert set(row) == {"trace", "capacity_blocks", *EVICTION.policies, *runner.BOUNDS}
    assert max(row[name] for name in EVICTION.policies) <= row["belady"]
    assert plot.stat().st_size > 5000


def test_unknown_policies_are_refused():
    status, _, err = call_experiment("eviction", "--policies=mru")
    assert status == 1
    assert "--policies: expected some of lru" in err
