"""The Triton kernels, compiled for Ampere and Hopper with no GPU present."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs the extra `triton`"
    ),
]


FLOATS = ("llama_3_8b", "llama_3_2_1b")
OF_8_BITS = (
    "llama_3_8b_int8",
    "llama_3_8b_fp8",
    "llama_3_2_1b_int8",
    "llama_3_2_1b_fp8",
    "gemma_2_2b_int8",
    "gemma_2_2b_fp8",
)
FLOAT32 = ("one_key_float32", "float32_int8", "float32_fp8")


@pytest.mark.parametrize("shapes", [FLOATS, OF_8_BITS, FLOAT32])
def test_kernels_compile_without_spills_and_fetch_ahead(shapes):
    flags = [f"--shapes={','.join(shapes)}"]
    command = [sys.executable, "-m", "experiments.compile_triton", *flags]
    # `triton_kernel_test` sets it for its own process.
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    found = {(row["shape"], row["arch"]) for row in rows}
    assert found == {(shape, arch) for shape in shapes for arch in (80, 90)}
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= 166912, row  # of a program on an A100
        if row["call"] in ("decode", "prompt", "prefix"):
            assert row["async_copies"] > 0, row
