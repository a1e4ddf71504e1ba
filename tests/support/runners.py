"""Programs in processes of their own: runners of `experiments`, and many devices."""

import json
import os
import pathlib
import subprocess
import sys

from tests.support.paths import ROOT


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


def on_eight_devices(script: str, folder: pathlib.Path) -> dict:
    """What a script of the tests, given an empty folder, prints as its last line.

    It has 8 virtual CPU devices, which are chosen before jax starts.
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
