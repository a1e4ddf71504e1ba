"""Scoring: the log-probabilities that a model assigns to given texts.

Pipeline: token ids -> [models.scoring] -> decoder -> log-probabilities.

The decoder is the one that the engine serves. It runs without pages, on whole texts.
These are padded to few shapes, so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.models.decoder import Decoder

_SHORTEST = 32  # texts are padded to at least this length, and to powers of two
_BATCH_TOKENS = 4096  # tokens of a batch including padding, unless one text is longer
_LOGITS_TOKENS = 512  # tokens whose logits are in memory at the same time


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is after its prompt."""

    prompt_token_ids: list[int]
    token_ids: list[int]  # of the continuation
    token_logprobs: list[float]  # of each token_id, given all tokens before it
    is_greedy: bool  # every token_id is the most likely one

    @property
    def cumulative_logprob(self) -> float:
        """Log-probability of the whole continuation."""
        return math.fsum(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(-self.cumulative_logprob / len(self.token_logprobs))


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    perplexity: float
    cumulative_logprob: float
    num_tokens: int  # predicted tokens: all but the first
    num_characters: int  # 0 for a text given as token ids

    @property
    def bits_per_character(self) -> float:
        """Comparable between models with different tokenizers; NaN for token ids."""
        if not self.num_characters:
            return math.nan
        return -self.cumulative_logprob / math.log(2) / self.num_characters


def score(
    model: Decoder,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    *,
    length: int | None = None,
) -> list[Score]:
    """Score each continuation after its prompt.

    Args:
      model: the decoder.
      prompts: token ids of each prompt, at least one.
      continuations: token ids of the continuation of each prompt, at least one.
      length: of the longest possible sequence; see `rotary.frequencies`. None is that
        of each text.

    Returns:
      A Score for each prompt.

    Raises:
      ValueError: a prompt or continuation is empty, contains unknown tokens, or both
        together are longer than the model's positions.
    """
    texts = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if not prompt:
            raise ValueError(f"prompts[{index}]: expected at least one token, got none")
        if len(text) == len(prompt):
            raise ValueError(
                f"continuations[{index}]: expected at least one token, got none"
            )
        _check_tokens(f"prompts[{index}]", model, text)
    scores = []
    found = _logprobs(model, texts, length)
    for prompt, continuation, (logprobs, is_best) in zip(
        prompts, continuations, found, strict=True
    ):
        first = len(prompt) - 1
        scores.append(
            Score(
                list(prompt),
                list(continuation),
                [float(x) for x in logprobs[first:]],
                bool(is_best[first:].all()),
            )
        )
    return scores


def perplexity(
    model: Decoder,
    token_ids: Sequence[int],
    *,
    window: int | None = None,
    overlap: int | None = None,
    num_characters: int = 0,
    length: int | None = None,
) -> Perplexity:
    """Perplexity of one text of any length, computed in overlapping windows.

    Each token is predicted once, given at least the `overlap` tokens before it, or all
    tokens before it if there are fewer.

    Args:
      model: the decoder.
      token_ids: the text, at least two tokens.
      window: tokens that are computed at once. None is the model's maximum length, but
        at most 1024.
      overlap: tokens of a window that only serve as context. None is half the window.
      num_characters: length of the text, for `bits_per_character`.
      length: of the longest possible sequence; see `rotary.frequencies`. None is that
        of each window.

    Raises:
      ValueError: the text has fewer than two tokens or contains unknown ones, or
        `window` or `overlap` is out of range.
    """
    longest = model.config.max_length
    window = min(model.config.default_length, 1024) if window is None else window
    overlap = window // 2 if overlap is None else overlap
    if not 2 <= window <= longest:
        raise ValueError(f"window: expected from 2 to {longest}, got {window}")
    if not 1 <= overlap < window:
        raise ValueError(f"overlap: expected from 1 to {window - 1}, got {overlap}")
    if len(token_ids) < 2:
        raise ValueError(f"text: expected at least two tokens, got {len(token_ids)}")
    _check_tokens("text", model, token_ids, limit=False)
    starts, end = [0], window
    while end < len(token_ids):
        starts.append(end - overlap)
        end += window - overlap
    texts = [list(token_ids[start : start + window]) for start in starts]
    total, count = 0.0, 0
    for index, (logprobs, _) in enumerate(_logprobs(model, texts, length)):
        new = logprobs if index == 0 else logprobs[overlap - 1 :]
        total += math.fsum(float(x) for x in new)
        count += len(new)
    assert count == len(token_ids) - 1, (count, len(token_ids))
    return Perplexity(math.exp(-total / count), total, count, num_characters)


def read_text(file: pathlib.Path) -> str:
    """The text of a UTF-8 file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, got {error}") from error


def _check_tokens(
    name: str, model: Decoder, token_ids: Sequence[int], *, limit: bool = True
) -> None:
    config = model.config
    if limit and len(token_ids) > config.max_length:
        raise ValueError(
            f"{name}: expected at most {config.longest_name} ({config.max_length}) "
            f"tokens including the continuation, got {len(token_ids)}"
        )
    unknown = [t for t in token_ids if not 0 <= t < config.vocab_size]
    if unknown:
        raise ValueError(
            f"{name}: expected token ids from 0 to {config.vocab_size - 1}, got "
            f"{unknown[0]}"
        )


def _logprobs(
    model: Decoder, texts: Sequence[list[int]], rope_length: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text, values of its tokens after the first.

    Texts of similar length share a batch, so that few shapes occur.

    Returns:
      For each text, log-probabilities f32[T - 1], and bool[T - 1]: whether the token is
      the most likely one.
    """
    by_length: dict[int, list[int]] = {}
    config = model.config
    for index, text in enumerate(texts):
        length = max(_SHORTEST, 1 << (len(text) - 1).bit_length())
        # Padding must not change how a text is rotated.
        longest = (
            config.max_length if rope_length is not None else config.default_length
        )
        length = min(length, max(longest, len(text)))
        by_length.setdefault(length, []).append(index)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for length, members in sorted(by_length.items()):
        most = max(1, _BATCH_TOKENS // length)
        num_rows = min(most, 1 << (len(members) - 1).bit_length())
        for first in range(0, len(members), num_rows):
            batch = members[first : first + num_rows]
            tokens = np.zeros((num_rows, length), np.int32)
            for row, index in enumerate(batch):
                tokens[row, : len(texts[index])] = texts[index]
            logprobs, is_best = jax.device_get(_forward(model, tokens, rope_length))
            for row, index in enumerate(batch):
                size = len(texts[index]) - 1
                found[index] = logprobs[row, :size], is_best[row, :size]
    return [found[index] for index in range(len(texts))]


@functools.partial(jax.jit, static_argnums=2)
def _forward(
    model: Decoder, tokens: jax.Array, rope_length: int | None
) -> tuple[jax.Array, jax.Array]:
    """Values of the token that follows each token of i32[B, T].

    Logits are computed for a few tokens at a time, to limit memory. The last column is
    meaningless, because no token follows.

    Returns:
      Log-probabilities f32[B, T], and bool[B, T]: whether it is the most likely token.
    """
    num_rows, length = tokens.shape
    hidden = model.hidden_states(tokens, length=rope_length)
    hidden = hidden.reshape(num_rows * length, -1)
    following = jnp.roll(tokens, -1, axis=1).reshape(-1)
    size = min(_LOGITS_TOKENS, num_rows * length)
    pad = -(num_rows * length) % size

    def chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(inputs[0])
        chosen = jnp.take_along_axis(logits, inputs[1][:, None], axis=1)[:, 0]
        is_best = chosen == jnp.max(logits, axis=1)
        return chosen - jax.nn.logsumexp(logits, axis=1), is_best

    parts = (
        jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[1]),
        jnp.pad(following, (0, pad)).reshape(-1, size),
    )
    logprobs, is_best = lax.map(chunk, parts)
    shape = (num_rows, length)
    count = num_rows * length
    return (
        logprobs.reshape(-1)[:count].reshape(shape),
        is_best.reshape(-1)[:count].reshape(shape),
    )
