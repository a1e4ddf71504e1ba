"""Profile files: readers of published CSV files with measured kernel times.

Pipeline: files -> [profile_files] -> profiles. Host only, NumPy.

Each file is a CSV with a header, gzipped or not. Columns of times end in _ms or _us.
The formats are those of vidur (MIT) and of LLMServingSim (MIT); see the readers.

Shape symbols: N measurements.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

_UNITS = {"_ms": 1e-3, "_us": 1e-6}
# How often each operation runs in a layer.
_PER_LAYER: Mapping[str, int] = {
    **dict.fromkeys(("input_layernorm", "post_layernorm"), 1),
    **dict.fromkeys(("post_attention_layernorm", "attn_rope", "rotary_emb"), 1),
    **dict.fromkeys(("attn_pre_proj", "attn_post_proj", "mlp_up_proj"), 1),
    **dict.fromkeys(("mlp_down_proj", "mlp_act", "rope", "act_fn"), 1),
    **dict.fromkeys(("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"), 1),
    **dict.fromkeys(("gate_up_proj", "gate_proj", "up_proj", "down_proj"), 1),
    # A layer has two of these: norms before attention and MLP, and residual sums.
    "layernorm": 2,
    "add": 2,
}
_PER_STEP = ("emb", "embedding", "final_layernorm")
_PER_ROW = ("lm_head", "sampler")
_ATTENTION = ("attn",)  # without a KV cache; `read_attention` reads better files


@dataclasses.dataclass(frozen=True)
class Curve:
    """Measured seconds as a function of one number."""

    x: np.ndarray  # f64[N], ascending
    seconds: np.ndarray  # f64[N]
    path: str


@dataclasses.dataclass(frozen=True)
class DenseTimes:
    """Times of all operations of a layer or a step, without attention."""

    tokens: np.ndarray  # f64[N], tokens of a step, ascending
    operations: Mapping[str, np.ndarray]  # f64[N] each, seconds of one run
    logits: Curve | None  # by tokens; None: not in the file
    path: str

    def seconds(self, num_layers: int) -> np.ndarray:
        """Return f64[N], seconds of a step with `num_layers` layers."""
        total = np.zeros(len(self.tokens))
        for name, times in self.operations.items():
            total += times * (num_layers * _PER_LAYER.get(name, 0))
            total += times * (name in _PER_STEP)
        return total

    def at_bandwidth(self, ratio: float) -> DenseTimes:
        """Estimate the times on a chip with another memory bandwidth.

        A matrix product takes the longer of two times: computing, which is
        proportional to tokens and known from the most tokens, and reading its weights,
        known from the fewest tokens. For other operations, the time that grows with the
        tokens is spent on moving bytes.

        Args:
          ratio: bandwidth of the new chip divided by that of the measured chip.
        """
        _check_ratio("ratio", ratio)

        def estimate(name: str, times: np.ndarray) -> np.ndarray:
            if not name.endswith("_proj"):
                return times[0] + (times - times[0]) / ratio
            if ratio >= 1:  # reading becomes shorter, but not shorter than computing
                computing = times[-1] * self.tokens / self.tokens[-1]
                return np.maximum(times / ratio, np.minimum(times, computing))
            return np.maximum(times, times[0] / ratio)

        moved = {name: estimate(name, times) for name, times in self.operations.items()}
        return dataclasses.replace(self, operations=moved)


@dataclasses.dataclass(frozen=True)
class AttentionTimes:
    """Times of a layer's attention, of prompts and of decode rows.

    A measurement has a chunk of a prompt and the tokens before it, or decode rows and
    the tokens before each of them; if `is_mixed`, some measurements have both.
    """

    chunks: np.ndarray  # f64[N], tokens; 0: no prompt
    past: np.ndarray  # f64[N], tokens before the chunk
    rows: np.ndarray  # f64[N], 0: no decode row
    contexts: np.ndarray  # f64[N], tokens before the computed one
    seconds: np.ndarray  # f64[N]
    is_mixed: bool
    path: str

    def for_heads(self, *, queries: float, keys: float) -> AttentionTimes:
        """Estimate the times of a model with other numbers of heads of the same size.

        The time of decoding depends on the pairs of a row and a key head, so n rows
        take as long as n * `keys` rows did. A prompt takes `queries` times as long.

        Args:
          queries: query heads of the new model divided by those of the measured model.
          keys: key heads of the new model divided by those of the measured model.
        """
        self._check_separate("for_heads")
        _check_ratio("queries", queries)
        _check_ratio("keys", keys)
        is_prompt = self.chunks > 0
        return dataclasses.replace(
            self,
            rows=self.rows / keys,
            seconds=np.where(is_prompt, self.seconds * queries, self.seconds),
        )

    def at_bandwidth(self, ratio: float) -> AttentionTimes:
        """Estimate the times on a chip with another memory bandwidth.

        The time of decoding beyond the shortest measured time is spent on reading;
        prompts compute.

        Args:
          ratio: bandwidth of the new chip divided by that of the measured chip.
        """
        self._check_separate("at_bandwidth")
        _check_ratio("ratio", ratio)
        floor = self.seconds[self.rows > 0].min()
        moved = floor + (self.seconds - floor) / ratio
        return dataclasses.replace(
            self, seconds=np.where(self.rows > 0, moved, self.seconds)
        )

    def _check_separate(self, what: str) -> None:
        if self.is_mixed:
            raise ValueError(
                f"{what}: expected separate times of prompts and decoding rows, got "
                f"{self.path}, which measures them together"
            )


def read_dense(
    path: str | os.PathLike[str], *, tensor_parallel: int = 1, fused: Sequence[str] = ()
) -> DenseTimes:
    """Read times of the operations of a layer, and of a step's embedding and last norm.

    Columns: `num_tokens`, one `NAME_ms` for each operation, and `tp` if several degrees
    of tensor parallelism were measured. Or: a row for each `layer`, `tokens` (or
    `num_tokens`) and `time_us`.

    Args:
      path: the file.
      tensor_parallel: the degree of tensor parallelism to read.
      fused: operations that the profiler measured as part of another operation at some
        numbers of tokens, where their row is missing; they take no time there.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: a column or operation is missing or unknown, or a field is not a
        number; the message has file, line and column.
    """
    table = read_table(path)
    if "layer" in table.columns:
        tokens, operations = _long_operations(table, fused)
    else:
        tokens, operations = _wide_operations(table, tensor_parallel)
    heads = [operations.pop(name) for name in _PER_ROW if name in operations]
    for name in _ATTENTION:
        operations.pop(name, None)
    for name in operations:
        if name not in _PER_LAYER and name not in _PER_STEP:
            known = ", ".join((*_PER_LAYER, *_PER_STEP, *_PER_ROW))
            raise ValueError(f"{path}: expected operations among {known}, got {name!r}")
    if not operations:
        raise ValueError(f"{path}: expected times of operations, got none")
    logits = Curve(tokens, np.sum(heads, axis=0), str(path)) if heads else None
    return DenseTimes(tokens, operations, logits, str(path))


def read_per_sequence(path: str | os.PathLike[str]) -> Curve:
    """Read times of logits and sampling by the rows whose next token is sampled.

    Columns: `layer` (lm_head, sampler), `sequences`, `time_us`. The result is the sum
    of both layers.

    Raises:
      FileNotFoundError, ValueError: as `read_dense`.
    """
    table = read_table(path)
    rows, operations = _long_operations(table, (), "sequences")
    unknown = sorted(set(operations) - set(_PER_ROW))
    if unknown or not operations:
        raise ValueError(
            f"{path}: expected layers among {', '.join(_PER_ROW)}, got "
            f"{', '.join(unknown) or 'none'}"
        )
    return Curve(rows, np.sum(list(operations.values()), axis=0), str(path))


def read_attention(path: str | os.PathLike[str]) -> AttentionTimes:
    """Read times of a layer's attention.

    Columns: `phase` (prefill or decode), `batch_size`, `prefill_chunk`,
    `kv_cache_len` and `time_ms`. Or, for steps with both phases: `prefill_chunk`,
    `kv_prefill`, `n_decode`, `kv_decode` and `time_us`.

    Raises:
      FileNotFoundError, ValueError: as `read_dense`.
    """
    table = read_table(path)
    seconds = table.times("time")
    if "phase" not in table.columns:
        return AttentionTimes(
            chunks=table.numbers("prefill_chunk"),
            past=table.numbers("kv_prefill"),
            rows=table.numbers("n_decode"),
            contexts=table.numbers("kv_decode"),
            seconds=seconds,
            is_mixed=True,
            path=str(path),
        )
    phases = np.array(table.columns["phase"])
    for line, phase in zip(table.lines, table.columns["phase"], strict=True):
        if phase not in ("prefill", "decode"):
            raise ValueError(
                f"{path}, line {line}, column phase: expected prefill or decode, got "
                f"{phase!r}"
            )
    is_prompt = phases == "prefill"
    for phase, rows in (("prefill", is_prompt), ("decode", ~is_prompt)):
        if not rows.any():
            raise ValueError(f"{path}: expected rows of phase {phase}, got none")
    batch, tokens = table.numbers("batch_size"), table.numbers("kv_cache_len")
    several = np.flatnonzero(is_prompt & (batch != 1))
    if several.size:
        raise ValueError(
            f"{path}, line {table.lines[several[0]]}, column batch_size: expected "
            f"a single prompt, got {batch[several[0]]:g}"
        )
    return AttentionTimes(
        chunks=np.where(is_prompt, table.numbers("prefill_chunk"), 0),
        past=np.where(is_prompt, tokens, 0),
        rows=np.where(is_prompt, 0, batch),
        contexts=np.where(is_prompt, 0, tokens),
        seconds=seconds,
        is_mixed=False,
        path=str(path),
    )


@dataclasses.dataclass(frozen=True)
class Table:
    """The columns of a CSV file, as text, and the line number of each row."""

    path: str
    columns: dict[str, list[str]]
    lines: list[int]

    def numbers(self, name: str) -> np.ndarray:
        """Convert a column to f64[N], each at least 0."""
        if name not in self.columns:
            raise ValueError(
                f"{self.path}, line 1: expected a column {name}, got "
                f"{', '.join(self.columns)}"
            )
        out = np.empty(len(self.lines))
        for row, text in enumerate(self.columns[name]):
            try:
                out[row] = float(text)
            except ValueError:
                out[row] = math.nan
            if not 0 <= out[row] < math.inf:
                raise ValueError(
                    f"{self.path}, line {self.lines[row]}, column {name}: expected a "
                    f"number of at least 0, got {text!r}"
                )
        return out

    def times(self, name: str) -> np.ndarray:
        """Convert the column `name` with a unit, such as time_ms, to f64[N] seconds."""
        for unit, seconds in _UNITS.items():
            if name + unit in self.columns:
                return self.numbers(name + unit) * seconds
        raise ValueError(
            f"{self.path}, line 1: expected a column {name}_ms or {name}_us, got "
            f"{', '.join(self.columns)}"
        )


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a CSV file, gzipped or not.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not a CSV file, the number of fields of a line differs from the
        header, or there are no rows.
    """
    raw = pathlib.Path(path).read_bytes()
    try:
        # Detected by its first bytes, as not every gzipped file has the suffix .gz.
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        lines = raw.decode("utf-8").splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a CSV or one gzipped: {error}") from None
    reader = csv.reader(lines)
    header = [name.strip() for name in next(reader, [])]
    columns: dict[str, list[str]] = {name: [] for name in header}
    numbers = []
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {reader.line_num}: expected {len(header)} fields, got "
                f"{len(row)}"
            )
        numbers.append(reader.line_num)
        for name, text in zip(header, row, strict=True):
            columns[name].append(text.strip())
    if not numbers:
        raise ValueError(f"{path}: expected a header and rows below it, got none")
    return Table(str(path), columns, numbers)


