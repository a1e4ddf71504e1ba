"""A wheel with compiled kernels, in a new environment on a machine with no compiler."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import venv

import pytest

from tests.support.cpu_kernels import needs_compiler
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    needs_compiler,
]

# Prints where jpaged and its library are, products of int8 weights by each library, and
# what an LLM generates.
PROGRAM = """
import ctypes, hashlib, pathlib
import jax, numpy as np
import jpaged
from jpaged.cpu import library

rng = np.random.default_rng(0)
x = rng.normal(size=(5, 513)).astype(np.float32)
weight = rng.integers(-127, 128, (513, 70), np.int8)
scale = rng.uniform(1, 2, 70).astype(np.float32)

def digest(target):
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct((5, 70), np.float32)])
    (product,) = call(x, weight, scale)
    np.testing.assert_allclose(product, (x @ weight) * scale, rtol=1e-3, atol=1)
    return hashlib.sha256(np.asarray(product).tobytes()).hexdigest()

digests = [digest(library.target("matmul"))]
for path in sorted(library.SHIPPED.glob("*")):
    handler = jax.ffi.pycapsule(ctypes.CDLL(str(path)).JpagedMatMul)
    jax.ffi.register_ffi_target(path.name, handler, platform="cpu")
    digests.append(digest(path.name))
llm = jpaged.LLM("tiny-python", max_num_seqs=1, max_model_len=64)
params = jpaged.SamplingParams(temperature=0.0, max_tokens=8)
print(pathlib.Path(jpaged.__file__).parent)
print(library.build())
print(*digests)
print(llm.stats()["attention"], llm.generate("def ", params)[0].outputs[0].token_ids)
"""


def generate(
    python: pathlib.Path | str, folder: pathlib.Path, **environment: str
) -> list[str]:
    done = subprocess.run(
        [python, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_wheel_needs_no_compiler(tmp_path):
    # The environment of the tests stands for the installed dependencies.
    subprocess.run(
        ["make", "wheel-only", f"RUN={sys.executable}", f"WHEELS={tmp_path}"],
        check=True,
        cwd=ROOT,
    )
    (wheel,) = tmp_path.glob("jpaged-*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")

    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*install, "--target", str(packages), str(wheel)], check=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    where, path, digests, line = generate(
        python, empty, PATH=str(empty), HOME=str(empty), XDG_CACHE_HOME=str(empty)
    )
    assert where == str(packages / "jpaged")
    assert path.startswith(where)
    assert line.startswith("cpu [")
    # A library that is compiled for this processor alone gives the same tokens.
    *_, digest, expected = generate(
        sys.executable, ROOT, PATH=os.environ["PATH"], HOME=str(empty)
    )
    assert line == expected
    # The sums of int8 products are exact integers, with every set of instructions.
    assert len(digests.split()) > 1
    assert set(digests.split()) == {digest}
