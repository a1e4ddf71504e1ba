"""Numbers: the paper's printed results and the settings of its runs, with sources.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023 (arXiv 2309.06180). Marks: T text, F printed in a figure or
table, A the authors' artifact, D derived from them.
"""

from __future__ import annotations

import dataclasses

SYSTEMS = ("vllm", "orca_oracle", "orca_pow2", "orca_max", "fastertransformer")
TITLES = {
    "vllm": "vLLM (the engine)",
    "orca_oracle": "Orca (Oracle)",
    "orca_pow2": "Orca (Pow2)",
    "orca_max": "Orca (Max)",
    "fastertransformer": "FasterTransformer",
}
# Names for people.
REQUEST_NAMES = {
    "sharegpt": "ShareGPT",
    "alpaca": "Alpaca",
    "chat": "chat",
    "wmt16-1shot": "WMT16, one example",
    "wmt16-5shot": "WMT16, five examples",
}
MODEL_NAMES = {
    "opt-13b": "OPT-13B",
    "opt-66b": "OPT-66B",
    "opt-175b": "OPT-175B",
    "llama-13b": "LLaMA-13B",
}
PART_NAMES = {
    "token_states": "token states",
    "reservation": "reserved",
    "internal": "internal fragmentation",
    "external": "external fragmentation",
}


@dataclasses.dataclass(frozen=True)
class Printed:
    """A number of the paper, or the two ends of a range."""

    low: float
    high: float
    source: str  # where it is printed, with its mark

    @property
    def text(self) -> str:
        """The number or the range as text."""
        if self.low == self.high:
            return f"{self.low:g}"
        return f"{self.low:g} to {self.high:g}"

    def ratio(self, here: float) -> float | None:
        """Divide `here` by the number, or by the nearer end of the range.

        Returns:
          The ratio, 1 within the range; None if the divisor is 0.
        """
        nearest = min(max(here, self.low), self.high)
        return here / nearest if nearest else None


def _one(number: float, source: str) -> Printed:
    return Printed(number, number, source)


def _figure_2() -> dict[tuple[str, ...], Printed]:
    parts = ("token_states", "reservation", "internal", "external")
    rows = {
        "orca_max": (20.4, 13.3, 57.3, 8.9),
        "orca_pow2": (26.8, 17.9, 13.6, 41.6),
        "orca_oracle": (38.2, 25.2, 0.0, 36.6),
        "vllm": (96.3,),
    }
    return {
        ("fig02", system, part): _one(number, "figure 2 [F]")
        for system, numbers in rows.items()
        for part, number in zip(parts, numbers, strict=False)
    }


def _figure_13() -> dict[tuple[str, ...], Printed]:
    systems = ("orca_max", "orca_pow2", "orca_oracle", "vllm")
    rows = {"sharegpt": (7.00, 9.81, 13.62, 30.42), "alpaca": (7, 43.24, 72.75, 132.44)}
    return {
        ("fig13", requests, system): _one(number, "figure 13 [F]")
        for requests, numbers in rows.items()
        for system, number in zip(systems, numbers, strict=True)
    }


def _figure_15() -> dict[tuple[str, ...], Printed]:
    rows = {"samples": (6.09, 8.53, 9.79), "beams": (37.56, 53.13, 55.16)}
    found = {
        ("fig15", "alpaca", kind, str(width)): _one(number, "figure 15 [F]")
        for kind, numbers in rows.items()
        for width, number in zip((2, 4, 6), numbers, strict=True)
    }
    for width in ("2", "4", "6"):
        text = "section 6.3 [T], for 2 to 6"
        found["fig15", "sharegpt", "samples", width] = Printed(16.2, 30.5, text)
        found["fig15", "sharegpt", "beams", width] = Printed(44.3, 66.3, text)
    return found


PRINTED: dict[tuple[str, ...], Printed] = {
    ("fig01", "parameters, % of memory"): _one(65, "figure 1 [F]"),
    ("fig01", "parameters, GB"): _one(26, "figure 1, table 1 [F]"),
    ("fig01", "keys and values, % of memory"): _one(30, "figure 1 [F]: above 30"),
    ("fig01", "a token's keys and values, KB"): _one(800, "section 3 [T]"),
    ("fig01", "a request of 2,048 tokens, GB"): _one(1.6, "section 3 [T]: up to"),
    **_figure_2(),
    ("fig11", "sharegpt", "input"): _one(161.31, "figure 11 [F]"),
    ("fig11", "sharegpt", "output"): _one(337.99, "figure 11 [F]"),
    ("fig11", "alpaca", "input"): _one(19.31, "figure 11 [F]"),
    ("fig11", "alpaca", "output"): _one(58.45, "figure 11 [F]"),
    ("fig12", "sharegpt", "orca_oracle"): Printed(1.7, 2.7, "section 6.2 [T]"),
    ("fig12", "sharegpt", "orca_max"): Printed(2.7, 8, "section 6.2 [T]"),
    ("fig12", "sharegpt", "fastertransformer"): Printed(1, 22, "6.2 [T]: up to 22"),
    **_figure_13(),
    ("fig14", "n 1"): _one(1.3, "section 6.3 [T]"),
    ("fig14", "beam 6"): _one(2.3, "section 6.3 [T]"),
    **_figure_15(),
    ("fig16", "wmt16-1shot"): _one(1.67, "section 6.4 [T]"),
    ("fig16", "wmt16-5shot"): _one(3.58, "section 6.4 [T]"),
    ("fig17", "orca_oracle"): _one(2, "section 6.4 [T]"),
    ("fig17", "orca_pow2"): _one(2, "section 6.4 [T]"),
    ("fig17", "orca_max"): _one(2, "section 6.4 [T]"),
    ("fig18a", "ratio"): Printed(1.20, 1.26, "section 7.1 [T]"),
    ("fig18b", "sharegpt"): _one(128, "section 7.2 [T]: best from 16 to 128"),
    ("fig18b", "alpaca"): _one(32, "section 7.2 [T]: good at 16 and 32"),
    ("fig19a", "recompute over swap"): Printed(0, 1.2, "section 7.3 [T]: at most 1.2"),
    ("fig19b", "recompute over swap"): Printed(
        0.9, 1.1, "section 7.3 [T]: comparable; taken as within 10 %"
    ),
}

