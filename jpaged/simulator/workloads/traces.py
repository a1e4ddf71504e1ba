"""Traces: workloads and lengths from files that users have, on the host.

Place on the road: file -> [traces] -> workload -> system -> load -> cost model.

Every reader takes plain files and, where the name ends in .gz, packed ones. What is
wrong with a file is said with its name and the line.
"""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.simulator.workloads.lengths import Lengths
from jpaged.simulator.workloads.trace_lines import (
    csv_rows,
    json_lines,
    num_tokens,
    number_of,
    open_text,
)
from jpaged.simulator.workloads.workload import NO_CONTENT, Workload

MOONCAKE_CONTENT_SIZE = 512
VLLM_CONTENT_SIZE = 16
_EMPTY = "a length of 0"


class Prompt(NamedTuple):
    """A prompt: its tokens, and a number for each piece and all before it."""

    input_length: int
    hash_ids: list[int]


def read(path: str | pathlib.Path, *, skip_empty: bool = False) -> Workload | Lengths:
    """What the file has: a `Workload` where it tells times, else `Lengths`.

    A name in .csv or .csv.gz is a table (see `read_lengths`, `read_csv_trace`); one in
    .jsonl or .jsonl.gz has requests as lines (see `read_mooncake`, `read_vllm_run`),
    told apart by their times.

    Raises:
      OSError, ValueError: as the reader; or another ending.
    """
    path = pathlib.Path(path)
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        with open_text(path) as file:
            header = next(csv.reader(file), [])
        if "timestamp_s" in header:
            return read_csv_trace(path, skip_empty=skip_empty)
        return read_lengths(path, skip_empty=skip_empty)
    if name.endswith(".jsonl"):
        with open_text(path) as file:
            first = next((line for line in file if line.strip()), "")
        if '"arrival_s"' in first:
            return read_vllm_run(path, skip_empty=skip_empty)
        return read_mooncake(path, skip_empty=skip_empty)
    raise ValueError(
        f"trace: wanted a file .csv or .jsonl, packed (.gz) or not: {path}"
    )


