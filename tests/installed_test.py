"""An installed package: scripts for vLLM and `python -m jpaged`, anywhere.

The wheel is built from a copy of the sources and unpacked into an empty folder, which
comes before the environment's packages. The scripts are in tests/support/vllm_scripts;
they are what a user has after changing `vllm` to `jpaged` in the imports.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

SCRIPTS = sorted((ROOT / "tests" / "support" / "vllm_scripts").glob("*.py"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that has nothing but the package, as pip installs it."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    for name in ("jpaged", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "built")
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    command += ["--disable-pip-version-check", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return target


@pytest.fixture
def run(installed, tmp_path):
    """Runs Python with the package, in an empty folder: the finished process."""

    def run(*arguments, stdin=""):
        environment = {
            name: value for name, value in os.environ.items() if name != "PYTHONPATH"
        }
        environment["PYTHONPATH"] = str(installed)
        done = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=tmp_path,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


def test_the_package_is_the_installed_one(run, installed):
    code = "import jpaged, jpaged.plot; print(jpaged.__file__)"
    where = pathlib.Path(run("-c", code).stdout.strip())
    assert where.is_relative_to(installed)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_for_vllm_runs_after_changing_its_imports(run, script, tmp_path):
    shutil.copy(script, tmp_path / "script.py")
    record = json.loads(run("script.py").stdout.splitlines()[-1])
    assert record["finish_reasons"]
    assert set(record["finish_reasons"]) <= {"stop", "length"}


def test_python_m_jpaged_generates_in_any_folder(run):
    arguments = ("-m", "jpaged", "--temperature=0", "--max-tokens=8")
    first = run(*arguments, "def ")
    second = run(*arguments, stdin="def ")
    assert first.stdout == second.stdout
    assert len(first.stdout.strip()) > 4
    lines = first.stderr.splitlines()
    assert lines
    assert all(line.startswith("jpaged: ") for line in lines)
