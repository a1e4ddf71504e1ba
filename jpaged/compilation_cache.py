"""Compilation cache: compiled programs outlive the process, in a user's cache folder.

Beside the road. A second process that runs the same model with the same sizes loads
its programs instead of compiling them.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

# jax keeps only what took a second to compile; most of our small programs do not.
LEAST_COMPILE_S = 0.1
_JAX_LEAST_COMPILE_S = 1.0  # jax's default, so that a user's choice is recognised


def turn_on() -> pathlib.Path | None:
    """The folder that is now used; None where nothing was changed.

    Nothing is changed where the user configured jax's cache (or switched it off),
    where JPAGED_COMPILATION_CACHE=off, and, silently, where the folder cannot be
    written.
    """
    if os.environ.get("JPAGED_COMPILATION_CACHE", "").lower() == "off":
        return None
    if (
        jax.config.jax_compilation_cache_dir
        or not jax.config.jax_enable_compilation_cache
    ):
        return None
    folder = user_folder() / _machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    name = "jax_persistent_cache_min_compile_time_secs"
    if getattr(jax.config, name) == _JAX_LEAST_COMPILE_S:
        jax.config.update(name, LEAST_COMPILE_S)
    # jax looks for a folder when it compiles the first program, and never again.
    jax_cache.reset_cache()
    return folder


def user_folder() -> pathlib.Path:
    """Where this user's programs keep what they can make again."""
    if configured := os.environ.get("XDG_CACHE_HOME"):
        base = pathlib.Path(configured)
    elif sys.platform == "darwin":
        base = pathlib.Path("~/Library/Caches")
    else:
        base = pathlib.Path("~/.cache")
    try:
        return base.expanduser() / "jpaged" / "xla"
    except RuntimeError:  # no home folder
        return base / "jpaged" / "xla"


def _machine() -> str:
    """A name for this kind of processor.

    A home folder may be shared by machines, and a program that was compiled for one
    processor can use instructions that another one lacks.
    """
    features = platform.processor()
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                features = line
                break
    except OSError:
        pass
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    return f"{platform.machine()}-{digest}"
