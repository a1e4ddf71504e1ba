"""Search for the lowest free blocks, for many blocks at once.

Pipeline: block_state -> [free_blocks] -> block_manager.append.

One bit per block is packed into 32-bit words. After the packing, no array has the size
of the pool. docs/decisions/block_manager.md compares this search with others.

Shape symbols: N blocks, W words of 32 blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.indexing import take

_WORD_BITS = 32
_MOST_COMPARED = 1 << 16  # comparisons; above it, a binary search
# For each bit of a word, a mask of the bits up to it.
_UP_TO = np.array([(2 << bit) - 1 for bit in range(_WORD_BITS)], np.uint32)


class FreeBits(NamedTuple):
    """The free blocks as a bit set."""

    words: jax.Array  # u32[W], a bit is set where the block is free
    num_free: jax.Array  # i32[W], free blocks up to and including each word


def pack_free_blocks(is_free: jax.Array) -> FreeBits:
    """Return the bit set of the free blocks; `is_free` is bool[N]."""
    (num_blocks,) = is_free.shape
    is_free = jnp.pad(is_free, (0, -num_blocks % _WORD_BITS))
    bit = np.uint32(1) << np.arange(_WORD_BITS, dtype=np.uint32)
    bits = jnp.where(is_free.reshape(-1, _WORD_BITS), bit[None, :], np.uint32(0))
    words = jnp.sum(bits, axis=1, dtype=jnp.uint32)
    return FreeBits(words, jnp.cumsum(_num_set(words)))


def lowest_free_blocks(free: FreeBits, count: int) -> jax.Array:
    """Return the lowest free blocks in ascending order, i32[count].

    Entries after the last free block are arbitrary numbers.

    All n are searched at once: first the word of the n-th free block, then its bit. The
    position of the bit is the number of bits up to which too few blocks are free. For
    few blocks, a comparison with all words is a smaller program than a binary search.
    """
    words, num_free = free
    nth = jnp.arange(count, dtype=jnp.int32)
    if count * words.size <= _MOST_COMPARED:
        index = jnp.sum(num_free[None, :] <= nth[:, None], axis=1, dtype=jnp.int32)
    else:
        index = jnp.searchsorted(num_free, nth, side="right", method="scan_unrolled")
    index = jnp.minimum(index, words.size - 1).astype(jnp.int32)
    word = take(words, index)
    # The number of free blocks to skip inside the word.
    skipped = nth - take(num_free, index) + _num_set(word)
    num_below = _num_set(word[:, None] & _UP_TO[None, :])
    bit = jnp.sum(num_below <= skipped[:, None], axis=1, dtype=jnp.int32)
    return index * _WORD_BITS + bit


def _num_set(words: jax.Array) -> jax.Array:
    return lax.population_count(words).astype(jnp.int32)
