"""Compiled programs: compiled ahead of time, side by side, and owned by one engine.

Pipeline: functions and example arguments -> [compiled] -> stepping. Host only.

jit keeps what it compiles until the process ends. These programs are freed together
with their owner. They are compiled in threads, so several cores share the work, and an
engine continues with other programs meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax.sharding import SingleDeviceSharding

from jpaged.compat import return_free_memory

Key = TypeVar("Key", bound=Hashable)


class Program(NamedTuple):
    """What to compile.

    Attributes:
      name: for people.
      function: a function of arrays.
      args: example arguments, arrays or `jax.ShapeDtypeStruct`.
      donated: positions of the arguments that may be overwritten.
      options: options of XLA for this program.
    """

    name: str
    function: Callable[..., Any]
    args: Sequence[Any]
    donated: Sequence[int] = ()
    options: dict[str, Any] | None = None


class CompileRecord(NamedTuple):
    """One compilation."""

    name: str
    trace_s: float  # tracing and lowering
    compile_s: float  # XLA, or loading from the cache


class CompiledPrograms(Generic[Key]):
    """The programs of one engine, by key.

    Attributes:
      records: what was compiled so far.
    """

    def __init__(self) -> None:
        self.records: list[CompileRecord] = []
        self._futures: dict[Key, concurrent.futures.Future[Any]] = {}
        self._executor = concurrent.futures.ThreadPoolExecutor(
            max(2, os.cpu_count() or 1), "jpaged-compile"
        )
        self._lock = threading.Lock()

    @property
    def num_compilations(self) -> int:
        """Number of programs that were compiled or loaded."""
        return len(self.records)

    def start(self, key: Key, program: Callable[[], Program]) -> None:
        """Begin to compile a program in a thread, unless it is known.

        Args:
          key: identifies the program.
          program: called at once if the program is not known.
        """
        if key not in self._futures:
            wanted = program()
            args = jax.tree.map(_shape_of, tuple(wanted.args))
            wanted = wanted._replace(args=args)
            self._futures[key] = self._executor.submit(self._compile, wanted)

    def keys(self, is_started: bool = False) -> list[Key]:
        """Return the programs that can be called without waiting, or all."""
        return [
            key
            for key, future in self._futures.items()
            if is_started or (future.done() and future.exception() is None)
        ]

    def are_ready(self, keys: Sequence[Key]) -> bool:
        """Return whether all these programs can be called without waiting."""
        return all(key in self._futures and self._futures[key].done() for key in keys)

    def call(self, key: Key, *args: Any) -> Any:
        """Call a started program; waits until it is compiled.

        Raises:
          Exception: what its compilation raised.
        """
        self.wait([key])
        return self._futures[key].result()(*args)

    def wait(self, keys: Sequence[Key]) -> None:
        """Wait until these started programs are compiled; raise what they raised."""
        for key in keys:
            try:
                self._futures[key].result()
            except Exception:
                del self._futures[key]  # it can be tried again
                raise

    def are_done(self, keys: Sequence[Key], timeout_s: float | None) -> bool:
        """Wait at most `timeout_s` for started programs; return whether all ended."""
        futures = [self._futures[key] for key in keys]
        return not concurrent.futures.wait(futures, timeout_s).not_done

    def close(self) -> None:
        """Free all programs."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._futures.clear()
        return_free_memory()

    def _compile(self, program: Program) -> Any:
        start = time.perf_counter()
        jitted = jax.jit(program.function, donate_argnums=tuple(program.donated))
        lowered = jitted.lower(*program.args)
        traced = time.perf_counter()
        compiled = lowered.compile(program.options)
        end = time.perf_counter()
        with self._lock:
            self.records.append(
                CompileRecord(program.name, traced - start, end - traced)
            )
        return compiled


def _shape_of(array: Any) -> Any:
    """Return the shape, dtype and placement of an array."""
    sharding = getattr(array, "sharding", None)
    if sharding is not None:
        device = next(iter(sharding.device_set))
        default = device.default_memory().kind
        if sharding.memory_kind not in (None, default):
            return array  # a shape has no memory space
        if isinstance(sharding, SingleDeviceSharding) and not array.committed:
            sharding = None  # like the other arrays, wherever they are
    return jax.ShapeDtypeStruct(
        array.shape,
        array.dtype,
        sharding=sharding,
        weak_type=getattr(array, "weak_type", False),
    )
