"""Logits transforms against float64 numpy with full sorts."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jpaged.decoding import chain, min_p, temperature, top_k, top_p, transforms


def kept_by_sorting(
    logits: np.ndarray, temp: float, k: int, p: float, minimum: float
) -> np.ndarray:
    """The tokens of one row that min-p, top-k and top-p keep, bool[V]."""
    x = logits.astype(np.float64)
    weights = np.exp((x - x.max()) / temp)
    kept = x > -np.inf
    if minimum > 0:
        kept &= weights >= minimum * weights.max()
    if 0 < k < len(x):
        kept &= x >= np.sort(x)[-k]
    if p < 1:
        order = np.argsort(-x, kind="stable")
        mass = np.cumsum(np.where(kept, weights, 0.0)[order])
        # The token with which the mass reaches p is the last one kept.
        edge = order[np.searchsorted(mass, p * mass[-1], side="left")]
        kept &= x >= x[edge]
    return kept


def is_on_the_edge(logits: np.ndarray, temp: float, p: float, kept: np.ndarray) -> bool:
    """Whether float32 rounding (1e-5 of the mass) may change the nucleus."""
    x = np.sort(logits[logits > -np.inf].astype(np.float64))[::-1]
    weights = np.exp((x - x[0]) / temp)
    return bool(np.min(np.abs(np.cumsum(weights) / weights.sum() - p)) < 1e-5)


def kept(logits: np.ndarray, **settings: float) -> np.ndarray:
    """The tokens at or above the threshold of `filter_threshold`, bool[S, V]."""
    num_rows = len(logits)
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    arrays = {
        name: jnp.broadcast_to(
            jnp.asarray(value, jnp.int32 if name == "top_k" else jnp.float32), num_rows
        )
        for name, value in values.items()
    }
    threshold = jax.jit(transforms.filter_threshold)(jnp.asarray(logits), **arrays)
    return (logits >= np.asarray(threshold)[:, None]) & (logits > -np.inf)


def rows_of_kinds(seed: int, vocab_size: int) -> np.ndarray:
    """Peaked, flat, tied, half masked, equal and one-token rows, f32[6, V]."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(6, vocab_size)) * np.array([4, 0.1, 1, 1, 0, 0])[:, None]
    rows[2] = np.round(rows[2] * 4) / 4
    rows[3, rng.random(vocab_size) < 0.5] = -np.inf
    rows[3:, 0] = 1.0
    rows[5, 1:] = -np.inf
    # Adding 0 removes -0.0, which XLA's top_k orders below 0.0 and a sort does not.
    return rows.astype(np.float32) + np.float32(0)


SETTINGS = [
    (1.0, 1, 1.0, 0.0),
    (1.0, 3, 1.0, 0.0),
    (1.0, 64, 1.0, 0.0),
    (1.0, 65, 1.0, 0.0),
    (1.0, 700, 1.0, 0.0),
    (1.0, 0, 0.5, 0.0),
    (0.7, 0, 0.9, 0.0),
    (2.0, 0, 0.999, 0.0),
    (1.0, 0, 0.001, 0.0),
    (0.7, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (0.7, 50, 0.9, 0.001),
    (1.5, 300, 0.8, 0.01),
]


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 128, 2000, 5003])
def test_filters_keep_the_same_tokens_as_full_sorts(vocab_size):
    for number, (temp, k, p, minimum) in enumerate(SETTINGS):
        logits = rows_of_kinds(number, vocab_size)
        ours = kept(logits, temperature=temp, top_k=k, top_p=p, min_p=minimum)
        for row, mine in zip(logits, ours, strict=True):
            expected = kept_by_sorting(row, temp, k, p, minimum)
            if p < 1 and is_on_the_edge(row, temp, p, expected):
                continue
            np.testing.assert_array_equal(mine, expected)


def test_rows_of_one_call_may_have_different_settings():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(len(SETTINGS), 3000)).astype(np.float32)
    temp, k, p, minimum = (np.array(values) for values in zip(*SETTINGS, strict=True))
    ours = kept(logits, temperature=temp, top_k=k, top_p=p, min_p=minimum)
    for s, setting in enumerate(SETTINGS):
        np.testing.assert_array_equal(ours[s], kept_by_sorting(logits[s], *setting))


def test_a_row_that_needs_a_search_does_not_change_other_rows():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(20, 3000)).astype(np.float32)
    p = np.full(20, 0.01)
    alone = kept(logits, top_p=p)
    p[::2] = 0.97  # nuclei of many hundred tokens
    together = kept(logits, top_p=p)
    assert together[::2].sum(axis=1).min() > transforms.NUM_LEADING
    np.testing.assert_array_equal(together[1::2], alone[1::2])


