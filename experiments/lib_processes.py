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
from collections.abc import Callable
from typing import Any

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
