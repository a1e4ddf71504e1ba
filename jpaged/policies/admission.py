"""Admission policies: which waiting request is admitted first.

Pipeline: Requests -> [admission policy] -> scores; the smallest is admitted first, and
equal scores by arrival.

Shape symbols: R sequences.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.policies.views import Requests

# Generated tokens after which a request falls to the next queue of `feedback`.
QUANTA = (16.0, 64.0, 256.0, 1024.0)


def fcfs(requests: Requests) -> jax.Array:
    """First come, first served (paper section 4.5)."""
    return jnp.zeros_like(requests.arrivals)


def priority(requests: Requests) -> jax.Array:
    """Smallest request priority first; it also decides which requests keep memory."""
    return requests.priorities


def shortest_prompt(requests: Requests) -> jax.Array:
    """Shortest prompt first."""
    return requests.prompt_lens


def shortest_job(requests: Requests) -> jax.Array:
    """Fewest tokens left to generate first: `max_tokens` is taken for the length.

    It halves mean latency under load where `max_tokens` is close to the length. It can
    starve a long request for as long as shorter ones arrive.
    """
    return requests.tokens_left


def longest_prefix(requests: Requests) -> jax.Array:
    """Longest cached prefix first.

    It can starve a request without a cached prefix for as long as others arrive.

    Source: Zheng et al. 2024, SGLang, section 3 (cache-aware scheduling).
    """
    return -requests.cached_lens


def earliest_deadline(requests: Requests) -> jax.Array:
    """Earliest deadline first; requests without a deadline come last."""
    return requests.times_left


def feedback(requests: Requests) -> jax.Array:
    """Multi-level feedback queue: fewest tokens so far first, in levels.

    Parameters: the generated tokens after which a request falls by one level; none are
    `QUANTA`. Use it with the preemption policy of the same name, which makes requests
    of lower levels give back their rows.

    Source: Wu et al. 2023, FastServe. https://arxiv.org/abs/2305.05920
    """
    quanta = requests.parameters
    if not quanta.shape[0]:
        quanta = jnp.array(QUANTA, jnp.float32)
    generated = requests.num_generated.astype(jnp.float32)
    passed = generated[:, None] >= quanta[None, :]
    return jnp.sum(passed, axis=1, dtype=jnp.int32)


def fair_share(requests: Requests) -> jax.Array:
    """The user who got the fewest tokens first, and users in turn.

    A request counts with its prompt and `max_tokens` for the later ones of its user.

    Source: Sheng et al. 2024, virtual token counters. https://arxiv.org/abs/2401.00588
    """
    users, index = requests.users, jnp.arange(requests.users.shape[0], dtype=jnp.int32)
    cost = jnp.where(
        requests.is_waiting & (requests.leaders == index),
        requests.prompt_lens + requests.max_tokens,
        0,
    )
    # By user and arrival: the sum of the costs before each request of its user.
    users, _, order, cost = lax.sort(
        (users, requests.arrivals, index, cost), num_keys=3
    )
    before = jnp.cumsum(cost) - cost
    is_first = jnp.concatenate([jnp.ones((1,), jnp.bool_), users[1:] != users[:-1]])
    start = lax.cummax(jnp.where(is_first, before, 0))
    queued = jnp.zeros_like(before).at[order].set(before - start)
    return requests.user_tokens + queued


# The summands of `weighted`, in the order of its parameters.
WEIGHTED = Requests._fields[:6]


def weighted(requests: Requests) -> jax.Array:
    """Weighted sum of the columns in `WEIGHTED`, with one parameter for each.

    All weights 0 is `fcfs`. With a weight on `arrivals`, a waiting request eventually
    precedes all later requests.
    """
    if requests.parameters.shape != (len(WEIGHTED),):
        raise ValueError(
            f"policy_parameters: expected {len(WEIGHTED)} weights for 'weighted', of "
            f"{', '.join(WEIGHTED)}, got {requests.parameters.shape[0]}"
        )
    columns = jnp.stack(requests[: len(WEIGHTED)]).astype(jnp.float32)
    return jnp.sum(columns * requests.parameters[:, None], axis=0)
