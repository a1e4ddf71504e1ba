"""The shared library of the kernels: built with the user's compiler, and loaded once.

Pipeline: kernels/*.cc -> [library] -> cpu.calls.

The library is built at first use and kept in the user's cache folder. Its file name
holds a hash of the sources, the jaxlib version, the compiler and the processor, so a
change of any of them builds another file. A wheel may contain libraries for a few kinds
of processors (`make wheel`); then no compiler is needed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator

import jax

from jpaged import compilation_cache
from jpaged.log import LOG

SOURCES = pathlib.Path(__file__).parent / "kernels"
JAXLIB_VERSION = importlib.metadata.version("jaxlib")
COMPILERS = ("c++", "g++", "clang++")  # tried after $CXX
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-w")
_TIMEOUT_S = 1800
_LOCK = threading.Lock()
# Libraries of a wheel: compiler flag -> what the processor must have, best one first.
SHIPPED = SOURCES.parent / "built"
_LEVELS = {
    "x86_64": {
        "-march=x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        "-march=x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    },
    "arm64": {"-march=armv8-a": set[str]()},
}
# FFI target -> symbol of its handler.
TARGETS = {
    "attention": "JpagedAttention",
    "write_kv": "JpagedWriteKv",
    "copy_blocks": "JpagedCopyBlocks",
    "matmul": "JpagedMatMul",
    "grouped_matmul": "JpagedGroupedMatMul",
    "rms_norm": "JpagedRmsNorm",
    "gated": "JpagedGated",
}


class LibraryError(RuntimeError):
    """The library cannot be built or loaded; the message says what to do."""


def is_available() -> bool:
    """Whether the kernels can be used. Builds the library at the first call.

    If they cannot, a warning is logged that says why, once in a process.
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
    return _target(name)


@functools.cache
def has_int8_pairs() -> bool:
    """Whether int8 weights are multiplied in pairs, with integer instructions.

    Raises:
      LibraryError: the library cannot be built or loaded.
    """
    return bool(_load().JpagedHasInt8Pairs())


def _target(name: str) -> str:
    return f"jpaged_{name}_{_source_hash()[:12]}"


def _announce_build() -> None:
    LOG.info("building the CPU kernels for this processor, once; some 10 s")


@functools.cache
def _report(reason: str) -> None:
    if reason != "JPAGED_CPU_KERNELS=off":
        LOG.warning(
            "the CPU kernels are not available, XLA's operations serve: %s", reason
        )


def _load() -> ctypes.CDLL:
    """Build, load and register the kernels, once in a process, from any thread."""
    with _LOCK:
        return _load_once()


@functools.cache
def _load_once() -> ctypes.CDLL:
    try:
        return _register(build())
    except LibraryError:
        if _shipped() is None:
            raise
        # jaxlib does not accept the library of the wheel.
        return _register(_build_here())


def _register(path: pathlib.Path) -> ctypes.CDLL:
    library = _open(path)
    try:
        for name, symbol in TARGETS.items():
            capsule = jax.ffi.pycapsule(getattr(library, symbol))
            jax.ffi.register_ffi_target(_target(name), capsule, platform="cpu")
    except Exception as error:  # jaxlib does not accept a library of another version
        raise LibraryError(f"cannot register {path}: {error}") from error
    return library


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

    A library that came with the wheel is used as it is, unless its sources differ. Of
    several processes one builds while the others wait.

    Raises:
      LibraryError: there is no compiler, or it fails.
    """
    return _shipped() or _build_here()


def _build_here() -> pathlib.Path:
    compiler = find_compiler()
    name = f"jpaged-cpu-{_key(compiler)}.so"
    errors = []
    for folder in _folders():
        path = folder / name
        if path.is_file():
            return path
        try:
            with _locked(folder):
                if not path.is_file():
                    _announce_build()
                    compile_library(compiler, path, processor_flags())
            return path
        except OSError as error:
            errors.append(f"{folder}: {error}")
    raise LibraryError("found no folder for the library: " + "; ".join(errors))


def build_shipped() -> None:
    """Build the libraries of a wheel for this machine's family of processors.

    Raises:
      LibraryError: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    shutil.rmtree(SHIPPED, ignore_errors=True)
    SHIPPED.mkdir()
    for flag in _LEVELS.get(_family(), {}):
        compile_library(compiler, _shipped_path(flag), [flag])


def _shipped() -> pathlib.Path | None:
    """Return the best library of the wheel for this processor, or None."""
    for flag, needed in _LEVELS.get(_family(), {}).items():
        path = _shipped_path(flag)
        if path.is_file() and needed <= _processor_features():
            return path
    return None


def _shipped_path(flag: str) -> pathlib.Path:
    return SHIPPED / f"jpaged-cpu-{_source_hash()[:12]}{flag.replace('=', '-')}.so"


def _family() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)


def _processor_features() -> set[str]:
    """Return the flags of the processor on Linux; empty elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return set()
    flags = [line for line in lines if line.startswith("flags")]
    return set(flags[0].split(":", 1)[1].split()) if flags else set()


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


def compile_library(
    compiler: list[str], path: pathlib.Path, processor: list[str]
) -> None:
    """Compile the kernels into a new file at `path`.

    A file of another name is renamed at the end, so the file is always complete.

    Args:
      compiler: the command of the compiler.
      path: of the library.
      processor: flags for the processor, such as `processor_flags()`.

    Raises:
      LibraryError: the compiler fails.
    """
    command = [*compiler, *_FLAGS, *processor]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        folder = pathlib.Path(scratch)
        include = ["-isystem", jax.ffi.include_dir(), "-I", str(SOURCES)]
        sources = [path for path in sorted(SOURCES.iterdir()) if path.suffix == ".cc"]
        objects = [str(folder / f"{source.stem}.o") for source in sources]
        units = [
            [*command, *include, "-c", str(source), "-o", name]
            for source, name in zip(sources, objects, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(_run, units))
        built = folder / path.name
        _run([*command, "-shared", *objects, "-o", str(built)])
        os.replace(built, path)


def _run(command: list[str]) -> None:
    """Run a compiler; raise LibraryError with its message if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LibraryError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        message = done.stderr.strip() or done.stdout.strip()
        raise LibraryError(f"{shlex.join(command)} failed:\n{message[-2000:]}")


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Let one process at a time build in a folder, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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


def processor_flags() -> list[str]:
    """Return the compiler's flags for the processor of this machine."""
    return ["-mcpu=native" if _family() == "arm64" else "-march=native"]


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
        shlex.join([*_FLAGS, *processor_flags()]),
        compilation_cache.machine(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
