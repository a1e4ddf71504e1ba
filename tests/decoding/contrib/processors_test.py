"""Logits processors of papers, each beside its rule in numpy on tables of logits."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding import Row, contrib
from jpaged.decoding.contrib import watermark
from jpaged.decoding.processor_checks import check_processors

V, LENGTH = 40, 24
SEEDS = range(6)


def softmax(x):
    weights = np.exp(x - np.max(x))
    return weights / weights.sum()


def row_of(tokens, prompt_len=0, seed=0):
    padded = np.full(LENGTH, V, np.int32)
    padded[: len(tokens)] = tokens
    return Row(
        jnp.asarray(padded),
        jnp.int32(prompt_len),
        jnp.int32(len(tokens)),
        jax.random.key(seed),
    )


_apply = jax.jit(lambda kind, *args: kind.apply(*args), static_argnums=0)


def apply(one, logits, tokens=(0,), prompt_len=0, seed=0, state=()):
    """The processed logits of one row."""
    row = row_of(tokens, prompt_len, seed)
    logits = jnp.asarray(logits, jnp.float32)
    return np.asarray(_apply(one.kind, logits, row, state, dict(one.parameters)))


def random_logits(seed):
    """Logits of different sharpness; some have forbidden tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.uniform(0.5, 5), V)
    if seed % 2:
        logits[rng.random(V) < 0.3] = -np.inf
    return logits.astype(np.float32)


def assert_kept(found, logits, kept):
    np.testing.assert_array_equal(found, np.where(kept, logits, -np.inf))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mass", [0.2, 0.7, 0.95])
def test_typical_keeps_the_tokens_nearest_to_the_entropy(seed, mass):
    logits = random_logits(seed)
    p = softmax(logits.astype(np.float64))
    surprise = -np.log(np.maximum(p, 1e-300))
    distance = np.abs(surprise - (p * surprise).sum())
    distance[p == 0] = np.inf
    kept, total = np.zeros(V, bool), 0.0
    for token in np.argsort(distance):
        if total < mass - 1e-6 and p[token] > 0:
            kept[token], total = True, total + p[token]
    assert_kept(apply(contrib.typical(mass), logits), logits, kept)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("epsilon", [1e-4, 0.02, 0.3, 1.0])
def test_epsilon_and_eta_cut_off_by_probability(seed, epsilon):
    logits = random_logits(seed)
    p = softmax(logits.astype(np.float64))
    best = p == p.max()
    assert_kept(
        apply(contrib.epsilon_sampling(epsilon), logits), logits, (p >= epsilon) | best
    )
    entropy = -sum(q * math.log(q) for q in p if q)
    eta = min(epsilon, math.sqrt(epsilon) * math.exp(-entropy))
    assert_kept(apply(contrib.eta_sampling(epsilon), logits), logits, (p >= eta) | best)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [0.3, 1.0, 2.5])
def test_top_n_sigma_ignores_forbidden_tokens_and_temperature(seed, n):
    logits = random_logits(seed)
    allowed = logits[logits > -np.inf].astype(np.float64)
    kept = logits >= allowed.max() - n * allowed.std()
    assert_kept(apply(contrib.top_n_sigma(n), logits), logits, kept)
    cooler = np.float32(4) * logits
    assert_kept(apply(contrib.top_n_sigma(n), cooler), cooler, kept)


def test_mirostat_follows_its_target():
    tau, eta = 3.0, 0.2
    one = contrib.mirostat(tau, eta)
    state, mu = one.kind.init_state(one.parameters), 2 * tau
    rng = np.random.default_rng(0)
    for step in range(12):
        logits = random_logits(step)
        p = softmax(logits.astype(np.float64))
        kept = (-np.log2(np.maximum(p, 1e-300)) <= mu) | (p == p.max())
        assert_kept(apply(one, logits, state=state), logits, kept)
        left = np.where(kept, p, 0) / p[kept].sum()
        token = int(rng.choice(V, p=left))
        mu -= eta * (-math.log2(left[token]) - tau)
        state = one.kind.updated(
            jnp.asarray(logits), row_of([0]), state, jnp.int32(token), one.parameters
        )
        np.testing.assert_allclose(state, mu, rtol=1e-5)


