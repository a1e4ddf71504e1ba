"""Logits rules against plain Python in float64, hand-computed numbers and others."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jpaged import decoding
from jpaged.decoding import LogitsRules, RuleSizes, check_rules, rule_arrays, rules
from jpaged.params import SamplingParams
from tests.decoding.sample_test import chi_square_z, exact_distribution
from tests.decoding.sample_test import rows as sampling_rows

V, L, S, E = 40, 12, 4, 3
SIZES = RuleSizes(num_bias=4, num_bad_words=4, bad_word_len=4, num_allowed=64)


@dataclasses.dataclass
class Case:
    """One row: parameters, tokens of bad words, known tokens, tokens that end it."""

    params: SamplingParams
    bad_words: list[tuple[int, ...]]
    tokens: list[int]
    prompt_len: int
    stop_ids: list[int]


def by_hand(logits: np.ndarray, case: Case) -> np.ndarray:
    """The logits f64[V] after the rules, one after the other in plain Python."""
    x = [float(value) for value in logits]
    params = case.params
    output = case.tokens[case.prompt_len :]
    if params.allowed_token_ids is not None:
        for token in set(range(len(x))) - set(params.allowed_token_ids):
            x[token] = -np.inf
    for *before, last in case.bad_words:
        if not before or output[-len(before) :] == before:
            x[last] = -np.inf
    if len(output) < params.min_tokens:
        for token in case.stop_ids:
            x[token] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(case.tokens):
        penalty = params.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token)
        x[token] -= params.presence_penalty
    return np.array(x)


@functools.cache
def compiled(order: tuple):
    """A jitted `rules.apply` for each (planted) order."""
    del order
    return jax.jit(lambda *arguments: rules.apply(*arguments))


def apply_to(logits: np.ndarray, cases: list[Case], sizes: RuleSizes = SIZES):
    """Logits f32[S, V] after the rules of `cases`, computed in one call."""
    encoded = [rule_arrays.encode_rules(c.params, sizes, c.bad_words) for c in cases]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *encoded)
    # Entries after the last token must be ignored; here they are token 0.
    tokens = np.zeros((len(cases), L), np.int32)
    stop_ids = np.full((len(cases), E), -1, np.int32)
    for s, case in enumerate(cases):
        tokens[s, : len(case.tokens)] = case.tokens
        stop_ids[s, : len(case.stop_ids)] = case.stop_ids
    changed = compiled(rules._ORDER)(
        jnp.asarray(logits),
        stacked,
        jnp.asarray(tokens),
        jnp.array([case.prompt_len for case in cases], jnp.int32),
        jnp.array([len(case.tokens) for case in cases], jnp.int32),
        jnp.asarray(stop_ids),
    )
    return np.asarray(changed)


# Few different tokens, so that repetitions and bad words occur.
token_ids = st.integers(0, 5) | st.integers(0, V - 1)


@st.composite
def random_cases(draw) -> Case:
    def sometimes(values, otherwise):
        return draw(st.just(otherwise) | values)

    params = SamplingParams(
        repetition_penalty=sometimes(st.floats(0.25, 4.0), 1.0),
        presence_penalty=sometimes(st.floats(-2, 2), 0.0),
        frequency_penalty=sometimes(st.floats(-2, 2), 0.0),
        max_tokens=100,
        min_tokens=sometimes(st.integers(0, 8), 0),
        logit_bias=sometimes(
            st.dictionaries(token_ids, st.floats(-5, 5), max_size=4), None
        ),
        allowed_token_ids=sometimes(st.sets(token_ids, min_size=1, max_size=30), None),
    )
    words = st.lists(token_ids, min_size=1, max_size=4).map(tuple)
    tokens = draw(st.lists(token_ids, min_size=1, max_size=L))
    return Case(
        params=params,
        bad_words=sometimes(st.lists(words, max_size=4), []),
        tokens=tokens,
        prompt_len=draw(st.integers(1, len(tokens))),
        stop_ids=draw(st.lists(token_ids, max_size=E)),
    )


def normal(seed: int, num_rows: int = S, vocab_size: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, vocab_size)).astype("f4")


def assert_rules_hold(cases: list[Case], seed: int) -> None:
    logits = 3 * normal(seed, len(cases))
    expected = [by_hand(row, case) for row, case in zip(logits, cases, strict=True)]
    np.testing.assert_allclose(apply_to(logits, cases), expected, rtol=1e-5, atol=1e-5)


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.lists(random_cases(), min_size=S, max_size=S), st.integers(0, 99))
def test_random_rules_equal_plain_python(cases, seed):
    assert_rules_hold(cases, seed)


# Any two rules that do not commute act on one token here.
EVERYTHING = Case(
    params=SamplingParams(
        repetition_penalty=1.7,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        max_tokens=9,
        min_tokens=6,
        logit_bias={3: -2.0, 7: 4.0, 9: 1.0},
        allowed_token_ids=[1, 3, 5, 7, 9, 11, 13, 39],
    ),
    bad_words=[(5,), (3, 7, 11), (9, 9, 1)],
    tokens=[9, 3, 7, 3, 7, 39, 3, 7],
    prompt_len=3,
    stop_ids=[13, 2],
)


def test_all_rules_of_a_row_equal_numbers_computed_by_hand():
    logits = np.full((1, V), 2.0, np.float32)
    x = apply_to(logits, [EVERYTHING])[0]
    # The output is 3, 7, 39, 3, 7. Allowed tokens that are left: 1, 3, 7, 9, 39.
    assert np.flatnonzero(x > -np.inf).tolist() == [1, 3, 7, 9, 39]
    assert x[1] == 2.0  # not preceded by 9, 9
    assert x[3] == 0.0 * 1.7 - 0.25 * 2 - 0.5
    np.testing.assert_allclose(x[7], (2.0 + 4.0) / 1.7 - 0.25 * 2 - 0.5, rtol=1e-6)
    np.testing.assert_allclose(x[9], (2.0 + 1.0) / 1.7, rtol=1e-6)  # in the prompt
    np.testing.assert_allclose(x[39], 2.0 / 1.7 - 0.25 - 0.5, rtol=1e-6)


def swapped(first: int, second: int):
    order = list(rules._ORDER)
    order[first], order[second] = order[second], order[first]
    return tuple(order)


@pytest.mark.parametrize("pair", [(3, 4), (4, 5), (3, 5)])
def test_another_order_of_rules_is_found(pair, monkeypatch):
    assert_rules_hold([EVERYTHING], 0)
    # The three rules that only forbid tokens commute with each other and with a bias.
    monkeypatch.setattr(rules, "_ORDER", swapped(*pair))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_rules_hold([EVERYTHING], 0)


def without(name: str):
    return tuple(rule for rule in rules._ORDER if rule[0].__name__ != name)


@pytest.mark.parametrize("name", [has_rule.__name__ for has_rule, _ in rules._ORDER])
def test_a_missing_rule_is_found(name, monkeypatch):
    monkeypatch.setattr(rules, "_ORDER", without(name))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_rules_hold([EVERYTHING], 0)


PLAIN = Case(SamplingParams(), [], [9, 3, 7, 3], 2, [2])


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.lists(random_cases(), min_size=S - 1, max_size=S - 1), st.integers(0, 99)
)
def test_a_row_does_not_depend_on_the_rules_of_other_rows(cases, seed):
    logits = normal(seed)
    logits[:, ::7] = -0.0
    logits[:, 1::7] = -np.inf
    together = apply_to(logits, [*cases, PLAIN])
    for s in range(S - 1):
        others = [PLAIN] * S
        others[s] = cases[s]
        alone = apply_to(logits, others)
        assert together[s].tobytes() == alone[s].tobytes()
    assert together[-1].tobytes() == logits[-1].tobytes()


@hypothesis.settings(max_examples=40)
@hypothesis.given(random_cases())
def test_is_any_finds_rows_with_rules_and_ignores_capacities(case):
    params = case.params
    # A penalty that float32 rounds to its neutral value is no rule.
    has_rule = bool(
        np.float32(params.repetition_penalty) != 1
        or np.float32(params.presence_penalty) != 0
        or np.float32(params.frequency_penalty) != 0
        or params.min_tokens
        or params.logit_bias
        or params.allowed_token_ids is not None
        or case.bad_words
    )
    needed = RuleSizes.of_request(params, V, case.bad_words)
    for sizes in (needed, SIZES.grown(needed)):
        row = rule_arrays.encode_rules(params, sizes, case.bad_words)
        stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], row)
        assert rules.is_any(stacked).tolist() == [has_rule]
    assert not rules.is_any(LogitsRules.none(3, SIZES)).any()
    assert not rules.is_any(LogitsRules.none(3, RuleSizes())).any()


def test_capacities_do_not_change_the_result():
    logits = normal(0, 1)
    penalties = dataclasses.replace(
        EVERYTHING.params, logit_bias=None, allowed_token_ids=None
    )
    case = dataclasses.replace(EVERYTHING, params=penalties, bad_words=[])
    small, large = apply_to(logits, [case], RuleSizes()), apply_to(logits, [case])
    assert small.tobytes() == large.tobytes()


def test_grown_rules_have_the_same_meaning():
    needed = RuleSizes.of_request(EVERYTHING.params, V, EVERYTHING.bad_words)
    # 3 biases, 3 bad words of at most 3 tokens; 40 tokens in masks of 32 bits.
    assert needed == RuleSizes(4, 4, 4, 64)
    larger = needed.grown(RuleSizes(num_bias=8, bad_word_len=8, num_allowed=96))
    assert larger == RuleSizes(8, 4, 8, 96)
    row = rule_arrays.encode_rules(EVERYTHING.params, needed, EVERYTHING.bad_words)
    expected = rule_arrays.encode_rules(EVERYTHING.params, larger, EVERYTHING.bad_words)
    assert row.sizes == needed
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], row)
    for old, axis in ((row, ()), (stacked, (0,))):
        grown = rule_arrays.grow_rules(old, larger)
        assert grown.sizes == larger
        for got, leaf in zip(*map(jax.tree.leaves, (grown, expected)), strict=True):
            assert got.dtype == leaf.dtype
            np.testing.assert_array_equal(np.squeeze(got, axis), leaf)
    assert rule_arrays.grow_rules(row, RuleSizes()) is row


def test_a_request_beyond_the_sizes_is_refused():
    params = EVERYTHING.params
    for name, got in (
        ("num_bias", 2),
        ("num_bad_words", 2),
        ("bad_word_len", 2),
        ("num_allowed", 32),
    ):
        small = dataclasses.replace(SIZES, **{name: got})
        with pytest.raises(
            ValueError, match=f"expected {name} of at least .*, got {got}"
        ):
            rule_arrays.encode_rules(params, small, EVERYTHING.bad_words)
    narrow = dataclasses.replace(SIZES, num_allowed=32)
    with pytest.raises(ValueError, match=r"mask of at least 40 tokens.* got one of 32"):
        apply_to(normal(0, 1), [PLAIN], narrow)


def test_rules_can_be_mapped_over_requests():
    cases = [EVERYTHING, PLAIN]
    logits = normal(5, 2)
    expected = apply_to(logits, cases)
    encoded = [rule_arrays.encode_rules(c.params, SIZES, c.bad_words) for c in cases]
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x))[:, None], *encoded)
    tokens = np.zeros((2, 1, L), np.int32)
    stop_ids = np.full((2, 1, E), -1, np.int32)
    for s, case in enumerate(cases):
        tokens[s, 0, : len(case.tokens)] = case.tokens
        stop_ids[s, 0, : len(case.stop_ids)] = case.stop_ids
    lens = jnp.array([[case.prompt_len] for case in cases], jnp.int32)
    nums = jnp.array([[len(case.tokens)] for case in cases], jnp.int32)
    got = jax.jit(jax.vmap(rules.apply))(
        jnp.asarray(logits)[:, None], stacked, tokens, lens, nums, stop_ids
    )
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-6)


NUM_SAMPLES = 16384
LADDER = [
    {},
    {"temperature": 0.6, "repetition_penalty": 1.5},
    {"presence_penalty": 1.5, "frequency_penalty": -0.7, "top_k": 12},
    {"logit_bias": {0: 3.0, 1: -3.0, 39: 2.0}, "top_p": 0.8},
    {"allowed_token_ids": list(range(5, 30)), "min_p": 0.05, "frequency_penalty": 1.0},
    {
        "temperature": 1.3,
        "min_tokens": 6,
        "max_tokens": 9,
        "logit_bias": {2: 2.0},
        "min_p": 0.01,
        "top_k": 25,
        "top_p": 0.95,
        "repetition_penalty": 0.8,
    },
]


def sampled_tokens(case: Case, logits: np.ndarray) -> np.ndarray:
    """NUM_SAMPLES tokens sampled after the rules of one row."""
    params = case.params
    batch = np.broadcast_to(apply_to(logits[None], [case]), (1024, V))
    settings = {
        name: getattr(params, name)
        for name in ("temperature", "top_k", "top_p", "min_p")
    }
    sample = jax.jit(decoding.sample)
    many = [
        sample(jnp.asarray(batch), sampling_rows(1024, **settings), jnp.full(1024, n))[
            0
        ]
        for n in range(NUM_SAMPLES // 1024)
    ]
    return np.concatenate([np.asarray(tokens) for tokens in many])


def exact(case: Case, logits: np.ndarray) -> np.ndarray:
    params = case.params
    return exact_distribution(
        by_hand(logits, case),
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
    )


@pytest.mark.parametrize("settings", LADDER, ids=str)
def test_samples_after_the_rules_have_the_exact_distribution(settings):
    logits = 1.5 * normal(1, 1)[0]
    case = dataclasses.replace(
        EVERYTHING, params=SamplingParams(**settings), bad_words=[(4,), (3, 7, 6)]
    )
    tokens = sampled_tokens(case, logits)
    # Seeds are fixed; by chance a correct program fails with probability 3e-5.
    assert abs(chi_square_z(tokens, exact(case, logits))) < 4
    # The same samples do not fit another presence penalty.
    penalty = case.params.presence_penalty - 1
    other = dataclasses.replace(case.params, presence_penalty=penalty)
    wrong = exact(dataclasses.replace(case, params=other), logits)
    is_impossible = bool(np.any(wrong[tokens] == 0))
    assert is_impossible or chi_square_z(tokens, wrong) > 8


REFUSED = [
    ({"logit_bias": {40: 1.0}}, r"logit_bias: .*vocab_size \(40\), got 40"),
    ({"allowed_token_ids": [1, 41]}, r"allowed_token_ids: .*\(40\), got 41"),
    ({"logit_bias": {4: 1e10}}, r"logit_bias\[4\]: expected -3e\+38 to 1e\+09"),
    ({"logit_bias": {4: -4e38}}, r"logit_bias\[4\]: expected"),
    ({"repetition_penalty": 1e-10}, r"repetition_penalty: expected 1e-09 to 1e\+09"),
    ({"repetition_penalty": 1e200}, "repetition_penalty: .*got 1e.200"),
    (
        {"allowed_token_ids": [5, 6]},
        "bad_words: expected at least one token of allowed",
    ),
    (
        {"allowed_token_ids": [2, 5, 13], "min_tokens": 1},
        r"min_tokens: expected 0, got 1: .*_ids \(\[2, 13\]\) end the request",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_impossible_rules_are_refused(settings, message):
    params = SamplingParams(**settings)
    with pytest.raises(ValueError, match=message):
        check_rules(params, V, [(5,), (6,), (7, 8)], [2, 13])


def test_rules_that_leave_a_token_are_accepted():
    check_rules(EVERYTHING.params, V, EVERYTHING.bad_words, EVERYTHING.stop_ids)
    check_rules(SamplingParams(allowed_token_ids=[2, 5]), V, [(5,)], [2])
    check_rules(SamplingParams(allowed_token_ids=[7], min_tokens=3), V, [(7, 8)], [2])
    check_rules(SamplingParams(), V, [(token,) for token in range(V - 1)])
    with pytest.raises(ValueError, match=r"bad_words: .* of the vocabulary to be left"):
        check_rules(SamplingParams(), V, [(token,) for token in range(V)])


@pytest.mark.parametrize("extreme", [1e-9, 1e9])
def test_the_most_extreme_accepted_numbers_give_no_nan(extreme):
    params = SamplingParams(
        repetition_penalty=extreme, logit_bias={3: 1e9, 7: -3e38, 9: 1e9}
    )
    check_rules(params, V)
    case = dataclasses.replace(EVERYTHING, params=params, bad_words=[])
    changed = apply_to(1e4 * normal(2, 1), [case])
    assert not np.isnan(changed).any()
    assert changed.max() < np.inf
    _, logprobs = decoding.sample(
        jnp.asarray(changed), sampling_rows(1), jnp.zeros(1, jnp.int32)
    )
    assert np.isfinite(logprobs).all()


@pytest.mark.huggingface
@hypothesis.settings(max_examples=40)
@hypothesis.given(random_cases(), st.integers(0, 99))
def test_each_rule_equals_the_processor_of_transformers(case, seed):
    import torch
    from transformers import generation

    logits = 3 * normal(seed, 1)
    params = case.params

    def processed(*processors) -> np.ndarray:
        ids, scores = torch.tensor([case.tokens]), torch.tensor(logits)
        for processor in processors:
            scores = processor(ids, scores)
        return scores.numpy()

    def ours(bad_words=(), prompt_len=None, **settings) -> np.ndarray:
        only = dataclasses.replace(
            case,
            params=SamplingParams(max_tokens=100, **settings),
            bad_words=list(bad_words),
            prompt_len=case.prompt_len if prompt_len is None else prompt_len,
        )
        return apply_to(logits, [only])

    penalty = params.repetition_penalty
    theirs = processed(generation.RepetitionPenaltyLogitsProcessor(penalty))
    np.testing.assert_allclose(ours(repetition_penalty=penalty), theirs, rtol=1e-6)
    if case.bad_words:
        # transformers matches the prompt too, so here all tokens are output.
        words = [list(word) for word in case.bad_words]
        theirs = processed(generation.NoBadWordsLogitsProcessor(words))
        np.testing.assert_array_equal(ours(case.bad_words, prompt_len=0), theirs)
    if case.stop_ids and params.min_tokens:
        minimum = generation.MinNewTokensLengthLogitsProcessor(
            case.prompt_len, params.min_tokens, case.stop_ids
        )
        theirs = processed(minimum)
        np.testing.assert_array_equal(ours(min_tokens=params.min_tokens), theirs)
