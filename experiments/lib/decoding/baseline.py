"""Baseline of decoding methods: beam search and samples in plain JAX.

Like `experiments/lib/baseline.py` for greedy tokens, it has a contiguous cache of the
needed length for each row. The prompt is computed once and its cache is repeated. A
beam that continues another one needs that beam's cache, so every step of beam search
gathers the whole cache by the parents. Paging avoids these copies.

No token ends a sequence. Both methods have two forms: a Python loop over one jitted
step that donates its state, and a loop inside one program.

Shape symbols: S rows (beams, samples), N tokens of an output, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments.lib import baseline
from experiments.lib.baseline import BaselineShape, StaticBatch, Weights


class BaselineBeams(NamedTuple):
    """State of a beam search."""

    rows: StaticBatch  # one row per beam
    scores: jax.Array  # f32[S], sums of log-probabilities, best first
    tokens: jax.Array  # i32[S, N], zeros after the generated tokens
    length: jax.Array  # i32[], generated tokens


class BaselineSamples(NamedTuple):
    """State of the samples of one prompt."""

    rows: StaticBatch  # one row per sample
    key: jax.Array  # key[]
    tokens: jax.Array  # i32[S, N], zeros after the generated tokens
    length: jax.Array  # i32[], generated tokens


@functools.partial(jax.jit, static_argnames=("shape", "num_rows", "num_tokens"))
def begin_beams(
    weights: Weights,
    prompt: jax.Array,
    *,
    shape: BaselineShape,
    num_rows: int,
    num_tokens: int,
) -> BaselineBeams:
    """Computes the prompt i32[T] and starts a search with one token per beam."""
    rows, logits = _begin(weights, prompt, shape, num_tokens)
    scores, tokens = lax.top_k(jax.nn.log_softmax(logits[0]), num_rows)
    rows = _repeat(rows, num_rows, tokens)
    return BaselineBeams(rows, scores, _first(tokens, num_tokens), jnp.int32(1))


def _beam_step(
    weights: Weights, beams: BaselineBeams, shape: BaselineShape
) -> BaselineBeams:
    """Extends every beam by one token."""
    rows, logits = baseline.step_logits(weights, beams.rows, shape)
    num_rows, vocab_size = logits.shape
    totals = beams.scores[:, None] + jax.nn.log_softmax(logits, axis=-1)
    scores, best = lax.top_k(totals.reshape(-1), num_rows)
    parents, tokens = best // vocab_size, best % vocab_size
    rows = rows._replace(
        keys=tuple(keys[parents] for keys in rows.keys),
        values=tuple(values[parents] for values in rows.values),
        tokens=tokens,
    )
    history = beams.tokens[parents].at[:, beams.length].set(tokens)
    return BaselineBeams(rows, scores, history, beams.length + 1)


@functools.partial(jax.jit, static_argnames=("shape", "num_rows", "num_tokens"))
def begin_samples(
    weights: Weights,
    prompt: jax.Array,
    key: jax.Array,
    *,
    shape: BaselineShape,
    num_rows: int,
    num_tokens: int,
) -> BaselineSamples:
    """Computes the prompt i32[T] and samples one token each, at temperature 1."""
    rows, logits = _begin(weights, prompt, shape, num_tokens)
    key, used = jax.random.split(key)
    tokens = jax.random.categorical(used, logits[0], shape=(num_rows,))
    tokens = tokens.astype(jnp.int32)
    rows = _repeat(rows, num_rows, tokens)
    return BaselineSamples(rows, key, _first(tokens, num_tokens), jnp.int32(1))


def _sample_step(
    weights: Weights, samples: BaselineSamples, shape: BaselineShape
) -> BaselineSamples:
    """Extends every sample by one token."""
    rows, logits = baseline.step_logits(weights, samples.rows, shape)
    key, used = jax.random.split(samples.key)
    tokens = jax.random.categorical(used, logits).astype(jnp.int32)
    history = samples.tokens.at[:, samples.length].set(tokens)
    rows = rows._replace(tokens=tokens)
    return BaselineSamples(rows, key, history, samples.length + 1)


class DecodingForms(NamedTuple):
    """Both forms of a decode loop: (weights, state, shape=...) -> final state."""

    calls: Callable[..., Any]
    loop: Callable[..., Any]


def _forms_of(step: Callable[..., Any]) -> DecodingForms:
    jitted = jax.jit(step, static_argnames="shape", donate_argnums=1)

    def calls(weights: Weights, state: Any, *, shape: BaselineShape) -> Any:
        _, num_tokens = state.tokens.shape
        for _ in range(num_tokens - 1):
            state = jitted(weights, state, shape=shape)
        return state

    @functools.partial(jax.jit, static_argnames="shape", donate_argnames="state")
    def loop(weights: Weights, state: Any, *, shape: BaselineShape) -> Any:
        _, num_tokens = state.tokens.shape
        return lax.fori_loop(
            1, num_tokens, lambda _, state: step(weights, state, shape), state
        )

    return DecodingForms(calls, loop)


decode_beams = _forms_of(_beam_step)
decode_samples = _forms_of(_sample_step)


def _begin(
    weights: Weights, prompt: jax.Array, shape: BaselineShape, num_tokens: int
) -> tuple[StaticBatch, jax.Array]:
    """One row after the prompt, with a cache for the output, and logits f32[1, V]."""
    # The last token of an output never enters the cache.
    max_len = prompt.shape[0] + num_tokens - 1
    starts = jnp.zeros((1,), jnp.int32)
    return baseline.prefill_logits(weights, prompt[None], starts, shape, max_len)


def _repeat(rows: StaticBatch, num_rows: int, tokens: jax.Array) -> StaticBatch:
    repeat = functools.partial(jnp.repeat, repeats=num_rows, axis=0)
    return rows._replace(
        keys=tuple(map(repeat, rows.keys)),
        values=tuple(map(repeat, rows.values)),
        starts=repeat(rows.starts),
        tokens=tokens,
    )


def _first(tokens: jax.Array, num_tokens: int) -> jax.Array:
    history = jnp.zeros((tokens.shape[0], num_tokens), jnp.int32)
    return history.at[:, 0].set(tokens)