def dry_penalties(tokens, multiplier, base, allowed, breakers):
    """By the definition: try every earlier position, compare backwards."""
    longest = collections.Counter()
    for i in range(len(tokens) - 1):
        length = 0
        while (
            length <= i
            and tokens[i - length] == tokens[len(tokens) - 1 - length]
            and tokens[i - length] not in breakers
            and length < 50
        ):
            length += 1
        longest[tokens[i + 1]] = max(longest[tokens[i + 1]], length)
    return {
        token: multiplier * base ** (length - allowed)
        for token, length in longest.items()
        if length >= allowed
    }


@pytest.mark.parametrize("seed", range(12))
def test_dry_penalises_what_continues_a_repetition(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 2 + seed % 3, rng.integers(1, LENGTH + 1)).tolist()
    breakers = [1] if seed % 4 == 3 else []
    allowed = 1 + seed % 3
    one = contrib.dry(0.7, 1.5, allowed, breakers)
    logits = random_logits(0)
    expected = logits.astype(np.float64)
    for token, penalty in dry_penalties(tokens, 0.7, 1.5, allowed, breakers).items():
        expected[token] -= penalty
    np.testing.assert_allclose(apply(one, logits, tokens), expected, rtol=1e-5)


def test_dry_of_a_known_text():
    found = apply(contrib.dry(1.0, 2.0, 2), np.zeros(V), [5, 6, 7, 9, 5, 6, 8, 5, 6])
    np.testing.assert_array_equal(np.flatnonzero(found), [7, 8])
    found = apply(contrib.dry(1.0, 2.0, 2), np.zeros(V), [4, 5, 6, 7, 4, 5, 6])
    assert found[7] == -2.0  # 1.0 * 2.0 ** (3 - 2)


def test_dry_of_a_very_long_repetition_is_finite():
    one = contrib.dry(0.0, base=100.0)
    tokens, length = jnp.full(64, 3, jnp.int32), jnp.int32(64)
    row = Row(tokens, jnp.int32(60), length, jax.random.key(0))
    found = one.kind.apply(jnp.zeros(V), row, (), dict(one.parameters))
    np.testing.assert_array_equal(found, np.zeros(V))


def test_xtc_drops_all_probable_tokens_but_the_least_as_often_as_asked():
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05, *[1e-9] * (V - 5)]))
    logits = logits.astype(np.float32)
    one = contrib.xtc(threshold=0.12, probability=0.25)
    rows = jax.vmap(lambda key: row_of([0])._replace(key=key))(
        jax.random.split(jax.random.key(0), 2000)
    )
    apply_all = jax.vmap(
        lambda row: one.kind.apply(jnp.asarray(logits), row, (), dict(one.parameters))
    )
    found = np.asarray(apply_all(rows))
    dropped = (found == -np.inf).any(axis=1)
    assert (found[~dropped] == logits).all()
    assert (found[dropped] == np.where(np.arange(V) < 2, -np.inf, logits)).all()
    assert abs(dropped.mean() - 0.25) < 0.04
    always = contrib.xtc(threshold=0.35, probability=1.0)  # a single token above
    np.testing.assert_array_equal(apply(always, logits), logits)


@pytest.mark.parametrize("seed", SEEDS)
def test_dynamic_temperature_follows_the_entropy(seed):
    logits = random_logits(seed)
    p = softmax(logits.astype(np.float64))
    entropy = -sum(q * math.log(q) for q in p if q)
    share = entropy / math.log(np.isfinite(logits).sum())
    temperature = 0.4 + (2.0 - 0.4) * share**0.7
    found = apply(contrib.dynamic_temperature(0.4, 2.0, 0.7), logits)
    np.testing.assert_allclose(found, logits / temperature, rtol=1e-4)


def test_a_thinking_budget_forces_the_end_once():
    end, budget, prompt = [7, 8, 9], 4, [7, 8, 9, 3]
    one = contrib.thinking_budget(budget, end)
    logits = random_logits(0)

    def forced(output):
        found = apply(one, logits, [*prompt, *output], len(prompt))
        kept = np.flatnonzero(found > -np.inf)
        return int(kept[0]) if len(kept) == 1 else None

    assert [forced([1] * i) for i in range(6)] == [None] * 4 + [7, 7]
    assert forced([1, 1, 1, 1, 7]) == 8
    assert forced([1, 1, 1, 1, 7, 8]) == 9
    assert forced([1, 1, 1, 1, 7, 8, 9]) is None
    assert forced([1, 1, 7, 8]) == 9  # it had begun by itself
    assert forced([7, 8, 9, 1, 1, 1, 1]) is None
    assert forced([1] * (LENGTH - len(prompt))) == 7  # no space behind
    full = [1] * (LENGTH - len(prompt) - 3) + end
    assert forced(full) is None
    forbidden = logits.copy()
    forbidden[7] = -np.inf
    found = apply(one, forbidden, [*prompt, 1, 1, 1, 1], len(prompt))
    np.testing.assert_array_equal(found, forbidden)


