"""Lengths: the number of tokens of prompts and of outputs.

Pipeline: [lengths] -> workload -> system -> step load -> cost model. Host only.

The built-in lengths are tables of quantiles, so that nothing must be downloaded. A
table has the quantiles of all prompts, and the quantiles of outputs for each fifth of
the prompts, the shortest prompts first, because outputs depend on the length of the
prompt. Between two quantiles, lengths are distributed uniformly. The tables were fitted
by least squares, which keeps the mean. Outputs are cut so that prompt and output have
less than 2,048 tokens, as in the paper's runs; this lowers ShareGPT's mean by 0.7 %.

Shape symbols: N requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

# Requests of the paper have fewer tokens than this, prompt and output.
PAPER_MAX_LEN = 2048
# Tokens of the instruction and the examples before each sentence to translate.
PREFIX_TOKENS = {"wmt16-1shot": 80, "wmt16-5shot": 341}


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of prompts and of their outputs.

    Raises:
      ValueError: the vectors differ in size, or a length is below 1 (with its index).
    """

    prompt_lens: np.ndarray  # i32[N]
    output_lens: np.ndarray  # i32[N]
    # skipped requests, by reason
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt_lens", "output_lens"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        if self.prompt_lens.shape != self.output_lens.shape:
            raise ValueError(
                f"output_lens: expected {len(self.prompt_lens)} numbers, as many as "
                f"prompt_lens, got {len(self.output_lens)}"
            )

    def __len__(self) -> int:
        return len(self.prompt_lens)


def positive(name: str, numbers: object, at_least: int = 1) -> np.ndarray:
    """Convert integers to i32[N].

    Args:
      name: of the argument, for messages.
      numbers: a vector of integers.
      at_least: the smallest allowed number.

    Raises:
      ValueError: `numbers` is not a vector of integers from `at_least` to the largest
        int32.
    """
    found = np.asarray(numbers)
    if found.ndim != 1 or not (
        found.size == 0 or np.issubdtype(found.dtype, np.integer)
    ):
        raise ValueError(
            f"{name}: expected a vector of integers, got shape {found.shape} and "
            f"dtype {found.dtype}"
        )
    wrong = np.flatnonzero((found < at_least) | (found >= 2**31))
    if wrong.size:
        raise ValueError(
            f"{name}: expected numbers from {at_least} to 2**31 - 1, got "
            f"{found[wrong[0]]} at index {wrong[0]}"
        )
    return found.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Table:
    """Quantiles in tokens, at `_PROMPT_SHARES` and `_OUTPUT_SHARES`."""

    prompts: tuple[float, ...]
    outputs: tuple[tuple[float, ...], ...]  # for each fifth of the prompts


# fmt: off
_PROMPT_SHARES = (
    0, .05, .1, .15, .2, .25, .3, .35, .4, .45, .5, .55, .6, .65, .7, .75, .8, .85, .9,
    .93, .96, .98, .99, 1,
)
_OUTPUT_SHARES = (0, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .99, 1)

