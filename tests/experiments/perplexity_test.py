"""The runner `perplexity`: its smallest run, and a missing file."""

import pytest

from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long


def test_the_runner_scores_a_file_in_each_quantisation(tmp_path):
    file = tmp_path / "text.py"
    file.write_text("import os\n\n\ndef main(path):\n    return path\n" * 3, "utf-8")
    status, stdout, stderr = call_experiment(
        "perplexity",
        f"--file={file}",
        "--quantization=none",
        "--quantization=int8",
        "--decode_tokens=4",
        "--repeats=1",
    )
    assert status == 0, stderr
    result = last_json(stdout)
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


def test_a_missing_file_is_named(tmp_path):
    status, _, stderr = call_experiment("perplexity", f"--file={tmp_path / 'missing'}")
    assert status == 1
    assert stderr.startswith("perplexity: ")
    assert "missing" in stderr
