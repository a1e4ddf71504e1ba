"""Traces: workloads and lengths from files.

Pipeline: file -> [traces] -> workload -> system -> step load -> cost model. Host only.

Every reader accepts plain files, and gzipped files if their name ends in .gz. Error
messages have the file and the line.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.simulator.workloads.lengths import Lengths
from jpaged.simulator.workloads.trace_lines import (
    Clock,
    csv_header,
    csv_rows,
    json_lines,
    num_tokens,
    number_of,
)
from jpaged.simulator.workloads.workload import NO_CONTENT, Workload

MOONCAKE_CONTENT_SIZE = 512
VLLM_CONTENT_SIZE = 16
_EMPTY = "a length of 0"


class Prompt(NamedTuple):
    """A prompt of a trace."""

    input_length: int  # tokens
    hash_ids: list[int]  # each represents a piece and all pieces before it


def read_trace(
    path: str | pathlib.Path, *, skip_empty: bool = False
) -> Workload | Lengths:
    """Read a trace file of any supported format.

    A file .csv or .csv.gz is a table (see `read_lengths`, `read_csv_trace`). A file
    .jsonl or .jsonl.gz has one request per line (see `read_mooncake`, `read_vllm_run`);
    the name of the time field decides which format it is.

    Args:
      path: the file.
      skip_empty: skip and count requests with a length of 0, instead of raising.

    Returns:
      A `Workload` if the file has times, otherwise `Lengths`.

    Raises:
      OSError: the file cannot be read.
      ValueError: as the reader; or the name has another suffix.
    """
    path = pathlib.Path(path)
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        if "timestamp_s" in csv_header(path):
            return read_csv_trace(path, skip_empty=skip_empty)
        return read_lengths(path, skip_empty=skip_empty)
    if name.endswith(".jsonl"):
        first = next(json_lines(path), ("", "", {}))[2]
        if isinstance(first, dict) and "arrival_s" in first:
            return read_vllm_run(path, skip_empty=skip_empty)
        return read_mooncake(path, skip_empty=skip_empty)
    raise ValueError(
        f"trace: expected a file .csv or .jsonl, gzipped (.gz) or not, got {path}"
    )


def read_lengths(path: str | pathlib.Path, *, skip_empty: bool = False) -> Lengths:
    """Read a CSV file with the columns input_tokens and output_tokens.

    Columns may have the usual names of other traces (`trace_lines.ALIASES`), in any
    case. Other columns are ignored.

    Args:
      path: the file.
      skip_empty: skip rows with a length of 0 and count them in `skipped`, instead of
        raising.

    Raises:
      OSError: the file cannot be read.
      ValueError: a column is missing or occurs twice, a field is not an integer of at
        least 1, there are no rows, or the file is damaged or not UTF-8.
    """
    path = pathlib.Path(path)
    prompts, outputs, num_empty = [], [], 0
    for where, row in csv_rows(path, ("input_tokens", "output_tokens")):
        prompt = num_tokens(row["input_tokens"], "input_tokens", where, skip_empty)
        output = num_tokens(row["output_tokens"], "output_tokens", where, skip_empty)
        if not (prompt and output):
            num_empty += 1
            continue
        prompts.append(prompt)
        outputs.append(output)
    if not prompts:
        raise ValueError(f"trace: expected requests, got none in {path}")
    skipped = {_EMPTY: num_empty} if num_empty else {}
    return Lengths(_i32(prompts), _i32(outputs), skipped)


def read_csv_trace(path: str | pathlib.Path, *, skip_empty: bool = False) -> Workload:
    """Read a CSV file with the columns timestamp_s, input_tokens and output_tokens.

    Columns may have the usual names of other traces (`trace_lines.ALIASES`), in any
    case. Dates, as in Azure's LLM inference traces, become seconds from the first row.

    Raises:
      OSError: the file cannot be read.
      ValueError: as `read_lengths`; or a time is not a number, negative, or earlier
        than the time before it.
    """
    path = pathlib.Path(path)
    found = _Requests(path, skip_empty)
    columns = ("timestamp_s", "input_tokens", "output_tokens")
    clock = Clock()
    for where, row in csv_rows(path, columns):
        row["timestamp_s"] = clock.seconds(row["timestamp_s"], where)
        found.add(where, *((name, row[name]) for name in columns))
    return found.workload(1.0, None)


def read_mooncake(
    path: str | pathlib.Path,
    *,
    content_size: int = MOONCAKE_CONTENT_SIZE,
    skip_empty: bool = False,
) -> Workload:
    """Read a trace of Mooncake: JSON lines, with the prefixes that prompts share.

    A line has timestamp (milliseconds), input_length, output_length, and hash_ids: a
    number for every `content_size` tokens of the prompt, which represents these tokens
    and all tokens before them. The last piece may be partial.

    Raises:
      OSError: the file cannot be read.
      ValueError: as `read_csv_trace`; or a line is not such JSON, or has more hash_ids
        than its prompt has pieces.

    Source: Qin et al., Mooncake, FAST 2025.
    """
    return _read_hashed(path, "timestamp", 1e-3, content_size, skip_empty)


def read_vllm_run(
    path: str | pathlib.Path,
    *,
    content_size: int = VLLM_CONTENT_SIZE,
    skip_empty: bool = False,
) -> Workload:
    """Read a workload of LLMServingSim: JSON lines.

    As `read_mooncake`, but with arrival_s (seconds) in place of timestamp, and with
    hash_ids of whole pieces only.
    """
    return _read_hashed(path, "arrival_s", 1.0, content_size, skip_empty)


def read_prompts(path: str | pathlib.Path) -> list[Prompt]:
    """Read the prompts of JSON lines, without times and outputs.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is not JSON with input_length and hash_ids, or there are no
        lines.
    """
    path = pathlib.Path(path)
    found = [_prompt(fields, line, where) for where, line, fields in json_lines(path)]
    if not found:
        raise ValueError(f"trace: expected requests, got none in {path}")
    return found


def _read_hashed(
    path: str | pathlib.Path,
    time_name: str,
    seconds: float,
    content_size: int,
    skip_empty: bool,
) -> Workload:
    if content_size < 1:
        raise ValueError(f"content_size: expected at least 1 token, got {content_size}")
    path = pathlib.Path(path)
    found = _Requests(path, skip_empty)
    pieces: list[Sequence[int]] = []
    for where, line, fields in json_lines(path):
        prompt = _prompt(fields, line, where)
        for name in (time_name, "output_length"):
            if name not in fields:
                raise ValueError(f"trace: expected {name}, got {line:.80} in {where}")
        most = cdiv(prompt.input_length, content_size)
        if len(prompt.hash_ids) > most:
            raise ValueError(
                f"trace: expected at most {most} hash_ids, for "
                f"{prompt.input_length} tokens in pieces of {content_size}, got "
                f"{len(prompt.hash_ids)} in {where}"
            )
        pairs = [(time_name, fields[time_name]), ("input_length", prompt.input_length)]
        if found.add(where, *pairs, ("output_length", fields["output_length"])):
            pieces.append(prompt.hash_ids)
    longest = max(map(len, pieces), default=0)
    contents = np.full((len(pieces), longest), NO_CONTENT, np.int32)
    for row, ids in enumerate(pieces):
        contents[row, : len(ids)] = ids
    return found.workload(seconds, contents, content_size)


class _Requests:
    """The requests read so far, with the checks that all readers share."""

    def __init__(self, path: pathlib.Path, skip_empty: bool) -> None:
        self.path = path
        self.skip_empty = skip_empty
        self.times: list[float] = []
        self.prompts: list[int] = []
        self.outputs: list[int] = []
        self.num_empty = 0
        self.last = 0.0

    def add(self, where: str, *pairs: tuple[str, Any]) -> bool:
        """Add a request from (name, value) of time, prompt length and output length.

        Returns:
          False if the request was skipped.
        """
        (time_name, value), prompt, output = pairs
        time = number_of(value)
        if time is None or time < 0:
            raise ValueError(
                f"trace: expected a number of at least 0 for {time_name}, got "
                f"{value!r} in {where}"
            )
        if time < self.last:
            raise ValueError(
                f"trace: expected sorted times, got {time_name} {value} in {where}, "
                f"after {self.last:g}; sort the file by {time_name}"
            )
        self.last = time
        lengths = [
            num_tokens(n, name, where, self.skip_empty) for name, n in (prompt, output)
        ]
        if not all(lengths):
            self.num_empty += 1
            return False
        self.times.append(time)
        self.prompts.append(lengths[0])
        self.outputs.append(lengths[1])
        return True

    def workload(
        self, seconds: float, contents: np.ndarray | None, content_size: int = 1
    ) -> Workload:
        """Return the workload; `seconds` is the unit of the times."""
        if not self.times:
            raise ValueError(f"trace: expected requests, got none in {self.path}")
        return Workload(
            np.array(self.times, np.float64) * seconds,
            _i32(self.prompts),
            _i32(self.outputs),
            contents=contents,
            content_size=content_size,
            skipped={_EMPTY: self.num_empty} if self.num_empty else {},
        )


def _prompt(fields: Any, line: str, where: str) -> Prompt:
    try:
        prompt = Prompt(fields["input_length"], fields["hash_ids"])
        numbers = [prompt.input_length, *prompt.hash_ids]
        if not all(type(one) is int and 0 <= one < 2**31 for one in numbers):
            raise ValueError("a number is not an int32 of at least 0")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"trace: expected JSON with an integer input_length and a list hash_ids of "
            f"integers, got {line!r:.80} in {where} ({error})"
        ) from error
    return prompt


def _i32(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers, np.int32)
