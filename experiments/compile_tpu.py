r"""Compiles the engine for TPUs without a TPU, and reports the memory it needs.

    python -m experiments.compile_tpu --topology v5e:2x2 --model llama-3-8b \
        --tensor_parallel 4

Nothing is computed, and no weights exist. The TPU's compiler (libtpu, of the extra
`tpu`) gets shapes and returns a program for the named machine, or an error. It is
`engine.run`, of which `LLM(mesh=...)` runs the parts, on a state of
`engine.init(mesh=...)`, with weights and pages sharded by `jpaged.parallel`.

Time: a minute or two on two cores, mostly for the decoder's layers; `--num_layers`
compiles fewer of them. The last line of the output is one JSON object: compiled,
bytes_per_chip (arguments, results and temporaries on a device), temporary_bytes,
collectives, fits, compile_s.

Expected, by arithmetic: the shape of Llama-3-8B has 16.1 GB of bfloat16 weights, 4.0 GB
on each of four chips. Its pages have 131 kB per token, 33 kB per token and chip; with
`--kv_dtype int8 --block_size 128` 68 kB and 17 kB. There are two all-reduces per layer
and one for the embedding, for each of a step's two sizes (decodes only; with prompts),
and one all-gather, of the logits.
"""

import collections
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

# Set before jax is imported: jax must neither ask the network for a TPU nor look for
# one, and several compilers may run at the same time.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from experiments.lib import runner
from jpaged import engine, parallel
from jpaged.config import EngineConfig
from jpaged.engine import replicas
from jpaged.kv.cache_groups import choose_groups
from jpaged.models import ModelConfig
from jpaged.models.config import DTYPES
from jpaged.models.decoder import Decoder
from jpaged.models.loading.placing import placement
from jpaged.models.shapes import random_config
from jpaged.pages.quantised import PAGE_DTYPES
from jpaged.simulator.costs.chips import CHIPS, GIB

# Memory of a device by the kind of machine. A chip of tpu7x is two devices. The
# simulator has no v4; its 32 GiB are from Google's documentation.
DEVICE_BYTES: Mapping[str, int] = {
    "v4": 32 * GIB,
    **{kind: CHIPS[f"tpu-{kind}"].memory_bytes for kind in ("v5e", "v5p", "v6e")},
    "tpu7x": CHIPS["tpu7x"].memory_bytes // 2,
}

FLAGS = flags.FLAGS
_OPTIONS = (
    "topology",
    "model",
    "tensor_parallel",
    "num_layers",
    "num_blocks",
    "block_size",
    "kv_dtype",
    "max_num_seqs",
    "max_model_len",
    "max_num_batched_tokens",
    "cache_groups",
)


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string(
        "topology", "v5e:2x2", "Machine, such as v6e:4x4 or tpu7x:2x2x1."
    )
    flags.DEFINE_string(
        "model", "llama-3-8b", "Name of a shape in jpaged.models.shapes."
    )
    flags.DEFINE_integer("tensor_parallel", 4, "Devices that share the model.")
    flags.DEFINE_integer("num_layers", None, "Layers to compile; default: all.")
    flags.DEFINE_integer("num_blocks", 2048, "KV blocks of all layers.")
    flags.DEFINE_integer("block_size", 16, "Tokens per block.")
    flags.DEFINE_string(
        "kv_dtype", None, "dtype of the pages, such as int8; default: the model's."
    )
    flags.DEFINE_integer("max_num_seqs", 4, "Batch rows of a step.")
    flags.DEFINE_integer("max_model_len", 2048, "Tokens of the longest sequence.")
    flags.DEFINE_integer("max_num_batched_tokens", 32, "Token budget of a step.")
    flags.DEFINE_bool(
        "cache_groups", True, "Layers with a window have tables of their own."
    )


def tpu_mesh(topology: str, tensor_parallel: int) -> Mesh:
    """Builds a mesh, as `jpaged.make_mesh` does, of a machine that is not present.

    Raises:
      ValueError: The machine does not exist or has fewer devices, or libtpu is not
        installed.
    """
    kind = topology.partition(":")[0]
    if kind not in DEVICE_BYTES:
        raise ValueError(
            f"--topology: expected one of {tuple(DEVICE_BYTES)} with a shape, such as "
            f"v5e:2x2, got {topology!r}"
        )
    if importlib.util.find_spec("libtpu") is None and not os.environ.get(
        "TPU_LIBRARY_PATH"
    ):
        raise ValueError(
            "libtpu: expected the TPU's compiler, got none; pip install 'jpaged[tpu]'"
        )
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    if not 1 <= tensor_parallel <= len(devices):
        raise ValueError(
            f"--tensor_parallel: expected from 1 to {len(devices)}, the devices of "
            f"{topology}, got {tensor_parallel}"
        )
    shape = tuple(tensor_parallel if a == "tensor" else 1 for a in parallel.AXES)
    return Mesh(
        np.array(devices[:tensor_parallel]).reshape(shape),
        parallel.AXES,
        axis_types=(AxisType.Auto,) * len(parallel.AXES),
    )


