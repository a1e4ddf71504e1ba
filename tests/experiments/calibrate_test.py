"""The engine on a real clock beside the simulation that is fitted to it."""

import numpy as np
import pytest

from experiments import search_policy
from experiments.lib import calibration
from jpaged import load_model
from jpaged.policies import WEIGHTED
from jpaged.simulator.simulate import simulate
from jpaged.simulator.systems.engine_system import EngineSystem
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long
SMALL = ("--num_requests=5", "--longest=12", "--max_num_seqs=4", "--num_blocks=16")


def test_the_fitted_simulation_repeats_the_steps_of_a_burst():
    workload = calibration.short_requests(9, 20, seed=1)
    config = calibration.calibration_config([workload], max_num_seqs=4, num_blocks=12)
    served = calibration.run_workload(load_model("tiny-python"), config, workload)
    cost_model, report = calibration.fit_engine(config, workload, [served])
    outcome = simulate(EngineSystem(config), workload, cost_model)
    assert outcome.num_steps == len(served.step_seconds) == len(report.residuals)
    # The order of the requests does not depend on the clock here.
    for mine, theirs in (
        (served.first_times, outcome.first_times),
        (served.end_times, outcome.end_times),
    ):
        ranks = [np.unique(times, return_inverse=True)[1] for times in (mine, theirs)]
        np.testing.assert_array_equal(*ranks)
        assert ranks[0].max() >= 3
    # The fitted steps add up to the measured time, up to rounding to microseconds.
    assert outcome.makespan == pytest.approx(served.step_seconds.sum(), rel=0.02)


def test_mean_times_equal_means_computed_by_hand():
    workload = calibration.with_poisson_arrivals(
        calibration.short_requests(2, 8, 0), 1.0, 0
    )
    late = workload.arrivals + np.array([1.0, 3.0])
    found = calibration.mean_times(workload, late - 0.5, late)
    assert found["latency_s"] == pytest.approx(2.0)
    assert found["ttft_s"] == pytest.approx(1.5)
    assert found["makespan_s"] == pytest.approx(workload.arrivals[1] + 3.0)
    per_token = np.mean(np.array([1.0, 3.0]) / workload.output_lens)
    assert found["normalized_latency_s"] == pytest.approx(per_token)


def test_calibrate_reports_measured_and_simulated_times():
    status, stdout, _ = call_experiment("calibrate", "--bursts=1", "--runs=1", *SMALL)
    assert status == 0
    record = last_json(stdout)
    assert set(record["ratios"]) == {
        "latency_s",
        "normalized_latency_s",
        "ttft_s",
        "makespan_s",
    }
    (run,) = record["details"]["runs"]
    ratio = run["simulated"]["latency_s"] / run["measured"]["latency_s"]
    assert record["ratios"]["latency_s"] == pytest.approx(ratio)
    # Other processes may slow the engine down, but not by such a factor.
    assert 0.02 < ratio < 50


def test_the_winner_of_a_search_is_best_in_simulation_and_runs():
    status, stdout, _ = call_experiment("search_policy", "--settings=4", *SMALL)
    assert status == 0
    record = last_json(stdout)
    found = record["details"]
    assert found["num_settings"] == 4
    name = "normalized_latency_s"
    before, after = (found[who]["simulated"][name] for who in ("fcfs", "winner"))
    assert after <= before
    assert record["ratios"]["simulated"] == pytest.approx(after / before)
    assert found["winner"]["measured"]["makespan_s"] > 0


def test_settings_depend_on_the_seed_only_and_start_with_the_engine_s_own():
    workload = calibration.short_requests(9, 20, seed=1)
    config = calibration.calibration_config(
        [workload],
        max_num_seqs=4,
        num_blocks=12,
        policy="weighted",
        policy_parameters=(0.0,) * len(WEIGHTED),
    )
    settings = search_policy.sample_settings(30, config, seed=1)
    assert settings == search_policy.sample_settings(30, config, seed=1)
    assert settings[0] == config
    assert len(set(settings)) == 30
