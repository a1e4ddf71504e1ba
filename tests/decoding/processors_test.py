"""Logits processors: batches of rows, states, and functions that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding import LogitsProcessor, Row, processor
from jpaged.decoding import processors as batches
from jpaged.decoding.processor_checks import check_processors
from jpaged.params import BeamSearchParams, SamplingParams

V, S, LENGTH = 10, 4, 6


def scale(logits, row, *, factor):
    return logits * factor


def count_mod(logits, row, state, *, step):
    return logits + state


def count_next(logits, row, state, token, *, step):
    return state + step * token.astype(jnp.float32)


COUNT = LogitsProcessor(
    count_mod,
    {"step": 2.0},
    init=lambda *, step: jnp.float32(0.0),
    update=count_next,
)


def rows():
    number = jnp.arange(S, dtype=jnp.int32)
    tokens = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (S, 1))
    return Row(tokens, number, number + 1, jax.random.split(jax.random.key(0), S))


def stacked(one, values):
    return {name: jnp.asarray([value] * S) for name, value in values.items()}


def test_only_the_rows_of_a_chain_change_and_forbidden_tokens_stay_so():
    logits = jax.random.normal(jax.random.key(1), (S, V)).at[:, 3].set(-jnp.inf)
    mask = jnp.array([True, False, True, False])
    revive = LogitsProcessor(lambda logits, row: jnp.zeros_like(logits))
    found = batches.process(
        (processor(scale, factor=0.5).kind, revive.kind),
        mask,
        logits,
        rows(),
        (stacked(None, {"factor": 0.5}), {}),
        ((), ()),
        jnp.ones(S),
    )
    np.testing.assert_array_equal(found.logits[1], logits[1])
    np.testing.assert_array_equal(found.logits[3], logits[3])
    expected = jnp.zeros(V).at[3].set(-jnp.inf)
    np.testing.assert_array_equal(found.logits[0], expected)


def test_processors_after_the_temperature_get_divided_logits():
    late = LogitsProcessor(lambda logits, row: logits + 1.0, after_temperature=True)
    early = processor(scale, factor=10.0)
    logits = jnp.ones((S, V))
    temperature = jnp.array([2.0, 0.0, 0.5, 3.0])
    found = batches.process(
        (late.kind, early.kind),  # the order of the list does not matter here
        jnp.array([True, True, True, False]),
        logits,
        rows(),
        ({}, stacked(None, {"factor": 10.0})),
        ((), ()),
        temperature,
    )
    np.testing.assert_allclose(found.logits[:, 0], [6.0, 11.0, 21.0, 1.0])
    np.testing.assert_allclose(found.temperature, [1.0, 0.0, 1.0, 3.0])


def test_states_change_after_tokens_of_the_chains_rows_only():
    mask = jnp.array([True, False, True, True])
    values, states = (stacked(None, {"step": 2.0}),), (jnp.arange(4.0),)
    args = (jnp.zeros((S, V)), rows(), values, states)
    found = batches.process((COUNT.kind,), mask, *args, jnp.ones(S))
    np.testing.assert_allclose(found.logits[:, 0], [0.0, 0.0, 2.0, 3.0])
    after = batches.next_states(
        (COUNT.kind,),
        mask,
        found.inputs,
        rows(),
        values,
        states,
        jnp.array([5, 5, 1, 0]),
    )
    np.testing.assert_allclose(after[0], [10.0, 1.0, 4.0, 3.0])


def test_the_values_of_parameters_are_not_part_of_what_is_compiled():
    one, other = processor(scale, factor=0.5), processor(scale, factor=0.7)
    assert one.kind == other.kind
    assert hash(one.kind) == hash(other.kind)
    assert one.kind != processor(scale, factor=np.zeros(3)).kind
    assert processor(scale, factor=1).parameters["factor"].dtype == np.int32


def nan(logits, row):
    return jnp.where(logits > 0, jnp.nan, logits)


def nan_where_forbidden(logits, row):
    return logits - jnp.mean(logits)


def python_branch(logits, row):
    return logits if row.num_tokens > 3 else -logits


def other_structure(logits, row, state, token):
    return (state, state)


REFUSED = {
    "shape": (lambda logits, row: logits[:3], r"expected logits float32 of shape \(10"),
    "dtype": (lambda logits, row: logits.astype(jnp.int32), "got int32 of shape"),
    "nothing": (lambda logits, row: None, "got None"),
    "nan": (nan, r"got nan for token .* for the example with random logits"),
    "nan of masks": (nan_where_forbidden, "two thirds of the tokens forbidden"),
    "branch": (python_branch, "expected a function that jax can trace"),
    "arguments of vLLM": (lambda tokens, logits, extra: logits, "TypeError"),
    "infinite": (lambda logits, row: logits + jnp.inf, "got inf for token 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_functions_are_refused_with_an_example(name):
    function, message = REFUSED[name]
    params = SamplingParams(logits_processors=[lambda logits, row: logits, function])
    with pytest.raises(ValueError, match=rf"logits_processors\[1\].*{message}"):
        check_processors(params.logits_processors, V)


def test_a_function_with_the_arguments_of_vllm_is_told_ours():
    def force(token_ids, logits):
        return logits

    with pytest.raises(ValueError, match=r"\(logits, row\) and not \(token_ids"):
        check_processors([LogitsProcessor(force)], 10)


def test_bad_states_are_refused():
    wrong = LogitsProcessor(
        lambda logits, row, state: logits,
        init=lambda: jnp.int32(0),
        update=other_structure,
    )
    with pytest.raises(ValueError, match="expected update to keep the structure"):
        check_processors([wrong], V)
    wrong = LogitsProcessor(
        lambda logits, row, state: logits,
        init=lambda: jnp.float32(0),
        update=lambda logits, row, state, token: state / 0.0,
    )
    with pytest.raises(ValueError, match="expected a state without NaN"):
        check_processors([wrong], V)
    with pytest.raises(ValueError, match="init, update: expected both"):
        LogitsProcessor(scale, init=lambda: 0)


def test_a_bad_value_of_a_parameter_shows_the_value():
    check_processors([processor(scale, factor=1.0)], V)
    with pytest.raises(ValueError, match=r"scale\(factor=-3\.0\)"):
        check_processors([processor(lambda_root, factor=-3.0)], V)


def lambda_root(logits, row, *, factor):
    return logits * jnp.sqrt(factor)


lambda_root.__name__ = "scale"


@pytest.mark.parametrize("value", ["x", 3, [3], [SamplingParams], {"a": scale}])
def test_other_values_of_the_parameter_are_refused(value):
    with pytest.raises(ValueError, match="logits_processors"):
        SamplingParams(logits_processors=value)


def test_a_function_is_a_processor_and_none_is_none():
    params = SamplingParams(logits_processors=[scale])
    assert params.logits_processors[0].function is scale
    assert SamplingParams(logits_processors=None).logits_processors == ()
    assert BeamSearchParams(2, 3, logits_processors=[scale]).logits_processors
    with pytest.raises(ValueError, match="parameter factor: expected a finite number"):
        processor(scale, factor=float("nan"))
    with pytest.raises(ValueError, match="parameter factor"):
        processor(scale, factor="a")
