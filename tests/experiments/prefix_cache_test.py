"""The runner `prefix_cache`: ratios by hand, by a slow cache, and of a real trace."""

import collections
import functools
import json
import pathlib

import pytest

from experiments import prefix_cache as runner
from jpaged.simulator.workloads.traces import read_prompts
from tests.support.paths import ROOT
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long

TRACE = pathlib.Path("data", "mooncake_synthetic.jsonl.gz")
# The folder `shared` is beside the checkout, if it exists.
SHARED = ROOT.parent / "shared" / TRACE


run = functools.partial(call_experiment, "prefix_cache")


def write(path: pathlib.Path, requests) -> pathlib.Path:
    lines = [
        json.dumps({"timestamp": 0, "input_length": length, "hash_ids": ids})
        for length, ids in requests
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


# Blocks of 10 tokens, of which 3 are kept. After each request the cached blocks are
# listed, the most recently used first.
TINY = [
    (25, [0, 1, 2]),  # no hit; 0 1 2
    (20, [0, 1]),  #    2 blocks, 20 tokens; 0 1 2
    (28, [0, 1, 3]),  # 2 blocks, 20 tokens; 0 1 3, since 2 is the oldest
    (25, [0, 1, 2]),  # 2 blocks, 20 tokens; 0 1 2
    (5, [9]),  #        no hit; 9 0 1, since 2 is the last block of its request
    (12, [0, 1]),  #    2 blocks, 12 tokens, since the second is partial; 0 1 9
]


def test_a_tiny_trace_has_the_ratios_computed_by_hand(tmp_path):
    path = write(tmp_path / "tiny.jsonl", TINY)
    status, out, _ = run(
        f"--trace={path}", "--capacity_blocks=3,1,100", "--block_size=10"
    )
    assert status == 0
    record = last_json(out)
    three, one, many = record["rows"]
    assert three["block_hit_ratio"] == pytest.approx(8 / 14)
    assert three["token_hit_ratio"] == pytest.approx(72 / 115)
    # A cache of one block keeps block 0, except after the request for block 9.
    assert one["block_hit_ratio"] == pytest.approx(3 / 14)
    assert one["token_hit_ratio"] == pytest.approx(30 / 115)
    # Nothing is evicted: the fourth request hits all its blocks.
    assert many["block_hit_ratio"] == pytest.approx(9 / 14)
    assert many["token_hit_ratio"] == pytest.approx(77 / 115)
    assert record["block_hit_ratio"] == many["block_hit_ratio"]
    assert record["capacity_blocks"] == 100
    assert record["num_lookups"] == 14
    assert record["seconds"] > 0
    assert record["lookups_per_s"] > 0
    assert record["flags"]["block_size"] == 10


def slow_hits(prompts, capacity):
    """Hits of each prompt by an ordered dictionary, the oldest block first."""
    kept: collections.OrderedDict[int, None] = collections.OrderedDict()
    hits = []
    for prompt in prompts:
        num_hits = next(
            (n for n, block in enumerate(prompt) if block not in kept), len(prompt)
        )
        hits.append(num_hits)
        for block in reversed(prompt):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > capacity:
            kept.popitem(last=False)
    return hits


@pytest.mark.parametrize("capacity", [1, 40, 200])
def test_hits_of_a_synthetic_trace_equal_those_of_a_slow_cache(capacity):
    requests = runner.synthetic_trace(300, 16, seed=1)
    prompts = [request.hash_ids for request in requests]
    hits, _, _ = runner.replay_prompts(prompts, capacity)
    assert hits.tolist() == slow_hits(prompts, capacity)
    assert capacity < 40 or hits.sum() > 300


def test_the_synthetic_trace_depends_on_the_seed_only():
    trace = runner.synthetic_trace(50, 16, seed=1)
    assert trace == runner.synthetic_trace(50, 16, seed=1)
    assert trace != runner.synthetic_trace(50, 16, seed=2)
    for length, ids in trace:
        assert len(ids) == -(-length // 16)


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs ../shared/{TRACE}")
def test_ratios_of_a_recorded_trace_equal_a_brute_force_count():
    requests = read_prompts(SHARED)
    ratios, _ = runner.measure_capacity(requests, 1000, 512)
    assert (ratios.num_requests, ratios.num_lookups) == (3134, 87091)
    assert ratios.block_hit_ratio == pytest.approx(0.0275, abs=1e-3)
    assert ratios.token_hit_ratio == pytest.approx(0.0281, abs=1e-3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--capacity_blocks=10,0", "--capacity_blocks: expected integers from 1"),
        ("--capacity_blocks=-5", "--capacity_blocks: expected integers from 1"),
        ("--capacity_blocks=many", "got 'many'"),
        ("--trace=nowhere.jsonl", "nowhere.jsonl"),
        ("--num_requests=0", "flag --num_requests=0"),
    ],
)
def test_an_invalid_flag_is_refused(argument, message):
    status, out, err = run(argument)
    assert status == 1
    assert message in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"input_length": 5}',
        '{"input_length": 5, "hash_ids": 7}',
        '{"input_length": 5, "hash_ids": [1, "a"]}',
        '{"input_length": 5, "hash_ids": [-1]}',
        '{"input_length": 5.5, "hash_ids": [1]}',
        '{"input_length": 5, "hash_ids": [4294967296]}',
    ],
)
def test_an_invalid_line_of_a_trace_is_named(line, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"input_length": 5, "hash_ids": [1]}\n' + line + "\n", "utf-8")
    with pytest.raises(
        ValueError, match=r"trace: expected JSON.*line 2 of .*bad\.jsonl"
    ):
        read_prompts(path)


def test_an_empty_or_uncompressed_file_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n", "utf-8")
    with pytest.raises(
        ValueError, match=r"trace: expected requests, got none in .*empty\.jsonl"
    ):
        read_prompts(path)
    packed = tmp_path / "plain.jsonl.gz"
    packed.write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"expected a whole gzip file, .*jsonl\.gz"):
        read_prompts(packed)
