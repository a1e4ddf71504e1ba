"""Computes whether a model fits on a mesh of chips, before you rent the chips.

    python -m experiments.plan --model llama-3-70b --chip h100 --tensor 4

Prints the bytes on a chip (weights, temporaries, pages), the number of tokens whose
keys and values fit, what a decode step sends between chips, and its time by the
simulator's roofline. The last line of the output is one JSON object with the same
numbers.

Takes seconds and needs no accelerator. Weights are exact: the shapes of the decoder,
divided by `jpaged.parallel.RULES`. Temporaries are an estimate of the arrays that exist
at the same time; `experiments.compile_tpu` asks the TPU's compiler. Collectives are
those of Megatron-LM, https://arxiv.org/abs/1909.08053. Times are predicted, not
measured.

Expected: 141.1 GB of bfloat16 weights for llama-3-70b, 35.3 GB on each of four chips.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from experiments.lib import runner
from jpaged import parallel
from jpaged.arithmetic import cdiv
from jpaged.models import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.models.loading import checkpoint, sources
from jpaged.models.loading.placing import split_sizes
from jpaged.models.shapes import random_config
from jpaged.serving import memory
from jpaged.simulator.costs.chips import Chip, find_chip
from jpaged.simulator.costs.load import StepLoad
from jpaged.simulator.costs.roofline import Roofline
from jpaged.simulator.costs.served_models import ServedModel

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """A model on a mesh: bytes on one chip, tokens of one replica."""

    weight_bytes: int
    temporary_bytes: int  # estimated
    page_bytes: int  # the remaining memory, in whole blocks
    available_bytes: int  # `memory_fraction` of the chip's memory
    kv_tokens: int  # tokens whose keys and values fit, in whole blocks
    fits: bool  # whether at least one block fits beside weights and temporaries
    collectives: Mapping[str, Mapping[str, int]]  # kind -> count, bytes of each result
    step_s: float | None  # predicted decode step of max_num_seqs rows; None: no fit


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string(
        "model", "llama-3-8b", "Name of a shape, or a Hugging Face folder."
    )
    flags.DEFINE_string("chip", "h100", "Name in jpaged.simulator.costs.chips.CHIPS.")
    flags.DEFINE_integer("tensor", 1, "Chips that share each matrix.")
    flags.DEFINE_integer("expert", 1, "Chips that share the experts.")
    flags.DEFINE_integer("data", 1, "Replicas of the model.")
    flags.DEFINE_integer("block_size", 16, "Tokens per block.")
    flags.DEFINE_integer("max_num_seqs", 64, "Rows of a step.")
    flags.DEFINE_integer("max_num_batched_tokens", 512, "Token budget of a step.")
    flags.DEFINE_integer("context", 1024, "Tokens of each row in the predicted step.")
    flags.DEFINE_float("memory_fraction", 0.9, "Share of a chip's memory to use.")


def find_model_config(name: str) -> ModelConfig:
    """Sizes of a model, by name or from the config of a folder or GGUF file.

    Raises:
      ValueError: No shape has this name, or config.json is not supported.
      FileNotFoundError: The folder does not exist or has no config.json.
    """
    if os.path.exists(name) or name in sources.named_models():
        return checkpoint.load_config(name)
    if os.sep in name:
        raise FileNotFoundError(
            f"--model: expected a folder or GGUF file that exists, got {name}"
        )
    return random_config(name)


def weight_bytes(config: ModelConfig, tensor: int = 1, expert: int = 1) -> int:
    """Bytes of the parameters on one chip, by `parallel.RULES`."""
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
    """Estimates the bytes of a step's arrays that exist at the same time on one chip.

    In a layer these are the residual, the normalised input and both operands of the
    addition, which are replicated; and queries, keys, values, the output of attention
    and the MLP's gate and up products, which are divided over `tensor`. In the sampler
    they are logits, sorted values and their order: four bytes each, replicated.

    Args:
      config: Sizes of the model.
      tensor: Chips that share each matrix.
      rows: Batch rows of the step.
      tokens: Tokens of the step.
    """
    size = jnp.dtype(config.dtype).itemsize
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    inner = config.intermediate_size
    if config.num_experts:
        inner = max(inner, config.expert_size * config.num_experts_per_token)
    divided = heads * config.head_dim + 2 * inner
    layer = tokens * size * (4 * config.hidden_size + cdiv(divided, tensor))
    return max(layer, 3 * 4 * rows * config.vocab_size)


def predicted_collectives(
    config: ModelConfig, tensor: int, expert: int, rows: int, tokens: int
) -> dict[str, dict[str, int]]:
    """Collectives of one step: kind -> their count and the bytes of each result.

    There are two all-reduces per layer and one for the embedding, and an all-gather of
    the logits if `tensor` divides the vocabulary.
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


