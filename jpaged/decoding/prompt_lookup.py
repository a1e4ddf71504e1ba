"""Prompt lookup: the next tokens guessed from what the sequence itself says before.

Place on the road: tokens so far -> [prompt_lookup] -> drafts -> verification.

What followed the last few tokens when they last occurred is a guess of what follows
them now; good where output repeats its input: summaries, edits, code.

Letters: S rows, L tokens of the longest sequence, D drafts.
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
    """Return drafts i32[S, D] and how many of them there are, i32[S].

    The longest run of last tokens, of `max_ngram` down to `min_ngram`, that occurs
    earlier in the sequence counts, and of several such places the last one.

    Args:
        tokens: i32[S, L].
        num_tokens: i32[S], tokens of each row that are known.
        num_drafts: D, static.
        min_ngram, max_ngram: static, 1 <= min_ngram <= max_ngram.

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
    # How many tokens up to each place are those up to the last one.
    matches = jnp.zeros(tokens.shape, jnp.int32)
    is_equal = index < last
    for back in range(max_ngram):
        # A roll brings tokens round from the end; they lie before the beginning.
        earlier = jnp.roll(tokens, back, axis=1)
        wanted = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0), axis=1)
        is_equal &= (earlier == wanted) & (index >= back)
        matches += is_equal.astype(jnp.int32)
    longest = jnp.max(matches, axis=1, keepdims=True)
    is_best = (matches == longest) & (longest >= min_ngram)
    place = jnp.max(jnp.where(is_best, index, -1), axis=1)
    at = place[:, None] + 1 + jnp.arange(num_drafts, dtype=jnp.int32)[None, :]
    is_draft = (place[:, None] >= 0) & (at < num_tokens[:, None])
    drafts = jnp.take_along_axis(tokens, jnp.minimum(at, length - 1), axis=1)
    drafts = jnp.where(is_draft, drafts, 0)
    return drafts, jnp.sum(is_draft, axis=1, dtype=jnp.int32)
