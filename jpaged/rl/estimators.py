"""Estimators: entropy of distributions, and KL divergence from samples.

Pipeline: logits, log-probabilities -> [estimators] -> losses, metrics. Pure functions.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

KLKind = Literal["k1", "k2", "k3"]


def entropy(logits: jax.Array) -> jax.Array:
    """Return the entropy in nats of softmax(logits), f32[...] of f32[..., V].

    Tokens with a logit of -inf count as impossible.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    is_possible = logprobs > -jnp.inf
    terms = jnp.where(is_possible, logprobs, 0.0) * jnp.exp(logprobs)
    return -jnp.sum(terms, axis=-1)


def kl_estimate(
    logprobs: jax.Array, reference: jax.Array, kind: KLKind = "k3"
) -> jax.Array:
    """Estimate the KL divergence of the policy from a reference, per token.

    The tokens must be sampled from the policy. With r = reference - logprobs:

    - "k1" is -r: unbiased, of high variance, and negative for half of the tokens.
    - "k2" is r**2 / 2: biased, of low variance; its gradient is that of the KL.
    - "k3" is exp(r) - 1 - r: unbiased, of low variance, and never negative.

    Args:
      logprobs: f32[...], log-probabilities of the tokens under the policy.
      reference: f32[...], under the reference.
      kind: which estimator.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html
    """
    ratio = reference - logprobs
    if kind == "k1":
        return -ratio
    if kind == "k2":
        return jnp.square(ratio) / 2
    if kind == "k3":
        return jnp.expm1(ratio) - ratio
    raise ValueError(f"kind: expected 'k1', 'k2' or 'k3', got {kind!r}")
