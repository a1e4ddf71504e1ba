"""Search for the lowest free blocks, for many blocks at once.

Pipeline: block_state -> [free_blocks] -> block_manager.append.

One bit per block is packed into 32-bit words. After the packing, no array has the size
of the pool. docs/decisions/block_manager.md compares this search with others.

Shape symbols: N blocks, W words of 32 blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.indexing import take

_WORD_BITS = 32


class FreeBits(NamedTuple):
    """The free blocks as a bit set."""

    words: jax.Array  # u32[W], a bit is set where the block is free
    num_free: jax.Array  # i32[W], free blocks up to and including each word


def pack_free_blocks(is_free: jax.Array) -> FreeBits:
    """Return the bit set of the free blocks; `is_free` is bool[N]."""
    (num_blocks,) = is_free.shape
    is_free = jnp.pad(is_free, (0, -num_blocks % _WORD_BITS))
    bit = jnp.uint32(1) << jnp.arange(_WORD_BITS, dtype=jnp.uint32)
    bits = jnp.where(is_free.reshape(-1, _WORD_BITS), bit[None, :], jnp.uint32(0))
    words = jnp.sum(bits, axis=1, dtype=jnp.uint32)
    return FreeBits(words, jnp.cumsum(lax.population_count(words).astype(jnp.int32)))


def lowest_free_blocks(free: FreeBits, count: int) -> jax.Array:
    """Return the lowest free blocks in ascending order, i32[count].

    Entries after the last free block are arbitrary numbers.

    A binary search finds the word of the n-th free block, and five halvings find its
    bit in the word, for all n at once.
    """
    words, num_free = free
    nth = jnp.arange(count, dtype=jnp.int32)
    index = jnp.searchsorted(num_free, nth, side="right", method="scan_unrolled")
    index = jnp.minimum(index, words.size - 1).astype(jnp.int32)
    word = take(words, index)
    # From here on `nth` is the number of free blocks to skip inside the word.
    nth = nth - take(num_free, index) + lax.population_count(word).astype(jnp.int32)
    block = index * _WORD_BITS
    for half in (16, 8, 4, 2, 1):
        in_low = lax.population_count(word & jnp.uint32(2**half - 1)).astype(jnp.int32)
        is_high = nth >= in_low
        nth = jnp.where(is_high, nth - in_low, nth)
        word = jnp.where(is_high, word >> half, word)
        block = jnp.where(is_high, block + half, block)
    return block
