"""The runner `predict`: a measured run of vLLM beside what its profile says."""

import functools
import json

import pytest

from tests.support.paths import ROOT
from tests.support.runners import run_experiment

DATA = ROOT.parent / "shared" / "data"
PROFILE = DATA / "profiles" / "rtxpro6000_llama31_8b_"
RUN = DATA / "vllm_runs"
WORKLOAD = RUN / "workload_sharegpt300_llama31.jsonl.gz"
MEASURED = RUN / "rtxpro6000_llama31_8b_requests.csv"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not WORKLOAD.exists(), reason="the measured run is not in the repository"
    ),
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
    # What the host adds to each step is in no profile, and piles up in the queue.
    assert 0.85 < ratios["mean_ttft_s"] < 1.1
    measured = {row["quantity"]: row["measured"] for row in rows}
    assert measured["mean_tpot_s"] == pytest.approx(0.03246, rel=1e-3)
    assert measured["makespan_s"] == pytest.approx(65.83, rel=1e-3)


def test_a_table_of_another_run_is_refused(tmp_path):
    path = tmp_path / "measured.csv"
    path.write_text("ttft_s,tpot_s,e2e_s\n1,2,3\n")
    status, _, stderr = run(f"--measured={path}")
    assert status == 1
    assert "wanted 300 rows" in stderr
    path.write_text("ttft_s,tpot_s\n1,2\n")
    status, _, stderr = run(f"--measured={path}")
    assert status == 1
    assert "e2e_s" in stderr


def test_a_profile_that_does_not_go_so_far_is_refused():
    status, _, stderr = run("--max_num_batched_tokens=1000000")
    assert status == 1
    assert "was measured up to" in stderr
    assert "tokens of a step, got 1000000" in stderr
