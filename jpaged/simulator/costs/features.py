"""Features: a dozen numbers of a step's load, in which cost models are linear.

Pipeline: step load -> [features] -> cost models.

A row that computes several tokens is a chunk of a prompt. A row that computes one token
decodes: the last token of a prompt, computed alone, costs as much as a decoded token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpaged.simulator.costs.load import StepLoad


class Features(NamedTuple):
    """The features of a load, each f32[]."""

    steps: jax.Array  # 1 if the step has any work
    prompt_steps: jax.Array  # 1 if a row computes several tokens
    prompt_rows: jax.Array
    prompt_tokens: jax.Array
    prompt_squares: jax.Array  # sum over chunks of chunk^2
    prompt_past: jax.Array  # sum over chunks of chunk * tokens before it
    decode_rows: jax.Array
    decode_contexts: jax.Array  # tokens they attend to, with themselves
    longest_context: jax.Array  # of all rows
    logits: jax.Array  # rows whose next token is sampled
    copied_tokens: jax.Array
    swapped_tokens: jax.Array
    swap_copies: jax.Array

    @property
    def num_tokens(self) -> jax.Array:
        """Tokens that the step computes, f32[]."""
        return self.prompt_tokens + self.decode_rows

    @property
    def prompt_pairs(self) -> jax.Array:
        """Pairs of a prompt's query and a key that it attends to, f32[]."""
        return self.prompt_past + (self.prompt_squares + self.prompt_tokens) / 2


def features(load: StepLoad) -> Features:
    """Compute the features of a load.

    They are float32, as sums of squares exceed 32-bit integers.
    """
    chunks = load.query_lens.astype(jnp.float32)
    contexts = load.context_lens.astype(jnp.float32)
    is_prompt, is_decode = chunks > 1, chunks == 1
    prompts = jnp.where(is_prompt, chunks, 0.0)
    others = jnp.stack(
        [
            load.num_logits,
            load.num_copied_tokens,
            load.num_swapped_tokens,
            load.num_swap_copies,
        ]
    ).astype(jnp.float32)
    is_busy = jnp.any(load.query_lens > 0) | jnp.any(others > 0)
    return Features(
        steps=is_busy.astype(jnp.float32),
        prompt_steps=jnp.any(is_prompt).astype(jnp.float32),
        prompt_rows=jnp.sum(is_prompt, dtype=jnp.float32),
        prompt_tokens=jnp.sum(prompts),
        prompt_squares=jnp.sum(prompts * prompts),
        prompt_past=jnp.sum(prompts * (contexts - chunks)),
        decode_rows=jnp.sum(is_decode, dtype=jnp.float32),
        decode_contexts=jnp.sum(jnp.where(is_decode, contexts, 0.0)),
        longest_context=jnp.max(jnp.where(chunks > 0, contexts, 0.0), initial=0.0),
        logits=others[0],
        copied_tokens=others[1],
        swapped_tokens=others[2],
        swap_copies=others[3],
    )
