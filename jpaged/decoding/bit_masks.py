"""Bit masks over the vocabulary: 32 tokens per word.

Shape symbols: S rows, V vocabulary, W words.
"""

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv

MASK_BITS = 32  # tokens per word


def num_words(vocab_size: int) -> int:
    """Number of words W of a mask over the vocabulary."""
    return cdiv(vocab_size, MASK_BITS)


def unpack(words: jax.Array, vocab_size: int) -> jax.Array:
    """Unpacks masks.

    Args:
      words: u32[S, W]; bit v % 32 of word v // 32 is token v.
      vocab_size: V, at most 32 * W.

    Returns:
      bool[S, V].
    """
    # Every bit is computed where it is used: there is no gather over the vocabulary.
    shifts = jnp.arange(MASK_BITS, dtype=jnp.uint32)[None, None]
    bits = (words[:, :, None] >> shifts) & jnp.uint32(1)
    return (bits != 0).reshape(len(words), -1)[:, :vocab_size]


def packed(mask: jax.Array) -> jax.Array:
    """Packs masks bool[S, V] into words u32[S, W], as `unpack` reads them."""
    num_rows, vocab_size = mask.shape
    padding = num_words(vocab_size) * MASK_BITS - vocab_size
    bits = jnp.pad(mask, ((0, 0), (0, padding))).reshape(num_rows, -1, MASK_BITS)
    shifts = jnp.arange(MASK_BITS, dtype=jnp.uint32)[None, None]
    return jnp.sum(bits.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number`; 0 for 0.

    >>> [power_of_two(number) for number in (0, 1, 5, 8)]
    [0, 1, 8, 8]
    """
    return 1 << (number - 1).bit_length() if number else 0
