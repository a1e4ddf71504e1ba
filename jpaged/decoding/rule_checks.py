"""What the rules of a request may be, checked before work starts.

Place on the road: user's parameters -> [rule_checks] -> rule_arrays. Host only.
"""

from collections.abc import Sequence

from jpaged.decoding.rule_arrays import RuleParams

# Within these, no sum or product of usual logits overflows float32.
LARGEST_BIAS, LEAST_BIAS = 1e9, -3e38
LARGEST_PENALTY = 1e9  # its inverse is the least


def check_rules(
    params: RuleParams,
    vocab_size: int,
    bad_word_token_ids: Sequence[Sequence[int]] = (),
    stop_ids: Sequence[int] = (),
) -> None:
    """Raise ValueError where the rules do not fit the vocabulary or leave no token.

    Args:
        params: of one request.
        vocab_size: of the model.
        bad_word_token_ids: what `text.bad_word_token_ids` made of `params.bad_words`.
        stop_ids: all that end the request: its own and, unless ignored, EOS.
    """
    bias, allowed = params.logit_bias or {}, params.allowed_token_ids
    for name, ids in (("logit_bias", bias), ("allowed_token_ids", allowed or ())):
        wrong = [token for token in ids if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(
                f"{name}: wanted token ids below the model's vocab_size "
                f"({vocab_size}), got {wrong[0]}"
            )
    for token, value in bias.items():
        if not LEAST_BIAS <= value <= LARGEST_BIAS:
            raise ValueError(
                f"logit_bias[{token}]: wanted {LEAST_BIAS:g} to {LARGEST_BIAS:g}, "
                f"which float32 logits can bear, got {value:g}"
            )
    penalty = params.repetition_penalty
    if not 1.0 / LARGEST_PENALTY <= penalty <= LARGEST_PENALTY:
        raise ValueError(
            f"repetition_penalty: wanted {1.0 / LARGEST_PENALTY:g} to "
            f"{LARGEST_PENALTY:g}, which float32 logits can bear, got {penalty:g}"
        )
    _check_a_token_is_left(params, vocab_size, bad_word_token_ids, set(stop_ids))


def _check_a_token_is_left(
    params: RuleParams,
    vocab_size: int,
    bad_word_token_ids: Sequence[Sequence[int]],
    stop_ids: set[int],
) -> None:
    allowed = params.allowed_token_ids
    left = set(range(vocab_size) if allowed is None else allowed)
    what = "the vocabulary" if allowed is None else "allowed_token_ids"
    left -= {word[0] for word in bad_word_token_ids if len(word) == 1}
    if not left:
        raise ValueError(
            f"bad_words: wanted at least one token of {what} to be left, got bad words "
            f"that forbid all of them; allow more tokens, or forbid fewer"
        )
    if params.min_tokens > 0 and left <= stop_ids:
        raise ValueError(
            f"min_tokens: wanted 0, got {params.min_tokens}: all tokens of {what} that "
            f"are left ({sorted(left)[:8]}) end the request, so none can come before "
            f"min_tokens; allow another token, or set min_tokens to 0"
        )
