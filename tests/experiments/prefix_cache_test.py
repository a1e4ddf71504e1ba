"""The runner `prefix_cache`: ratios by hand, a slow count, and a recorded trace."""

import collections
import functools
import gzip
import json
import pathlib

import pytest

from experiments import prefix_cache as runner
from jpaged.simulator.workloads.traces import read_prompts
from tests.support.paths import ROOT
from tests.support.runners import run_experiment

pytestmark = pytest.mark.long

TRACE = pathlib.Path("data", "mooncake_synthetic.jsonl.gz")
# The folder `shared` lies beside the checkout where there is one.
SHARED = ROOT.parent / "shared" / TRACE


run = functools.partial(run_experiment, "prefix_cache")


def write(path: pathlib.Path, requests) -> pathlib.Path:
    lines = [
        json.dumps({"timestamp": 0, "input_length": length, "hash_ids": ids})
        for length, ids in requests
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


# Blocks of 10 tokens, room for 3. What is kept after each, most recently used first:
TINY = [
    (25, [0, 1, 2]),  # nothing known; 0 1 2
    (20, [0, 1]),  #    2 blocks, 20 tokens; 0 1 2
    (28, [0, 1, 3]),  # 2 blocks, 20 tokens; 0 1 3, for 2 is the oldest
    (25, [0, 1, 2]),  # 2 blocks, 20 tokens; 0 1 2
    (5, [9]),  #        nothing known; 9 0 1, for 2 is the tail of its request
    (12, [0, 1]),  #    2 blocks, 12 tokens, as the second is not full; 0 1 9
]


def test_a_tiny_trace_gives_the_ratios_worked_out_by_hand(tmp_path):
    path = write(tmp_path / "tiny.jsonl", TINY)
    status, out, _ = run(
        f"--trace={path}", "--capacity_blocks=3,1,100", "--block_size=10"
    )
    assert status == 0
    record = json.loads(out.rstrip().split("\n")[-1])
    three, one, many = record["rows"]
    assert three["block_hit_ratio"] == pytest.approx(8 / 14)
    assert three["token_hit_ratio"] == pytest.approx(72 / 115)
    # Room for one block keeps block 0 from request to request, but for the last.
    assert one["block_hit_ratio"] == pytest.approx(3 / 14)
    assert one["token_hit_ratio"] == pytest.approx(30 / 115)
    # Nothing is evicted: the fourth request knows all its blocks.
    assert many["block_hit_ratio"] == pytest.approx(9 / 14)
    assert many["token_hit_ratio"] == pytest.approx(77 / 115)
    assert record["block_hit_ratio"] == many["block_hit_ratio"]
    assert record["capacity_blocks"] == 100
    assert record["num_lookups"] == 14
    assert record["seconds"] > 0
    assert record["lookups_per_s"] > 0
    assert record["flags"]["block_size"] == 10


def slow_hits(prompts, capacity):
    """Known blocks of each prompt, by an ordered dictionary, the oldest first."""
    kept: collections.OrderedDict[int, None] = collections.OrderedDict()
    hits = []
    for prompt in prompts:
        known = next(
            (n for n, block in enumerate(prompt) if block not in kept), len(prompt)
        )
        hits.append(known)
        for block in reversed(prompt):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > capacity:
            kept.popitem(last=False)
    return hits


@pytest.mark.parametrize("capacity", [1, 40, 200])
def test_each_request_of_a_synthetic_trace_hits_what_a_slow_count_says(capacity):
    requests = runner.synthetic_trace(300, 16, seed=1)
    prompts = [request.hash_ids for request in requests]
    hits, _, _ = runner.replay(prompts, capacity)
    assert hits.tolist() == slow_hits(prompts, capacity)
    assert capacity < 40 or hits.sum() > 300


def test_the_synthetic_trace_is_its_seed_s():
    trace = runner.synthetic_trace(50, 16, seed=1)
    assert trace == runner.synthetic_trace(50, 16, seed=1)
    assert trace != runner.synthetic_trace(50, 16, seed=2)
    for length, ids in trace:
        assert len(ids) == -(-length // 16)


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs ../shared/{TRACE}")
def test_the_ratios_of_a_recorded_trace_are_those_of_a_brute_force_count():
    requests = read_prompts(SHARED)
    ratios, _ = runner.measure(requests, 1000, 512)
    assert (ratios.num_requests, ratios.num_lookups) == (3134, 87091)
    assert ratios.block_hit_ratio == pytest.approx(0.0275, abs=1e-3)
    assert ratios.token_hit_ratio == pytest.approx(0.0281, abs=1e-3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--capacity_blocks=10,0", "capacity_blocks: wanted numbers from 1"),
        ("--capacity_blocks=-5", "capacity_blocks: wanted numbers from 1"),
        ("--capacity_blocks=many", "got 'many'"),
        ("--trace=nowhere.jsonl", "nowhere.jsonl"),
        ("--num_requests=0", "flag --num_requests=0"),
    ],
)
def test_a_wrong_flag_is_said_in_one_line(argument, message):
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
def test_a_line_that_is_no_request_is_named(line, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"input_length": 5, "hash_ids": [1]}\n' + line + "\n", "utf-8")
    with pytest.raises(ValueError, match=r"trace: wanted JSON.*line 2 of .*bad\.jsonl"):
        read_prompts(path)


def test_a_file_that_is_empty_or_not_what_its_name_says_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n", "utf-8")
    with pytest.raises(ValueError, match="has no requests"):
        read_prompts(path)
    packed = tmp_path / "plain.jsonl.gz"
    packed.write_text("{}", "utf-8")
    with pytest.raises(gzip.BadGzipFile):
        read_prompts(packed)
