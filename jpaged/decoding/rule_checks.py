"""Checks the logits rules of a request before it is submitted.

Pipeline: request parameters -> [rule_checks] -> rule_arrays. Host only.
"""

import itertools
from collections.abc import Sequence

from jpaged.decoding.rule_arrays import RuleParams

# Within these limits, sums and products with usual logits do not overflow float32.
LARGEST_BIAS, LEAST_BIAS = 1e9, -3e38
LARGEST_PENALTY = 1e9  # the smallest penalty is its inverse


def check_rules(
    params: RuleParams,
    vocab_size: int,
    bad_word_token_ids: Sequence[Sequence[int]] = (),
    stop_ids: Sequence[int] = (),
) -> None:
    """Checks that the rules fit the vocabulary and leave at least one token.

    Args:
      params: The request's parameters.
      vocab_size: Size of the model's vocabulary.
      bad_word_token_ids: The tokens of `params.bad_words`, from
        `text.bad_word_token_ids`.
      stop_ids: All tokens that end the request: its own and, unless ignored, EOS.

    Raises:
      ValueError: A rule is out of range, or no token is left.
    """
    bias, allowed = params.logit_bias or {}, params.allowed_token_ids
    for name, ids in (
        ("logit_bias", bias),
        ("allowed_token_ids", allowed or ()),
        ("bad_words", itertools.chain.from_iterable(bad_word_token_ids)),
    ):
        invalid = [token for token in ids if not 0 <= token < vocab_size]
        if invalid:
            raise ValueError(
                f"{name}: expected token ids below the model's vocab_size "
                f"({vocab_size}), got {invalid[0]}"
            )
    for token, value in bias.items():
        if not LEAST_BIAS <= value <= LARGEST_BIAS:
            raise ValueError(
                f"logit_bias[{token}]: expected {LEAST_BIAS:g} to {LARGEST_BIAS:g}, so "
                f"that float32 logits do not overflow, got {value:g}"
            )
    penalty = params.repetition_penalty
    if not 1.0 / LARGEST_PENALTY <= penalty <= LARGEST_PENALTY:
        raise ValueError(
            f"repetition_penalty: expected {1.0 / LARGEST_PENALTY:g} to "
            f"{LARGEST_PENALTY:g}, so that float32 logits do not overflow, got "
            f"{penalty:g}"
        )
    _check_a_token_is_left(params, vocab_size, bad_word_token_ids, set(stop_ids))


def _check_a_token_is_left(
    params: RuleParams,
    vocab_size: int,
    bad_word_token_ids: Sequence[Sequence[int]],
    stop_ids: set[int],
) -> None:
    allowed = params.allowed_token_ids
    candidates = range(vocab_size) if allowed is None else allowed
    what = "the vocabulary" if allowed is None else "allowed_token_ids"
    forbidden = {word[0] for word in bad_word_token_ids if len(word) == 1}
    # `all` stops at the first remaining token, not at the end of the vocabulary.
    if all(token in forbidden for token in candidates):
        raise ValueError(
            f"bad_words: expected at least one token of {what} to be left, got bad "
            f"words that forbid all of them; allow more tokens, or forbid fewer"
        )
    ends = forbidden | stop_ids
    if params.min_tokens > 0 and all(token in ends for token in candidates):
        left = sorted(set(candidates) - forbidden)
        raise ValueError(
            f"min_tokens: expected 0, got {params.min_tokens}: all remaining tokens of "
            f"{what} ({left[:8]}) end the request, so none can come before "
            f"min_tokens; allow another token, or set min_tokens to 0"
        )
