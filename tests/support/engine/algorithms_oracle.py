"""References for requests of algorithms: plain loops that recompute every token.

They have no cache and no blocks, and no batch but one request's rows. `drive` shares
with the engine the model and the algorithm's own `step`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding import Decision
from jpaged.decoding.sample import token_keys
from jpaged.models import Decoder
from jpaged.params import AlgorithmParams, BeamSearchParams
from tests.support.beam_oracle import SlowBeams

_WIDTH = 8  # prefixes that are computed in one batch


class Expected(NamedTuple):
    """The expected output of a request."""

    tokens: list[int]
    reason: str
    logprob: float  # of all tokens together


@jax.jit
def _last_logprobs(model: Decoder, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    logits = model(tokens)[jnp.arange(len(tokens)), lengths - 1]
    return jax.nn.log_softmax(logits, axis=-1)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A model as a function from token sequences to log-probabilities."""

    model: Decoder
    max_model_len: int

    def __call__(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """f32[..., V] for the token that follows each sequence."""
        tokens = np.zeros((_WIDTH, self.max_model_len), np.int32)
        lengths = np.ones(_WIDTH, np.int32)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)], lengths[row] = sequence, len(sequence)
        found = _last_logprobs(self.model, jnp.asarray(tokens), jnp.asarray(lengths))
        return np.asarray(found)[: len(sequences)]

    def most_tokens(self, prompt: Sequence[int], max_tokens: int) -> int:
        return min(max_tokens, self.max_model_len - len(prompt))


def search(
    plain: Plain, prompt: Sequence[int], params: BeamSearchParams
) -> list[Expected]:
    """The beams of a slow search, best first."""

    def logprobs_of(prefixes):
        return plain([[*prompt, *prefix] for prefix in prefixes])

    max_tokens = plain.most_tokens(prompt, params.max_tokens)
    found = SlowBeams(
        width=params.beam_width,
        max_tokens=max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        stop_ids=params.stop_token_ids,
    ).run(logprobs_of)
    return [
        Expected(
            list(tokens),
            "stop" if tokens[-1] in params.stop_token_ids else "length",
            score * len(tokens) ** params.length_penalty,
        )
        for score, tokens in found
    ]


@dataclasses.dataclass(frozen=True)
class _Sequence:
    tokens: list[int]
    logprob: float
    reason: str | None  # None while it runs


def drive(
    plain: Plain, prompt: Sequence[int], params: AlgorithmParams
) -> tuple[list[Expected], bool]:
    """The outputs of an algorithm, and whether a row that had ended ran again."""
    num_rows = params.num_rows
    limit = plain.most_tokens(prompt, params.max_tokens)
    step = _compiled(params.algorithm)
    state: Any = jax.tree.map(jnp.asarray, params.algorithm.init(num_rows))
    now = [_Sequence([], 0.0, None)] * num_rows
    was_revived = False
    while any(one.reason is None for one in now[:num_rows]):
        live = [q for q in range(num_rows) if now[q].reason is None]
        logprobs = np.full((num_rows, plain.model.config.vocab_size), np.nan, "f4")
        logprobs[live] = plain([[*prompt, *now[q].tokens] for q in live])
        longest = len(prompt) + max(len(one.tokens) for one in now[:num_rows])
        keys = token_keys(
            jnp.full(num_rows, params.seed, jnp.uint32),
            jnp.arange(num_rows, dtype=jnp.int32),
            jnp.full(num_rows, longest, jnp.int32),
        )
        state, decision = step(keys, jnp.asarray(logprobs), state)
        decision = jax.tree.map(np.asarray, decision)
        retained = [_Sequence([], 0.0, "retained")] * (len(decision.tokens) - num_rows)
        now = [*now, *retained][: len(decision.tokens)]
        before, now = now, _follow(now, decision, limit, params.stop_token_ids)
        was_revived |= any(
            before[row].reason is not None and now[row].reason is None
            for row in range(num_rows)
        )
    outputs = now[num_rows:] or now
    return [
        Expected(one.tokens, one.reason, one.logprob) for one in outputs
    ], was_revived


@functools.cache
def _compiled(algorithm: Any) -> Any:
    return jax.jit(algorithm.step)


def _follow(
    before: list[_Sequence], decision: Decision, limit: int, stop_ids: Sequence[int]
) -> list[_Sequence]:
    after = []
    for token, parent, logprob, finished in zip(
        decision.tokens.tolist(),
        decision.parents.tolist(),
        decision.logprobs.tolist(),
        decision.finished.tolist(),
        strict=True,
    ):
        one = before[parent]
        if one.reason is None:
            tokens = [*one.tokens, token]
            reason = "stop" if finished else None
            reason = "length" if len(tokens) == limit else reason
            reason = "stop" if token in stop_ids else reason
            one = _Sequence(tokens, one.logprob + logprob, reason)
        after.append(one)
    return after
