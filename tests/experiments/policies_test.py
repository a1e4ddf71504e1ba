"""The runner `policies`: its metrics by hand, and one program for all policies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import policies as runner
from jpaged.config import EngineConfig
from jpaged.policies import BUDGET, KINDS, NO_DEADLINE
from jpaged.simulator.simulate import sweep
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.workloads.workload import Workload
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long
SIZES = dict(
    num_blocks=64,
    block_size=4,
    max_num_seqs=3,
    max_model_len=64,
    max_num_batched_tokens=12,
    max_num_requests=48,
    enable_prefix_caching=True,
)
ONE_PROGRAM = dict(
    policy=runner.any_admission,
    policy_parameters=(0.0, *runner.QUANTA),
    preemption_policy=runner.any_preemption,
    preemption_parameters=(0.0, *runner.QUANTA),
    budget_policy=runner.any_budget,
    budget_parameters=(0.0, runner.CHUNK_SHARE),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConstantCost:
    """A cost model whose steps all take the same time."""

    seconds: jax.Array

    def __call__(self, load):
        del load
        return self.seconds


TENTH = ConstantCost(jnp.float32(0.1))


def test_metrics_are_those_computed_by_hand():
    workload = Workload(
        np.array([0.0, 1.0]),
        [3, 3],
        [1, 5],
        users=np.array([0, 1]),
        deadlines_ms=np.array([1000, NO_DEADLINE]),
    )
    found = runner.measure(workload, np.array([2.0, 3.0]), np.array([2.0, 7.0]))
    assert found == {
        "latency_s": 4.0,
        "ttft_s": 2.0,
        "tpot_s": 1.0,
        "missed": 0.5,
        "light_users_s": 6.0,
    }
    mean, half = runner.summarise([found, found | {"latency_s": 6.0}])["latency_s"]
    assert mean == 5.0
    assert half == pytest.approx(12.706, abs=0.01)  # t of one degree of freedom


def test_every_admission_and_budget_policy_is_compared():
    left_out = {"weighted", "priority", "longest_prefix"}  # nothing to choose by
    used = {setting.policy for setting in runner.SETTINGS.values()}
    assert used == set(KINDS[0].policies) - left_out
    assert {setting.budget for setting in runner.SETTINGS.values()} == set(
        BUDGET.policies
    )


def mean_end(lens, order, num_rows):
    """Mean end if each row takes the next request when it is free, in steps."""
    rows, ends = [0] * num_rows, []
    for index in order:
        row = int(np.argmin(rows))
        rows[row] += lens[index]
        ends.append(rows[row])
    return np.mean(ends)


def test_shortest_job_first_halves_mean_latency_and_one_program_runs_all():
    rng = np.random.default_rng(6)
    outputs = np.clip(rng.lognormal(1.3, 1.5, 40), 1, 50).astype(int)
    workload = Workload(np.zeros(40), rng.integers(1, 4, 40), outputs)
    config = EngineConfig(**SIZES, **ONE_PROGRAM)
    names = ["fcfs", "shortest_job", "feedback"]
    systems = [
        EngineSystem(runner.with_setting(config, runner.SETTINGS[name]))
        for name in names
    ]
    ends = [one.end_times for one in sweep(systems, workload, TENTH)]
    means = dict(zip(names, map(np.mean, ends), strict=True))
    ratio = means["shortest_job"] / means["fcfs"]
    assert ratio < 0.5
    by_length = np.argsort(outputs, kind="stable")
    expected = mean_end(outputs, by_length, 3) / mean_end(outputs, range(40), 3)
    assert ratio == pytest.approx(expected, abs=0.1)
    # A feedback queue knows no lengths, and short requests still need not wait.
    is_short = outputs <= runner.QUANTA[0]
    assert ends[2][is_short].mean() < 0.7 * ends[0][is_short].mean()
    # The same policies by name, in a program of their own.
    named = EngineConfig(
        **SIZES, policy="shortest_job", preemption_policy="longest_job"
    )
    (alone,) = sweep([EngineSystem(named)], workload, TENTH)
    assert alone.end_times.tolist() == ends[1].tolist()


def test_the_runner_simulates_and_runs_policies():
    status, out, _ = call_experiment(
        "policies",
        *("--num_requests=6", "--longest=12", "--max_num_seqs=2", "--num_blocks=16"),
        *("--seeds=2", "--loads=2", "--engine_loads=2"),
        "--policies=fcfs,feedback",
    )
    assert status == 0
    record = last_json(out)
    kinds = {(row["kind"], row["policy"], row["load"]) for row in record["rows"]}
    assert kinds == {
        (kind, policy, 2.0)
        for kind in ("simulated", "engine")
        for policy in ("fcfs", "feedback")
    }
    assert record["ratios"]["engine"]["fcfs"] == 1.0
    assert all(row["latency_s"][0] > 0 for row in record["rows"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--policies=lifo", "--policies: expected some of fcfs"),
        ("--loads=0", "--loads: expected numbers above 0"),
        ("--engine_loads=many", "--engine_loads: expected numbers above 0"),
    ],
)
def test_bad_flags_are_refused(argument, message):
    status, _, err = call_experiment("policies", argument)
    assert status == 1
    assert message in err
