"""Lines of trace files, each with where it stands, so that errors can say it."""

from __future__ import annotations

import csv
import gzip
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import IO, Any


def open_text(path: pathlib.Path) -> IO[str]:
    """The file as text, unpacked where its name ends in .gz."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")


def csv_rows(
    path: pathlib.Path, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of a table that has the columns, and where it stands."""
    with open_text(path) as file:
        reader = csv.DictReader(file)
        found = reader.fieldnames or []
        missing = [name for name in columns if name not in found]
        if missing:
            raise ValueError(
                f"trace: no column {', '.join(missing)} in line 1 of {path}, which has "
                f"{', '.join(found) or 'nothing'}"
            )
        for row in reader:
            yield f"line {reader.line_num} of {path}", row


def json_lines(path: pathlib.Path) -> Iterator[tuple[str, str, Any]]:
    """Of each line that is not blank: where it stands, itself, and what it says."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"trace: wanted JSON, {where} is {line.strip()!r:.80} ({error})"
                ) from error
            yield where, line.strip(), fields


def num_tokens(value: Any, name: str, where: str, zero_allowed: bool) -> int:
    """The whole number that a text or a number is.

    Raises:
      ValueError: it is none, or 0 where that is not allowed.
    """
    number = number_of(value)
    if number is None or number % 1 or not 0 <= number < 2**31:
        raise ValueError(
            f"trace: wanted a whole number of tokens for {name}, got {value!r} "
            f"in {where}"
        )
    if not number and not zero_allowed:
        raise ValueError(
            f"trace: wanted at least 1 token for {name}, got 0 in {where}; with "
            f"skip_empty such requests are left out and counted"
        )
    return int(number)


def number_of(value: Any) -> float | None:
    """The finite number that a text or a number is, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
