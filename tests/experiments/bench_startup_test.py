"""The runner `bench_startup` at its smallest sizes."""

import pytest

from tests.support.runners import call_experiment, last_json, run_experiment
from tests.support.tiny_llm import write_folder

pytestmark = pytest.mark.long


def test_three_processes_compile_the_same_programs_and_the_second_loads_them(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    status, stdout, stderr = run_experiment(
        "bench_startup",
        *(f"--model={folder}", "--max_num_seqs=4", "--max_num_batched_tokens=32"),
        *("--max_model_len=32", "--num_prompts=2", "--max_tokens=4"),
        "--features=greedy,logprobs",
    )
    assert status == 0, stderr + stdout
    result = last_json(stdout)
    parts = result["parts"]
    names = [
        *("schedule", "trunk of 32 tokens", "decode", "settle", "loop of 4 rows"),
        *("decode (greedy, logprobs)", "loop of 4 rows (greedy, logprobs)"),
    ]
    for programs in (parts, *result["cases"].values()):
        assert sorted(row["name"] for row in programs["programs"]) == sorted(names)
    empty, filled = result["cases"].values()
    assert filled["num_cache_hits"] > empty["num_cache_hits"]
    for case in (empty, filled):
        order = ["import", "load", "first token", "call: greedy", "call: logprobs"]
        assert list(case["milestones"]) == [*order, "all compiled"]
        seconds = [pair[0] for pair in case["milestones"].values()]
        assert seconds == sorted(seconds)
    # A plain decode step has no scheduler and no page tables.
    lines = {row["name"]: row["hlo_lines"] for row in parts["programs"]}
    assert 0 < parts["reference"]["hlo_lines"] < lines["loop of 4 rows"]
    plain_s = parts["reference"]["processor_s"]
    total_s = empty["milestones"]["all compiled"][1]
    assert result["ratios"]["all compiled"] == pytest.approx(total_s / plain_s)


def test_an_unknown_feature_is_refused():
    status, _, stderr = call_experiment("bench_startup", "--features=greedy,nothing")
    assert status == 1
    assert "--features: expected some of greedy, " in stderr
