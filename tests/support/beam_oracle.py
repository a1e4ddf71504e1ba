"""Oracles for beam searches: table models, and searches in slow Python.

A table model is f32[T, V, V]: the log-probabilities of token t + 1 given the previous
token (0 at first). `follow` applies an algorithm's decisions to lists of tokens.
`SlowBeams` implements the rules of Hugging Face's beam search on tuples and sorted
lists.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.decoding import Decision

Tokens = tuple[int, ...]
LogitsOf = Callable[[list[Tokens]], np.ndarray]  # several prefixes -> f32[..., V]


def random_table(
    seed: int, *, num_steps: int, vocab_size: int, forbidden: float = 0.0, **kind: bool
) -> np.ndarray:
    """Log-probabilities, not normalised, of which a share `forbidden` is -inf.

    With `is_tied=True` they are multiples of 1/8, which often tie and have exact sums.
    """
    rng = np.random.default_rng(seed)
    shape = (num_steps, vocab_size, vocab_size)
    if kind.get("is_tied"):
        table = -rng.integers(0, 17, shape) / 8.0
    else:
        table = -rng.exponential(1.0, shape)
    table[rng.random(shape) < forbidden] = -np.inf
    return table.astype(np.float32)


def normalised(table: np.ndarray) -> np.ndarray:
    return np.array(jax.nn.log_softmax(table, axis=-1))


def table_logits(table: np.ndarray) -> LogitsOf:
    def logits_of(prefixes: list[Tokens]) -> np.ndarray:
        return np.stack([table[len(p), p[-1] if p else 0] for p in prefixes])

    return logits_of


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The hypotheses of a search at its end, best first, and facts about the search."""

    hypotheses: list[Tokens]
    logprobs: list[float]  # sums of the tokens' log-probabilities
    num_steps: int
    was_revived: bool  # whether a finished row ran again
    state: Any


def follow(step: Any, state: Any, logits_of: LogitsOf, num_rows: int) -> Outcome:
    """Runs one request as an engine does, with lists of tokens.

    The logits of finished rows are NaN.
    """
    sequences: list[tuple[Tokens, float]] = [((), 0.0)] * (2 * num_rows)
    finished = np.array([False] * num_rows + [True] * num_rows)
    keys = jax.random.split(jax.random.key(0), num_rows)
    was_revived, num_steps = False, 0
    while not finished.all():
        num_steps += 1
        live = np.flatnonzero(~finished[:num_rows])
        found = logits_of([sequences[row][0] for row in live])
        logits = np.full((num_rows, found.shape[-1]), np.nan, np.float32)
        logits[live] = found
        state, decision = step(keys, logits, state)
        decision = jax.tree.map(np.asarray, decision)
        check_decision(decision, finished, num_rows)
        new = []
        for parent, token, logprob in zip(
            decision.parents, decision.tokens, decision.logprobs, strict=True
        ):
            tokens, total = sequences[parent]
            if not finished[parent]:
                tokens, total = (*tokens, int(token)), total + float(logprob)
            new.append((tokens, total))
        was_revived |= bool(np.any(finished[:num_rows] & ~decision.finished[:num_rows]))
        sequences, finished = new, decision.finished
    has_hypothesis = np.asarray(state_of(state).has_hypothesis).reshape(-1)
    retained = list(zip(sequences[num_rows:], has_hypothesis, strict=True))
    assert all(sequence == ((), 0.0) for sequence, ok in retained if not ok)
    return Outcome(
        hypotheses=[sequence[0] for sequence, ok in retained if ok],
        logprobs=[sequence[1] for sequence, ok in retained if ok],
        num_steps=num_steps,
        was_revived=was_revived,
        state=state,
    )


def state_of(state: Any) -> Any:
    """The part of a state that has `has_hypothesis`."""
    return getattr(state, "groups", state)


def check_decision(decision: Decision, finished: np.ndarray, num_rows: int) -> None:
    """Checks the invariants of the interface."""
    assert decision.tokens.shape == decision.parents.shape == (2 * num_rows,)
    assert decision.tokens.dtype == decision.parents.dtype == np.int32
    assert decision.logprobs.dtype == np.float32
    assert decision.finished.dtype == bool
    assert np.all((decision.parents >= 0) & (decision.parents < 2 * num_rows))
    assert decision.finished[num_rows:].all()
    runs = ~decision.finished
    assert not finished[decision.parents[runs]].any(), "continues a finished sequence"
    assert np.isfinite(decision.logprobs).all()


def hypothesis_scores(state: Any) -> list[float]:
    state = state_of(state)
    scores = np.asarray(state.hypothesis_scores)
    has_hypothesis = np.asarray(state.has_hypothesis)
    assert np.all(scores[~has_hypothesis] == -np.inf)
    return scores[has_hypothesis].tolist()