# Rates of the artifact's scripts, requests per second, by data set, model and system.
# It has FasterTransformer only for OPT-13B.
_RATES_12: dict[tuple[str, str, str], tuple[float, ...]] = {
    ("sharegpt", "opt-13b", "vllm"): (1.0, 1.25, 1.5, 1.75, 1.9, 2.0),
    ("sharegpt", "opt-13b", "orca_oracle"): (0.5, 0.75, 1.0, 1.25, 1.5),
    ("sharegpt", "opt-13b", "orca_pow2"): (0.25, 0.5, 0.75, 0.9),
    ("sharegpt", "opt-13b", "orca_max"): (0.2, 0.4, 0.5, 0.75),
    ("sharegpt", "opt-13b", "fastertransformer"): (0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    ("sharegpt", "opt-66b", "vllm"): (0.4, 0.6, 0.8, 0.9, 1.0),
    ("sharegpt", "opt-66b", "orca_oracle"): (0.2, 0.3, 0.4, 0.5),
    ("sharegpt", "opt-66b", "orca_pow2"): (0.1, 0.2, 0.25, 0.35),
    ("sharegpt", "opt-66b", "orca_max"): (0.1, 0.2, 0.3),
    ("sharegpt", "opt-175b", "vllm"): (1.5, 1.75, 2.0, 2.25, 2.5, 3.0),
    ("sharegpt", "opt-175b", "orca_oracle"): (0.8, 1.0, 1.2, 1.4, 1.6, 1.8),
    ("sharegpt", "opt-175b", "orca_pow2"): (0.5, 0.75, 1.0, 1.25, 1.5),
    ("sharegpt", "opt-175b", "orca_max"): (0.25, 0.5, 0.75, 1.0, 1.25),
    ("alpaca", "opt-13b", "vllm"): (20, 22.5, 25, 27.5, 29, 31.5),
    ("alpaca", "opt-13b", "orca_oracle"): (15, 17.5, 20, 21, 22.5, 24),
    ("alpaca", "opt-13b", "orca_pow2"): (7.5, 10, 12.5, 15, 16, 17, 18),
    ("alpaca", "opt-13b", "orca_max"): (2, 3, 4, 5),
    ("alpaca", "opt-13b", "fastertransformer"): (0.1, 0.5, 1, 1.5, 2, 2.5, 3),
    ("alpaca", "opt-66b", "vllm"): (11, 13, 15, 17.5, 19, 20),
    ("alpaca", "opt-66b", "orca_oracle"): (6, 8, 10, 11, 12),
    ("alpaca", "opt-66b", "orca_pow2"): (3, 5, 6, 7),
    ("alpaca", "opt-66b", "orca_max"): (0.05, 0.1, 0.15, 0.25),
    ("alpaca", "opt-175b", "vllm"): (15, 17.5, 19, 20, 22),
    ("alpaca", "opt-175b", "orca_oracle"): (15, 17.5, 19, 20, 22),
    ("alpaca", "opt-175b", "orca_pow2"): (10, 15, 16, 17, 19),
    ("alpaca", "opt-175b", "orca_max"): (1.25, 2.5, 4, 5, 7),
}
# By kind of decoding: rates of the engine, and of Orca (Oracle).
RATES_14 = {
    "n 2": ((12.5, 15, 18, 19, 20), (10, 11, 12, 13, 14)),
    "n 4": ((6, 8, 10, 11, 12), (4, 5, 6, 7, 8, 9)),
    "n 6": ((4, 5, 6, 7, 8, 9), (2, 3, 4, 5, 6)),
    "beam 2": ((10, 12.5, 15, 16, 17.5, 19), (6, 8, 9, 10, 11)),
    "beam 4": ((6, 8, 9, 10, 11), (3, 4, 4.5, 5, 6)),
    "beam 6": ((4, 6, 6.5, 7, 8, 8.5), (1, 2, 3, 3.5, 4, 4.5)),
}
RATES_16 = {
    "wmt16-1shot": ((24, 32, 40, 48, 52), (24, 26, 28, 30, 32)),
    "wmt16-5shot": ((24, 36, 42, 48), (4, 8, 10, 11, 12, 13)),
}
RATES_17 = ((0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
RATE_2, RATE_15 = 4.0, 20.0
RATES_13 = {"sharegpt": 2.0, "alpaca": 30.0}
RATES_18 = {"sharegpt": 2.01, "alpaca": 30.1}
RATE_19 = 2.01
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Seconds of arrivals: section 6.1, and the artifact where the section has none.
HOUR = 3600.0
DURATIONS = {
    "fig02": 900.0,
    "fig13": 900.0,
    "fig15": 900.0,
    "fig16": 1200.0,
    "fig18": 600.0,
    "fig19": 600.0,
    "opt-175b": 900.0,
}


def rates_12(requests: str, model: str, system: str) -> tuple[float, ...]:
    """Return the first rates of a curve of figure 12.

    They are the authors' rates. FasterTransformer has none for larger models; it gets a
    third of the rates of Orca (Max).
    """
    key = (requests, model, system)
    if key in _RATES_12:
        return _RATES_12[key]
    return tuple(round(rate / 3, 4) for rate in rates_12(requests, model, "orca_max"))
