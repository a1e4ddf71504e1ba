"""Runners of `experiments`, each run in a process of its own, as a user runs it."""

import os
import subprocess
import sys

from conftest import ROOT


def run_experiment(name: str, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `python -m experiments.NAME ARGUMENTS`."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
    )
    return done.returncode, done.stdout, done.stderr
