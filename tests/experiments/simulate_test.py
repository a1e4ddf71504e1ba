"""The runner `simulate`: its results, and its answers to invalid flags."""

import csv
import functools
import json

import numpy as np
import pytest

from tests.support.runners import run_experiment

pytestmark = pytest.mark.long

KEYS = {
    "mean_batched_requests",
    "normalized_latency_s",
    "kv_composition",
    "num_preemptions",
    "prefix_hit_ratio",
}


run = functools.partial(run_experiment, "simulate")


def last_line(*flags):
    status, stdout, stderr = run(*flags)
    assert status == 0, stderr
    return json.loads(stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    """Requests of equal lengths: prompts of 100 tokens and outputs of 900."""
    path = tmp_path_factory.mktemp("traces") / "lengths.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["input_tokens", "output_tokens"])
        writer.writerows([[100, 900]] * 50)
    return str(path)


def test_orca_max_batches_seven_requests_of_opt_13b_as_in_the_paper(lengths):
    flags = ["--trace", lengths, "--rate", "2", "--duration", "60"]
    found = last_line("--system", "orca_max", *flags)
    assert found.keys() >= KEYS
    # Figure 13: 7.00. Figure 2: 15,728 tokens without 7 chunks of 2,048 are lost.
    assert found["mean_batched_requests"] == pytest.approx(7, abs=0.005)
    shares = found["kv_composition"]
    assert shares["external"] == pytest.approx(1 - 7 * 2048 / 15728, abs=1e-6)
    # Each request fills 1,000 of 2,048 slots; the others are never filled.
    lost = 7 * 1048 / 15728
    assert shares["internal"] == pytest.approx(lost, abs=1e-3)
    assert sum(shares.values()) == pytest.approx(1)


def test_the_engine_batches_more_than_orca_and_is_repeatable(lengths):
    flags = ["--trace", lengths, "--rate", "1", "--duration", "40"]
    ours = last_line(*flags, "--max_num_seqs", "32", "--max_model_len", "1024")
    again = last_line(
        *flags, "--max_num_seqs", "32", "--max_model_len", "1024", "--bounds"
    )
    orca = last_line("--system", "orca_max", *flags)
    assert ours["mean_batched_requests"] > 1.5 * orca["mean_batched_requests"]
    assert ours["normalized_latency_s"] < orca["normalized_latency_s"]
    assert ours["kv_composition"]["token_states"] > 0.96
    lines = again.pop("bounds")
    assert 0 < lines["alone"]["share"] < lines["unlimited_memory"]["share"] <= 1.001
    assert lines["alone"]["normalized_latency_s"] < ours["normalized_latency_s"]
    del ours["wall_s"], again["wall_s"]
    assert ours == again


def test_the_prefix_cache_finds_the_prefixes_of_a_trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 50_000 * i, "input_length": 1030, "output_length": 5,
         "hash_ids": [1, 2, 10 + i]}
        for i in range(4)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = last_line("--trace", str(path), "--model", "llama-3-8b", "--gpu", "h100",
                      "--max_num_seqs", "8", "--bounds")  # fmt: skip
    # No request waits for another, so all orders are equal.
    assert found["bounds"]["best_order"]["share"] == pytest.approx(1)
    # After the first, each request finds two pieces of 512 tokens of its 1,030.
    assert found["prefix_hit_ratio"] == pytest.approx(3 * 1024 / (4 * 1030))
    assert found["num_requests"] == 4
    assert np.isclose(found["makespan_s"], 150, atol=5)


def test_layers_with_windows_give_blocks_back_unless_they_may_not(lengths):
    flags = ["--trace", lengths, "--rate=20", "--duration=1", "--max_num_seqs=8"]
    flags += ["--model=gemma-3-1b", "--num_slots=2048", "--max_model_len=1024"]
    found = last_line(*flags)
    assert found["group_windows"] == [None, *[512] * 6]
    # Two rows of 1,000 tokens fit into one table for all layers.
    assert found["mean_batched_requests"] > 2.5


@pytest.mark.parametrize("system", ["vllm", "orca_oracle"])
def test_requests_larger_than_memory_are_skipped_and_counted(tmp_path, system):
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens,output_tokens,timestamp_s\n" + "5,7,1\n" * 3)
    with open(path, "a", encoding="utf-8") as file:
        file.write("15000,900,2\n9,2,3\n")
    found = last_line("--trace", str(path), "--system", system)
    assert found["num_requests"] == 4
    assert found["num_skipped"] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--system", "orca_max", "--policy", "fcfs"], "--policy: expected none with"),
        (["--duration", "0.01", "--rate", "0.001"], "no requests"),
        (["--model", "opt-12b"], "opt-12b"),
        (["--step_fit", "x.json"], "--step_fit: expected none with --cost_model"),
        (
            ["--model", "opt-175b", "--gpu", "h100", "--duration", "5"],
            "use more chips",
        ),
        (["--num_slots", "15", "--duration", "9"], "got no requests"),
    ],
)
def test_an_invalid_flag_is_named_before_the_simulation(flags, words):
    status, stdout, stderr = run(*flags)
    assert status == 1, stderr
    assert words in stderr
    assert "Traceback" not in stderr
    assert not stdout


def test_an_invalid_line_of_a_trace_is_named(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("input_tokens,output_tokens\n5,7\n6,-1\n")
    status, _, stderr = run("--trace", str(path))
    assert status == 1
    assert str(path) in stderr
    assert "3" in stderr
