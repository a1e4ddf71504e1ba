"""Compilation cache: compiled programs are kept in the user's cache folder.

A second process that runs the same model with the same sizes loads its programs instead
of compiling them.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import sys
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

# By default jax stores only programs that compile for a second or longer. Most programs
# of small models compile faster, and the host's helper functions in some 50 ms.
LEAST_COMPILE_S = 0.02
_JAX_LEAST_COMPILE_S = 1.0  # jax's default, to recognise a user's own setting


def turn_on() -> pathlib.Path | None:
    """Turn on jax's compilation cache, and return its folder.

    Nothing is changed, and None is returned, if the user configured jax's cache or
    turned it off, if JPAGED_COMPILATION_CACHE=off, or if the folder is not writable.
    """
    if os.environ.get("JPAGED_COMPILATION_CACHE", "").lower() == "off":
        return None
    config: Any = jax.config  # its options are not declared as attributes
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    folder = user_folder() / machine()
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
    # jax reads the setting only once, when it compiles the first program.
    jax_cache.reset_cache()
    return folder


def user_folder() -> pathlib.Path:
    """Return the folder for compiled programs in the user's cache directory."""
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


def machine() -> str:
    """Return a name for this kind of processor.

    Machines may share a home folder, and a program that is compiled for one processor
    can use instructions that another one does not have.
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
