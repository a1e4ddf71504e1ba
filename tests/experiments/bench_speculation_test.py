"""The runner `bench_speculation` at its smallest size."""

import pytest

from experiments import bench_speculation
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.slow  # compiles three programs


def test_the_runner_reports_acceptance_and_speedup():
    flags = ["--rows=1", "--temperatures=0", "--repeats=1", "--output_tokens=8"]
    status, stdout, stderr = call_experiment("bench_speculation", *flags)
    assert status == 0, stderr
    rows = last_json(stdout)["rows"]
    assert [set(row) for row in rows] == [
        set(bench_speculation.SpeculationRow._fields)
    ] * 3
    plain, *drafted = rows
    assert plain["tokens_per_step"] == plain["speedup"] == 1
    assert all(0 <= row["acceptance_rate"] <= 1 for row in drafted)
