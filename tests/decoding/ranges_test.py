"""Numbers out of range are refused by name: in constructors, and in requests."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding import (
    DecodingAlgorithm,
    Range,
    chain,
    contrib,
    min_p,
    sampling,
    smc,
    temperature,
    top_k,
    top_p,
)
from jpaged.decoding.repeated import repeated
from jpaged.params import AlgorithmParams, SamplingParams


def twisted(**settings):
    return contrib.twisted_smc(lambda state, token: (state, 0.0), 0, **settings)


def contrastive(**settings):
    return contrib.contrastive_search(max_tokens=2, hidden_size=4, **settings)


def dola(**settings):
    return contrib.dola((0,), **settings)


ALGORITHMS = [
    (contrib.entropy_branching, "temperature", -0.1, "of at least 0"),
    (contrib.contrastive_decoding, "temperature", -1, "of at least 0"),
    (contrib.contrastive_decoding, "alpha", 0, "above 0 and at most 1"),
    (contrib.contrastive_decoding, "beta", -0.5, "of at least 0"),
    (contrib.classifier_free_guidance, "temperature", -1.0, "of at least 0"),
    (contrib.experts, "share", 1.5, "of at least 0 and at most 1"),
    (contrib.experts, "temperature", -2.0, "of at least 0"),
    (dola, "alpha", 1e-50, "above 0 and at most 1"),  # 0 as float32
    (dola, "temperature", -1.0, "of at least 0"),
    (contrastive, "alpha", 1.01, "of at least 0 and at most 1"),
    (twisted, "threshold", -0.01, "of at least 0 and at most 1"),
]
COMPANIONS = {contrib.classifier_free_guidance: 1, contrib.experts: 2}


def message(name, expected, value):
    found = f"{name}: expected a finite number {expected}, got {value!r} "
    return "^" + re.escape(found)


@pytest.mark.parametrize(("make", "name", "value", "expected"), ALGORITHMS)
def test_algorithms_refuse_numbers_by_name(make, name, value, expected):
    companions = [[5]] * COMPANIONS.get(make, 0)
    rows = len(companions) + 1
    with pytest.raises(ValueError, match=message(name, expected, value)):
        make(**{name: value})
    where = f"parameters['{name}']"
    with pytest.raises(ValueError, match=message(where, expected, value)):
        AlgorithmParams(make(), rows, parameters={name: value}, companions=companions)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"{name}.*: expected a finite number"):
            make(**{name: wrong})
        with pytest.raises(ValueError, match=rf"{name}.*: expected a finite number"):
            AlgorithmParams(
                make(), rows, parameters={name: wrong}, companions=companions
            )
    AlgorithmParams(make(), rows, parameters={name: 0.5}, companions=companions)


TRANSFORMS = [
    (temperature, "temperature", 0, "above 0"),
    (temperature, "temperature", -1.0, "above 0"),
    (top_k, "top_k", -1, "of at least 0"),
    (top_p, "top_p", 0, "above 0 and at most 1"),
    (top_p, "top_p", 1.2, "above 0 and at most 1"),
    (min_p, "min_p", -0.1, "of at least 0 and at most 1"),
]


@pytest.mark.parametrize(("make", "name", "value", "expected"), TRANSFORMS)
def test_transforms_refuse_numbers_by_name(make, name, value, expected):
    with pytest.raises(ValueError, match=message(name, expected, value)):
        make(value)
    with pytest.raises(ValueError, match=rf"^{name}: expected a finite number"):
        make(math.nan)
    algorithm = sampling(chain(temperature(0.8), make(0.5)))
    where = f"parameters['{name}_1']"
    for one in (algorithm, repeated(algorithm, 2)):  # as n=2 runs it
        with pytest.raises(ValueError, match=message(where, expected, value)):
            AlgorithmParams(one, 2, parameters={f"{name}_1": value})


def test_arrays_and_unknown_names():
    def make(values, **ranges):
        return DecodingAlgorithm(
            lambda num_rows: (),
            lambda *args: args,
            parameters={"weights": values},
            ranges=ranges,
        )

    share = Range(0, 1)
    algorithm = make(np.array([0.5, 1.0]), weights=share)
    assert algorithm.parameters["weights"].dtype == np.float32
    with pytest.raises(ValueError, match=r"^weights: expected a finite number of at"):
        make(np.array([0.5, 1.5]), weights=share)
    with pytest.raises(
        ValueError, match=r"^parameters\['weights'\]: expected a finite"
    ):
        AlgorithmParams(algorithm, parameters={"weights": np.array([0.5, -1.0])})
    with pytest.raises(ValueError, match=r"^ranges: expected names of \['weights'\]"):
        make(np.zeros(2), weight=share)
    # Ranges are no part of what is compiled.
    assert make(np.zeros(2), weights=share).specs == make(np.zeros(2)).specs


@pytest.mark.parametrize("limit", [0.1, 0.7, 1e-30])
def test_limits_are_compared_as_float32(limit):
    Range(high=limit).check("x", limit)
    Range(low=limit).check("x", np.full(2, limit))
    with pytest.raises(ValueError, match=r"^x: expected a finite number above"):
        Range(above=limit).check("x", limit)


def test_other_kinds_of_values():
    def make(value, one=Range(0, 9)):  # noqa: B008
        return DecodingAlgorithm(
            lambda num_rows: (),
            lambda *args: args,
            parameters={"x": value},
            ranges={"x": one},
        )

    for value in (np.array([1, 2]), [1, 2], 3, np.int32(4)):
        assert make(value).parameters["x"].dtype == np.float32
    for wrong in ("a", True, [1, "b"], None, {}):
        with pytest.raises(ValueError, match=r"^x: expected a finite number of at"):
            make(wrong)
    with pytest.raises(ValueError, match=r"^ranges\['x'\]: expected a Range"):
        make(1, (0, 1))


def test_transforms_accept_traced_numbers():
    logits = jnp.arange(4.0)[None]
    values = jnp.array([0.5, 2.0])
    found = jax.vmap(lambda value: temperature(value)(logits))(values)
    expected = np.asarray(logits) / np.asarray(values)[:, None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_particles_and_ordinary_requests_refuse_theirs():
    with pytest.raises(ValueError, match=r"^threshold: expected a finite number"):
        smc(lambda state, token: (state, 0.0), 0, threshold=math.nan)
    for name, value in (("temperature", -1), ("top_k", -2), ("top_p", 0)):
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got {value}"):
            SamplingParams(**{name: value})
        with pytest.raises(ValueError, match=rf"^{name}: expected .* got nan"):
            SamplingParams(**{name: math.nan})
