"""Packed pages: tokens of small heads side by side in rows of 128 numbers.

Place on the road: attention, implementations, pallas -> [packed_pages].

A TPU's memory tiles have rows of 128 numbers, so pages [..., P, D] of a smaller D are
stored there as [..., R, 128] with 128 // D tokens in a row. That is the same numbers in
the same order: one is a reshape of the other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# Numbers in a row of a TPU's memory tile: an array's last axis is padded to a multiple.
LANES = 128
# Of 16 tokens even the smallest fill two rows, the least that a tile of bfloat16 has.
_HEAD_DIMS = (16, 32, 64)


def per_row(head_dim: int, dtype: Any) -> int:
    """Tokens in a row of packed pages; 1 where heads are not packed.

    Those of 8 bits are not, whose scales are a token's.
    """
    is_packed = jnp.dtype(dtype).name in ("bfloat16", "float32")
    return LANES // head_dim if is_packed and head_dim in _HEAD_DIMS else 1


def fits(block_size: int, per_row: int) -> bool:
    """Whether blocks are whole rows and whole memory tiles, or 2 or 4 rows of one."""
    rows = block_size // per_row
    return block_size % 16 == 0 and (rows in (2, 4) or rows % 8 == 0)


def tokens_of_row(pages: Any, head_dim: int) -> int:
    """Tokens in a row of pages [..., R, 128] or [..., P, D]; heads are of `head_dim`.

    A last axis of 128 is always that of packed pages, where such heads are packed.
    """
    is_wide = pages.shape[-1] == LANES != head_dim
    return per_row(head_dim, pages.dtype) if is_wide else 1


def head_dim_of_rows(pages: Any) -> int:
    """A head_dim for pages [..., R, 128] or others, of which whole blocks are moved.

    What is in a row is no matter then: where blocks of R rows may be packed, the least.
    """
    *_, rows, width = pages.shape
    least = _HEAD_DIMS[0]
    return least if fits(rows * LANES // least, LANES // least) else width


def plain_shape(pages: Any, head_dim: int) -> tuple[int, ...]:
    """[..., P, D] of pages, packed or not."""
    tokens, (*first, rows, width) = tokens_of_row(pages, head_dim), pages.shape
    return (*first, rows * tokens, width // tokens)


def plain(pages: jax.Array, head_dim: int) -> jax.Array:
    """Pages [..., P, D]; on a TPU a copy where they were packed."""
    return pages.reshape(plain_shape(pages, head_dim))


def packed(pages: jax.Array) -> jax.Array:
    """Pages of small heads [..., R, 128]; on a TPU a copy where they were [..., P, D].

    Others are left as they are.
    """
    *first, block_size, head_dim = pages.shape
    tokens = per_row(head_dim, pages.dtype)
    return pages.reshape(*first, block_size // tokens, head_dim * tokens)
