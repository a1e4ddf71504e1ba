r"""Compiles the engine for TPUs, with no TPU present, and says what it takes.

    python -m experiments.compile_tpu --topology v5e:2x2 --model llama-3-8b \
        --tensor_parallel 4

Nothing is computed and no weight exists: the TPU's own compiler (libtpu, of the extra
`tpu`) gets shapes, and gives back a program for the named machine, or the reason why
there is none. It is the program that `LLM(mesh=...)` runs, `engine.run` on a state of
`engine.init(mesh=...)`, with weights and pages where `jpaged.parallel` wants them.

Takes a minute or two on two cores, most of it for the decoder's layers; `--num_layers`
compiles fewer. The last line of the output is one JSON object: compiled, bytes_per_chip
(arguments, results and temporaries of a device), temporary_bytes, collectives, fits,
compile_s.

Expected, by arithmetic: a Llama-3-8B shape has 16.1 GB of bfloat16 weights, so 4.0 GB a
chip of four, and its pages 131 kB a token, so 33 kB a token and chip; with `--kv_dtype
int8 --block_size 128` 68 kB, so 17 kB. Two sums a layer
and one of the embedding, for each of a step's two sizes (decodes; prompts too), and one
gather, of the logits.
"""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from absl import app, flags

# Before jax is imported: it shall neither ask the network for a TPU nor look for one,
# and compilers may run beside each other.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jpaged import engine, parallel
from jpaged.config import EngineConfig
from jpaged.engine import replicas
from jpaged.models import ModelConfig
from jpaged.models.config import DTYPES
from jpaged.models.decoder import Decoder
from jpaged.models.loading.placing import placement
from jpaged.models.shapes import random_config
from jpaged.pages.quantised import PAGE_DTYPES
from jpaged.simulator.costs.chips import CHIPS, GIB

# Memory of a device by the name of its machine. A chip of tpu7x is two devices; the
# simulator has no v4, whose 32 GiB Google's page on it states.
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
)


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_string("topology", "v5e:2x2", "Machine, as v6e:4x4 or tpu7x:2x2x1.")
    flags.DEFINE_string("model", "llama-3-8b", "A name of jpaged.models.shapes.")
    flags.DEFINE_integer("tensor_parallel", 4, "Devices that share the model.")
    flags.DEFINE_integer("num_layers", None, "Compile only so many layers.")
    flags.DEFINE_integer("num_blocks", 2048, "KV blocks.")
    flags.DEFINE_integer("block_size", 16, "Tokens of a block.")
    flags.DEFINE_string("kv_dtype", None, "Of the pages, as int8; None: the model's.")
    flags.DEFINE_integer("max_num_seqs", 4, "Rows of a step.")
    flags.DEFINE_integer("max_model_len", 2048, "Tokens of the longest sequence.")
    flags.DEFINE_integer("max_num_batched_tokens", 32, "Tokens of a step.")


def tpu_mesh(topology: str, tensor_parallel: int) -> Mesh:
    """A mesh, as `jpaged.make_mesh` gives it, of a machine that is not there.

    Raises:
      ValueError: there is no such machine, or it has fewer devices.
    """
    kind = topology.partition(":")[0]
    if kind not in DEVICE_BYTES:
        raise ValueError(
            f"topology: wanted one of {tuple(DEVICE_BYTES)} and its shape, as v5e:2x2, "
            f"got {topology!r}"
        )
    if importlib.util.find_spec("libtpu") is None and not os.environ.get(
        "TPU_LIBRARY_PATH"
    ):
        raise ValueError(
            "libtpu: wanted the TPU's compiler, got none; pip install 'jpaged[tpu]'"
        )
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    if not 1 <= tensor_parallel <= len(devices):
        raise ValueError(
            f"tensor_parallel: wanted from 1 to the {len(devices)} devices of "
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
    """Model and engine state of shapes only, each where it lies on the mesh.

    `kv_dtype`: as in `engine.init`.

    Raises:
      ValueError: the model does not divide over the mesh.
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
    """`engine.run`, as `LLM(mesh=...)` runs it, compiled for the mesh's devices."""
    model, state = abstract_engine(model_config, config, mesh, kv_dtype)
    max_steps = jax.ShapeDtypeStruct((), "int32")
    return engine.run.lower(model, state, max_steps).compile()


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How many of each kind the program has."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text() or "")
    return dict(collections.Counter(found))


def report(compiled: jax.stages.Compiled, topology: str) -> dict[str, Any]:
    """Bytes of one device, whether it has so many, and what is sent."""
    memory = compiled.memory_analysis()
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
        "collectives": collectives(compiled),
        "fits": used <= available,
        "available_bytes": available,
    }


def _asked(options: Mapping[str, Any]) -> tuple[ModelConfig, EngineConfig, Mesh]:
    """What the flags name.

    Raises:
      ValueError: a flag's value is none of those that work.
    """
    model = dataclasses.replace(random_config(options["model"]), vocab_first=True)
    if options["num_layers"] is not None:
        model = dataclasses.replace(model, num_layers=options["num_layers"])
    config = EngineConfig(
        num_blocks=options["num_blocks"],
        block_size=options["block_size"],
        max_num_seqs=options["max_num_seqs"],
        max_model_len=options["max_model_len"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        attention="mosaic_tpu",
    )
    return model, config, tpu_mesh(options["topology"], options["tensor_parallel"])


def check_kv_dtype(kv_dtype: str | None) -> None:
    """Raises ValueError for a `kv_dtype` that does not exist."""
    wanted = (None, *DTYPES, *PAGE_DTYPES)
    if kv_dtype not in wanted:
        raise ValueError(f"kv_dtype: wanted one of {wanted}, got {kv_dtype!r}")


def main(argv: list[str]) -> None:
    """Reads flags, compiles, prints."""
    del argv
    options = {name: getattr(FLAGS, name) for name in _OPTIONS}
    try:
        model, config, mesh = _asked(options)
        placement(model, mesh)
        check_kv_dtype(options["kv_dtype"])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    start = time.perf_counter()
    try:
        compiled = compile_run(model, config, mesh, options["kv_dtype"])
        result = report(compiled, options["topology"])
    except jax.errors.JaxRuntimeError as error:
        # The compiler itself refuses what does not fit into the device's memory.
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
    print(json.dumps({**options, "jax": jax.__version__, **result}))


if __name__ == "__main__":
    define_flags()
    app.run(main)