def check_mesh_sizes(config: ModelConfig, **sizes: int) -> None:
    """Checks that sizes are positive and that the model divides over the mesh.

    Args:
      config: Sizes of the model.
      **sizes: Sizes by flag, "tensor" and "expert" among them.

    Raises:
      ValueError: A size is below 1, or an axis does not divide what it shares.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"--{name}: expected at least 1, got {size}")
    tensor, expert = sizes["tensor"], sizes["expert"]
    split = split_sizes(config)
    for name, axis, size, of in (
        *(("tensor", tensor, size, name) for name, size in split.items()),
        ("expert", expert, config.num_experts or 1, "num_experts"),
    ):
        if size % axis:
            fitting = [n for n in range(1, axis) if size % n == 0]
            raise ValueError(
                f"--{name}: expected a divisor of {of}={size}, such as "
                f"{' or '.join(map(str, fitting))}, got {axis}"
            )


def predicted_step_s(
    model: ServedModel, chip: Chip, tensor: int, rows: int, context: int
) -> float:
    """Predicts the seconds of a decode step by the simulator's roofline.

    Args:
      model: Sizes of the model.
      chip: The kind of chip.
      tensor: Chips that share each matrix.
      rows: Batch rows of the step.
      context: Tokens of each row.
    """
    load = StepLoad(
        query_lens=jnp.ones(rows, jnp.int32),
        context_lens=jnp.full(rows, context, jnp.int32),
        num_logits=jnp.int32(rows),
        num_copied_tokens=jnp.int32(0),
        num_swapped_tokens=jnp.int32(0),
        num_swap_copies=jnp.int32(0),
    )
    return float(Roofline.of(model, chip, tensor)(load))


def plan_mesh(
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
) -> MeshPlan:
    """Plans the memory of each chip of a mesh.

    Args:
      config: Sizes of the model.
      chip: The kind of chip.
      tensor: Chips that share each matrix.
      expert: Chips that share the experts.
      data: Replicas of the model.
      block_size: Tokens per block.
      max_num_seqs: Batch rows of a step.
      max_num_batched_tokens: Token budget of a step.
      context: Tokens of each row in the predicted step.
      memory_fraction: Share of a chip's memory to use.

    Raises:
      ValueError: The model does not divide over the mesh, or a number is out of range.
    """
    sizes = {"tensor": tensor, "expert": expert, "data": data}
    sizes |= {"block_size": block_size, "max_num_seqs": max_num_seqs}
    sizes |= {"max_num_batched_tokens": max_num_batched_tokens, "context": context}
    check_mesh_sizes(config, **sizes)
    if not 0 < memory_fraction <= 1:
        raise ValueError(
            "--memory_fraction: expected more than 0 and at most 1, got "
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
        step_s = predicted_step_s(model, chip, tensor, max_num_seqs, context)
    return MeshPlan(
        weight_bytes=weights,
        temporary_bytes=temporaries,
        page_bytes=blocks * block,
        available_bytes=available,
        kv_tokens=blocks * block_size,
        fits=blocks > 0,
        collectives=predicted_collectives(
            config, tensor, expert, max_num_seqs, max_num_seqs
        ),
        step_s=step_s,
    )


def main(argv: list[str]) -> None:
    """Plans the mesh of the flags and prints the plan."""
    del argv
    names = ("tensor", "expert", "data", "block_size", "max_num_seqs")
    names += ("max_num_batched_tokens", "context", "memory_fraction")
    options: dict[str, Any] = {name: getattr(FLAGS, name) for name in names}
    with runner.user_errors("plan"):
        config, chip = find_model_config(FLAGS.model), find_chip(FLAGS.chip)
        plan = plan_mesh(config, chip, **options)
    chips = options["tensor"] * options["expert"] * options["data"]
    print(f"{FLAGS.model} on {chips} x {chip.name}, on each chip:")
    for name in ("weight_bytes", "temporary_bytes", "page_bytes", "available_bytes"):
        print(f"  {name:16} {getattr(plan, name) / 1e9:9.2f} GB")
    print(f"KV tokens of a replica: {plan.kv_tokens:,}")
    for kind, each in plan.collectives.items():
        print(f"{each['count']} x {kind} of {each['bytes']:,} bytes per decode step")
    if plan.step_s is None:
        print("Does not fit: use more chips, or larger ones.")
    else:
        print(f"Predicted decode step: {1e3 * plan.step_s:.2f} ms")
    result = {"model": FLAGS.model, "chip": chip.name, **options}
    runner.print_json({**result, **dataclasses.asdict(plan)})


if __name__ == "__main__":
    runner.start(main, define_flags)