# Means: 162.0 and 335.8; figure 11 of the paper prints 161.31 and 337.99. Fitted to
# 80 % of the lengths below 2,048 tokens in the artifact of Kwon et al. 2023 (first
# round of each conversation, tokens of OPT).
_SHAREGPT = _Table(
    (1.4, 6.7, 8.9, 11.0, 13.0, 15.2, 17.9, 20.9, 24.4, 29.0, 35.3, 43.6, 54.6, 70.9,
     93.2, 131.5, 199.9, 318.9, 497.7, 685.6, 973.5, 1215.1, 1442.1, 1898.2),
    ((5.2, 9.7, 16.4, 44.6, 85.6, 117.5, 173.7, 224.3, 275.1, 328.9, 427.3, 604.7,
      857.4, 1539.1),
     (5.6, 38.0, 74.2, 121.4, 180.5, 227.6, 268.8, 312.9, 365.5, 445.9, 610.9, 762.6,
      1017.7, 1654.5),
     (3.7, 34.1, 58.2, 128.6, 194.5, 251.9, 306.9, 370.1, 447.2, 576.4, 778.0, 932.3,
      1264.6, 1731.4),
     (2.0, 30.1, 61.4, 122.7, 192.3, 256.5, 321.0, 391.3, 483.6, 637.3, 829.9, 1037.8,
      1370.6, 1820.2),
     (2.0, 17.5, 55.6, 122.1, 172.3, 238.2, 309.3, 393.6, 493.0, 649.4, 822.3, 976.5,
      1315.0, 1653.7)),
)
# Means: 19.4 and 58.9; figure 11 prints 19.31 and 58.45. Fitted to 4,000 rows of
# Stanford Alpaca (Taori et al. 2023), tokens of GPT-2, which are OPT's.
_ALPACA = _Table(
    (6.2, 8.6, 9.6, 10.3, 11.0, 11.8, 12.2, 13.1, 13.9, 14.6, 15.5, 16.6, 17.8, 19.2,
     21.0, 22.7, 24.7, 27.3, 32.0, 35.8, 44.4, 59.7, 68.2, 137.7),
    ((1.0, 8.0, 12.5, 21.2, 33.8, 51.5, 64.2, 76.4, 88.9, 101.0, 124.4, 163.1, 243.6,
      506.4),
     (1.1, 6.0, 11.9, 19.7, 37.1, 51.3, 65.1, 77.1, 91.1, 110.4, 137.9, 182.9, 265.4,
      391.0),
     (1.0, 5.1, 6.4, 11.5, 18.8, 34.3, 51.3, 67.4, 85.6, 105.2, 133.8, 179.1, 267.6,
      485.5),
     (1.0, 2.6, 5.1, 7.0, 8.9, 11.5, 17.0, 30.4, 51.6, 74.2, 113.6, 138.0, 244.2,
      378.3),
     (1.0, 2.3, 4.9, 8.7, 11.6, 14.6, 19.7, 29.6, 45.2, 65.8, 105.1, 134.1, 224.5,
      465.1)),
)
# The sentence to translate, after the prefix, and its translation. Means: 28.6 and
# 36.4. Fitted to 80 % of newstest2016, English to German (WMT16), tokens of LLaMA.
_WMT16 = _Table(
    (5.3, 10.3, 12.5, 14.3, 15.8, 17.2, 18.7, 20.4, 22.1, 24.0, 25.9, 28.1, 29.9, 32.5,
     34.5, 37.1, 40.1, 43.5, 48.1, 52.3, 57.7, 66.4, 70.3, 95.1),
    ((4.3, 6.6, 8.7, 10.9, 12.4, 13.9, 14.9, 16.4, 17.4, 18.7, 21.0, 23.2, 25.9, 29.0),
     (14.2, 17.0, 17.8, 19.3, 20.8, 22.0, 23.2, 24.8, 26.1, 27.2, 29.4, 32.2, 35.0,
      44.7),
     (19.6, 23.7, 25.1, 27.4, 29.0, 30.4, 32.3, 34.1, 35.5, 37.4, 40.5, 43.3, 46.7,
      53.8),
     (28.8, 33.4, 34.6, 37.0, 39.3, 41.3, 43.9, 46.5, 48.3, 50.7, 55.7, 58.8, 63.0,
      73.8),
     (39.3, 46.5, 48.5, 53.2, 56.8, 60.4, 62.8, 67.0, 71.2, 77.2, 88.9, 96.1, 112.8,
      146.8)),
)
# fmt: on

_TABLES = {
    "sharegpt": _SHAREGPT,
    "alpaca": _ALPACA,
    "wmt16-1shot": _WMT16,
    "wmt16-5shot": _WMT16,
}
BUILTIN_LENGTHS = tuple(_TABLES)


def builtin_lengths(name: str, count: int, seed: int) -> Lengths:
    """Sample lengths like those of a data set of the paper.

    Args:
      name: "sharegpt", "alpaca", "wmt16-1shot" or "wmt16-5shot". Prompts of the
        last two include the prefix of `PREFIX_TOKENS`.
      count: number of requests.
      seed: of NumPy's default generator.

    Raises:
      ValueError: the name is unknown, or the count is negative.
    """
    if name not in _TABLES:
        raise ValueError(f"name: expected one of {', '.join(_TABLES)}, got {name!r}")
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    table = _TABLES[name]
    shares = np.random.default_rng(seed).random((count, 2))
    prompts = np.interp(shares[:, 0], _PROMPT_SHARES, table.prompts)
    fifth = (shares[:, 0] * len(table.outputs)).astype(int)
    outputs = np.empty(count)
    for number, quantiles in enumerate(table.outputs):
        here = fifth == number
        outputs[here] = np.interp(shares[here, 1], _OUTPUT_SHARES, quantiles)
    prompt_lens = np.maximum(np.rint(prompts), 1).astype(np.int32)
    prompt_lens += np.int32(PREFIX_TOKENS.get(name, 0))
    output_lens = np.maximum(np.rint(outputs), 1).astype(np.int32)
    most = np.int32(PAPER_MAX_LEN - 1)
    return Lengths(prompt_lens, np.minimum(output_lens, most - prompt_lens))
