"""The shared library of the kernels: built with the user's compiler, and loaded once.

Pipeline: kernels/*.cc -> [library] -> cpu.calls.

The library is built at first use and kept in the user's cache folder. Its file name
holds a hash of the sources, the jaxlib version, the compiler and the processor, so a
change of any of them builds another file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import jax

from jpaged import compilation_cache

SOURCES = pathlib.Path(__file__).parent / "kernels"
JAXLIB_VERSION = importlib.metadata.version("jaxlib")
COMPILERS = ("c++", "g++", "clang++")  # tried after $CXX
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
_TIMEOUT_S = 1800
# FFI target -> symbol of its handler.
TARGETS = {
    "attention": "JpagedAttention",
    "write_kv": "JpagedWriteKv",
    "copy_blocks": "JpagedCopyBlocks",
    "matmul": "JpagedMatMul",
    "grouped_matmul": "JpagedGroupedMatMul",
}


class LibraryError(RuntimeError):
    """The library cannot be built or loaded; the message says what to do."""


def is_available() -> bool:
    """Whether the kernels can be used. Builds the library at the first call.

    If they cannot, one line on stderr says why, once in a process.
    """
    reason = problem()
    if reason is not None:
        _report(reason)
    return reason is None


@functools.cache
def problem() -> str | None:
    """Return why the kernels cannot be used, or None. Builds at the first call."""
    if os.environ.get("JPAGED_CPU_KERNELS", "").lower() == "off":
        return "JPAGED_CPU_KERNELS=off"
    try:
        _load()
    except LibraryError as error:
        return str(error)
    return None


def target(name: str) -> str:
    """Return the FFI target of a kernel of `TARGETS`, and register all of them.

    The target's name holds a hash of the sources: a program in a compilation cache
    never calls another version of a kernel.

    Raises:
      LibraryError: the library cannot be built or loaded.
    """
    _load()
    return f"jpaged_{name}_{_source_hash()[:12]}"


@functools.cache
def _report(reason: str) -> None:
    if reason != "JPAGED_CPU_KERNELS=off":
        print(
            f"jpaged: the CPU kernels are not available, XLA's operations serve: "
            f"{reason}",
            file=sys.stderr,
        )


@functools.cache
def _load() -> None:
    """Build, load and register the kernels, once in a process."""
    library = _open(build())
    for name, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(
            f"jpaged_{name}_{_source_hash()[:12]}",
            jax.ffi.pycapsule(getattr(library, symbol)),
            platform="cpu",
        )


def _open(path: pathlib.Path) -> ctypes.CDLL:
    try:
        library = ctypes.cdll.LoadLibrary(str(path))
        for symbol in TARGETS.values():
            getattr(library, symbol)
    except (OSError, AttributeError) as error:
        raise LibraryError(f"cannot load {path}: {error}") from error
    return library


# ---- building


def build() -> pathlib.Path:
    """Return the path of the library, and build it if there is none.

    Several processes may build at the same time. Each writes a file of its own and
    renames it, so a file with the final name is complete.

    Raises:
      LibraryError: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    name = f"jpaged-cpu-{_key(compiler)}.so"
    errors = []
    for folder in _folders():
        path = folder / name
        if path.is_file():
            return path
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
                built = pathlib.Path(scratch) / name
                _compile(compiler, built)
                os.replace(built, path)
            return path
        except OSError as error:
            errors.append(f"{folder}: {error}")
    raise LibraryError("found no folder for the library: " + "; ".join(errors))


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: $CXX, or the first of `COMPILERS`.

    Raises:
      LibraryError: there is none.
    """
    if configured := os.environ.get("CXX"):
        command = shlex.split(configured)
        if command and shutil.which(command[0]):
            return command
        raise LibraryError(f"CXX: expected a C++ compiler, got {configured!r}")
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise LibraryError(
        f"compiler: expected one of {', '.join(COMPILERS)}, found none; install one, "
        "for example with `apt install g++` or `xcode-select --install`"
    )


def _compile(compiler: list[str], output: pathlib.Path) -> None:
    command = [*compiler, *_FLAGS, *_processor_flags()]
    command += ["-isystem", jax.ffi.include_dir(), "-I", str(SOURCES)]
    command += [str(SOURCES / "kernels.cc"), "-o", str(output)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LibraryError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        message = done.stderr.strip() or done.stdout.strip()
        raise LibraryError(f"{shlex.join(command)} failed:\n{message[-2000:]}")


def _folders() -> Iterator[pathlib.Path]:
    """Yield writable folders for the library, the user's cache first."""
    kept = compilation_cache.user_folder().parent / "kernels"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        if os.access(kept, os.W_OK | os.X_OK):
            yield kept
    except OSError:
        pass
    yield pathlib.Path(_process_folder().name)


@functools.cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="jpaged-")


def _processor_flags() -> list[str]:
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    return ["-mcpu=native" if is_arm else "-march=native"]


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cc", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _key(compiler: list[str]) -> str:
    """Return a hash of everything that decides what the library contains."""
    try:
        done = subprocess.run(
            [*compiler, "--version"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LibraryError(f"cannot run {compiler[0]}: {error}") from error
    parts = [
        _source_hash(),
        JAXLIB_VERSION,
        shlex.join(compiler),
        done.stdout,
        shlex.join([*_FLAGS, *_processor_flags()]),
        compilation_cache.machine(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
