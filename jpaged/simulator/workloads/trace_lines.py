"""Trace lines: the lines of trace files, each with its position for error messages.

Pipeline: file -> [trace_lines] -> traces. Host only.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

# Usual names of the columns of a table, in small letters. Vidur, BurstGPT
# and Azure's traces have such names.
ALIASES = {
    "timestamp_s": ("timestamp", "arrival_s", "arrival", "arrival_time", "arrived_at"),
    "input_tokens": (
        *("prompt_tokens", "request_tokens", "contexttokens", "context_tokens"),
        *("num_prefill_tokens", "input_length", "input_len", "prompt_len"),
    ),
    "output_tokens": (
        *("completion_tokens", "response_tokens", "generatedtokens"),
        *("generated_tokens", "num_decode_tokens", "output_length", "output_len"),
    ),
}


def text_lines(path: pathlib.Path) -> Iterator[str]:
    """Yield the lines of a text file, decompressed if its name ends in .gz.

    Raises:
      ValueError: the file is not UTF-8 (with or without a byte-order mark), or not
        a whole gzip file.
    """
    open_ = gzip.open if path.suffix == ".gz" else open
    number = 0
    with open_(path, "rt", encoding="utf-8-sig", newline="") as file:
        try:
            for line in file:
                number += 1
                yield line
        except UnicodeDecodeError as error:
            problem = f"expected UTF-8 text, got other bytes after line {number}"
            raise ValueError(f"trace: {problem} of {path} ({error.reason})") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problem = f"expected a whole gzip file, got an error after line {number}"
            raise ValueError(f"trace: {problem} of {path} ({error})") from error


def csv_header(path: pathlib.Path) -> list[str]:
    """Return the names of the columns of a table, with `ALIASES` replaced."""
    return _names(next(_csv_lines(path), ("", []))[1], path)


def csv_rows(
    path: pathlib.Path, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the position and the fields of each row of a table.

    Raises:
      ValueError: the table does not have all `columns`, has one twice, or a row has
        another number of fields.
    """
    lines = _csv_lines(path)
    header = next(lines, ("", []))[1]
    names = _names(header, path)
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(
            f"trace: expected a column {', '.join(missing)} in line 1 of {path}, "
            f"got {', '.join(header) or 'nothing'}"
        )
    for where, fields in lines:
        if not fields:
            continue
        if len(fields) < len(names) or any(fields[len(names) :]):
            raise ValueError(
                f"trace: expected {len(names)} fields, one for each column, got "
                f"{len(fields)} in {where}"
            )
        yield where, dict(zip(names, fields, strict=False))


def _csv_lines(path: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(text_lines(path))
    try:
        for fields in reader:
            yield f"line {reader.line_num} of {path}", fields
    except csv.Error as error:
        raise ValueError(
            f"trace: expected a row of a CSV file, got an error in line "
            f"{reader.line_num} of {path} ({error})"
        ) from error


def _names(header: Sequence[str], path: pathlib.Path) -> list[str]:
    """The names of columns, with the one alias of a missing column replaced."""
    names = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in header]
    for column, aliases in ALIASES.items():
        found = [i for i, name in enumerate(names) if name == column]
        found = found or [i for i, name in enumerate(names) if name in aliases]
        if len(found) > 1:
            raise ValueError(
                f"trace: expected one column {column} in line 1 of {path}, got "
                f"{', '.join(header[i] for i in found)}"
            )
        for index in found:
            names[index] = column
    times = [name for name in names if re.match("timestamp|arriv", name)]
    if times and "timestamp_s" not in names:
        raise ValueError(
            f"trace: expected arrival times in seconds in a column timestamp_s in line "
            f"1 of {path}, got a column {times[0]}"
        )
    return names


def json_lines(path: pathlib.Path) -> Iterator[tuple[str, str, Any]]:
    """Yield the position, the text and the JSON value of each line that is not blank.

    Raises:
      ValueError: a line is not JSON, or an object has a name twice.
    """
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            fields = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"trace: expected JSON, got {line.strip()!r:.80} in {where} ({error})"
            ) from error
        yield where, line.strip(), fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return found


class Clock:
    """Converts the times of a table to seconds; dates count from the first row's."""

    def __init__(self) -> None:
        self._first: datetime.datetime | None = None

    def seconds(self, text: str, where: str) -> Any:
        """Return the seconds of a date; other texts as they are.

        Raises:
          ValueError: the first time was a date, and this is none.
        """
        if number_of(text) is None or self._first is not None:
            try:
                date = datetime.datetime.fromisoformat(text.strip())
                self._first = self._first or date
                return (date - self._first).total_seconds()
            except (ValueError, TypeError):  # no date, or only one has a time zone
                if self._first is not None:
                    raise ValueError(
                        f"trace: expected a date like the first, {self._first}, got "
                        f"{text!r} in {where}"
                    ) from None
        return text


def num_tokens(value: Any, name: str, where: str, zero_allowed: bool) -> int:
    """Convert a text or a number to a number of tokens.

    Raises:
      ValueError: it is not an integer of at least 0, or 0 although this is not allowed.
    """
    number = number_of(value)
    if number is None or number % 1 or not 0 <= number < 2**31:
        raise ValueError(
            f"trace: expected an integer number of tokens for {name}, got {value!r} "
            f"in {where}"
        )
    if not number and not zero_allowed:
        raise ValueError(
            f"trace: expected at least 1 token for {name}, got 0 in {where}; with "
            f"skip_empty such requests are skipped and counted"
        )
    return int(number)


def number_of(value: Any) -> float | None:
    """Convert a text or a number to a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and (not value.isascii() or "_" in value):
        return None  # Python would read 1_000
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
