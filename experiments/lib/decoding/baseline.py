"""Baseline of decoding: beam search and samples in plain JAX, without jpaged.

What `lib/baseline.py` is for greedy tokens: a contiguous cache of exactly the
length that is needed, for each row. The prompt is computed once and its cache repeated.
A beam that continues another takes over its cache, so every step of beam search gathers
the whole cache by the parents: the copies that paging is there to avoid.

No token ends a sequence. Both methods come in two forms, a Python loop over one jitted
step that is given its memory back, and a loop inside one program.

Letters: S rows (beams, samples), N tokens of an answer, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments.lib import baseline
from experiments.lib.baseline import Shape, Weights


class Beams(NamedTuple):
    """A beam search after some tokens."""

    rows: baseline.State  # one row for each beam
    scores: jax.Array  # f32[S], sums of log-probabilities, best first
    tokens: jax.Array  # i32[S, N], zeros behind what is generated
    length: jax.Array  # i32[], tokens that are generated


class Samples(NamedTuple):
    """Samples of one prompt after some tokens."""

    rows: baseline.State  # one row for each sample
    key: jax.Array  # key[]
    tokens: jax.Array  # i32[S, N], zeros behind what is generated
    length: jax.Array  # i32[], tokens that are generated


@functools.partial(jax.jit, static_argnames=("shape", "num_rows", "num_tokens"))
def begin_beams(
    weights: Weights, prompt: jax.Array, *, shape: Shape, num_rows: int, num_tokens: int
) -> Beams:
    """The search after the prompt i32[T] and one token."""
    rows, logits = _begin(weights, prompt, shape, num_tokens)
    scores, tokens = lax.top_k(jax.nn.log_softmax(logits[0]), num_rows)
    rows = _repeat(rows, num_rows, tokens)
    return Beams(rows, scores, _first(tokens, num_tokens), jnp.int32(1))


def _beam_step(weights: Weights, beams: Beams, shape: Shape) -> Beams:
    """The search with one token more."""
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
    return Beams(rows, scores, history, beams.length + 1)


@functools.partial(jax.jit, static_argnames=("shape", "num_rows", "num_tokens"))
def begin_samples(
    weights: Weights,
    prompt: jax.Array,
    key: jax.Array,
    *,
    shape: Shape,
    num_rows: int,
    num_tokens: int,
) -> Samples:
    """Samples of the prompt i32[T] with one token each, at temperature 1."""
    rows, logits = _begin(weights, prompt, shape, num_tokens)
    key, used = jax.random.split(key)
    tokens = jax.random.categorical(used, logits[0], shape=(num_rows,))
    tokens = tokens.astype(jnp.int32)
    rows = _repeat(rows, num_rows, tokens)
    return Samples(rows, key, _first(tokens, num_tokens), jnp.int32(1))


def _sample_step(weights: Weights, samples: Samples, shape: Shape) -> Samples:
    """The samples with one token more each."""
    rows, logits = baseline.step_logits(weights, samples.rows, shape)
    key, used = jax.random.split(samples.key)
    tokens = jax.random.categorical(used, logits).astype(jnp.int32)
    history = samples.tokens.at[:, samples.length].set(tokens)
    rows = rows._replace(tokens=tokens)
    return Samples(rows, key, history, samples.length + 1)


Step = Callable[[Weights, NamedTuple, Shape], NamedTuple]


class Decoder(NamedTuple):
    """Both forms of decoding on: (weights, state, shape=...) -> state at its end."""

    calls: Callable[..., NamedTuple]
    loop: Callable[..., NamedTuple]


def _decoder(step: Step) -> Decoder:
    jitted = jax.jit(step, static_argnames="shape", donate_argnums=1)

    def calls(weights, state, *, shape):
        _, num_tokens = state.tokens.shape
        for _ in range(num_tokens - 1):
            state = jitted(weights, state, shape=shape)
        return state

    @functools.partial(jax.jit, static_argnames="shape", donate_argnames="state")
    def loop(weights, state, *, shape):
        _, num_tokens = state.tokens.shape
        return lax.fori_loop(
            1, num_tokens, lambda _, state: step(weights, state, shape), state
        )

    return Decoder(calls, loop)


beams_to_end = _decoder(_beam_step)
samples_to_end = _decoder(_sample_step)


def _begin(weights, prompt, shape, num_tokens) -> tuple[baseline.State, jax.Array]:
    """One row after the prompt, with room for the answer, and its logits f32[1, V]."""
    # The last token of an answer never enters the cache.
    max_len = prompt.shape[0] + num_tokens - 1
    starts = jnp.zeros((1,), jnp.int32)
    return baseline.prefill_logits(weights, prompt[None], starts, shape, max_len)


def _repeat(rows: baseline.State, num_rows: int, tokens: jax.Array) -> baseline.State:
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
