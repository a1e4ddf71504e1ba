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


METHODS: dict[str, Callable[..., Retention]] = {
    one.__name__: one for one in (sink_and_window, random)
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
