"""The perplexity runner, at its smallest, and what it refuses."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.long


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.perplexity", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_runner_scores_a_file_in_each_quantisation(tmp_path):
    file = tmp_path / "text.py"
    file.write_text("import os\n\n\ndef main(path):\n    return path\n" * 3, "utf-8")
    done = run(
        f"--file={file}",
        "--quantization=none",
        "--quantization=int8",
        "--decode_tokens=4",
        "--repeats=1",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    plain, small = result["rows"]
    assert (plain["quantization"], small["quantization"]) == ("none", "int8")
    assert plain["num_tokens"] == small["num_tokens"] > 30
    assert small["perplexity"] == pytest.approx(plain["perplexity"], rel=0.02)
    assert small["weight_bytes"] < 0.6 * plain["weight_bytes"]
    for row in result["rows"]:
        assert row["tokens_per_s"] > 0
        assert row["decode_tokens_per_s"] > 0
        assert row["bits_per_character"] > 0
    assert {"model", "device", "versions"} <= result.keys()


def test_a_file_that_is_not_there_ends_the_runner_with_a_sentence(tmp_path):
    done = run(f"--file={tmp_path / 'missing'}")
    assert done.returncode == 1
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr
