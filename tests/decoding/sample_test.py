"""Sampling: exact distributions, independence of the batch, and edge cases."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jpaged import decoding
from jpaged.decoding import (
    Context,
    SamplingRows,
    chain,
    temperature,
    token_keys,
    top_k,
)
from tests.decoding.transforms_test import kept_by_sorting

sample = jax.jit(decoding.sample)


def rows(num_rows: int, **settings: object) -> SamplingRows:
    """Rows with `settings` (scalars or lists) and seeds 0, 1, 2, ..."""
    base = dataclasses.replace(
        SamplingRows.greedy(num_rows),
        temperature=jnp.ones(num_rows),
        seed=jnp.arange(num_rows, dtype=jnp.uint32),
    )
    arrays = {
        name: jnp.broadcast_to(
            jnp.asarray(value, getattr(base, name).dtype), (num_rows,)
        )
        for name, value in settings.items()
    }
    return dataclasses.replace(base, **arrays)


def positions(num_rows: int, first: int = 0) -> jax.Array:
    return jnp.arange(first, first + num_rows, dtype=jnp.int32)


def exact_distribution(
    logits: np.ndarray, temp: float = 1.0, k: int = 0, p: float = 1.0, low: float = 0.0
) -> np.ndarray:
    """The exact distribution of one row, f64[V]."""
    x = logits.astype(np.float64)
    kept = kept_by_sorting(logits, temp, k, p, low)
    weights = np.where(kept, np.exp((x - x.max()) / temp), 0.0)
    return weights / weights.sum()


def chi_square_z(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """The chi-square statistic in standard deviations from its mean.

    Tokens that are expected fewer than 5 times count as one class.
    """
    observed = np.bincount(tokens, minlength=len(probabilities)).astype(np.float64)
    expected = probabilities * len(tokens)
    assert observed[probabilities == 0].sum() == 0, "a token of probability 0"
    is_rare = expected < 5
    observed = np.append(observed[~is_rare], observed[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1]
    statistic = np.sum((observed - expected) ** 2 / expected)
    degrees = len(expected) - 1
    # By Wilson and Hilferty the cube root is nearly normal from 3 degrees on.
    variance = 2 / (9 * degrees)
    return float(((statistic / degrees) ** (1 / 3) - (1 - variance)) / variance**0.5)


NUM_SAMPLES = 32768
LADDER = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 20},
    {"top_k": 80},
    {"top_p": 0.8},
    {"top_p": 0.98},
    {"min_p": 0.03},
    {"temperature": 1.3, "min_p": 0.005, "top_k": 100, "top_p": 0.9},
]


def sample_many(logits: np.ndarray, settings: dict) -> np.ndarray:
    """NUM_SAMPLES tokens of one row of logits, over seeds and positions."""
    batch = jnp.broadcast_to(jnp.asarray(logits), (1024, len(logits)))
    many = [
        sample(batch, rows(1024, **settings), jnp.full(1024, n, jnp.int32))[0]
        for n in range(NUM_SAMPLES // 1024)
    ]
    return np.concatenate([np.asarray(tokens) for tokens in many])


@pytest.mark.parametrize("settings", LADDER, ids=str)
def test_samples_have_the_exact_distribution(settings):
    # 300 entries are three groups, the last of which is partly padding.
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32) * 2
    names = {"temperature": "temp", "top_k": "k", "top_p": "p", "min_p": "low"}
    expected = exact_distribution(logits, **{names[n]: v for n, v in settings.items()})
    # Seeds are fixed; by chance a correct program fails with probability 3e-5.
    assert abs(chi_square_z(sample_many(logits, settings), expected)) < 4


def test_the_chi_square_finds_a_wrong_k_temperature_and_token():
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32) * 2
    tokens = sample_many(logits, {"top_k": 20})
    assert chi_square_z(tokens, exact_distribution(logits, k=21)) > 10
    assert chi_square_z(tokens, exact_distribution(logits, k=20, temp=1.1)) > 10
    expected = exact_distribution(logits, k=20)
    one_off = np.where(tokens == np.argmax(expected), 299, tokens)
    with pytest.raises(AssertionError, match="probability 0"):
        chi_square_z(one_off, expected)


def test_logprobs_are_the_raw_model_s_with_all_settings():
    logits = np.random.default_rng(1).normal(size=(4, 700)).astype(np.float32) * 3
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    ways = [
        rows(4, temperature=0.0),
        rows(4),
        rows(4, temperature=0.5),
        rows(4, temperature=0.5, top_k=5),
    ]
    for way in ways:
        tokens, logprobs = sample(logits, way, positions(4))
        expected = np.take_along_axis(exact, np.asarray(tokens)[:, None], axis=1)[:, 0]
        # Sums of 700 float32 terms.
        np.testing.assert_allclose(logprobs, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vocab_size", [1, 3, 128, 129, 1000])
def test_temperature_zero_is_argmax_with_any_filters(vocab_size):
    logits = np.random.default_rng(2).normal(size=(5, vocab_size)).astype(np.float32)
    # bfloat16 logits tie often.
    logits = np.asarray(jnp.asarray(logits).astype(jnp.bfloat16).astype(jnp.float32))
    settings = rows(5, temperature=[0, 1e-6, 0, 0, 0], top_k=3, top_p=0.1, min_p=0.5)
    tokens, _ = sample(logits, settings, positions(5))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))


def test_top_k_of_one_is_greedy():
    logits = np.random.default_rng(3).normal(size=(64, 900)).astype(np.float32)
    tokens, _ = sample(logits, rows(64, top_k=1), positions(64))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))


MIXED = {
    "temperature": [0, 1, 1, 0.7, 0.7, 1.5, 1, 0.3] * 4,
    "top_k": [0, 0, 5, 0, 200, 0, 0, 0] * 4,
    "top_p": [1, 1, 1, 1, 1, 0.95, 0.5, 1] * 4,
    "min_p": [0, 0, 0, 0, 0, 0, 0, 0.1] * 4,
}


def take(settings: SamplingRows, index: np.ndarray) -> SamplingRows:
    return jax.tree.map(lambda leaf: leaf[index], settings)


def test_a_row_does_not_depend_on_the_other_rows():
    logits = np.random.default_rng(4).normal(size=(32, 2500)).astype(np.float32)
    mixed, places = rows(32, **MIXED), positions(32)
    tokens, logprobs = sample(logits, mixed, places)
    # The same rows in another order, and each kind of row among unused rows.
    order = np.random.default_rng(5).permutation(32)
    shuffled = sample(logits[order], take(mixed, order), places[order])
    np.testing.assert_array_equal(shuffled[0], tokens[order])
    np.testing.assert_array_equal(shuffled[1], logprobs[order])
    for kind in range(8):
        is_kind = np.arange(32) % 8 == kind
        alone = jax.tree.map(
            lambda leaf, idle, is_kind=is_kind: jnp.where(is_kind, leaf, idle),
            mixed,
            SamplingRows.greedy(32),
        )
        got = sample(logits, alone, places)
        np.testing.assert_array_equal(got[0][is_kind], tokens[is_kind])
        np.testing.assert_array_equal(got[1][is_kind], logprobs[is_kind])


def test_tokens_do_not_depend_on_the_batch_size():
    logits = np.random.default_rng(6).normal(size=(32, 2500)).astype(np.float32)
    mixed, places = rows(32, **MIXED), positions(32)
    tokens, logprobs = sample(logits, mixed, places)
    for size in (1, 8):
        for first in range(0, 32, 8):
            part = np.arange(first, first + size)
            got = sample(logits[part], take(mixed, part), places[part])
            np.testing.assert_array_equal(got[0], tokens[part])
            # XLA may add in another order at another batch size.
            np.testing.assert_allclose(got[1], logprobs[part], rtol=1e-6)


def test_seed_sample_and_position_change_the_token_and_nothing_else_does():
    logits = np.zeros((2, 10000), np.float32)
    base = rows(2, seed=7, sample=[0, 0])
    tokens, _ = sample(logits, base, jnp.array([5, 5], jnp.int32))
    assert tokens[0] == tokens[1]
    for changed, places in [
        (rows(2, seed=[7, 8]), [5, 5]),
        (rows(2, seed=7, sample=[0, 1]), [5, 5]),
        (rows(2, seed=7), [5, 6]),
    ]:
        got, _ = sample(logits, changed, jnp.array(places, jnp.int32))
        assert got[0] == tokens[0]
        assert got[1] != tokens[0]


def test_signed_and_unsigned_seeds_have_equal_keys():
    zeros = jnp.zeros(2, jnp.int32)
    signed = token_keys(jnp.array([-1, 3], jnp.int32), zeros, zeros)
    unsigned = token_keys(jnp.array([2**32 - 1, 3], jnp.uint32), zeros, zeros)
    np.testing.assert_array_equal(
        jax.random.key_data(signed), jax.random.key_data(unsigned)
    )


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    st.sets(st.integers(0, 299), min_size=1, max_size=5),
    st.sampled_from([{}, {"temperature": 0.01}, {"top_p": 0.9}, {"top_k": 3}]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 80.0, -300.0]),
)
def test_a_masked_token_is_never_sampled(allowed, settings, seed, level):
    logits = np.full((8, 300), -np.inf, np.float32)
    logits[:, sorted(allowed)] = level
    tokens, logprobs = sample(logits, rows(8, seed=seed, **settings), positions(8))
    assert set(np.asarray(tokens).tolist()) <= allowed
    np.testing.assert_allclose(logprobs, -np.log(len(allowed)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_p": 0.5}])
def test_a_completely_masked_row_gives_token_0_and_minus_infinity(settings):
    logits = np.full((2, 300), -np.inf, np.float32)
    logits[1, 299] = 3.0
    tokens, logprobs = sample(logits, rows(2, **settings), positions(2))
    np.testing.assert_array_equal(tokens, [0, 299])
    np.testing.assert_array_equal(logprobs, [-np.inf, 0.0])


def test_inverse_cdf_never_returns_an_index_of_weight_zero(monkeypatch):
    inverse_cdf = decoding.sample.__globals__["_inverse_cdf"]
    weights = np.zeros((4, 200), np.float32)
    weights[:, 5] = weights[:, 120] = 0.1
    uniform = np.array([0.0, 0.49, 0.51, 1.0], np.float32)  # 1 cannot occur, but works
    np.testing.assert_array_equal(inverse_cdf(weights, uniform), [5, 5, 120, 120])

    # With another order of additions the sum may increase at a weight of 0.
    rounded = jnp.array([[0.5, 0.5000001, 1.0]])
    monkeypatch.setattr(jnp, "cumsum", lambda weights, axis: rounded)
    got = inverse_cdf(jnp.array([[0.5, 0.0, 0.5]]), jnp.array([0.5]))
    np.testing.assert_array_equal(got, [2])


def test_top_logprobs_and_ranks_equal_a_full_sort():
    logits = np.random.default_rng(8).normal(size=(3, 5000)).astype(np.float32)
    logits[1] = np.round(logits[1], 1)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    values, ids = jax.jit(decoding.top_logprobs, static_argnums=1)(logits, 20)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(
        values, np.take_along_axis(exact, order, axis=1), rtol=1e-5
    )
    tokens = np.array([17, 4999, 0], np.int32)
    logprobs, ranks = jax.jit(decoding.token_logprobs)(logits, tokens)
    for s, token in enumerate(tokens):
        assert ranks[s] == 1 + np.sum(logits[s] > logits[s, token])
        np.testing.assert_allclose(logprobs[s], exact[s, token], rtol=1e-5)


def test_greedy_and_sampling_equal_sample_and_continue_their_own_rows():
    logits = jnp.asarray(np.random.default_rng(9).normal(size=(64, 900)), jnp.float32)
    places = positions(64)
    setting = rows(64, temperature=0.8, top_k=40)
    keys = token_keys(setting.seed, setting.sample, places)
    pairs = [
        (decoding.greedy(), rows(64, temperature=0.0)),
        (decoding.sampling(), rows(64)),
        (decoding.sampling(chain(temperature(0.8), top_k(40))), setting),
    ]
    for algorithm, same in pairs:
        state = algorithm.init(64)
        context = [Context(algorithm.parameters)] if algorithm.parameters else []
        state, decision = jax.jit(algorithm.step)(keys, logits, state, *context)
        tokens, logprobs = sample(logits, same, places)
        np.testing.assert_array_equal(decision.tokens, tokens)
        np.testing.assert_allclose(decision.logprobs, logprobs, rtol=1e-6)
        np.testing.assert_array_equal(decision.parents, np.arange(64))
        assert not decision.finished.any()


def test_sampling_needs_no_transfers_and_compiles_once_for_all_settings():
    logits = jax.device_put(np.random.default_rng(10).normal(size=(8, 300)))
    logits, places = logits.astype(jnp.float32), positions(8)
    mixes = [rows(8, temperature=0.0), rows(8), rows(8, temperature=0.5, top_p=0.9)]
    fresh = jax.jit(lambda *args: decoding.sample(*args))
    with jax.transfer_guard("disallow"):
        for mix in mixes:
            fresh(logits, mix, places)
    assert fresh._cache_size() == 1