def abstract_engine(
    model_config: ModelConfig,
    config: EngineConfig,
    mesh: Mesh,
    kv_dtype: str | None = None,
) -> tuple[Decoder, engine.EngineState]:
    """Model and engine state as shapes with their shardings on the mesh.

    Args:
      model_config: Sizes of the model.
      config: Sizes of the engine.
      mesh: The devices.
      kv_dtype: As in `engine.init`.

    Raises:
      ValueError: The model does not divide over the mesh.
    """
    sharding_of = placement(model_config, mesh)

    def shaped(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    model = nnx.eval_shape(lambda: Decoder(model_config, rngs=nnx.Rngs(0)))
    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: shaped(
            leaf, sharding_of([step.key for step in path], leaf.shape)
        ),
        nnx.to_pure_dict(nnx.state(model)),
    )
    nnx.update(model, weights)
    state = jax.eval_shape(
        lambda: engine.init(model, config, kv_dtype=kv_dtype, mesh=mesh)
    )
    return model, jax.tree.map(shaped, state, replicas.shardings(state, mesh))


def compile_run(
    model_config: ModelConfig,
    config: EngineConfig,
    mesh: Mesh,
    kv_dtype: str | None = None,
) -> jax.stages.Compiled:
    """Compiles `engine.run` for the mesh, as `LLM(mesh=...)` runs it."""
    model, state = abstract_engine(model_config, config, mesh, kv_dtype)
    max_steps = jax.ShapeDtypeStruct((), "int32")
    return engine.run.lower(model, state, max_steps).compile()


def count_collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Counts the collectives of a program by kind."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text() or "")
    return dict(collections.Counter(found))


def memory_report(compiled: jax.stages.Compiled, topology: str) -> dict[str, Any]:
    """Bytes used on one device, whether they fit, and the program's collectives."""
    memory: Any = compiled.memory_analysis()
    used = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    available = DEVICE_BYTES[topology.partition(":")[0]]
    return {
        "compiled": True,
        "bytes_per_chip": used,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": count_collectives(compiled),
        "fits": used <= available,
        "available_bytes": available,
    }


def _configs(options: Mapping[str, Any]) -> tuple[ModelConfig, EngineConfig, Mesh]:
    """Model, engine and mesh of the flags.

    Raises:
      ValueError: A flag is invalid.
    """
    model = dataclasses.replace(random_config(options["model"]), vocab_first=True)
    if options["num_layers"] is not None:
        model = dataclasses.replace(model, num_layers=options["num_layers"])
    # As `LLM` has them: a block stores the layers of one group.
    groups = choose_groups(
        model.windows, options["max_model_len"], options["cache_groups"]
    ).windows
    config = EngineConfig(
        num_blocks=options["num_blocks"] * len(groups),
        group_windows=groups,
        block_size=options["block_size"],
        max_num_seqs=options["max_num_seqs"],
        max_model_len=options["max_model_len"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        attention="mosaic_tpu",
    )
    return model, config, tpu_mesh(options["topology"], options["tensor_parallel"])


def check_kv_dtype(kv_dtype: str | None) -> None:
    """Raises ValueError for a `kv_dtype` that does not exist."""
    known = (None, *DTYPES, *PAGE_DTYPES)
    if kv_dtype not in known:
        raise ValueError(f"--kv_dtype: expected one of {known}, got {kv_dtype!r}")


def main(argv: list[str]) -> None:
    """Compiles the engine and prints the report."""
    del argv
    options = {name: getattr(FLAGS, name) for name in _OPTIONS}
    with runner.user_errors("compile_tpu"):
        model, config, mesh = _configs(options)
        placement(model, mesh)
        check_kv_dtype(options["kv_dtype"])
    start = time.perf_counter()
    try:
        compiled = compile_run(model, config, mesh, options["kv_dtype"])
        result = memory_report(compiled, options["topology"])
    except jax.errors.JaxRuntimeError as error:
        # The compiler refuses a program that does not fit into the device's memory.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(error)
        result = {"compiled": False, "bytes_per_chip": None, "fits": False}
    result["compile_s"] = round(time.perf_counter() - start, 1)
    if result["compiled"]:
        print(
            f"{options['model']} on {options['tensor_parallel']} of "
            f"{options['topology']}: {result['bytes_per_chip'] / 1e9:.2f} GB a device, "
            f"{result['temporary_bytes'] / 1e6:.1f} MB of it temporaries, of "
            f"{result['available_bytes'] / 1e9:.0f} GB; {result['collectives']}"
        )
    runner.print_json({**options, "jax": jax.__version__, **result})


if __name__ == "__main__":
    runner.start(main, define_flags)
