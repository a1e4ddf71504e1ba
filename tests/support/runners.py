"""Run programs in separate processes: experiments, and scripts on eight devices."""

import json
import os
import pathlib
import subprocess
import sys

from tests.support.paths import ROOT


def run_experiment(name: str, *arguments: str) -> tuple[int, str, str]:
    """Run `python -m experiments.NAME ARGUMENTS`; return status, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
    )
    return done.returncode, done.stdout, done.stderr


def on_eight_devices(script: str, folder: pathlib.Path) -> dict:
    """Run a script of `tests.support` on 8 virtual CPU devices; return its last line.

    Args:
      script: the module below `tests.support`.
      folder: an empty folder, passed to the script.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"tests.support.{script}", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
            "JAX_NUMPY_RANK_PROMOTION": "raise",
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
