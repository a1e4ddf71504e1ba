"""Prompt lookup: drafts the next tokens from earlier tokens of the same sequence.

Pipeline: tokens so far -> [prompt_lookup] -> drafts -> verification.

The drafts are the tokens that followed the last few tokens when these occurred before.
They are often right if the output repeats its input, as in summaries, edits and code.

Shape symbols: S rows, L tokens of the longest sequence, D drafts.

Source: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

import jax
import jax.numpy as jnp


def prompt_lookup(
    tokens: jax.Array,
    num_tokens: jax.Array,
    *,
    num_drafts: int,
    min_ngram: int,
    max_ngram: int,
) -> tuple[jax.Array, jax.Array]:
    """Drafts tokens for each row.

    The function finds the longest n-gram at the end of the sequence, from `max_ngram`
    down to `min_ngram` tokens, that occurs earlier in the sequence; of several
    occurrences it uses the last one.

    Args:
      tokens: i32[S, L].
      num_tokens: i32[S], number of known tokens of each row.
      num_drafts: Most drafts D of a row; static.
      min_ngram: Shortest n-gram, at least 1; static.
      max_ngram: Longest n-gram; static.

    Returns:
      Drafts i32[S, D], and the number of drafts of each row, i32[S].

    >>> tokens = jnp.array([[5, 6, 7, 8, 5, 6, 0, 0]])
    >>> drafts, count = prompt_lookup(
    ...     tokens, jnp.array([6]), num_drafts=3, min_ngram=1, max_ngram=3
    ... )
    >>> drafts.tolist(), count.tolist()
    ([[7, 8, 5]], [3])
    """
    _, length = tokens.shape
    index = jnp.arange(length, dtype=jnp.int32)[None, :]
    last = num_tokens[:, None] - 1
    # Number of tokens before each index that equal the last tokens of the sequence.
    matches = jnp.zeros(tokens.shape, jnp.int32)
    is_equal = index < last
    for back in range(max_ngram):
        # A roll moves tokens from the end to the start; `index >= back` excludes them.
        earlier = jnp.roll(tokens, back, axis=1)
        expected = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1)
        is_equal &= (earlier == expected) & (index >= back)
        matches += is_equal.astype(jnp.int32)
    longest = jnp.max(matches, axis=1, keepdims=True)
    is_best = (matches == longest) & (longest >= min_ngram)
    ngram_end = jnp.max(jnp.where(is_best, index, -1), axis=1)
    source = ngram_end[:, None] + 1 + jnp.arange(num_drafts, dtype=jnp.int32)[None, :]
    is_draft = (ngram_end[:, None] >= 0) & (source < num_tokens[:, None])
    drafts = jnp.take_along_axis(tokens, jnp.minimum(source, length - 1), axis=1)
    drafts = jnp.where(is_draft, drafts, 0)
    return drafts, jnp.sum(is_draft, axis=1, dtype=jnp.int32)
