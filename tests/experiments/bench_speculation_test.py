"""The runner bench_speculation, at its smallest size."""

import json
import subprocess
import sys

import pytest

from experiments import bench_speculation

pytestmark = pytest.mark.slow  # compiles three programs


def test_it_reports_acceptance_and_speedup_and_checks_the_tokens():
    flags = ["--rows=1", "--temperatures=0", "--repeats=1", "--output_tokens=8"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench_speculation", *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [set(row) for row in rows] == [set(bench_speculation.Row._fields)] * 3
    plain, *drafted = rows
    assert plain["tokens_per_step"] == plain["speedup"] == 1
    assert all(0 <= row["acceptance_rate"] <= 1 for row in drafted)
