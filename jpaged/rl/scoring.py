"""Scoring: log-probabilities of tokens by the model's forward pass, for training.

Pipeline: packing -> [scoring] -> losses. Pure functions, differentiable.

Shape symbols: B rows, T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv
from jpaged.decoding.sample import invariant_logprobs
from jpaged.decoding.sample import token_logprobs as logprobs_of
from jpaged.models.decoder import Decoder
from jpaged.models.invariant import invariant, settled
from jpaged.rl.estimators import entropy


def token_logprobs(
    model: Decoder,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
) -> jax.Array:
    """Return the log-probability of each token after those before it, f32[B, T].

    Logits are computed for `chunk` tokens at a time, and again for the gradient, so
    memory does not hold f32[B, T, V].

    Args:
      model: the decoder.
      tokens: i32[B, T].
      segment_ids: i32[B, T], see `Decoder.__call__`. None: one sequence in each row.
      temperature: that of the rollout, so that the distribution is the one that was
        sampled from (`LLM(logprobs_mode="processed")`); 1 for raw log-probabilities.
      chunk: number of tokens.

    Returns:
      f32[B, T]; 0 for the first token of each sequence.
    """
    return _score(model, tokens, segment_ids, temperature, chunk)[0]


def token_logprobs_and_entropy(
    model: Decoder,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Return `token_logprobs`, and the entropy of their distributions, f32[B, T]."""
    return _score(model, tokens, segment_ids, temperature, chunk)


def _score(
    model: Decoder,
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
    hidden = model.hidden_states(tokens, segment_ids)[:, :-1]
    shape, size = hidden.shape[:2], min(chunk, hidden.shape[0] * hidden.shape[1])
    num_chunks = cdiv(shape[0] * shape[1], size)
    padding = num_chunks * size - shape[0] * shape[1]
    rows = jnp.pad(hidden.reshape(-1, hidden.shape[-1]), ((0, padding), (0, 0)))
    targets = jnp.pad(tokens[:, 1:].reshape(-1), (0, padding))

    @jax.checkpoint
    def score(rows: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = settled(model.logits(rows) * (1.0 / temperature))
        if invariant() is not None:
            return invariant_logprobs(logits, targets), entropy(logits)
        return logprobs_of(logits, targets)[0], entropy(logits)

    parts = jax.lax.map(
        lambda part: score(*part),
        (rows.reshape(num_chunks, size, -1), targets.reshape(num_chunks, size)),
    )
    is_first = jnp.zeros(shape, jnp.bool_)
    if segment_ids is not None:
        is_first = segment_ids[:, 1:] != segment_ids[:, :-1]

    def after_first(values: jax.Array) -> jax.Array:
        values = values.reshape(-1)[: shape[0] * shape[1]].reshape(shape)
        return jnp.pad(jnp.where(is_first, 0.0, values), ((0, 0), (1, 0)))

    return after_first(parts[0]), after_first(parts[1])
