r"""Fits or not, before you rent: a model on a mesh of chips, by arithmetic.

    python -m experiments.plan --model llama-3-70b --chip h100 --tensor 4

Prints the bytes of a chip (weights, temporaries, pages), the tokens whose keys and
values fit, what a decoding step sends between chips, and its time by the simulator's
roofline. The last line of the output is one JSON object with the same numbers.

Takes seconds and no accelerator. Weights are exact: shapes of the decoder, divided by
`jpaged.parallel.RULES`. Temporaries are an estimate, of the arrays that live at once;
`experiments.compile_tpu` asks the TPU's own compiler. Collectives are those of
Megatron's scheme, https://arxiv.org/abs/1909.08053. Time is predicted, not measured.

Expected: 141.1 GB of bfloat16 weights for llama-3-70b, so 35.3 GB a chip of four.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from jpaged import parallel
from jpaged.arithmetic import cdiv
from jpaged.models import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.models.loading import checkpoint
from jpaged.models.loading.placing import split_sizes
from jpaged.models.shapes import random_config
from jpaged.serving import memory
from jpaged.simulator.costs.chips import Chip, find_chip
from jpaged.simulator.costs.load import StepLoad
from jpaged.simulator.costs.roofline import Roofline
from jpaged.simulator.costs.served_models import ServedModel

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model on a mesh: bytes are of one chip, tokens of one replica."""

    weight_bytes: int
    temporary_bytes: int  # estimated
    page_bytes: int  # what is left, in whole blocks
    available_bytes: int  # memory_fraction of the chip's memory
    kv_tokens: int  # whose keys and values fit, in whole blocks
    fits: bool  # at least one block, beside weights and temporaries
    collectives: Mapping[str, Mapping[str, int]]  # kind -> count, bytes of each result
    step_s: float | None  # predicted, of max_num_seqs rows that decode; None: no fit


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_string("model", "llama-3-8b", "Name, or a Hugging Face folder.")
    flags.DEFINE_string("chip", "h100", "A name of jpaged.simulator.chips.CHIPS.")
    flags.DEFINE_integer("tensor", 1, "Chips that share each matrix.")
    flags.DEFINE_integer("expert", 1, "Chips that share the experts.")
    flags.DEFINE_integer("data", 1, "Replicas.")
    flags.DEFINE_integer("block_size", 16, "Tokens of a block.")
    flags.DEFINE_integer("max_num_seqs", 64, "Rows of a step.")
    flags.DEFINE_integer("max_num_batched_tokens", 512, "Tokens of a step.")
    flags.DEFINE_integer("context", 1024, "Tokens of each row, in the predicted step.")
    flags.DEFINE_float("memory_fraction", 0.9, "Of a chip's memory, to be used.")


def model_config(name: str) -> ModelConfig:
    """Sizes of a model by name or from the config.json of a folder.

    Raises:
      ValueError: no shape has this name, or config.json is not supported.
      FileNotFoundError: the folder has no config.json.
    """
    if os.path.isdir(name):
        return checkpoint.load_config(name)
    if os.sep in name:
        raise FileNotFoundError(f"model: no such folder: {name}")
    return random_config(name)


def weight_bytes(config: ModelConfig, tensor: int = 1, expert: int = 1) -> int:
    """Bytes of the parameters that lie on one chip, by `parallel.RULES`."""
    mesh = AbstractMesh(
        (1, expert, tensor),
        parallel.AXES,
        axis_types=(AxisType.Auto,) * len(parallel.AXES),
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        nnx.to_pure_dict(nnx.state(model))
    ):
        sharding = parallel.param_sharding(
            mesh, [step.key for step in path], leaf.shape, config.num_kv_heads
        )
        total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def temporary_bytes(config: ModelConfig, tensor: int, rows: int, tokens: int) -> int:
    """An estimate of what a step's arrays take at once on one chip.

    Of a layer: residual, normed input and the sum's two sides, whole; queries, keys,
    values, attention's output and the MLP's two rising products, divided. Of the
    sampler: logits, sorted values and their order, four bytes each, whole.
    """
    size = jnp.dtype(config.dtype).itemsize
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    inner = config.intermediate_size
    if config.num_experts:
        inner = max(inner, config.expert_size * config.num_experts_per_token)
    divided = heads * config.head_dim + 2 * inner
    layer = tokens * size * (4 * config.hidden_size + cdiv(divided, tensor))
    return max(layer, 3 * 4 * rows * config.vocab_size)


