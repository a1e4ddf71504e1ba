"""Entropy-based branching: a text branches where the model is unsure.

All rows hold one text until the entropy of the next token exceeds a threshold. Then
each row takes another of the most probable tokens, and continues by itself.
CoT-decoding branches so at the first token.

Source: Wang and Zhou 2024. https://arxiv.org/abs/2402.10200
"""

import jax
import jax.numpy as jnp

from jpaged.decoding.base import Context, Decision, DecodingAlgorithm, own_rows
from jpaged.decoding.contrib.thresholds import entropy
from jpaged.decoding.parameters import Range
from jpaged.decoding.sample import sample_rows


def _init(num_rows: int) -> jax.Array:
    return jnp.bool_(False)  # whether it has branched


def _step(
    keys: jax.Array, logits: jax.Array, has_branched: jax.Array, context: Context
) -> tuple[jax.Array, Decision]:
    num_rows = len(logits)
    _, leading = jax.lax.top_k(logits[0], num_rows)
    branches = ~has_branched & (entropy(logits[0]) > context.parameters["threshold"])
    temperature = context.parameters["temperature"]
    own = sample_rows(keys, logits, temperature)
    shared = jnp.broadcast_to(own[:1], own.shape)
    tokens = jnp.where(branches, leading.astype(jnp.int32), shared)
    tokens = jnp.where(has_branched, own, tokens)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    decision = Decision(tokens, own_rows(num_rows), logprobs, jnp.zeros(num_rows, bool))
    return has_branched | branches, decision


def entropy_branching(
    threshold: float = 2.0, temperature: float = 0.0
) -> DecodingAlgorithm:
    """Build the algorithm; rows share blocks up to the branch.

    Args:
      threshold: entropy in nats above which the text branches, once. Data.
      temperature: of the tokens before and after; 0 is greedy. Data.
    """
    parameters = {"threshold": threshold, "temperature": temperature}
    ranges = {"threshold": Range(), "temperature": Range(low=0)}
    return DecodingAlgorithm(
        _init, _step, parameters=parameters, ranges=ranges, keeps_rows=True
    )
