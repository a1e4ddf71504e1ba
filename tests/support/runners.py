"""Run experiments, in this process or another, and scripts on eight devices."""

import contextlib
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys

from absl import flags

from experiments.lib import runner
from tests.support.paths import ROOT


def run_experiment(name: str, *arguments: str) -> tuple[int, str, str]:
    """Runs `python -m experiments.NAME ARGUMENTS`.

    Returns:
      Exit status, stdout and stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
    )
    return done.returncode, done.stdout, done.stderr


def call_experiment(name: str, *arguments: str) -> tuple[int, str, str]:
    """As `run_experiment`, in this process: no start, and compiled programs are shared.

    The runner's flags exist only during the call.
    """
    module = importlib.import_module(f"experiments.{name}")
    out, err = io.StringIO(), io.StringIO()
    known = set(flags.FLAGS)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.define_flags()
            status = module.main(runner.parse([name, *arguments])) or 0
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):  # as Python does at exit
                print(status, file=sys.stderr)
                status = 1
        finally:
            for flag in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, flag)
    return int(status or 0), out.getvalue(), err.getvalue()


def last_json(stdout: str) -> dict:
    """The JSON object of a runner's last line."""
    return json.loads(stdout.splitlines()[-1])


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
