"""The engine on a real clock: its steps are those of the simulation fitted to it."""

import json

import numpy as np
import pytest

from experiments import search_policy
from experiments.lib import calibration as calibration
from jpaged import load_model
from jpaged.policies import WEIGHTED
from jpaged.simulator.simulate import simulate
from jpaged.simulator.systems.engine_system import EngineSystem
from tests.support import runners

pytestmark = pytest.mark.long
SMALL = ("--num_requests=5", "--longest=12", "--max_num_seqs=4", "--num_blocks=16")


def test_a_burst_takes_the_steps_that_the_simulation_says_in_the_times_it_had():
    workload = calibration.short_requests(9, 20, seed=1)
    config = calibration.engine_config([workload], max_num_seqs=4, num_blocks=12)
    served = calibration.serve(load_model("tiny-python"), config, workload)
    cost_model, report = calibration.fit_engine(config, workload, [served])
    outcome = simulate(EngineSystem(config), workload, cost_model)
    assert outcome.num_steps == len(served.step_seconds) == len(report.residuals)
    # Who was before whom depends on no clock here.
    for mine, theirs in (
        (served.first_times, outcome.first_times),
        (served.end_times, outcome.end_times),
    ):
        ranks = [np.unique(times, return_inverse=True)[1] for times in (mine, theirs)]
        np.testing.assert_array_equal(*ranks)
        assert ranks[0].max() >= 3
    # What was fitted adds up to what was measured, but for rounding to microseconds.
    assert outcome.makespan == pytest.approx(served.step_seconds.sum(), rel=0.02)


def test_means_are_those_of_a_hand():
    workload = calibration.arriving(calibration.short_requests(2, 8, 0), 1.0, 0)
    late = workload.arrivals + np.array([1.0, 3.0])
    found = calibration.means(workload, late - 0.5, late)
    assert found["latency_s"] == pytest.approx(2.0)
    assert found["ttft_s"] == pytest.approx(1.5)
    assert found["makespan_s"] == pytest.approx(workload.arrivals[1] + 3.0)
    per_token = np.mean(np.array([1.0, 3.0]) / workload.output_lens)
    assert found["normalized_latency_s"] == pytest.approx(per_token)


def test_calibrate_prints_both_sides():
    status, stdout, _ = runners.run_experiment(
        "calibrate", "--bursts=1", "--runs=1", *SMALL
    )
    assert status == 0
    record = json.loads(stdout.splitlines()[-1])
    assert set(record["ratios"]) == {
        "latency_s",
        "normalized_latency_s",
        "ttft_s",
        "makespan_s",
    }
    (run,) = record["details"]["runs"]
    ratio = run["simulated"]["latency_s"] / run["measured"]["latency_s"]
    assert record["ratios"]["latency_s"] == pytest.approx(ratio)
    # Other processes may slow the engine down, by no factor like this.
    assert 0.02 < ratio < 50


def test_the_winner_of_a_search_is_the_least_and_runs():
    status, stdout, _ = runners.run_experiment("search_policy", "--settings=4", *SMALL)
    assert status == 0
    record = json.loads(stdout.splitlines()[-1])
    found = record["details"]
    assert found["num_settings"] == 4
    name = "normalized_latency_s"
    before, after = (found[who]["simulated"][name] for who in ("fcfs", "winner"))
    assert after <= before
    assert record["ratios"]["simulated"] == pytest.approx(after / before)
    assert found["winner"]["measured"]["makespan_s"] > 0


def test_settings_are_drawn_alike_and_begin_with_the_engines_own():
    workload = calibration.short_requests(9, 20, seed=1)
    config = calibration.engine_config(
        [workload],
        max_num_seqs=4,
        num_blocks=12,
        policy="weighted",
        policy_parameters=(0.0,) * len(WEIGHTED),
    )
    settings = search_policy.draw_settings(30, config, seed=1)
    assert settings == search_policy.draw_settings(30, config, seed=1)
    assert settings[0] == config
    assert len(set(settings)) == 30
