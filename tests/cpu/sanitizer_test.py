"""The kernels' own tests with AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def runtimes() -> str | None:
    """Return g++'s runtimes of the sanitizers for LD_PRELOAD, or None."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        try:
            command = ["g++", f"-print-file-name={name}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        found.append(done.stdout.strip())
    return ":".join(found) if all(map(os.path.isabs, found)) else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or runtimes() is None,
        reason="needs Linux and g++ with its sanitizers",
    ),
]
# What an access behind the end of an array looks like.
FAULT = """
import ctypes
ctypes.CDLL(None).memset(ctypes.create_string_buffer(8), 0, 1 << 16)
"""


def run_sanitized(
    cache: pathlib.Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ
        | {
            "CXX": f"g++ {SANITIZERS}",
            "LD_PRELOAD": str(runtimes()),
            # Python itself leaks what it keeps until the end.
            "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
            "XDG_CACHE_HOME": str(cache),
        },
    )


def test_the_kernels_tests_pass_under_the_sanitizers(tmp_path):
    done = run_sanitized(
        tmp_path,
        *("-m", "pytest", "-q", "-m", "long"),
        *("tests/cpu/products_test.py", "tests/cpu/pages_test.py"),
        "tests/cpu/elementwise_test.py",
        "tests/cpu/attention_test.py",
        *("-k", "not decode_equals and not share_their_first and not hypothesis"),
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (built,) = (tmp_path / "jpaged" / "kernels").iterdir()
    assert b"__asan_report" in built.read_bytes()
    # The sanitizer is on in such a process.
    done = run_sanitized(tmp_path, "-c", FAULT)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
