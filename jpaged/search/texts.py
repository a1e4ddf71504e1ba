"""Texts of a search: the outputs of nodes, and of trees.

Pipeline: tree -> [texts] -> values, loop.

Shape symbols: B trees, N nodes of a tree, T tokens of an output.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """Outputs, one of each tree or node: the axes before T are B, or B and N."""

    tokens: jax.Array  # i32[..., T]
    lens: jax.Array  # i32[...]
    logprobs: jax.Array  # f32[..., T]
    values: jax.Array  # f32[...]


def no_texts(shape: tuple[int, ...], max_tokens: int) -> Texts:
    """Return empty texts.

    Args:
      shape: the axes before T.
      max_tokens: T.
    """
    return Texts(
        tokens=jnp.zeros((*shape, max_tokens), jnp.int32),
        lens=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros((*shape, max_tokens), jnp.float32),
        values=jnp.zeros(shape, jnp.float32),
    )


def first(texts: Texts) -> Texts:
    """Return the texts [B] of the roots; `texts` has those [B, N] of all nodes."""
    return jax.tree.map(lambda x: x[:, 0], texts)


def appended(texts: Texts, tokens: jax.Array, logprobs: jax.Array) -> Texts:
    """Return the texts [B] with one more token.

    Args:
      texts: the texts; a full one drops its token.
      tokens: i32[B].
      logprobs: f32[B], log-probabilities of the tokens.
    """
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    at = (index, texts.lens)
    return dataclasses.replace(
        texts,
        tokens=texts.tokens.at[at].set(tokens, mode="drop"),
        logprobs=texts.logprobs.at[at].set(logprobs, mode="drop"),
        lens=texts.lens + 1,
    )


def last_tokens(texts: Texts) -> jax.Array:
    """Return the last token i32[B] of each text."""
    at = jnp.maximum(texts.lens - 1, 0)[:, None]
    return jnp.take_along_axis(texts.tokens, at, axis=1)[:, 0]
