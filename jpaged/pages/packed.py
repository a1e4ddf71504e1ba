"""Packed pages: tokens of small heads side by side in rows of 128 numbers.

Pipeline: layout, attention, pallas -> [packed].

A TPU's memory tiles have rows of 128 numbers. Pages [..., P, D] with a smaller D are
stored there as [..., R, 128], with 128 // D tokens in a row. Both forms hold the same
numbers in the same order: one is a reshape of the other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# Numbers in a row of a TPU's memory tile. The last axis of an array is padded to a
# multiple of it.
LANES = 128
# 16 tokens of even the smallest heads fill two rows, the least that a memory tile of
# bfloat16 has.
_HEAD_DIMS = (16, 32, 64)


def per_row(head_dim: int, dtype: Any) -> int:
    """Return the number of tokens in a row of packed pages; 1 if heads are not packed.

    Heads of 8 bits are not packed, because each token has its own scale.
    """
    is_packed = jnp.dtype(dtype).name in ("bfloat16", "float32")
    return LANES // head_dim if is_packed and head_dim in _HEAD_DIMS else 1


def fits(block_size: int, per_row: int) -> bool:
    """Whether blocks are whole rows, and whole memory tiles or 2 or 4 rows of one."""
    rows = block_size // per_row
    return block_size % 16 == 0 and (rows in (2, 4) or rows % 8 == 0)


def tokens_of_row(pages: Any, head_dim: int) -> int:
    """Return the tokens in a row of pages [..., R, 128] or [..., P, D] of `head_dim`.

    If heads of this size and dtype can be packed, pages with a last axis of 128 are.
    """
    is_wide = pages.shape[-1] == LANES != head_dim
    return per_row(head_dim, pages.dtype) if is_wide else 1


def head_dim_of_rows(pages: Any) -> int:
    """Return a head_dim with which whole blocks of these pages can be copied.

    A copy of whole blocks does not depend on what a row contains. If blocks of R rows
    may be packed, the result is the smallest head_dim.
    """
    *_, rows, width = pages.shape
    least = _HEAD_DIMS[0]
    return least if fits(rows * LANES // least, LANES // least) else width


def plain_shape(pages: Any, head_dim: int) -> tuple[int, ...]:
    """Return the shape [..., P, D] of pages, packed or not."""
    tokens, (*first, rows, width) = tokens_of_row(pages, head_dim), pages.shape
    return (*first, rows * tokens, width // tokens)


def plain(pages: jax.Array, head_dim: int) -> jax.Array:
    """Return pages as [..., P, D]; on a TPU this copies packed pages."""
    return pages.reshape(plain_shape(pages, head_dim))


def packed(pages: jax.Array) -> jax.Array:
    """Return pages of small heads as [..., R, 128]; on a TPU this copies plain pages.

    Pages of other heads stay as they are.
    """
    *first, block_size, head_dim = pages.shape
    tokens = per_row(head_dim, pages.dtype)
    return pages.reshape(*first, block_size // tokens, head_dim * tokens)
