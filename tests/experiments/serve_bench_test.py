"""The open-loop client and `serve_bench`, on the bundled model."""

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("starlette", reason="needs the extra `server`")
pytest.importorskip("prometheus_client", reason="needs the extra `server`")

from experiments.lib.open_loop import Timing, run_open_loop
from experiments.serve_bench import fit_costs, row_of
from jpaged.serving.metrics import StepRecord
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long


def test_rates_have_a_measured_and_a_predicted_latency(tmp_path):
    table = tmp_path / "latency.csv"
    status, out, err = call_experiment(
        "serve_bench",
        "--num_requests=8",
        "--scale=0.02",
        "--loads=0.3,0.6",
        "--max_num_seqs=4",
        f"--csv={table}",
    )
    assert status == 0, err
    rows = last_json(out)["details"]["rows"]
    assert [row["load"] for row in rows] == [0.3, 0.6]
    for row in rows:
        assert row["normalized_latency_s"] > row["ttft_s"] / 100 > 0
        assert row["predicted_s"] > 0
    header, *lines = table.read_text().splitlines()
    assert header.split(",")[:2] == ["load", "rate"]
    assert len(lines) == 2


def test_latencies_are_those_of_the_definitions():
    timings = [Timing(0.0, 1.0, 3.0, 5, 4), Timing(1.0, 1.5, 2.0, 2, 2)]
    row = row_of(0.5, timings, 7.0)
    assert row.rate == 1.0
    assert row.normalized_latency_s == pytest.approx((3 / 5 + 1 / 2) / 2)
    assert row.ttft_s == pytest.approx(0.75)
    assert row.tpot_s == pytest.approx((2 / 4 + 0.5 / 1) / 2)
    assert row.tokens_per_s == pytest.approx(7 / 3)


def test_costs_of_steps_are_found_again():
    rng = np.random.default_rng(0)
    time_s, steps = 0.0, []
    for number in range(60):
        rows, prompt = int(rng.integers(1, 30)), int(rng.integers(0, 100))
        time_s += 0.01 + 0.002 * prompt + 0.0005 * rows
        steps.append(
            StepRecord(number, time_s, 1, 1, 1, 0, 0, rows, prompt + rows, rows)
        )
    cost, error = fit_costs(steps)
    assert error < 1e-6
    assert float(cost.seconds.steps) == pytest.approx(0.01, rel=1e-3)
    assert float(cost.seconds.prompt_tokens) == pytest.approx(0.002, rel=1e-3)
    assert float(cost.seconds.decode_rows) == pytest.approx(0.0005, rel=1e-3)


def test_work_that_no_step_has_costs_nothing():
    steps = [
        StepRecord(number, 0.5 * number, 1, 1, 1, 0, 0, 3, 3, 3) for number in range(5)
    ]
    cost, error = fit_costs(steps)
    assert error < 1e-6
    assert float(cost.seconds.steps) == pytest.approx(0.5)
    assert float(cost.seconds.prompt_tokens) == float(cost.seconds.decode_rows) == 0


def test_the_overhead_is_a_ratio_of_throughputs():
    status, out, err = call_experiment(
        "serve_bench", "--mode=overhead", "--streams=4", "--tokens=8", "--runs=1"
    )
    assert status == 0, err
    found = last_json(out)
    speeds = found["tokens_per_s"]
    assert found["ratios"]["server/llm"] == speeds["server"] / speeds["llm"]


def test_a_server_that_is_not_there_is_one_line():
    status, _, err = call_experiment("serve_bench", "--url=http://127.0.0.1:9")
    assert status == 1
    assert err.startswith("serve_bench: ")
    with pytest.raises(ValueError, match="Connect call failed"):
        run_open_loop("http://127.0.0.1:9", [[1]], [1], [0.0])
