"""The runner `occupancy`: its statistics, and its smallest run."""

import csv
import functools
import importlib.util

import numpy as np
import pytest

from experiments import occupancy
from jpaged.outputs import RequestOutput
from jpaged.serving.metrics import LATENCIES, StepRecord
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long

run = functools.partial(call_experiment, "occupancy")


def test_a_small_run_writes_table_figure_and_json(tmp_path):
    table, figure = tmp_path / "steps.csv", tmp_path / "figure.png"
    arguments = ["--num_requests=6", "--rate=20", f"--csv={table}"]
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    if has_matplotlib:
        arguments.append(f"--plot={figure}")
    status, out, _ = run(*arguments)
    assert status == 0
    details = last_json(out)["details"]
    assert set(details["latencies_s"]) == set(LATENCIES)
    shares = details["kv_composition"]
    parts = [shares[name] for name in ("token_states", "reserved", "free")]
    np.testing.assert_allclose(sum(parts), 1)
    assert min(parts) > 0
    assert details["num_requests"] == 6
    assert details["num_lost_events"] == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == StepRecord._fields
    assert len(rows) == details["num_steps"]
    generated = sum(int(row["num_generated"]) for row in rows)
    assert generated == details["num_generated"]
    assert not has_matplotlib or figure.stat().st_size > 1000
    assert "KV slots: token states" in out


def record(**counts):
    zeros = dict.fromkeys(StepRecord._fields, 0)
    return StepRecord(**zeros | counts)


def test_the_composition_is_the_mean_of_the_steps():
    steps = [
        record(num_used_blocks=2, num_token_states=5, num_reserved_slots=3),
        record(num_used_blocks=4, num_token_states=15, num_reserved_slots=1)._replace(
            num_saved_blocks=1
        ),
    ]
    assert occupancy.composition(steps, num_blocks=10, block_size=4) == dict(
        token_states=10 / 40, reserved=2 / 40, free=28 / 40, saved=0.5 * 4 / 40
    )


def test_the_latency_table_has_percentiles_of_the_requests_with_a_latency():
    none = dict.fromkeys(LATENCIES)
    outputs = [
        RequestOutput(number, None, [1], [], metrics=none | dict(total_s=float(number)))
        for number in range(101)
    ]
    outputs.append(RequestOutput(101, None, [1], [], metrics=none))
    assert occupancy.latency_table(outputs) == dict(
        total_s=dict(mean=50.0, p50=50.0, p90=90.0, p99=99.0)
    )


def test_arrivals_start_at_0_and_have_the_rate():
    times = occupancy.poisson_arrivals_s(4000, 5.0, seed=1)
    assert times[0] == 0
    assert times == sorted(times)
    assert abs(4000 / times[-1] - 5) < 0.3
    assert occupancy.poisson_arrivals_s(4000, 5.0, seed=2) != times


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--num_blocks=2", "blocks"),
        ("--block_size=0", "flag --block_size=0"),
        ("--model=nowhere", "model: "),
        ("--rate=0", "flag --rate=0"),
    ],
)
def test_an_invalid_flag_is_refused(argument, message):
    status, out, err = run(argument)
    assert status == 1
    assert message in out + err
    assert "Traceback" not in err
