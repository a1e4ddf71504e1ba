"""Watermark: a bias towards tokens that the tokens before them choose, and its test.

The last tokens seed a random set of "green" tokens, each with probability `share`. The
text of a watermarked request has more of them than `share`, which needs no model to
find.

Source: Kirchenbauer et al. 2023. https://arxiv.org/abs/2301.10226
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.processors import LogitsProcessor, Row
from jpaged.validation import integer, number, token_ids


def green_tokens(
    context: jax.Array, secret: jax.Array, share: jax.Array, vocab_size: int
) -> jax.Array:
    """Which tokens are green after `context` i32[width]; bool[V]."""
    key = jax.random.key(secret, impl="threefry2x32")
    for i in range(context.shape[0]):
        key = jax.random.fold_in(key, context[i])
    bits = jax.random.bits(key, (vocab_size,), jnp.uint32) >> 8
    return bits.astype(jnp.float32) * 2.0**-24 < share


def _favour(
    logits: jax.Array,
    row: Row,
    *,
    bias: jax.Array,
    share: jax.Array,
    secret: jax.Array,
    offsets: jax.Array,
) -> jax.Array:
    at = row.num_tokens - offsets
    context = row.tokens[jnp.maximum(at, 0)]
    is_green = green_tokens(context, secret, share, logits.shape[0])
    is_green &= jnp.all(at >= 0)
    return logits + jnp.where(is_green, bias, 0.0)


class Detection(NamedTuple):
    """Result of `Watermark.detect`."""

    num_tokens: int  # tokens that were tested
    num_green: int
    z_score: float  # standard deviations above what is expected without the watermark
    p_value: float  # probability of such a score without the watermark


@dataclasses.dataclass(frozen=True)
class Watermark:
    """A watermark: `processor` writes it, `detect` finds it.

    Attributes:
      vocab_size: V of the model.
      bias: added to the logits of green tokens, after the temperature.
      share: share of tokens that are green, between 0 and 1.
      secret: the key, which `detect` needs too; 0 to 2**32 - 1.
      width: number of preceding tokens that choose the green tokens; 1 to 8.

    Raises:
      ValueError: a value is out of range.
    """

    vocab_size: int
    bias: float = 2.0
    share: float = 0.25
    secret: int = 15_485_863
    width: int = 1

    def __post_init__(self) -> None:
        integer("vocab_size", self.vocab_size, low=1)
        number("bias", self.bias)
        number("share", self.share, above=0, high=0.999)
        integer("secret", self.secret, low=0, high=2**32 - 1)
        integer("width", self.width, low=1, high=8)

    @property
    def processor(self) -> LogitsProcessor:
        """The logits processor that writes the watermark."""
        parameters = {
            "bias": float(self.bias),
            "share": float(self.share),
            "secret": np.uint32(self.secret),
            "offsets": np.arange(self.width, 0, -1, dtype=np.int32),
        }
        return LogitsProcessor(_favour, parameters, after_temperature=True)

    def is_green(self, tokens: Sequence[int]) -> np.ndarray:
        """Return for each token after the first `width` whether it is green."""
        ids = np.asarray(token_ids("tokens", tokens), np.int32)
        windows = [ids[i : i + self.width] for i in range(len(ids) - self.width)]
        found = [
            _sets(self.vocab_size, self.secret, self.share, tuple(context.tolist()))
            for context in windows
        ]
        return np.array(
            [
                green[token]
                for green, token in zip(found, ids[self.width :], strict=True)
            ],
            np.bool_,
        )

    def detect(self, tokens: Sequence[int], *, once: bool = True) -> Detection:
        """Test whether a text has the watermark.

        Args:
          tokens: the text's tokens. Generated tokens only, or with those of the prompt
            before them, which dilute the watermark.
          once: count each pair of context and token only once, so that repetitions
            count as little in text without the watermark.

        Raises:
          ValueError: there are no more than `width` tokens.
        """
        if len(tokens) <= self.width:
            raise ValueError(
                f"tokens: expected more than width ({self.width}) tokens, got "
                f"{len(tokens)}"
            )
        is_green = self.is_green(tokens)
        if once:
            grams = [
                tuple(tokens[i : i + self.width + 1]) for i in range(len(is_green))
            ]
            is_green = np.array(list(dict(zip(grams, is_green, strict=True)).values()))
        count, green = len(is_green), int(is_green.sum())
        deviation = math.sqrt(count * self.share * (1 - self.share))
        z_score = (green - self.share * count) / deviation
        return Detection(count, green, z_score, 0.5 * math.erfc(z_score / math.sqrt(2)))


@functools.lru_cache(maxsize=4096)
def _sets(
    vocab_size: int, secret: int, share: float, context: tuple[int, ...]
) -> np.ndarray:
    green = _green_tokens(
        np.array(context, np.int32), np.uint32(secret), np.float32(share), vocab_size
    )
    return np.asarray(green)


_green_tokens = jax.jit(green_tokens, static_argnums=3)