def _wide_operations(
    table: Table, tensor_parallel: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Read tokens f64[N] and seconds f64[N] of each operation: one column each."""
    tokens = table.numbers("num_tokens")
    mine = np.ones(len(tokens), bool)
    if "tp" in table.columns:
        degrees = table.numbers("tp")
        mine = degrees == tensor_parallel
    else:
        degrees = np.ones(1)
    if not (degrees == tensor_parallel).any():
        have = ", ".join(f"{value:g}" for value in np.unique(degrees))
        raise ValueError(
            f"tensor_parallel: expected one of {have} in {table.path}, got "
            f"{tensor_parallel}"
        )
    points, operations = tokens, {}
    for name in table.columns:
        if name[-3:] in _UNITS:
            points, times = _medians(tokens[mine], table.times(name[:-3])[mine])
            operations[name[:-3]] = times
    return points, operations


def _long_operations(
    table: Table, fused: Sequence[str], count: str = ""
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Read counts f64[N] and seconds f64[N] of each operation: one row per time."""
    if not count:
        count = "tokens" if "tokens" in table.columns else "num_tokens"
    counts, seconds = table.numbers(count), table.times("time")
    names = np.array(table.columns["layer"] if "layer" in table.columns else [])
    if not names.size:
        raise ValueError(f"{table.path}, line 1: expected a column layer, got none")
    points = np.unique(counts)
    operations = {}
    for name in dict.fromkeys(names.tolist()):
        mine, times = _medians(counts[names == name], seconds[names == name])
        if len(mine) != len(points) and name not in fused:
            missing = np.setdiff1d(points, mine)
            raise ValueError(
                f"{table.path}: expected {name} at every number of {count}, got none "
                f"at {missing[0]:g} and {len(missing) - 1} more; list it in `fused` if "
                "other operations include it there"
            )
        operations[name] = np.zeros(len(points))
        operations[name][np.searchsorted(points, mine)] = times
    return points, operations


def _medians(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each x once, ascending, with the median of its y."""
    points, inverse = np.unique(x, return_inverse=True)
    return points, np.array([np.median(y[inverse == i]) for i in range(len(points))])


def _check_ratio(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected more than 0, got {value}")
