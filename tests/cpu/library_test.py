"""The library of the CPU kernels: how it is built, kept, shared and shipped."""

import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from jpaged.cpu import library
from tests.support.cpu_kernels import needs_compiler
from tests.support.paths import ROOT

pytestmark = pytest.mark.long
# Attention in a fresh process: which backend serves, and its result.
PROGRAM = """
import jax.numpy as jnp
from jpaged.attention import paged_attention
from jpaged.attention.backends import preferred
pages = jnp.ones((2, 1, 4, 8))
arguments = (jnp.ones((1, 2, 8)), pages, pages, jnp.array([[1]]), jnp.array([3]))
print([backend.name for backend in preferred()])
print(float(paged_attention(*arguments).sum()))
paged_attention(*arguments, implementation=NAME)
"""


def run_fresh(
    name: str | None = None, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("NAME", repr(name))],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_without_a_compiler_xla_serves_and_one_line_says_so(tmp_path):
    done = run_fresh(None, PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.splitlines() == ["['xla']", "16.0"], done.stderr
    lines = [line for line in done.stderr.splitlines() if "jpaged" in line]
    assert len(lines) == 1
    assert "found none; install one, for example with `apt install g++`" in lines[0]


def test_without_a_compiler_the_name_raises_an_error_that_says_what_to_install(
    tmp_path,
):
    done = run_fresh("cpu", PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert "ValueError: implementation: 'cpu' cannot serve this" in done.stderr
    assert "apt install g++" in done.stderr


def test_a_compiler_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(library.LibraryError, match=r"CXX: expected .* 'no-such-comp"):
        library.find_compiler()


def test_the_kernels_can_be_turned_off():
    done = run_fresh(None, JPAGED_CPU_KERNELS="off")
    assert done.stdout.splitlines() == ["['xla']", "16.0"]
    assert "jpaged" not in done.stderr


@pytest.fixture
def quick_compiler(tmp_path, monkeypatch) -> pathlib.Path:
    """Return the log of a compiler that writes its output file after a while."""
    log, script = tmp_path / "log", tmp_path / "compiler"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "compiler $VERSION"; exit; fi\n'
        'for last; do :; done\nsleep 0.2\necho library > "$last"\n'
        f'echo "$last" >> {log}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return log


def test_a_library_is_built_once_and_found_again(quick_compiler):
    path = library.build()
    assert path.read_text() == "library\n"
    assert library.build() == path
    # A call for each source, and one that links.
    assert len(quick_compiler.read_text().splitlines()) == 5
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_another_compiler_source_or_processor_builds_another_library(
    quick_compiler, monkeypatch
):
    paths = {library.build()}
    monkeypatch.setenv("VERSION", "2")
    paths.add(library.build())
    monkeypatch.setattr(library.compilation_cache, "machine", lambda: "other")
    paths.add(library.build())
    monkeypatch.setattr(library, "_source_hash", lambda: "other")
    paths.add(library.build())
    monkeypatch.setattr(library, "JAXLIB_VERSION", "other")
    paths.add(library.build())
    assert len(paths) == 5


@needs_compiler
def test_several_threads_can_load_the_kernels_first():
    code = (
        "import concurrent.futures as f; from jpaged.cpu import library\n"
        "with f.ThreadPoolExecutor(8) as pool:\n"
        "    print(set(pool.map(lambda _: library.problem(), range(16))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "{None}", done.stderr


@needs_compiler
def test_a_shipped_library_that_does_not_load_is_replaced_by_a_built_one(
    monkeypatch, tmp_path
):
    (tmp_path / "wrong.so").write_text("library")
    monkeypatch.setattr(library, "_shipped", lambda: tmp_path / "wrong.so")
    registered = []
    register = library._open

    def record(path):
        registered.append(path)
        register(path)

    monkeypatch.setattr(library, "_register", record)
    library._load_once.__wrapped__()
    assert registered[0] == library.build() == tmp_path / "wrong.so"
    assert registered[1:] == [library._build_here()]


def test_several_processes_can_build_at_once(quick_compiler):
    code = "from jpaged.cpu import library; print(library.build())"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(3)
    ]
    paths = {process.communicate()[0].strip() for process in started}
    (path,) = paths
    assert pathlib.Path(path).read_text() == "library\n"


def test_a_folder_that_is_not_writable_is_replaced(
    quick_compiler, monkeypatch, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library.build().read_text() == "library\n"


def test_a_compiler_that_fails_shows_its_message(tmp_path, monkeypatch):
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo bad >&2; exit 3; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(library.LibraryError, match=r"attention.cc .* failed:\nbad"):
        library.build()


def test_a_file_that_is_no_library_is_an_error_and_not_a_crash(tmp_path):
    (tmp_path / "wrong.so").write_text("library")
    with pytest.raises(library.LibraryError, match="cannot load"):
        library._open(tmp_path / "wrong.so")


def test_a_library_without_the_kernels_is_an_error(tmp_path):
    if library.problem() is not None:
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "empty.c"
    source.write_text("int nothing;\n")
    built = tmp_path / "empty.so"
    subprocess.run(
        [*library.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(built)],
        check=True,
    )
    with pytest.raises(library.LibraryError, match="cannot load"):
        library._open(built)


def test_the_package_contains_the_sources():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["jpaged"]
    found = {path for each in patterns for path in (ROOT / "jpaged").glob(each)}
    assert set(library.SOURCES.iterdir()) <= found
    assert {path.suffix for path in library.SOURCES.iterdir()} == {".cc", ".h"}


@needs_compiler
def test_targets_change_with_the_sources(monkeypatch):
    before = library.target("attention")
    monkeypatch.setattr(library, "_source_hash", lambda: "0123456789abcdef")
    assert library.target("attention") == "jpaged_attention_0123456789ab" != before
