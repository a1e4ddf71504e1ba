"""Decisions: when a method decides, and its decision for all rows.

Pipeline: lengths, statistics, method -> [decisions] -> the blocks that rows keep.

A sequence has *decision points*: the end of its prompt, every `every` tokens after it,
and every `prompt_every` tokens before it. They depend on the sequence alone, so chunks
of prompts, other rows and preemptions change no decision.

Shape symbols: S rows, M blocks per row, C parameters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpaged.retention.method import Retention, Row

NEVER = 2**30


def _when(method: Retention, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `every` and `prompt_every` of each row, i32[S]; -1: it never decides."""
    names = ("every", "prompt_every")
    columns = (values[..., method.names.index(name)] for name in names)
    every, prompt_every = (column.astype(jnp.int32) for column in columns)
    return every, prompt_every


def next_decision(
    method: Retention, values: jax.Array, prompt_lens: jax.Array, computed: jax.Array
) -> jax.Array:
    """Return the first decision point above `computed`, i32[S]; NEVER if none.

    Args:
      method: the method.
      values: f32[S, C], the rows' parameters.
      prompt_lens: i32[S].
      computed: i32[S], tokens of the sequence that are computed, dropped ones included.
    """
    every, prompt_every = _when(method, values)

    def after(computed: jax.Array, every: jax.Array) -> jax.Array:
        step = jnp.maximum(every, 1)
        return jnp.where(every > 0, (computed // step + 1) * step, NEVER)

    in_prompt = jnp.minimum(after(computed, prompt_every), prompt_lens)
    behind = prompt_lens + after(computed - prompt_lens, every)
    point = jnp.where(computed < prompt_lens, in_prompt, behind)
    return jnp.where(every < 0, NEVER, jnp.minimum(point, NEVER))


def is_decision(
    method: Retention, values: jax.Array, prompt_lens: jax.Array, computed: jax.Array
) -> jax.Array:
    """Return whether rows are at a decision point, bool[S]; arguments as above."""
    point = next_decision(method, values, prompt_lens, computed - 1)
    return (computed > 0) & (point == computed)


def first_observed(
    method: Retention, values: jax.Array, prompt_lens: jax.Array, computed: jax.Array
) -> jax.Array:
    """Return the position of the first query that counts for the next decision, i32[S].

    All queries count for "attention", the last `queries` for "recent_attention", and
    the last one for "key_norm", which is computed with it. Arguments as above.
    """
    point = next_decision(method, values, prompt_lens, computed)
    if method.statistic == "attention":
        return jnp.where(point == NEVER, NEVER, 0)
    number = jnp.ones_like(point)
    if method.statistic == "recent_attention":
        number = values[..., method.names.index("queries")].astype(jnp.int32)
    return jnp.where(point == NEVER, NEVER, jnp.maximum(point - number, 0))


def mappable_tokens(
    method: Retention, values: jax.Array, prompt_lens: jax.Array
) -> jax.Array:
    """Return the tokens that sequences may map from others, i32[S].

    A sequence computes the tokens before its first decision point itself as far as the
    method's statistic needs their queries; and at least one.

    Args: as of `next_decision`.
    """
    return first_observed(method, values, prompt_lens, jnp.zeros_like(prompt_lens))


def blocks_to_keep(
    method: Retention,
    values: jax.Array,
    *,
    num_tokens: jax.Array,
    num_dropped: jax.Array,
    prompt_lens: jax.Array,
    seeds: jax.Array,
    statistic: jax.Array | None,
    width: int,
    block_size: int,
) -> jax.Array:
    """Return the blocks that each row keeps, bool[S, M]; its last block is one of them.

    Args:
      method: the method.
      values: f32[S, C], the rows' parameters.
      num_tokens: i32[S], stored tokens.
      num_dropped: i32[S], tokens dropped before.
      prompt_lens: i32[S].
      seeds: u32[S, 2], of the rows' random numbers.
      statistic: f32[S, M], or None.
      width: M.
      block_size: tokens per block.
    """
    index = jnp.arange(width, dtype=jnp.int32)
    if statistic is None:
        statistic = jnp.zeros((num_tokens.size, width), jnp.float32)

    def one(
        values: jax.Array,
        num_tokens: jax.Array,
        num_dropped: jax.Array,
        prompt_len: jax.Array,
        seed: jax.Array,
        statistic: jax.Array,
    ) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
        key = jax.random.fold_in(key, num_tokens + num_dropped)
        num_blocks = -(-num_tokens // block_size)
        row = Row(
            column=index,
            num_blocks=num_blocks,
            num_tokens=num_tokens,
            num_dropped=num_dropped,
            prompt_len=prompt_len,
            noise=jax.random.uniform(key, (width,)),
            statistic=statistic,
            parameters=dict(zip(method.names, values, strict=True)),
            block_size=block_size,
        )
        keeps = method.select(method.score(row), row)
        return (keeps | (index == num_blocks - 1)) & (index < num_blocks)

    return jax.vmap(one)(values, num_tokens, num_dropped, prompt_lens, seeds, statistic)


def blocks_to_read(
    method: Retention,
    values: jax.Array,
    statistic: jax.Array,
    *,
    num_tokens: jax.Array,
    prompt_lens: jax.Array,
    block_size: int,
) -> jax.Array:
    """Return the blocks that each row's query reads, bool[S, M].

    Args: as of `blocks_to_keep`; nothing was dropped, and noise is the same for all.
    """
    none = jnp.zeros_like(num_tokens)
    seeds = jnp.zeros((num_tokens.size, 2), jnp.uint32)
    return blocks_to_keep(
        method,
        values,
        num_tokens=num_tokens,
        num_dropped=none,
        prompt_lens=prompt_lens,
        seeds=seeds,
        statistic=statistic,
        width=statistic.shape[1],
        block_size=block_size,
    )
