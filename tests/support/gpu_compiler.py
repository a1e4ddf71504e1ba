"""Compiles programs for an H100 on a machine without a GPU: extra `gpu-compile`.

The plugin's compiler only reads a description of the device. `ptxas`, `nvlink` and
libdevice come with NVIDIA's wheels, where jax finds them.
"""

import collections
import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Of tests that compile with XLA for a GPU.
requires_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the extra `gpu-compile`: CUDA's compilers, but no GPU",
)

# An H100 SXM by its data sheet.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 85000000000
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def gpu_mesh() -> Mesh:
    """A mesh of one H100 that programs can be compiled for, but not run on."""
    jax.devices()  # loads the plugins
    topology = topologies.get_topology_desc(
        "", "cuda", target_config=H100, topology="1x1x1"
    )
    return Mesh(np.array(topology.devices[:1]), ("x",))


def compile_for_gpu(
    function: Callable[..., Any], *args: Any, donate: Sequence[int] = ()
) -> jax.stages.Compiled:
    """The program of `function` for an H100.

    Args:
      function: A function of arrays, jitted or not.
      *args: Trees of arrays or of `jax.ShapeDtypeStruct`; only shapes and dtypes count.
      donate: Numbers of the arguments that the program may overwrite; none for a
        jitted function, which has its own.
    """
    sharding = NamedSharding(gpu_mesh(), PartitionSpec())

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if not hasattr(function, "trace"):
        function = jax.jit(function, donate_argnums=tuple(donate))
    with jax.sharding.use_abstract_mesh(gpu_mesh().abstract_mesh):
        traced = function.trace(*jax.tree.map(placed, args))
        lowered = traced.lower(lowering_platforms=("cuda",))
        # Tests turn optimisation off (tests/conftest.py), and here it is what counts.
        return lowered.compile({"xla_backend_optimization_level": 3})


# ---- loops and branches, which cost a GPU a launch or a wait for the host each


@dataclasses.dataclass(frozen=True)
class ControlFlow:
    """Loops and branches of a compiled program, each counted once.

    A loop's body is counted once, however often it runs. Loops and branches within
    fused kernels do not count, because they launch nothing.
    """

    dynamic_loops: int  # whose number of steps depends on data
    counted_loops: int  # whose number of steps the compiler knows
    branches: int

    def __add__(self, other: "ControlFlow") -> "ControlFlow":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return ControlFlow(*map(sum, zip(mine, others, strict=True)))


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_WHILE = re.compile(r"= .* while\(.*body=%?([\w.\-]+)")
_CONDITIONAL = re.compile(r"= .* conditional\(")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_OR_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_CALL = re.compile(r"= .* call\(.*to_apply=%?([\w.\-]+)")


def control_flow(program: jax.stages.Compiled | str) -> ControlFlow:
    """The loops and branches that a compiled program can reach from its entry.

    Args:
      program: A compiled program, or its text in HLO.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    computations = _computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError(f"program: expected HLO with an entry, got {text[:80]!r}")
    total = ControlFlow(0, 0, 0)
    waiting = [entry[1]]
    while waiting:
        for found, reached in _instructions(computations[waiting.pop()]):
            total += found
            waiting += reached
    return total


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    name = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def _instructions(lines: list[str]) -> Iterator[tuple[ControlFlow, list[str]]]:
    """What each line adds to the counts, and the computations that it runs."""
    for line in lines:
        if match := _WHILE.search(line):
            is_counted = "known_trip_count" in line
            yield ControlFlow(1 - is_counted, int(is_counted), 0), [match[1]]
        elif _CONDITIONAL.search(line):
            if match := _BRANCHES.search(line):
                names = [name.strip().lstrip("%") for name in match[1].split(",")]
            else:
                names = _TRUE_OR_FALSE.findall(line)
            yield ControlFlow(0, 0, 1), names
        elif match := _CALL.search(line):
            yield ControlFlow(0, 0, 0), [match[1]]
