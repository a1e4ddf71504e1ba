"""Contenders in separate processes, so that memory use does not carry over.

The child process prints each result as one marked line (`send_result`). The parent
process reads these lines (`results_of`), including those of a child that crashed or was
stopped at its time limit.
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
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from experiments.lib.runner import progress

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # the flags belong to the runner that asks for them

_MARK = "measured: "


def define_contender_flags(names: Sequence[str]) -> None:
    """Defines the flags of a runner that measures each contender in a process."""
    flags.DEFINE_list(
        "contenders", None, f"What to measure, of {', '.join(names)}; default: all."
    )
    flags.DEFINE_float(
        "limit_s", 3600, "Time limit of the whole run, in seconds.", lower_bound=0
    )
    flags.DEFINE_string(
        "alone", None, "Internal: the contender that this process measures."
    )


def share_accelerator() -> None:
    """Keeps this process from reserving the memory that its children need."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def send_result(result: dict[str, Any]) -> None:
    """Sends a result to the parent process."""
    print(_MARK + json.dumps(result), flush=True)


def results_of(
    runner: str, arguments: list[str], count: int, limit_s: float
) -> list[dict[str, Any]]:
    """Results of a child process.

    Args:
      runner: Name of the runner, as in `python -m experiments.RUNNER`.
      arguments: Its command-line arguments.
      count: Number of results that it sends.
      limit_s: Time limit in seconds.

    Returns:
      `count` results; each missing one is `{"failed": reason}`.
    """
    ended = run_limited(
        [sys.executable, "-m", f"experiments.{runner}", *arguments], limit_s
    )
    last = (ended.stderr.strip().splitlines() or ["no error message"])[-1]
    reason = f"the process ended with status {ended.status}: {last[:200]}"
    if ended.status is None:
        reason = "stopped at its time limit"
    lines = ended.stdout.splitlines()
    found = [json.loads(x[len(_MARK) :]) for x in lines if x.startswith(_MARK)]
    return found + [{"failed": reason}] * (count - len(found))


def measure_each(
    runner: str,
    names: Sequence[str],
    arguments: list[str],
    on_results: Callable[[str, list[dict[str, Any]]], None],
    *,
    reason_of: Callable[[str], str | None],
    count_of: Callable[[str], int],
    limit_s: float,
    share: float = 1.0,
) -> dict[str, str]:
    """Measures contenders one after the other, and prints which are left out.

    Args:
      runner: Name of the runner.
      names: Names of the contenders.
      arguments: Command-line arguments for all of them.
      on_results: Called with a contender's name and its results, as `results_of`
        returns them.
      reason_of: Returns why a contender cannot run on this machine, or None.
      count_of: Returns how many results a contender sends.
      limit_s: Time limit of all contenders together, in seconds.
      share: Share of the remaining time that one contender may use.

    Returns:
      For each contender that was left out, the reason.
    """
    end = time.monotonic() + limit_s
    left_out = {}
    for name in names:
        left_s = end - time.monotonic()
        reason = reason_of(name) or ("no time was left" if left_s < 1 else None)
        if reason is not None:
            left_out[name] = reason
            continue
        progress(f"measuring {name}")
        own = [*arguments, f"--alone={name}"]
        on_results(name, results_of(runner, own, count_of(name), share * left_s))
    for name, reason in left_out.items():
        print(f"{name:<22} left out: {reason}")
    return left_out


@dataclasses.dataclass(frozen=True)
class EndedProcess:
    """How a process ended; `status` is None if it was stopped at its time limit."""

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
) -> EndedProcess:
    """Runs a command, and stops it and its children at a time limit.

    Args:
      command: The program and its arguments.
      limit_s: Time limit in seconds.
      show: Called with each line of the command's stdout.
      environment: Environment variables to add.
      folder: Working directory.
    """
    begin, lines, is_stopped = time.monotonic(), [], threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | (environment or {}),
            cwd=folder,
            start_new_session=True,  # so that its children are stopped with it
        )

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def stop() -> None:
            is_stopped.set()
            kill()

        timer = threading.Timer(limit_s, stop)
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
            kill()
            raise
        finally:
            timer.cancel()
        errors.seek(0)
        seconds = time.monotonic() - begin
        status = None if is_stopped.is_set() else status
        return EndedProcess(status, "".join(lines), errors.read(), seconds)