def collectives(
    config: ModelConfig, tensor: int, expert: int, rows: int, tokens: int
) -> dict[str, dict[str, int]]:
    """What one step sends: kind -> how many, and bytes of each one's result.

    Two sums a layer, one for the embedding, and one gathering of logits where
    `tensor` divides the vocabulary.
    """
    size = jnp.dtype(config.dtype).itemsize
    has_split_words = tensor > 1 and config.vocab_size % tensor == 0
    sums = has_split_words * 1
    if tensor > 1:
        sums += 2 * config.num_layers
    elif expert > 1:
        sums += sum(config.has_experts(layer) for layer in range(config.num_layers))
    found = {
        "all_reduce": {"count": sums, "bytes": tokens * config.hidden_size * size},
        "all_gather": {
            "count": int(has_split_words),
            "bytes": rows * config.vocab_size * 4,
        },
    }
    return {kind: each for kind, each in found.items() if each["count"]}


def check(config: ModelConfig, **sizes: int) -> None:
    """Raises ValueError where a number is below 1, or the model does not divide."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: wanted at least 1, got {size}")
    tensor, expert = sizes["tensor"], sizes["expert"]
    split = split_sizes(config)
    for name, axis, size, of in (
        *(("tensor", tensor, size, name) for name, size in split.items()),
        ("expert", expert, config.num_experts or 1, "num_experts"),
    ):
        if size % axis:
            fitting = [n for n in range(1, axis) if size % n == 0]
            raise ValueError(
                f"{name}: wanted a divisor of {of}={size}, got {axis}; "
                f"{' or '.join(map(str, fitting))} would work"
            )


def make_plan(
    config: ModelConfig,
    chip: Chip,
    *,
    tensor: int = 1,
    expert: int = 1,
    data: int = 1,
    block_size: int = 16,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
    context: int = 1024,
    memory_fraction: float = 0.9,
) -> Plan:
    """What a model takes of each chip of a mesh, and what is left for pages.

    Raises:
      ValueError: the model does not divide over the mesh, or a number is out of range.
    """
    sizes = {"tensor": tensor, "expert": expert, "data": data}
    sizes |= {"block_size": block_size, "max_num_seqs": max_num_seqs}
    sizes |= {"max_num_batched_tokens": max_num_batched_tokens, "context": context}
    check(config, **sizes)
    if not 0 < memory_fraction <= 1:
        raise ValueError(
            "memory_fraction: wanted more than 0 and at most 1, got "
            f"{memory_fraction:g}"
        )
    model = ServedModel.of("model", config)
    weights = weight_bytes(config, tensor, expert)
    temporaries = temporary_bytes(config, tensor, max_num_seqs, max_num_batched_tokens)
    available = int(memory_fraction * chip.memory_bytes)
    block = memory.block_bytes(config, block_size, config.dtype, tensor=tensor)
    blocks = max(0, (available - weights - temporaries) // block)
    step_s = None
    if blocks:
        load = StepLoad(
            query_lens=jnp.ones(max_num_seqs, jnp.int32),
            context_lens=jnp.full(max_num_seqs, context, jnp.int32),
            num_logits=jnp.int32(max_num_seqs),
            num_copied_tokens=jnp.int32(0),
            num_swapped_tokens=jnp.int32(0),
            num_swap_copies=jnp.int32(0),
        )
        step_s = float(Roofline.of(model, chip, tensor)(load))
    return Plan(
        weight_bytes=weights,
        temporary_bytes=temporaries,
        page_bytes=blocks * block,
        available_bytes=available,
        kv_tokens=blocks * block_size,
        fits=blocks > 0,
        collectives=collectives(config, tensor, expert, max_num_seqs, max_num_seqs),
        step_s=step_s,
    )


def main(argv: list[str]) -> None:
    """Reads flags, plans, prints."""
    del argv
    names = ("tensor", "expert", "data", "block_size", "max_num_seqs")
    names += ("max_num_batched_tokens", "context", "memory_fraction")
    options: dict[str, Any] = {name: getattr(FLAGS, name) for name in names}
    try:
        config, chip = model_config(FLAGS.model), find_chip(FLAGS.chip)
        plan = make_plan(config, chip, **options)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    chips = options["tensor"] * options["expert"] * options["data"]
    print(f"{FLAGS.model} on {chips} x {chip.name}, of each chip:")
    for name in ("weight_bytes", "temporary_bytes", "page_bytes", "available_bytes"):
        print(f"  {name:16} {getattr(plan, name) / 1e9:9.2f} GB")
    print(f"KV tokens of a replica: {plan.kv_tokens:,}")
    for kind, each in plan.collectives.items():
        print(f"{each['count']} x {kind} of {each['bytes']:,} bytes a decoding step")
    if plan.step_s is None:
        print("Does not fit: take more chips, or larger ones.")
    else:
        print(f"Predicted decoding step: {1e3 * plan.step_s:.2f} ms")
    result = {"model": FLAGS.model, "chip": chip.name, **options}
    print(json.dumps({**result, **dataclasses.asdict(plan)}))


if __name__ == "__main__":
    define_flags()
    app.run(main)
