"""Methods: the retention methods that are built in.

Pipeline: parameters -> [methods] -> method.

At block size 1, blocks are tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.retention.method import Retention, Row, keep_positive


def sink_and_window(
    num_sinks: float = 4, window: float = 1020, **when: float
) -> Retention:
    """Keep the first and the last tokens, with the blocks that they are in.

    Unlike in the paper, tokens keep their positions.

    Args:
      num_sinks: tokens at the start of the sequence.
      window: tokens before the decision.
      **when: `every` and `prompt_every`, see `Retention`.

    Source: Xiao et al. 2024, StreamingLLM. https://arxiv.org/abs/2309.17453
    """
    numbers = dict(num_sinks=num_sinks, window=window)
    return Retention(_is_sink_or_recent, numbers | when, keep_positive)


def _is_sink_or_recent(row: Row) -> jax.Array:
    num_sinks, window = (row.integer(name) for name in ("num_sinks", "window"))
    is_sink = row.column * row.block_size < num_sinks
    is_recent = row.ends > row.num_tokens - window
    return (is_sink | is_recent).astype(jnp.float32)


def random(max_tokens: float = 1024, **when: float) -> Retention:
    """Keep random blocks: a baseline."""
    return Retention(_noise, dict(max_tokens=max_tokens) | when)


def _noise(row: Row) -> jax.Array:
    return row.noise


def heavy_hitters(
    max_tokens: float = 1024, recent: float = 512, **when: float
) -> Retention:
    """Keep the blocks that have got most attention from all queries, and the last.

    Args:
      max_tokens: tokens that stay, the last ones included.
      recent: the last tokens, which stay whatever they have got.
      **when: `every` and `prompt_every`, see `Retention`.

    Source: Zhang et al. 2023, H2O. https://arxiv.org/abs/2306.14048
    """
    numbers = dict(max_tokens=max_tokens, recent=recent)
    return Retention(_attention_or_recent, numbers | when, statistic="attention")


def _attention_or_recent(row: Row) -> jax.Array:
    is_recent = row.ends > row.num_tokens - row.integer("recent")
    return jnp.where(is_recent, jnp.inf, row.statistic)


def tova(max_tokens: float = 1024, **when: float) -> Retention:
    """Keep the blocks that get most attention from the last query.

    In the paper, `every` is 1.

    Args:
      max_tokens: tokens that stay.
      **when: `every` and `prompt_every`, see `Retention`.

    Source: Oren et al. 2024, TOVA. https://arxiv.org/abs/2401.06104
    """
    numbers = dict(max_tokens=max_tokens, queries=1.0)
    return Retention(_statistic, numbers | when, statistic="recent_attention")


def _statistic(row: Row) -> jax.Array:
    return row.statistic


def snapkv(
    max_tokens: float = 1024, queries: float = 32, kernel: float = 5, **when: float
) -> Retention:
    """Keep the blocks that get most attention from the last queries, and theirs.

    In the paper, `every` is 0: only the prompt is compressed.

    Args:
      max_tokens: tokens that stay, those of the last queries included.
      queries: number of the last queries; their own blocks stay.
      kernel: attention is averaged over so many tokens, rounded down to whole blocks on
        both sides.
      **when: `every` and `prompt_every`, see `Retention`.

    Source: Li et al. 2024, SnapKV. https://arxiv.org/abs/2404.14469
    """
    numbers = dict(max_tokens=max_tokens, queries=queries, kernel=kernel)
    return Retention(_pooled_attention, numbers | when, statistic="recent_attention")


def _pooled_attention(row: Row) -> jax.Array:
    is_recent = row.ends > row.num_tokens - row.integer("queries")
    earlier = jnp.where(row.is_block & ~is_recent, row.statistic, 0.0)
    radius = (row.integer("kernel") // 2) // row.block_size
    sums = jnp.concatenate([jnp.zeros((1,)), jnp.cumsum(earlier)])
    last = row.column.size
    above = sums[jnp.minimum(row.column + radius + 1, last)]
    pooled = above - sums[jnp.maximum(row.column - radius, 0)]
    return jnp.where(is_recent, jnp.inf, jnp.where(radius == 0, earlier, pooled))


def knorm(max_tokens: float = 1024, **when: float) -> Retention:
    """Keep the blocks whose keys have the smallest norms.

    Args:
      max_tokens: tokens that stay.
      **when: `every` and `prompt_every`, see `Retention`.

    Source: Devoto et al. 2024. https://arxiv.org/abs/2406.11430
    """
    numbers = dict(max_tokens=max_tokens)
    return Retention(_negative_norm, numbers | when, statistic="key_norm")


def _negative_norm(row: Row) -> jax.Array:
    return -row.statistic


def quest(max_tokens: float = 1024) -> Retention:
    """Keep all blocks, and read those whose keys could get the highest scores.

    Args:
      max_tokens: tokens that a generated token reads in each layer.

    Source: Tang et al. 2024, Quest. https://arxiv.org/abs/2406.10774
    """
    return Retention(_statistic, dict(max_tokens=max_tokens), statistic="key_extremes")


METHODS: dict[str, Callable[..., Retention]] = {
    one.__name__: one
    for one in (sink_and_window, heavy_hitters, snapkv, tova, knorm, quest, random)
}


def find(method: Any) -> Retention:
    """Return the method with a name, with its default parameters; or a method as it is.

    Raises:
      ValueError: neither a `Retention` nor a known name.
    """
    if isinstance(method, Retention):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    raise ValueError(
        f"retention: expected None, a retention.Retention, or one of {tuple(METHODS)}, "
        f"got {method!r:.100}"
    )
