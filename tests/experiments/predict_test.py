"""The runner `predict` compares a measured run of vLLM with its profile."""

import functools
import json

import pytest

from tests.support.runners import run_experiment
from tests.support.step_loads import shared_data

DATA = shared_data()
PROFILE = DATA / "profiles" / "rtxpro6000_llama31_8b_"
RUN = DATA / "vllm_runs"
WORKLOAD = RUN / "workload_sharegpt300_llama31.jsonl.gz"
MEASURED = RUN / "rtxpro6000_llama31_8b_requests.csv"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not WORKLOAD.exists(), reason="the measured run does not exist"),
]


run = functools.partial(
    run_experiment,
    "predict",
    f"--dense={PROFILE}dense.csv",
    f"--attention={PROFILE}attention.csv.gz",
    f"--per_sequence={PROFILE}per_sequence.csv",
    f"--workload={WORKLOAD}",
)


def test_a_run_of_vllm_is_predicted_from_its_profile():
    status, stdout, stderr = run(f"--measured={MEASURED}")
    assert status == 0, stderr
    rows = json.loads(stdout.splitlines()[-1])["rows"]
    ratios = {row["quantity"]: row["ratio"] for row in rows}
    assert ratios["mean_tpot_s"] == pytest.approx(1, abs=0.10)
    assert ratios["makespan_s"] == pytest.approx(1, abs=0.10)
    # The profile has no host time, so the missing time adds up in the queue.
    assert 0.85 < ratios["mean_ttft_s"] < 1.1
    measured = {row["quantity"]: row["measured"] for row in rows}
    assert measured["mean_tpot_s"] == pytest.approx(0.03246, rel=1e-3)
    assert measured["makespan_s"] == pytest.approx(65.83, rel=1e-3)


def test_a_table_of_another_run_raises(tmp_path):
    path = tmp_path / "measured.csv"
    path.write_text("ttft_s,tpot_s,e2e_s\n1,2,3\n")
    status, _, stderr = run(f"--measured={path}")
    assert status == 1
    assert "expected 300 rows" in stderr
    path.write_text("ttft_s,tpot_s\n" + "1,2\n" * 300)
    status, _, stderr = run(f"--measured={path}")
    assert status == 1
    assert "e2e_s" in stderr


def test_a_profile_with_a_smaller_range_raises():
    status, _, stderr = run("--max_num_batched_tokens=1000000")
    assert status == 1
    assert "max_tokens: expected at most" in stderr
    assert "was measured, got 1000000" in stderr
