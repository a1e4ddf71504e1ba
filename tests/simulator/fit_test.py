"""Fits recover known coefficients, and reject ambiguous measurements."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from jpaged.simulator.costs.features import Features, features
from jpaged.simulator.costs.fit import fit, measured_features
from tests.support.step_loads import step_load

RNG = np.random.default_rng(3)


def random_loads(count):
    loads = []
    for _ in range(count):
        rows = [(1, int(c)) for c in RNG.integers(1, 400, RNG.integers(1, 5))]
        if RNG.random() < 0.5:
            chunk = int(RNG.integers(2, 200))
            rows.append((chunk, chunk + int(RNG.integers(0, 300))))
        loads.append(step_load(*rows, num_logits=len(rows)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *loads)


def test_features_are_the_sums_of_the_rows():
    load = step_load((1, 10), (1, 30), (4, 9), (0, 77), copied=2, swapped=3, pieces=1)
    work = {name: float(x) for name, x in features(load)._asdict().items()}
    assert work == {
        "steps": 1,
        "prompt_steps": 1,
        "prompt_rows": 1,
        "prompt_tokens": 4,
        "prompt_squares": 16,
        "prompt_past": 4 * 5,
        "decode_rows": 2,
        "decode_contexts": 40,
        "longest_context": 30,
        "logits": 4,
        "copied_tokens": 2,
        "swapped_tokens": 3,
        "swap_copies": 1,
    }
    assert float(features(load).num_tokens) == 6
    assert float(features(load).prompt_pairs) == 6 + 7 + 8 + 9


@pytest.mark.parametrize("relative", [False, True])
def test_a_fit_recovers_known_coefficients_and_predicts(relative):
    truth = {
        "steps": 2e-3,
        "prompt_tokens": 1e-5,
        "prompt_past": 3e-8,
        "decode_rows": 4e-5,
        "decode_contexts": 2e-7,
    }
    loads = random_loads(60)
    work = measured_features(loads)
    seconds = sum(value * work[name] for name, value in truth.items())
    chosen = {name: work[name] for name in truth}
    model, report = fit(chosen, seconds, relative=relative)
    for name, value in truth.items():
        assert report.coefficients[name] == pytest.approx(value, rel=1e-6)
    assert report.explained == pytest.approx(1)
    assert report.rms_s < 1e-9
    np.testing.assert_allclose(jax.jit(jax.vmap(model))(loads), seconds, rtol=1e-5)


def test_the_report_has_the_residuals():
    work = {"steps": np.ones(4), "decode_rows": np.array([1.0, 2, 3, 4])}
    seconds = np.array([2.1, 2.9, 4.1, 4.9])
    _, report = fit(work, seconds)
    slope, base = np.polyfit(work["decode_rows"], seconds, 1)
    left = seconds - base - slope * work["decode_rows"]
    np.testing.assert_allclose(report.residuals, left, atol=1e-12)
    assert report.rms_s == pytest.approx(np.sqrt(np.mean(left**2)))
    assert report.max_error == pytest.approx(np.max(np.abs(left) / seconds))
    assert report.explained == pytest.approx(1 - np.sum(left**2) / np.var(seconds) / 4)


@pytest.mark.parametrize("seed", range(5))
def test_nonnegative_least_squares_is_the_best_subset_of_columns(seed):
    rng = np.random.default_rng(seed)
    matrix, y = rng.normal(size=(12, 5)), rng.normal(size=12)
    best = np.linalg.norm(y)
    for chosen in itertools.product([False, True], repeat=5):
        if any(chosen):
            x = np.linalg.lstsq(matrix[:, chosen], y, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, np.linalg.norm(y - matrix[:, chosen] @ x))
    x, _ = nnls(matrix, y)
    assert (x >= 0).all()
    assert np.linalg.norm(y - matrix @ x) == pytest.approx(best, rel=1e-9)


ONES = [1.0] * 6
RISING = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("work", "seconds", "message"),
    [
        ({}, RISING, "expected features among steps, .*, got none"),
        ({"tokens": ONES}, RISING, "got tokens"),
        ({"steps": ONES[:5]}, RISING, "steps: expected 6 numbers"),
        ({"steps": ONES}, [*RISING[:5], -1.0], "seconds: .* got -1.0 in measurement 5"),
        ({"steps": [1.0], "logits": [2.0]}, [1.0], "at least 2 measurements"),
        (
            {"steps": ONES, "logits": [0.0] * 6},
            RISING,
            "expected steps with logits, got none",
        ),
        (
            {"decode_rows": RISING, "logits": RISING},
            RISING,
            "got decode_rows, logits, which rise",
        ),
        ({"steps": [ONES]}, RISING, "steps: expected one number a step"),
    ],
)
def test_ambiguous_measurements_raise(work, seconds, message):
    with pytest.raises(ValueError, match=message):
        fit(work, seconds)


def test_a_relative_fit_needs_positive_seconds():
    with pytest.raises(ValueError, match="more than 0 for a relative fit"):
        fit({"steps": ONES}, [0.0, *RISING[1:]], relative=True)


def test_measured_features_have_all_features():
    assert set(measured_features(random_loads(2))) == set(Features._fields)
