"""The runner `smc_steering`: its potentials on whole texts, and its smallest run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import smc_steering
from tests.support.runners import call_experiment, last_json

TEXTS = ["a", "bcd", "\n", "e\nfghij", "kl\n\nmnopqrstu\nv", "", "Ee"]


def total(potential, initial, tokens) -> float:
    state, logs = initial, []
    for token in tokens:
        state, log = potential(state, jnp.int32(token))
        logs.append(float(log))
    return sum(logs)


def test_short_lines_charges_the_characters_beyond_the_limit():
    potential = smc_steering.short_lines(TEXTS, "x\nyz", 4, 0.5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.integers(0, len(TEXTS), 12).tolist()
        lines = ("yz" + "".join(TEXTS[token] for token in tokens)).split("\n")
        beyond = sum(len(line[4:]) for line in lines)
        assert total(*potential, tokens) == -0.5 * beyond


def test_no_letter_charges_the_letter_in_upper_and_lower_case():
    potential = smc_steering.no_letter(TEXTS, "e", 3.0)
    assert total(*potential, [0, 3, 6, 1]) == -9.0


@pytest.mark.long
def test_the_smallest_run_reports_particles_and_estimates():
    status, out, _ = call_experiment(
        "smc_steering",
        "--particles=3",
        "--num_runs=2",
        "--max_tokens=6",
        "--limit=5",
        "--strength=2",
    )
    assert status == 0
    record = last_json(out)
    for name in ("smc", "importance"):
        found = record["details"][name]
        assert len(found["log_normalisers"]) == len(found["effective_sizes"]) == 2
        assert np.all(np.array(found["log_normalisers"]) < 0)
        assert np.all(np.array(found["effective_sizes"]) <= 3 + 1e-5)
        shown = out.split(f"{name}, run 1: weight and text\n")[1].split("\n")[:3]
        weights = [float(line.split()[0]) for line in shown]
        assert weights == sorted(weights, reverse=True)
        assert abs(sum(weights) - 1) < 1e-3
    assert record["details"]["importance"]["num_resamplings"] == [0, 0]
    assert sum(record["details"]["smc"]["num_resamplings"]) > 0
    assert record["flags"]["particles"] == 3
    assert record["details"]["counters"]["num_generated"] == 2 * 2 * 3 * 6
    assert jax.devices()[0].platform in record["device"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--letter=ab", "--letter: expected one character"),
        ("--threshold=2", "threshold:"),
    ],
)
def test_an_invalid_flag_is_refused(argument, message):
    status, out, err = call_experiment("smc_steering", argument)
    assert (status, out) == (1, "")
    assert f"smc_steering: {message}" in err
    assert "Traceback" not in err
