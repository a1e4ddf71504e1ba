"""Contenders in processes of their own: what one does to memory ends with it.

Beside the road. The process that measures tells each finding as a line; the one that
asked reads them, also those of a process that was cut or fell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.lib.timing import progress

_DONE = "measured: "


def tell(found: dict[str, Any]) -> None:
    """A finding, for the process that asked."""
    print(_DONE + json.dumps(found), flush=True)


def ask(
    runner: str, arguments: list[str], count: int, limit_s: float
) -> list[dict[str, Any]]:
    """What `python -m experiments.RUNNER ARGUMENTS` tells: `count` findings.

    In place of those that are missing, `{"failed": why}`.
    """
    ended = run_limited(
        [sys.executable, "-m", f"experiments.{runner}", *arguments], limit_s
    )
    last = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
    reason = f"the process ended with {ended.status}: {last[:200]}"
    if ended.status is None:
        reason = "cut: no time was left"
    lines = ended.stdout.splitlines()
    found = [json.loads(x[len(_DONE) :]) for x in lines if x.startswith(_DONE)]
    return found + [{"failed": reason}] * (count - len(found))


def chosen(
    flag: str, given: Sequence[str] | None, names: Sequence[str], argv: list[str]
) -> list[str]:
    """The contenders that a flag names, all where it is None.

    Raises:
      ValueError: there is none of that name, or the command line has what no flag has.
    """
    unknown = [name for name in given or () if name not in names] + argv[1:]
    if unknown:
        raise ValueError(
            f"--{flag}: wanted some of {', '.join(names)}, got {unknown[0]!r}"
        )
    return list(given or names)


def ask_each(
    runner: str,
    names: Sequence[str],
    arguments: list[str],
    *,
    reason_of: Callable[[str], str | None],
    count_of: Callable[[str], int],
    limit_s: float,
    share: float = 1.0,
) -> Iterator[tuple[str, list[dict[str, Any]] | str]]:
    """Each contender with what it told, as `ask`, or why it was left out.

    Args:
      reason_of: what keeps a contender from this machine, or None.
      count_of: how many findings it tells.
      limit_s: for all of them together.
      share: of the time that is left, for one.
    """
    end = time.monotonic() + limit_s
    for name in names:
        left_s = end - time.monotonic()
        reason = reason_of(name) or ("no time was left" if left_s < 1 else None)
        if reason is not None:
            yield name, reason
            continue
        progress(f"measuring {name}")
        own = [*arguments, f"--alone={name}"]
        yield name, ask(runner, own, count_of(name), share * left_s)


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that ended, or was cut, whose `status` is then None."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float


def run_limited(
    command: list[str],
    limit_s: float,
    *,
    show: Callable[[str], None] | None = None,
    environment: dict[str, str] | None = None,
    folder: str | None = None,
) -> Ended:
    """Runs a command for at most so long; `show` gets each line of its stdout."""
    begin, lines, is_cut = time.monotonic(), [], threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | (environment or {}),
            cwd=folder,
            start_new_session=True,  # so that its own children end with it
        )

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def cut() -> None:
            is_cut.set()
            end()

        timer = threading.Timer(limit_s, cut)
        timer.start()
        try:
            assert process.stdout is not None
            with process.stdout as stdout:
                for line in stdout:
                    lines.append(line)
                    if show is not None:
                        show(line.rstrip("\n"))
            status = process.wait()
        except BaseException:
            end()
            raise
        finally:
            timer.cancel()
        errors.seek(0)
        seconds = time.monotonic() - begin
        status = None if is_cut.is_set() else status
        return Ended(status, "".join(lines), errors.read(), seconds)
