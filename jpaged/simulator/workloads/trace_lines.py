"""Trace lines: the lines of trace files, each with its position for error messages.

Pipeline: file -> [trace_lines] -> traces. Host only.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import IO, Any


def open_text(path: pathlib.Path) -> IO[str]:
    """Open a file as text, decompressed if its name ends in .gz."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")


def csv_rows(
    path: pathlib.Path, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the position and the fields of each row of a table.

    Raises:
      ValueError: the table does not have all `columns`.
    """
    with open_text(path) as file:
        reader = csv.DictReader(file)
        found = reader.fieldnames or []
        missing = [name for name in columns if name not in found]
        if missing:
            raise ValueError(
                f"trace: expected a column {', '.join(missing)} in line 1 of {path}, "
                f"got {', '.join(found) or 'nothing'}"
            )
        for row in reader:
            yield f"line {reader.line_num} of {path}", row


def json_lines(path: pathlib.Path) -> Iterator[tuple[str, str, Any]]:
    """Yield the position, the text and the JSON value of each line that is not blank.

    Raises:
      ValueError: a line is not JSON.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"trace: expected JSON, got {line.strip()!r:.80} in {where} "
                    f"({error})"
                ) from error
            yield where, line.strip(), fields


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
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
