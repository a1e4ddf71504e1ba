"""Value-guided beams, experts and best of n: on tables, against lists and by hand."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding import Context, contrib
from jpaged.decoding.values import mean_logprob

V, LENGTH, END = 6, 5, 4
PROMPT = [1, 3]
TABLE = np.asarray(
    jax.nn.log_softmax(
        jnp.asarray(np.random.default_rng(1).normal(0, 1.5, (LENGTH + 1, V, V)))
    ),
    np.float32,
)
GAINS = np.random.default_rng(2).normal(0, 1, V).astype(np.float32)


def gain(leaf, *, gains, share):
    """Sum of the gains of the output's tokens, and the log-probability."""
    index = jnp.arange(leaf.tokens.shape[0], dtype=jnp.int32)
    is_output = (index >= leaf.prompt_len) & (index < leaf.num_tokens)
    each = gains[jnp.minimum(leaf.tokens, V - 1)]
    return jnp.sum(jnp.where(is_output, each, 0.0)) + share * leaf.logprob


def logprob_of(text):
    texts = [PROMPT[-1], *text]
    return sum(TABLE[i, texts[i], token] for i, token in enumerate(text))


def value_of(text):
    return float(sum(GAINS[token] for token in text) + 0.5 * logprob_of(text))


def run(algorithm, num_rows):
    """The request's output: tokens of the retained sequence."""
    state, step = algorithm.init(num_rows), jax.jit(algorithm.step)
    texts = [[] for _ in range(num_rows + 1)]
    ended = np.zeros(num_rows + 1, bool)
    ended[num_rows] = True
    size = len(PROMPT) + LENGTH + 1
    while not ended[:num_rows].all():
        rows = [[*PROMPT, *text] for text in texts[:num_rows]]
        tokens = np.full((num_rows, size), V, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        logits = np.stack([TABLE[len(row) - len(PROMPT), row[-1]] for row in rows])
        logits[ended[:num_rows]] = np.nan
        lens = np.array([len(row) for row in rows], np.int32)
        longest = lens[~ended[:num_rows]].max()
        assert (lens[~ended[:num_rows]] == longest).all()
        context = Context(
            {name: jnp.asarray(x) for name, x in algorithm.parameters.items()},
            jnp.full(num_rows, len(PROMPT), jnp.int32),
            jnp.asarray(lens),
            jnp.full(num_rows, size, jnp.int32),
            tokens=jnp.asarray(tokens),
        )
        keys = jax.random.split(jax.random.key(0), num_rows)
        state, one = step(keys, jnp.asarray(logits), state, context)
        one = jax.device_get(one)
        grows = (one.tokens >= 0) & ~ended[one.parents]
        ended = one.finished | (one.tokens < 0)
        texts = [
            [*texts[p], int(t)] if grow else list(texts[p])
            for p, t, grow in zip(one.parents, one.tokens, grows, strict=True)
        ]
    return texts[num_rows]


def beams_of_lists(width, each):
    """The same search with lists; returns the text with the best value."""
    rows, found = [()], []
    for step in itertools.count():
        for row in rows:
            if step and (row[-1] == END or step == LENGTH):
                found.append(row)
        rows = [row for row in rows if not step or row[-1] != END]
        if step == LENGTH or not rows:
            return list(max(found, key=value_of))
        kept = sorted(rows, key=value_of, reverse=True)[:width]
        count = each if step else width * each
        rows = []
        for row in kept:
            last = row[-1] if row else PROMPT[-1]
            order = np.argsort(-TABLE[len(row), last], kind="stable")
            rows += [(*row, int(token)) for token in order[:count]]


def make(width):
    parameters = {"gains": GAINS, "share": 0.5}
    return contrib.value_beam(gain, width=width, parameters=parameters, stop_ids=[END])


@pytest.mark.parametrize(("width", "each"), [(1, 1), (1, 3), (2, 2), (3, 4), (5, 6)])
def test_a_value_beam_is_a_search_with_lists(width, each):
    assert run(make(width), width * each) == beams_of_lists(width, each)


def test_a_wide_value_beam_finds_the_best_of_all_texts():
    texts = []
    for size in range(1, LENGTH + 1):
        for text in itertools.product(range(V), repeat=size):
            ends = [i for i, token in enumerate(text) if token == END]
            if ends == [size - 1] or (not ends and size == LENGTH):
                texts.append(text)
    best = list(max(texts, key=value_of))
    assert run(make(30), 180) == best
    assert run(make(1), 1) != best


def test_width_1_with_one_candidate_is_greedy():
    greedy = contrib.value_beam(mean_logprob, width=1, stop_ids=[END])
    expected, last = [], PROMPT[-1]
    while len(expected) < LENGTH and END not in expected:
        last = int(TABLE[len(expected), last].argmax())
        expected.append(last)
    assert run(greedy, 1) == expected


@pytest.mark.parametrize(("alpha", "share"), [(0.0, 0.0), (1.5, 0.0), (3.0, 0.2)])
def test_experts_combine_three_rows(alpha, share):
    one = contrib.experts(alpha, share)
    logits = np.log(np.random.default_rng(4).dirichlet(np.ones(V), 3)).astype("float32")
    logits[:, 2] = -np.inf  # forbidden in all rows
    keys = jax.random.split(jax.random.key(0), 3)
    _, decision = one.step(keys, jnp.asarray(logits), (), Context(one.parameters))
    base, expert, anti = np.delete(logits, 2, axis=1).astype(np.float64)
    scores = base + alpha * (expert - anti)
    scores[base < base.max() + np.log(max(share, 1e-300))] = -np.inf
    token = np.delete(np.arange(V), 2)[scores.argmax()]
    assert decision.tokens.tolist() == [token] * 3
    np.testing.assert_allclose(decision.logprobs, logits[0, token], rtol=1e-6)


@dataclasses.dataclass
class Output:
    text: str


def test_best_of_n_by_score_and_by_weighted_vote():
    outputs = [Output(text) for text in ("a 1", "b 2", "c 2", "d ?", "e 1")]
    scores = dict(zip("abcde", (0.9, 0.5, 0.6, 2.0, 0.1), strict=True))
    best = contrib.best_of_n(outputs, lambda text: scores[text[0]])
    assert (best.output, best.score) == (outputs[3], 2.0)
    assert best.scores == list(scores.values())

    def answer(text):
        return text[-1] if text[-1].isdigit() else None

    vote = contrib.best_of_n(outputs, lambda text: scores[text[0]], answer)
    assert (vote.output, vote.answer) == (outputs[2], "2")
    assert abs(vote.share - 1.1 / 2.1) < 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrib.best_of_n([], len), "outputs: expected at least one"),
        (
            lambda: contrib.best_of_n([Output("a")], str),
            r"score_of\(outputs\[0\].text\)",
        ),
        (
            lambda: contrib.best_of_n([Output("a")], len, lambda text: None),
            "answer_of: expected an answer",
        ),
        (lambda: contrib.value_beam(3, width=2), "value: expected a function"),
        (lambda: contrib.value_beam(gain, width=0), "width: expected"),
        (lambda: make(2).init(3), r"num_rows: expected a multiple of width \(2\)"),
        (
            lambda: contrib.value_beam(gain, width=2, parameters={"stop_ids": 1}),
            "parameters: expected other names",
        ),
        (lambda: contrib.experts(share=2), "share: expected"),
        (lambda: contrib.experts().init(2), "num_rows: expected 3"),
        (
            lambda: contrib.twisted_smc(lambda s, t: (s, 0.0), 0, threshold=3),
            "threshold: expected",
        ),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
