"""Preemption policies: which running request gives back its blocks first.

Pipeline: Requests -> [preemption policy] -> scores; the largest is preempted first, and
of equal scores the latest arrival. A request whose score is `YIELD` gives back its row
even if there are enough blocks, as long as others wait.

Whatever the scores are, the scheduler never preempts the request that comes first by
priority and arrival among those that run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpaged.policies import admission
from jpaged.policies.views import YIELD, Requests


def latest(requests: Requests) -> jax.Array:
    """The largest priority, then the latest arrival (paper section 4.5)."""
    return jnp.zeros_like(requests.arrivals)


def least_computed(requests: Requests) -> jax.Array:
    """The fewest tokens to compute again."""
    return -requests.num_tokens


def longest_job(requests: Requests) -> jax.Array:
    """The most tokens left to generate, with `max_tokens` taken for the length."""
    return requests.tokens_left


def latest_deadline(requests: Requests) -> jax.Array:
    """The latest deadline; requests without one before all others."""
    return requests.times_left


def largest_share(requests: Requests) -> jax.Array:
    """The user who got the most tokens."""
    return requests.user_tokens


def feedback(requests: Requests) -> jax.Array:
    """The lowest level of `admission.feedback`; it yields to waiting higher levels."""
    level = admission.feedback(requests).astype(jnp.float32)
    best = jnp.min(jnp.where(requests.is_waiting, level, jnp.inf))
    return jnp.where(level > best, YIELD, level)
