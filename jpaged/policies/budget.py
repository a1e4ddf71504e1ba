"""Budget policies: how many tokens each row computes in a step.

Pipeline: Rows -> [budget policy] -> tokens of each row.

The scheduler limits each row to its `remaining` tokens, and all rows together to the
budget, by rank. The first row with work gets at least one token. Rows of a lockstep
request decode all or none. If every row only decodes, all of them do, and the policy is
not asked. Admitted requests get what is left of the budget in the step that admits
them.

Shape symbols: S batch rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpaged.policies.views import Rows


def _in_order(keys: jax.Array, wanted: jax.Array, budget: jax.Array) -> jax.Array:
    """Return the tokens of rows that get all they want, smallest key first, i32[S]."""
    is_before = keys[None, :] < keys[:, None]
    before = jnp.sum(jnp.where(is_before, wanted[None, :], 0), axis=1)
    return jnp.clip(budget - before, 0, wanted)


def _decodes(rows: Rows) -> jax.Array:
    return jnp.where(rows.is_decode, rows.remaining, 0)


def _prompts(rows: Rows) -> jax.Array:
    return jnp.where(rows.is_decode, 0, rows.remaining)


def decode_first(rows: Rows) -> jax.Array:
    """All rows that decode, then prompts by rank."""
    decodes = _decodes(rows)
    left = rows.budget - jnp.sum(decodes)
    return decodes + _in_order(rows.ranks, _prompts(rows), left)


def prefill_first(rows: Rows) -> jax.Array:
    """Prompts by rank, then rows that decode: early first tokens, later other ones."""
    prompts = _in_order(rows.ranks, _prompts(rows), rows.budget)
    left = rows.budget - jnp.sum(prompts)
    return prompts + _in_order(rows.ranks, _decodes(rows), left)


def chunked(rows: Rows) -> jax.Array:
    """As `decode_first`, but prompts get a share of the budget while rows decode.

    Small steps keep the time between tokens short. Parameters: the share, from 0 to 1;
    none is 0.25.

    Source: Agrawal et al. 2024, Sarathi-Serve. https://arxiv.org/abs/2403.02310
    """
    share = rows.parameters[0] if rows.parameters.shape[0] else jnp.float32(0.25)
    decodes = _decodes(rows)
    most = jnp.ceil(rows.budget.astype(jnp.float32) * share).astype(jnp.int32)
    left = rows.budget - jnp.sum(decodes)
    left = jnp.where(jnp.any(decodes > 0), jnp.minimum(left, most), left)
    return decodes + _in_order(rows.ranks, _prompts(rows), left)


def fair_split(rows: Rows) -> jax.Array:
    """All rows that decode, then the same number of tokens for each prompt."""
    decodes, prompts = _decodes(rows), _prompts(rows)
    left = rows.budget - jnp.sum(decodes)
    ordered = jnp.sort(jnp.where(prompts > 0, prompts, jnp.iinfo(jnp.int32).max))
    number = jnp.sum(prompts > 0)
    index = jnp.arange(prompts.shape[0])
    # If the shortest prompts get all they want, the others share the rest.
    done = jnp.cumsum(jnp.where(index < number, ordered, 0))
    before = jnp.concatenate([jnp.zeros((1,), done.dtype), done[:-1]])
    level = jnp.max(
        (left - before) // jnp.maximum(number - index, 1),
        where=index < number,
        initial=0,
    )
    even = jnp.minimum(prompts, jnp.maximum(level, 0))
    rest = left - jnp.sum(even)  # less than one token for each
    return decodes + even + _in_order(rows.ranks, jnp.minimum(prompts - even, 1), rest)


def deadline_first(rows: Rows) -> jax.Array:
    """All rows that decode, then prompts with the earliest deadline."""
    decodes = _decodes(rows)
    times = rows.requests.times_left
    is_before = times[None, :] < times[:, None]
    is_before |= (times[None, :] == times[:, None]) & (
        rows.ranks[None, :] < rows.ranks[:, None]
    )
    order = jnp.sum(is_before, axis=1)
    left = rows.budget - jnp.sum(decodes)
    return decodes + _in_order(order, _prompts(rows), left)
