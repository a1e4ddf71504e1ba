"""The rules of requests as arrays, and how a request's parameters become them.

Place on the road: user's parameters -> [rule_arrays] -> rules -> sample. `encode` works
on the host, one request at a time; the engine stacks the rows.

Shape letters: S rows, B biases of a row, W bad words of a row, K tokens of a bad word,
A words of a bit mask over the vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.arithmetic import cdiv

NO_TOKEN = -1  # pads token ids; in front of a bad word it stands for any token
MASK_BITS = 32  # vocabulary entries per word of the bit mask


class RuleParams(Protocol):
    """What is read of a request's parameters; `SamplingParams` has it."""

    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_tokens: int
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class RuleSizes:
    """Capacities per row. They are shapes, so each new value compiles anew."""

    num_bias: int = 0  # B, tokens with a bias
    num_bad_words: int = 0  # W
    bad_word_len: int = 0  # K, tokens of the longest bad word
    num_allowed: int = 0  # vocabulary entries that the bit mask covers; 0: no mask

    @classmethod
    def of_request(
        cls,
        params: RuleParams,
        vocab_size: int,
        bad_word_token_ids: Sequence[Sequence[int]] = (),
    ) -> "RuleSizes":
        """Return what one request needs, as powers of two, so that few sizes occur."""
        has_allowed = params.allowed_token_ids is not None
        covered = cdiv(vocab_size, MASK_BITS) * MASK_BITS
        return cls(
            num_bias=_power_of_two(len(params.logit_bias or ())),
            num_bad_words=_power_of_two(len(bad_word_token_ids)),
            bad_word_len=_power_of_two(max(map(len, bad_word_token_ids), default=0)),
            num_allowed=covered if has_allowed else 0,
        )

    def grown(self, other: "RuleSizes") -> "RuleSizes":
        """Return the least sizes that have room for both.

        >>> RuleSizes(num_bias=4).grown(RuleSizes(num_bias=2, num_allowed=32))
        RuleSizes(num_bias=4, num_bad_words=0, bad_word_len=0, num_allowed=32)
        """
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return RuleSizes(*map(max, pairs))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length() if number else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitsRules:
    """The rules of S rows, as arrays; at S = 1 place or row they have no axis S."""

    repetition_penalty: jax.Array  # f32[S], 1 is off
    presence_penalty: jax.Array  # f32[S], 0 is off
    frequency_penalty: jax.Array  # f32[S], 0 is off
    min_tokens: jax.Array  # i32[S], 0 is off
    bias_ids: jax.Array  # i32[S, B], NO_TOKEN where there is none
    biases: jax.Array  # f32[S, B]
    bad_words: jax.Array  # i32[S, W, K], NO_TOKEN before the first token
    has_allowed: jax.Array  # bool[S], whether `allowed` says anything
    allowed: jax.Array  # u32[S, A], bit v % 32 of word v // 32: token v is allowed

    @classmethod
    def none(cls, num_rows: int, sizes: RuleSizes) -> "LogitsRules":
        """Return rows without a rule: the value of unused rows too."""
        row = _no_rules(sizes)
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (num_rows, *leaf.shape)), row
        )

    @property
    def sizes(self) -> RuleSizes:
        """The capacities, read from the shapes."""
        num_bad_words, bad_word_len = self.bad_words.shape[-2:]
        return RuleSizes(
            num_bias=self.bias_ids.shape[-1],
            num_bad_words=num_bad_words,
            bad_word_len=bad_word_len,
            num_allowed=self.allowed.shape[-1] * MASK_BITS,
        )


def _no_rules(sizes: RuleSizes) -> LogitsRules:
    """Return one row without rules, of numpy arrays without the axis S."""
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


def encode(
    params: RuleParams,
    sizes: RuleSizes,
    bad_word_token_ids: Sequence[Sequence[int]] = (),
) -> LogitsRules:
    """Return the rules of one request: numpy arrays without the axis S.

    Args:
        params: checked by `check_rules`.
        sizes: at least `RuleSizes.of_request` of the same arguments.
        bad_word_token_ids: what `text.bad_word_token_ids` made of `params.bad_words`.

    Raises:
        ValueError: `sizes` has no room for the request.
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
                f"sizes: wanted {name} of at least {number} for this request, got "
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
        min_tokens=np.int32(params.min_tokens),
        has_allowed=np.bool_(allowed is not None),
    )


def grow(rules: LogitsRules, sizes: RuleSizes) -> LogitsRules:
    """Return the same rules with room for `sizes` as well; what fits is untouched.

    Works on numpy arrays and on jax arrays, with and without the axis S.
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
    longer = (new.bad_word_len - old.bad_word_len, 0)  # words end at the right
    more_bits = (0, (new.num_allowed - old.num_allowed) // MASK_BITS)
    return dataclasses.replace(
        rules,
        bias_ids=pad(rules.bias_ids, more_bias, value=NO_TOKEN),
        biases=pad(rules.biases, more_bias, value=0.0),
        bad_words=pad(rules.bad_words, more_words, longer, value=NO_TOKEN),
        allowed=pad(rules.allowed, more_bits, value=0),
    )
