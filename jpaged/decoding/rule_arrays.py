"""Logits rules of requests as arrays, encoded from the requests' parameters.

Pipeline: request parameters -> [rule_arrays] -> rules -> sample.

`encode_rules` runs on the host, for one request at a time; the engine stacks the rows.

Shape symbols: S rows, B biases of a row, W bad words of a row, K tokens of a bad word,
A words of a bit mask over the vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.bit_masks import MASK_BITS, num_words, power_of_two

NO_TOKEN = -1  # padding of token ids; before a bad word it matches any token


class RuleParams(Protocol):
    """The parameters of a request that are logits rules, as in `SamplingParams`."""

    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_tokens: int
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class RuleSizes:
    """Capacities per row; they are shapes, so every new value is compiled."""

    num_bias: int = 0  # B, tokens with a bias
    num_bad_words: int = 0  # W
    bad_word_len: int = 0  # K, tokens of the longest bad word
    num_allowed: int = 0  # tokens that the bit mask covers; 0: no mask

    @classmethod
    def of_request(
        cls,
        params: RuleParams,
        vocab_size: int,
        bad_word_token_ids: Sequence[Sequence[int]] = (),
    ) -> "RuleSizes":
        """Sizes that a request needs, as powers of two, so that few sizes occur."""
        has_allowed = params.allowed_token_ids is not None
        covered = num_words(vocab_size) * MASK_BITS
        return cls(
            num_bias=power_of_two(len(params.logit_bias or ())),
            num_bad_words=power_of_two(len(bad_word_token_ids)),
            bad_word_len=power_of_two(max(map(len, bad_word_token_ids), default=0)),
            num_allowed=covered if has_allowed else 0,
        )

    def grown(self, other: "RuleSizes") -> "RuleSizes":
        """Elementwise maximum of two sizes.

        >>> RuleSizes(num_bias=4).grown(RuleSizes(num_bias=2, num_allowed=32))
        RuleSizes(num_bias=4, num_bad_words=0, bad_word_len=0, num_allowed=32)
        """
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return RuleSizes(*map(max, pairs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitsRules:
    """The rules of S rows as arrays; those of one request have no axis S."""

    repetition_penalty: jax.Array  # f32[S], 1 is off
    presence_penalty: jax.Array  # f32[S], 0 is off
    frequency_penalty: jax.Array  # f32[S], 0 is off
    min_tokens: jax.Array  # i32[S], 0 is off
    bias_ids: jax.Array  # i32[S, B], NO_TOKEN is padding
    biases: jax.Array  # f32[S, B]
    bad_words: jax.Array  # i32[S, W, K], NO_TOKEN before the first token
    has_allowed: jax.Array  # bool[S], whether `allowed` applies
    allowed: jax.Array  # u32[S, A], see `bit_masks`

    @classmethod
    def none(cls, num_rows: int, sizes: RuleSizes) -> "LogitsRules":
        """Rows without rules, which are also the values of unused rows."""
        row = _no_rules(sizes)
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (num_rows, *leaf.shape)), row
        )

    @property
    def sizes(self) -> RuleSizes:
        """Capacities, from the shapes."""
        num_bad_words, bad_word_len = self.bad_words.shape[-2:]
        return RuleSizes(
            num_bias=self.bias_ids.shape[-1],
            num_bad_words=num_bad_words,
            bad_word_len=bad_word_len,
            num_allowed=self.allowed.shape[-1] * MASK_BITS,
        )


def _no_rules(sizes: RuleSizes) -> LogitsRules:
    """One row without rules, as numpy arrays without the axis S."""
    leaves: dict[str, Any] = dict(
        repetition_penalty=np.float32(1.0),
        presence_penalty=np.float32(0.0),
        frequency_penalty=np.float32(0.0),
        min_tokens=np.int32(0),
        bias_ids=np.full(sizes.num_bias, NO_TOKEN, np.int32),
        biases=np.zeros(sizes.num_bias, np.float32),
        bad_words=np.full(
            (sizes.num_bad_words, sizes.bad_word_len), NO_TOKEN, np.int32
        ),
        has_allowed=np.bool_(False),
        allowed=np.zeros(sizes.num_allowed // MASK_BITS, np.uint32),
    )
    return LogitsRules(**leaves)


def encode_rules(
    params: RuleParams,
    sizes: RuleSizes,
    bad_word_token_ids: Sequence[Sequence[int]] = (),
) -> LogitsRules:
    """Encodes the rules of one request as numpy arrays without the axis S.

    Args:
      params: The request's parameters, checked by `check_rules`.
      sizes: Capacities, at least `RuleSizes.of_request` of the same arguments.
      bad_word_token_ids: The tokens of `params.bad_words`, from
        `text.bad_word_token_ids`.

    Raises:
      ValueError: The request exceeds `sizes`.
    """
    row: Any = _no_rules(sizes)
    bias, allowed = params.logit_bias or {}, params.allowed_token_ids
    needed = {
        "num_bias": len(bias),
        "num_bad_words": len(bad_word_token_ids),
        "bad_word_len": max(map(len, bad_word_token_ids), default=0),
        "num_allowed": 0 if allowed is None else max(allowed) + 1,
    }
    for name, number in needed.items():
        if number > getattr(sizes, name):
            raise ValueError(
                f"sizes: expected {name} of at least {number} for this request, got "
                f"{getattr(sizes, name)}; grow it by RuleSizes.of_request"
            )
    row.bias_ids[: len(bias)] = list(bias.keys())
    row.biases[: len(bias)] = list(bias.values())
    for word, token_ids in zip(row.bad_words, bad_word_token_ids, strict=False):
        word[len(word) - len(token_ids) :] = token_ids
    if allowed is not None:
        ids = np.asarray(allowed, np.uint32)
        bits = np.uint32(1) << (ids % MASK_BITS)
        np.bitwise_or.at(row.allowed, ids // MASK_BITS, bits)
    return dataclasses.replace(
        row,
        repetition_penalty=np.float32(params.repetition_penalty),
        presence_penalty=np.float32(params.presence_penalty),
        frequency_penalty=np.float32(params.frequency_penalty),
        min_tokens=np.int32(min(params.min_tokens, np.iinfo(np.int32).max)),
        has_allowed=np.bool_(allowed is not None),
    )


def grow_rules(rules: LogitsRules, sizes: RuleSizes) -> LogitsRules:
    """Pads rules to capacities of at least `sizes`; the rules do not change.

    Accepts numpy and jax arrays, with and without the axis S.
    """
    old, new = rules.sizes, rules.sizes.grown(sizes)
    if old == new:
        return rules

    def pad(leaf: Any, *widths: tuple[int, int], value: float) -> Any:
        widths = ((0, 0),) * (leaf.ndim - len(widths)) + widths
        module = np if isinstance(leaf, np.ndarray) else jnp
        return module.pad(leaf, widths, constant_values=value)

    more_bias = (0, new.num_bias - old.num_bias)
    more_words = (0, new.num_bad_words - old.num_bad_words)
    longer = (new.bad_word_len - old.bad_word_len, 0)  # the last token stays last
    more_bits = (0, (new.num_allowed - old.num_allowed) // MASK_BITS)
    return dataclasses.replace(
        rules,
        bias_ids=pad(rules.bias_ids, more_bias, value=NO_TOKEN),
        biases=pad(rules.biases, more_bias, value=0.0),
        bad_words=pad(rules.bad_words, more_words, longer, value=NO_TOKEN),
        allowed=pad(rules.allowed, more_bits, value=0),
    )