@pytest.mark.parametrize("width", [1, 3])
def test_the_watermark_favours_green_tokens_and_is_detected(width):
    mark = contrib.Watermark(V, bias=3.0, share=0.3, secret=11, width=width)
    rng = np.random.default_rng(0)
    logits = np.zeros(V, np.float32)
    text = [int(token) for token in rng.integers(0, V, 4)]
    for _ in range(LENGTH - 4):
        context = jnp.asarray(text[-width:], jnp.int32)
        green = np.asarray(
            watermark.green_tokens(context, jnp.uint32(11), jnp.float32(0.3), V)
        )
        found = apply(mark.processor, logits, text)
        np.testing.assert_array_equal(found, np.where(green, 3.0, 0.0))
        text.append(int(rng.choice(V, p=softmax(found.astype(np.float64)))))
    result = mark.detect(text)
    plain = mark.detect(rng.integers(0, V, 200).tolist())
    assert result.z_score > 4
    assert result.p_value < 1e-4
    assert abs(plain.z_score) < 3
    assert plain.p_value > 1e-3
    other = contrib.Watermark(V, share=0.3, secret=12, width=width)
    assert abs(other.detect(text).z_score) < 3
    # The first tokens have no context, and change nothing.
    np.testing.assert_array_equal(
        apply(mark.processor, logits, text[: width - 1]), logits
    )


def test_a_pair_counts_once_and_short_texts_are_refused():
    mark = contrib.Watermark(V)
    text = [3, 5] * 10
    assert mark.detect(text).num_tokens == 2
    every = mark.detect(text, once=False)
    assert every.num_tokens == 19
    assert every.num_green == mark.is_green(text).sum()
    with pytest.raises(ValueError, match=r"tokens: expected more than width \(1\)"):
        mark.detect([3])


ALL = [
    contrib.typical(),
    contrib.epsilon_sampling(),
    contrib.eta_sampling(),
    contrib.top_n_sigma(),
    contrib.mirostat(),
    contrib.dry(sequence_breakers=[1]),
    contrib.xtc(),
    contrib.dynamic_temperature(),
    contrib.thinking_budget(3, [1, 2]),
    contrib.Watermark(V).processor,
]


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_all_pass_the_checks_of_submissions(one):
    check_processors([one], V)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: contrib.typical(0.0), "mass: expected a finite number above 0"),
        (lambda: contrib.epsilon_sampling(2.0), "epsilon: expected .* at most 1"),
        (lambda: contrib.top_n_sigma(0), "n: expected a finite number above 0"),
        (lambda: contrib.mirostat(eta=-1), "eta: expected"),
        (lambda: contrib.dry(base=0.5), "base: expected"),
        (lambda: contrib.dry(sequence_breakers=["a"]), r"sequence_breakers\[0\]"),
        (lambda: contrib.xtc(probability=2), "probability: expected"),
        (lambda: contrib.dynamic_temperature(1, 0.5), "high: expected"),
        (lambda: contrib.thinking_budget(-1, 3), "budget: expected"),
        (lambda: contrib.thinking_budget(1, []), "end: expected"),
        (lambda: contrib.Watermark(V, share=1.0), "share: expected"),
        (lambda: contrib.classifier_free_guidance(None), "scale: expected"),
        (lambda: contrib.classifier_free_guidance(1, -1), "temperature: expected"),
        (lambda: contrib.entropy_branching("2"), "threshold: expected"),
        (lambda: contrib.contrastive_decoding(alpha=0), "alpha: expected"),
        (lambda: contrib.contrastive_decoding(beta=-1), "beta: expected"),
        (lambda: contrib.dola([0], alpha=2), "alpha: expected"),
        (
            lambda: contrib.contrastive_search(max_tokens=0, hidden_size=8),
            "max_tokens: expected",
        ),
        (
            lambda: check_processors([contrib.thinking_budget(1000, [1, V])], V),
            "expected finite logits",
        ),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
