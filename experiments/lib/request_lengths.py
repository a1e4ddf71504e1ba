"""Lengths of the requests of the paper's two data sets, from a table or a file."""

from __future__ import annotations

import csv
import pathlib
from typing import NamedTuple

import numpy as np

from jpaged.arithmetic import cdiv

MAX_LEN = 2048  # tokens of input and output together

# Ten groups of equally many requests, by input length. Each has its mean input length,
# and the mean output lengths of five groups of its requests, by output length.
LENGTHS = {
    "alpaca": (
        (8, (10, 30, 59, 85, 140)),
        (10, (12, 28, 49, 71, 126)),
        (12, (16, 54, 79, 99, 160)),
        (13, (7, 22, 54, 98, 187)),
        (15, (13, 46, 73, 98, 169)),
        (17, (5, 12, 35, 73, 157)),
        (19, (5, 10, 24, 63, 136)),
        (23, (4, 9, 18, 46, 130)),
        (28, (5, 11, 16, 41, 125)),
        (49, (5, 15, 29, 53, 131)),
    ),
    "sharegpt": (
        (6, (11, 39, 96, 200, 461)),
        (11, (58, 141, 218, 302, 540)),
        (15, (70, 175, 266, 357, 648)),
        (21, (72, 200, 295, 408, 721)),
        (29, (67, 197, 309, 454, 813)),
        (44, (60, 187, 305, 459, 873)),
        (73, (59, 192, 320, 483, 898)),
        (139, (65, 194, 333, 521, 951)),
        (333, (71, 194, 333, 530, 955)),
        (945, (42, 160, 290, 484, 837)),
    ),
}


class RequestLength(NamedTuple):
    """Tokens of a request's input and output."""

    num_input: int
    num_output: int


def table_lengths(dataset: str, count: int, seed: int) -> list[RequestLength]:
    """Returns `count` lengths: shuffled rounds of the 50 pairs, the last partial."""
    pairs = [
        RequestLength(num_input, num_output)
        for num_input, outputs in LENGTHS[dataset]
        for num_output in outputs
    ]
    rng = np.random.default_rng(seed)
    rounds = cdiv(count, len(pairs))
    order = np.concatenate([rng.permutation(len(pairs)) for _ in range(rounds)])
    return [pairs[index] for index in order[:count]]


def trace_lengths(path: pathlib.Path, count: int, seed: int) -> list[RequestLength]:
    """Returns the first `count` lengths of a file below `MAX_LEN` tokens, shuffled.

    Raises:
      OSError: The file cannot be read.
      ValueError: A column is missing, a value is invalid, or too few rows fit.
    """
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                length = RequestLength(
                    int(row["input_tokens"]), int(row["output_tokens"])
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"--trace: expected integers in the columns input_tokens and "
                    f"output_tokens of {path}, got {row!r:.80}"
                ) from error
            if min(length) > 0 and sum(length) < MAX_LEN:
                found.append(length)
            if len(found) == count:
                break
    if len(found) < count:
        raise ValueError(
            f"--trace: expected {count} requests below {MAX_LEN} tokens, got "
            f"{len(found)} in {path}; lower --num_requests"
        )
    order = np.random.default_rng(seed).permutation(count)
    return [found[index] for index in order]