def read_lengths(path: str | pathlib.Path, *, skip_empty: bool = False) -> Lengths:
    """The lengths of a CSV with input_tokens and output_tokens, in its order.

    Other columns may stand beside them.

    Args:
      path: the file.
      skip_empty: whether rows with a length of 0 are left out, and counted in
        `skipped`; they are errors otherwise.

    Raises:
      OSError, ValueError: no such file; a column that is missing; a line with no whole
        number of at least 1.
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
    skipped = {_EMPTY: num_empty} if num_empty else {}
    return Lengths(_i32(prompts), _i32(outputs), skipped)


def read_csv_trace(path: str | pathlib.Path, *, skip_empty: bool = False) -> Workload:
    """The requests of a CSV with timestamp_s, input_tokens and output_tokens.

    That is the form of Azure's LLM inference traces, with seconds for its dates.

    Raises:
      OSError, ValueError: as `read_lengths`; a time that is negative, no number, or
        earlier than the line's before it.
    """
    path = pathlib.Path(path)
    gathered = _Gathered(path, skip_empty)
    columns = ("timestamp_s", "input_tokens", "output_tokens")
    for where, row in csv_rows(path, columns):
        gathered.add(where, *((name, row[name]) for name in columns))
    return gathered.workload(1.0, None)


def read_mooncake(
    path: str | pathlib.Path,
    *,
    content_size: int = MOONCAKE_CONTENT_SIZE,
    skip_empty: bool = False,
) -> Workload:
    """The requests of a trace of Mooncake: JSON lines, with what prompts share.

    A line has timestamp (milliseconds), input_length, output_length, and hash_ids: one
    number for every `content_size` tokens of the prompt, which stands for them and all
    before them; the last may be partial.

    Raises:
      OSError, ValueError: as `read_csv_trace`; a line that is no such JSON, or has more
        hash_ids than tokens ask for.

    Source: Qin et al., Mooncake, FAST 2025.
    """
    return _read_hashed(path, "timestamp", 1e-3, content_size, skip_empty)


def read_vllm_run(
    path: str | pathlib.Path,
    *,
    content_size: int = VLLM_CONTENT_SIZE,
    skip_empty: bool = False,
) -> Workload:
    """The requests of a workload of LLMServingSim: JSON lines.

    As `read_mooncake`, but with arrival_s (seconds) for timestamp, and hash_ids only
    of whole pieces.
    """
    return _read_hashed(path, "arrival_s", 1.0, content_size, skip_empty)


def read_sharegpt(
    path: str | pathlib.Path, count_tokens: Callable[[str], int]
) -> Lengths:
    """The lengths of each conversation's first round, from a ShareGPT JSON.

    The file is a list of objects whose `conversations` is a list of {"from", "value"}.
    The first message is the prompt, the second its output. Conversations with fewer
    than two messages, and rounds of which one is empty, are left out and counted.

    Args:
      path: the file.
      count_tokens: tokens of a text, for example
        `lambda text: len(tokenizer.encode(text))`; `lambda text: len(text.split())`
        counts words.

    Raises:
      OSError, ValueError: no such file, no such JSON (with the entry's number).
    """
    path = pathlib.Path(path)
    with open_text(path) as file:
        try:
            entries = json.load(file)
        except ValueError as error:
            raise ValueError(f"trace: {path} is no JSON ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(
            f"trace: wanted a list of conversations, got {path}, an object"
        )
    prompts, outputs, skipped = [], [], {}
    for number, entry in enumerate(entries):
        try:
            texts = [message["value"] for message in entry["conversations"][:2]]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a value is no text")
        except (KeyError, TypeError) as error:
            raise ValueError(
                'trace: wanted {"conversations": [{"from": ..., "value": text}, ...]}; '
                f"entry {number} of {path} is {json.dumps(entry):.80} ({error!r})"
            ) from error
        counts = [count_tokens(text) for text in texts]
        if len(counts) < 2:
            reason = "fewer than two messages"
        elif not all(counts):
            reason = _EMPTY
        else:
            prompts.append(counts[0])
            outputs.append(counts[1])
            continue
        skipped[reason] = skipped.get(reason, 0) + 1
    return Lengths(_i32(prompts), _i32(outputs), skipped)


def read_prompts(path: str | pathlib.Path) -> list[Prompt]:
    """What prompts share in a trace, whatever it tells of times and outputs.

    Raises:
      OSError, ValueError: no such file; a line that is no JSON with input_length and
        hash_ids; no line at all.
    """
    path = pathlib.Path(path)
    found = [_prompt(fields, line, where) for where, line, fields in json_lines(path)]
    if not found:
        raise ValueError(f"trace: {path} has no requests")
    return found


def _read_hashed(
    path: str | pathlib.Path,
    time_name: str,
    seconds: float,
    content_size: int,
    skip_empty: bool,
) -> Workload:
    if content_size < 1:
        raise ValueError(f"content_size: wanted at least 1 token, got {content_size}")
    path = pathlib.Path(path)
    gathered = _Gathered(path, skip_empty)
    pieces: list[Sequence[int]] = []
    for where, line, fields in json_lines(path):
        prompt = _prompt(fields, line, where)
        for name in (time_name, "output_length"):
            if name not in fields:
                raise ValueError(f"trace: no {name} in {where}: {line:.80}")
        most = cdiv(prompt.input_length, content_size)
        if len(prompt.hash_ids) > most:
            raise ValueError(
                f"trace: {where} has {len(prompt.hash_ids)} hash_ids, wanted at most "
                f"{most}: its {prompt.input_length} tokens in pieces of {content_size}"
            )
        pairs = [(time_name, fields[time_name]), ("input_length", prompt.input_length)]
        if gathered.add(where, *pairs, ("output_length", fields["output_length"])):
            pieces.append(prompt.hash_ids)
    longest = max(map(len, pieces), default=0)
    contents = np.full((len(pieces), longest), NO_CONTENT, np.int32)
    for row, ids in enumerate(pieces):
        contents[row, : len(ids)] = ids
    return gathered.workload(seconds, contents, content_size)


class _Gathered:
    """The requests read so far, and the checks that all readers share."""

    def __init__(self, path: pathlib.Path, skip_empty: bool):
        self.path = path
        self.skip_empty = skip_empty
        self.times: list[float] = []
        self.prompts: list[int] = []
        self.outputs: list[int] = []
        self.num_empty = 0
        self.last = 0.0

    def add(self, where: str, *pairs: tuple[str, Any]) -> bool:
        """Takes (name, value) of time, prompt and output; False: it was left out."""
        (time_name, value), prompt, output = pairs
        time = number_of(value)
        if time is None or time < 0:
            raise ValueError(
                f"trace: wanted a number of at least 0 for {time_name}, got {value!r} "
                f"in {where}"
            )
        if time < self.last:
            raise ValueError(
                f"trace: wanted times in order, got {time_name} {value} in {where}, "
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
        """The workload, where `seconds` is the unit of the times."""
        if not self.times:
            raise ValueError(f"trace: {self.path} has no requests")
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
            raise ValueError("a number is no int32 of at least 0")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"trace: wanted JSON with an integer input_length and a list hash_ids of "
            f"integers; {where} is {line!r:.80} ({error})"
        ) from error
    return prompt


def _i32(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers, np.int32)
