"""Repeated algorithms against several runs, one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding import Context, Decision, DecodingAlgorithm, contrib, sampling
from jpaged.decoding.repeated import repeated, repeated_params
from jpaged.params import AlgorithmParams

V, N = 7, 3


def shuffle_step(keys, logits, state, context):
    """Uses everything that a step gets, moves rows, and retains a sequence."""
    count = len(logits)
    order = jax.random.permutation(keys[0], count).astype(jnp.int32)
    scores = logits + context.layers.sum(axis=0) + context.draft
    tokens = jax.vmap(jax.random.categorical)(keys, scores[order]).astype(jnp.int32)
    tokens += context.num_tokens + context.tokens[:, 0]
    tokens = (tokens + context.hidden.sum(axis=1).astype(jnp.int32)) % V
    parents = jnp.append(order, jnp.int32(state % (count + 1)))
    logprobs = context.parameters["scale"] * logits[0, tokens]
    decision = Decision(
        jnp.append(tokens, tokens[0]),
        parents,
        jnp.append(logprobs, logprobs[-1]),
        jnp.append(context.limits < context.prompt_lens, True),
    )
    return state + tokens.sum(), decision


SHUFFLE = DecodingAlgorithm(
    lambda num_rows: jnp.int32(1),
    shuffle_step,
    needs={"history", "hidden", "layers", "draft"},
    layers=(0, 2),
    hidden_size=4,
    parameters={"scale": 2.0},
)


def context_of(rows, seed):
    rng = np.random.default_rng(seed)

    def integers():
        return jnp.asarray(rng.integers(0, V, rows), jnp.int32)

    def floats(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return Context(
        {"scale": jnp.float32(2.0)},
        integers(),
        integers(),
        integers(),
        tokens=jnp.asarray(rng.integers(0, V, (rows, 5)), jnp.int32),
        hidden=floats(rows, 4),
        layers=floats(2, rows, V),
        draft=floats(rows, V),
    )


def test_a_step_of_n_runs_is_n_steps():
    rows = 2
    both, state = repeated(SHUFFLE, N), repeated(SHUFFLE, N).init(rows * N)
    states = [SHUFFLE.init(rows) for _ in range(N)]
    for number in range(4):
        keys = jax.random.split(jax.random.key(number), rows * N)
        logits = jax.random.normal(jax.random.key(number), (rows * N, V))
        context = context_of(rows * N, number)
        state, found = both.step(keys, logits, state, context)
        for run in range(N):
            mine = jnp.arange(rows) * N + run
            own = jax.tree.map(
                lambda x, at=mine: x[at], context._replace(parameters={}, layers=None)
            )
            own = own._replace(
                parameters=context.parameters, layers=context.layers[:, mine]
            )
            states[run], one = SHUFFLE.step(keys[mine], logits[mine], states[run], own)
            sequences = np.arange(rows + 1) * N + run
            assert found.tokens[sequences].tolist() == one.tokens.tolist()
            parents = np.asarray(one.parents) * N + run
            assert found.parents[sequences].tolist() == parents.tolist()
            np.testing.assert_allclose(found.logprobs[sequences], one.logprobs)
            assert found.finished[sequences].tolist() == one.finished.tolist()


def test_parameters_are_those_of_all_runs():
    cfg = contrib.classifier_free_guidance(2.0)
    params = AlgorithmParams(cfg, 2, companions=[[4, 5]], n=N, num_return=1)
    found = repeated_params(params)
    assert (found.num_rows, found.n, found.num_return) == (2 * N, 1, N)
    assert found.companions == ((4, 5),) * N
    assert found.algorithm == repeated_params(params).algorithm
    assert found.algorithm.num_companions == N
    alone = AlgorithmParams(sampling())
    assert repeated_params(alone) is alone


def test_n_is_refused_in_the_pure_engine_with_what_to_use():
    from jpaged.config import EngineConfig
    from jpaged.engine import check_request

    config = EngineConfig(num_blocks=8, max_model_len=32)
    with pytest.raises(ValueError, match=r"n: expected 1 in the pure engine.*repeated"):
        check_request(config, [1], AlgorithmParams(sampling(), n=2), vocab_size=V)