def test_top_k_keeps_all_ties_with_the_kth_largest():
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    np.testing.assert_array_equal(kept(logits, top_k=1), [[1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(kept(logits, top_k=2), [[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(kept(logits, top_k=4), [[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(kept(logits, top_k=5), [[1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(kept(logits, top_k=99), [[1, 1, 1, 1, 1]])


def test_ties_beyond_the_leading_values_are_all_kept():
    logits = np.zeros((1, 4000), np.float32)
    logits[0, :10] = 1.0
    for k in (11, 63, 64, 65, 3000):
        assert kept(logits, top_k=k).all()
    # Ten tokens have e / (e + 399) of the mass, so 0.5 is reached among the ties.
    assert kept(logits, top_p=0.5).all()


def test_the_mass_of_ties_beyond_the_leading_values_counts_for_the_nucleus():
    logits = np.zeros((1, 4000), np.float32)
    logits[0, :10] = np.log(40.0)
    # Top-k of 11 keeps all 4000 tokens, because they tie. Ten tokens have 400 of 4390:
    # less than half of the mass, but most of the mass of the 64 leading values.
    assert kept(logits, top_k=11, top_p=0.5).all()
    assert kept(logits, top_k=11, top_p=0.09).sum() == 10


def test_the_nucleus_ends_with_the_token_that_reaches_p():
    # Probabilities 1/2, 1/4, 1/8, 1/8, all exact in float32.
    logits = np.log(np.array([[4.0, 2.0, 1.0, 1.0]])).astype(np.float32)
    np.testing.assert_array_equal(kept(logits, top_p=0.49), [[1, 0, 0, 0]])
    np.testing.assert_array_equal(kept(logits, top_p=0.51), [[1, 1, 0, 0]])
    np.testing.assert_array_equal(kept(logits, top_p=0.74), [[1, 1, 0, 0]])
    # The last two tie, so both are kept, although one is enough for 0.8.
    np.testing.assert_array_equal(kept(logits, top_p=0.8), [[1, 1, 1, 1]])


def test_the_fused_filters_equal_a_chain_of_single_filters():
    logits = rows_of_kinds(3, 1500)
    settings = {"temperature": 0.7, "top_k": 90, "top_p": 0.9, "min_p": 0.002}
    separate = chain(temperature(0.7), min_p(0.002), top_k(90), top_p(0.9))
    chained = np.asarray(jax.jit(separate)(jnp.asarray(logits)))
    np.testing.assert_array_equal(chained > -np.inf, kept(logits, **settings))


def test_a_chain_of_something_else_than_transforms_is_refused():
    with pytest.raises(TypeError, match=r"logits, as argument 1, got 0\.5"):
        chain(top_k(2), 0.5)


@pytest.mark.parametrize(("vocab_size", "num"), [(9, 9), (5000, 64), (4999, 7)])
def test_leading_equals_a_stable_sort(vocab_size, num):
    logits = rows_of_kinds(4, vocab_size)
    values, ids = jax.jit(transforms.leading, static_argnums=1)(logits, num)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :num]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, order, axis=1))


finite = st.floats(-50, 50, width=16)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.lists(finite | st.just(float("-inf")), min_size=200, max_size=200),
    st.integers(0, 210),
    st.sampled_from([1.0, 0.9, 0.3]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_random_masks_and_ties_equal_sorting(values, k, p, minimum):
    logits = np.array([values], np.float32)
    logits[0, 7] = 0.0
    ours = kept(logits, top_k=k, top_p=p, min_p=minimum)[0]
    expected = kept_by_sorting(logits[0], 1.0, k, p, minimum)
    assert ours[np.argmax(logits[0])]
    if p == 1.0:
        np.testing.assert_array_equal(ours, expected)
    else:
        # With many ties, rounding of the mass may change the nucleus. Then the result
        # is between those of a stricter and a looser p.
        looser = kept_by_sorting(logits[0], 1.0, k, p + 1e-5, minimum)
        stricter = kept_by_sorting(logits[0], 1.0, k, p - 1e-5, minimum)
        assert (stricter <= ours).all()
        assert (ours <= looser).all()


def test_the_oracle_finds_an_off_by_one_k_and_a_strict_nucleus():
    logits = rows_of_kinds(5, 2000)[:2]
    off_by_one = kept(logits, top_k=41)
    for row, mine in zip(logits, off_by_one, strict=True):
        assert (mine != kept_by_sorting(row, 1.0, 40, 1.0, 0.0)).any()
    # A mass strictly above p would keep one token too many if p is reached exactly.
    equal = np.array([[0.0, 0.0, -np.inf, -np.inf]], np.float32)
    equal[0, 1] = -1e-30  # another float32, the same weight
    assert kept_by_sorting(equal[0], 1.0, 0, 0.5, 0.0).sum() == 1
    assert kept(equal, top_p=0.5).sum() == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # min_p keeps .5 and .3; they are then .625 and .375, so .6 is one token.
        ({"min_p": 0.4, "top_p": 0.6}, 1),
        # After top_k the first token has .625 of the mass, too.
        ({"top_k": 2, "top_p": 0.6}, 1),
        ({"top_p": 0.6}, 2),
        ({"min_p": 0.4}, 2),
        ({"min_p": 0.4, "top_k": 3}, 2),
    ],
    ids=str,
)
def test_the_order_of_the_filters_is_that_of_vllm(settings, expected):
    logits = np.log(np.array([[0.15, 0.5, 0.05, 0.3]], np.float32))
    order = np.argsort(-logits[0])
    assert set(np.flatnonzero(kept(logits, **settings)[0])) == set(order[:expected])