class SlowBeams:
    """One beam search by the rules of Hugging Face, in float64, on Python lists."""

    def __init__(self, *, width, max_tokens, length_penalty, early_stopping, stop_ids):
        self.width, self.max_tokens = width, max_tokens
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.stop_ids = set(stop_ids)
        self.running: list[tuple[float, Tokens]] = [(0.0, ())]
        self.continued: list[tuple[float, Tokens]] = []  # without the end of the search
        self.pool: list[tuple[float, Tokens]] = []
        self.length = 0

    def normalise(self, score: float, length: int) -> float:
        return score / float(length) ** self.length_penalty

    def advance(self, logits_of: LogitsOf, penalty: np.ndarray | float = 0.0) -> None:
        """Adds one token; subtracts `penalty` f[V] from the log-probabilities."""
        self.length += 1
        logits = logits_of([tokens for _, tokens in self.running])
        logits = logits.astype(np.float64) - penalty
        found = [
            (score + logits[row, token], (*tokens, token))
            for row, (score, tokens) in enumerate(self.running)
            for token in range(logits.shape[1])
            if logits[row, token] > -np.inf
        ]
        found.sort(key=lambda entry: -entry[0])  # stable: by row and token on ties
        found = found[: max(2, 1 + len(self.stop_ids)) * self.width]
        is_last = self.length == self.max_tokens
        for score, tokens in found[: self.width]:
            if is_last or tokens[-1] in self.stop_ids:
                self.pool.append((self.normalise(score, self.length), tokens))
        self.pool.sort(key=lambda entry: -entry[0])
        self.pool = self.pool[: self.width]
        continued = [entry for entry in found if entry[1][-1] not in self.stop_ids]
        self.continued = continued[: self.width]
        self.running = [] if is_last else self.continued
        if self.running and self.is_over():
            self.running = []

    def is_over(self) -> bool:
        if len(self.pool) < self.width:
            return False
        if self.early_stopping is True or self.width == 1:
            return True
        is_longest = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_tokens if is_longest else self.length
        return self.normalise(self.running[0][0], length) <= self.pool[-1][0]

    def run(self, logits_of: LogitsOf) -> list[tuple[float, Tokens]]:
        while self.running:
            self.advance(logits_of)
        return self.pool


def every_sequence(
    logits_of: LogitsOf, stop_ids: tuple[int, ...], max_tokens: int
) -> list[tuple[float, Tokens]]:
    """All complete sequences, with their cumulative log-probabilities."""
    found, open_ones = [], [(0.0, ())]
    for length in range(1, max_tokens + 1):
        longer = [
            (total + float(logprob), (*tokens, token))
            for total, tokens in open_ones
            for token, logprob in enumerate(logits_of([tokens])[0])
            if logprob > -np.inf
        ]
        ends = [length == max_tokens or s[1][-1] in stop_ids for s in longer]
        found += [s for s, end in zip(longer, ends, strict=True) if end]
        open_ones = [s for s, end in zip(longer, ends, strict=True) if not end]
    return found


def rollout(
    step: Any, state: Any, table: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Runs one request in a `lax.while_loop`; array code that `vmap` can map.

    Returns tokens i32[S, T] and lengths i32[S] of the hypotheses, and the state.
    """
    num_rows = state_of(state).has_hypothesis.size
    num_steps, table = len(table), jnp.asarray(table)

    def body(carry):
        t, tokens, lengths, finished, state = carry
        at = jnp.maximum(lengths[:num_rows] - 1, 0)
        last = jnp.take_along_axis(tokens[:num_rows], at[:, None], axis=1)[:, 0]
        last = jnp.where(lengths[:num_rows] == 0, 0, last)
        keys = jax.random.split(jax.random.fold_in(key, t), num_rows)
        state, decision = step(keys, table[t][last], state)
        tokens, lengths = tokens[decision.parents], lengths[decision.parents]
        grows = ~finished[decision.parents]
        index = jnp.where(grows, lengths, num_steps)
        sequence = jnp.arange(2 * num_rows)
        tokens = tokens.at[sequence, index].set(decision.tokens, mode="drop")
        return (
            t + 1, tokens, lengths + grows.astype(jnp.int32), decision.finished, state
        )  # fmt: skip

    start = (
        jnp.int32(0),
        jnp.zeros((2 * num_rows, num_steps), jnp.int32),
        jnp.zeros(2 * num_rows, jnp.int32),
        jnp.arange(2 * num_rows) >= num_rows,
        jax.tree.map(jnp.asarray, state),
    )
    _, tokens, lengths, _, state = lax.while_loop(
        lambda carry: ~jnp.all(carry[3]), body, start
    )
    return tokens[num_rows:], lengths[num_rows:], state
