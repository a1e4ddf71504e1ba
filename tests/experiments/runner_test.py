"""What all runners share: flags with help texts, exit status, and messages."""

import importlib
import subprocess
import sys

import pytest
from absl import flags

from experiments.lib import runner
from tests.support.paths import ROOT
from tests.support.runners import call_experiment

RUNNERS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", RUNNERS)
def test_every_flag_has_a_help_text(name):
    module = importlib.import_module(f"experiments.{name}")
    known = set(flags.FLAGS)
    try:
        module.define_flags()
        own = set(flags.FLAGS) - known
        assert own
        for flag in own:
            assert len(flags.FLAGS[flag].help or "") > 5, flag
    finally:
        for flag in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, flag)
    assert f"python -m experiments.{name}" in module.__doc__


def test_help_goes_to_stdout_and_exits_with_0():
    command = [sys.executable, "-m", "experiments.plan", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("before you rent", "--chip: ", "--[no]", "--context: "):
        assert (text in done.stdout) == (text != "--[no]")


def test_positional_arguments_are_refused():
    assert call_experiment("plan", "llama") == (
        1,
        "",
        "plan: expected flags only, got 'llama'\n",
    )
    with pytest.raises(SystemExit, match="got 'abc'; pass it as --prompt"):
        runner.parse(["generate", "abc"], argument_flag="prompt")


def test_files_that_cannot_be_written_end_a_run_before_its_work(tmp_path, monkeypatch):
    missing = str(tmp_path / "missing")
    assert call_experiment("serve_bench", f"--csv={missing}/a.csv") == (
        1,
        "",
        f"serve_bench: --csv: expected a file in an existing folder, got "
        f"'{missing}/a.csv'; create '{missing}' first\n",
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for flag in ("sharing --plot=a.png", "grpo --out=a"):
        status, out, err = call_experiment(*flag.split())
        assert (status, out) == (1, "")
        assert "jpaged.plot needs matplotlib: pip install 'jpaged[plot]'" in err
