"""Packing: ragged rollouts as rows of a training batch.

Pipeline: outputs of the LLM -> [packing] -> scoring, losses. Host only.

Rollouts have different lengths. One per row wastes what the longest has more; several
in a row need attention within segments (`Decoder.__call__` with `segment_ids`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jpaged.outputs import RequestOutput


class Rollout(NamedTuple):
    """One sample of a prompt."""

    prompt: Sequence[int]  # token ids
    tokens: Sequence[int]  # sampled token ids
    logprobs: Sequence[float] | np.ndarray  # of `tokens`, under the rollout's policy


class TrainingBatch(NamedTuple):
    """Rollouts in rows; R rows of T tokens. Entries after the last segment are 0."""

    tokens: np.ndarray  # i32[R, T]
    segment_ids: np.ndarray  # i32[R, T], 1, 2, ... in each row; 0 is padding
    positions: np.ndarray  # i32[R, T], of each token in its rollout
    mask: np.ndarray  # bool[R, T], tokens that were sampled
    logprobs: np.ndarray  # f32[R, T], of these, under the rollout's policy
    rollouts: np.ndarray  # i32[R, T], index of each token's rollout; -1 is padding

    def per_token(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return values per rollout, as advantages, per token: f32[R, T]."""
        values = np.append(np.asarray(values, np.float32), np.float32(0))
        return values[self.rollouts] * self.mask


def rollouts_of(outputs: Iterable[RequestOutput]) -> list[Rollout]:
    """Return the samples of requests, prompt after prompt.

    Raises:
      ValueError: a request has an error instead of outputs.
    """
    found = []
    for output in outputs:
        if output.error is not None:
            raise ValueError(
                f"outputs: expected outputs without errors, got request "
                f"{output.request_id} with: {output.error}"
            )
        for sample in output.outputs:
            assert sample.token_logprobs is not None
            prompt = output.prompt_token_ids
            found.append(Rollout(prompt, sample.token_ids, sample.token_logprobs))
    return found


def pad(rollouts: Sequence[Rollout], length: int | None = None) -> TrainingBatch:
    """Return a batch with one rollout in each row.

    Args:
      rollouts: the rollouts.
      length: T; None is the length of the longest. A fixed one compiles less.

    Raises:
      ValueError: there is none, or one is longer than `length`.
    """
    sizes = _sizes(rollouts, length)
    length = max(sizes) if length is None else length
    return _batch(rollouts, [[i] for i in range(len(sizes))], length)


def pack(
    rollouts: Sequence[Rollout], length: int, num_rows: int | None = None
) -> TrainingBatch:
    """Return a batch with several rollouts in each row, where they fit.

    The longest come first, and each goes to the first row that has space for it.

    Args:
      rollouts: the rollouts.
      length: T, tokens of a row.
      num_rows: R; None is as many as needed. A fixed one compiles once.

    Raises:
      ValueError: there is no rollout, one is longer than `length`, or they need more
        rows.
    """
    sizes = _sizes(rollouts, length)
    rows: list[list[int]] = []
    spaces: list[int] = []
    for index in np.argsort([-size for size in sizes], kind="stable").tolist():
        fits = [row for row, space in enumerate(spaces) if space >= sizes[index]]
        row = fits[0] if fits else len(rows)
        if row == len(rows):
            rows.append([])
            spaces.append(length)
        rows[row].append(index)
        spaces[row] -= sizes[index]
    if num_rows is not None:
        if len(rows) > num_rows:
            raise ValueError(
                f"num_rows: expected at least {len(rows)} for {len(sizes)} rollouts of "
                f"{sum(sizes)} tokens in rows of {length}, got {num_rows}"
            )
        rows += [[] for _ in range(num_rows - len(rows))]
    return _batch(rollouts, rows, length)


def _sizes(rollouts: Sequence[Rollout], length: int | None) -> list[int]:
    if not rollouts:
        raise ValueError("rollouts: expected at least one, got none")
    for i, each in enumerate(rollouts):
        size = len(each.prompt) + len(each.tokens)
        if length is not None and size > length:
            raise ValueError(
                f"length: expected at least {size}, the tokens of rollout {i}, got "
                f"{length}"
            )
        if not len(each.prompt) or len(each.logprobs) != len(each.tokens):
            raise ValueError(
                f"rollouts[{i}]: expected a prompt, and a log-probability for each of "
                f"{len(each.tokens)} sampled tokens, got a prompt of "
                f"{len(each.prompt)} tokens and {len(each.logprobs)}"
            )
    return [len(each.prompt) + len(each.tokens) for each in rollouts]


def _batch(
    rollouts: Sequence[Rollout], rows: Sequence[Sequence[int]], length: int
) -> TrainingBatch:
    shape = len(rows), length
    batch = TrainingBatch(
        tokens=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        mask=np.zeros(shape, np.bool_),
        logprobs=np.zeros(shape, np.float32),
        rollouts=np.full(shape, -1, np.int32),
    )
    for row, indices in enumerate(rows):
        start = 0
        for segment, index in enumerate(indices, start=1):
            each = rollouts[index]
            first = start + len(each.prompt)
            end = first + len(each.tokens)
            batch.tokens[row, start:end] = [*each.prompt, *each.tokens]
            batch.segment_ids[row, start:end] = segment
            batch.positions[row, start:end] = np.arange(end - start)
            batch.mask[row, first:end] = True
            batch.logprobs[row, first:end] = each.logprobs
            batch.rollouts[row, start:end] = index
            start = end
    return batch
