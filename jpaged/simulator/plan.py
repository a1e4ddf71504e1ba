"""Plan: whether a model fits on a mesh of chips, before you rent the chips.

Pipeline: model config, chip, mesh -> [plan] -> bytes on a chip, tokens, step time. Host
only: sizes, no weights.

    plan = plan_mesh(random_config("llama-3-70b"), find_chip("h100"), tensor=4)
    plan.fits, plan.kv_tokens

Weights are exact: the shapes of the decoder, divided by `jpaged.parallel.RULES`.
Temporaries are an estimate of the arrays that exist at the same time. Collectives are
those of Megatron-LM, https://arxiv.org/abs/1909.08053. Times are predicted by the
roofline, not measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from jpaged import parallel
from jpaged.arithmetic import cdiv
from jpaged.attention import kv_cache
from jpaged.kv import cache_groups
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.models.loading.placing import split_sizes
from jpaged.simulator.costs.chips import Chip
from jpaged.simulator.costs.load import StepLoad
from jpaged.simulator.costs.roofline import Roofline
from jpaged.simulator.costs.served_models import ServedModel


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """A model on a mesh: bytes on one chip, tokens of one replica."""

    weight_bytes: int
    temporary_bytes: int  # estimated
    page_bytes: int  # the remaining memory, in whole blocks
    available_bytes: int  # `memory_fraction` of the chip's memory
    kv_tokens: int  # tokens whose keys and values fit, in whole blocks; of a model with
    # sliding windows, those of rows of `context` tokens
    fits: bool  # whether at least one block fits beside weights and temporaries
    collectives: Mapping[str, Mapping[str, int]]  # kind -> count, bytes of each result
    step_s: float | None  # predicted decode step of max_num_seqs rows; None: no fit


def weight_bytes(config: ModelConfig, tensor: int = 1, expert: int = 1) -> int:
    """Return the bytes of the parameters on one chip, by `parallel.RULES`."""
    mesh = AbstractMesh(
        (1, expert, tensor),
        parallel.AXES,
        axis_types=(AxisType.Auto,) * len(parallel.AXES),
    )
    total = 0
    for path, leaf in _parameters(config):
        sharding = parallel.param_sharding(mesh, path, leaf.shape, config.num_kv_heads)
        total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


@functools.lru_cache(maxsize=4)
def _parameters(config: ModelConfig) -> list[tuple[list[str], jax.ShapeDtypeStruct]]:
    """Return the path and shape of each parameter; seconds for a model of 80 layers."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return [([step.key for step in path], leaf) for path, leaf in leaves]


def temporary_bytes(config: ModelConfig, tensor: int, rows: int, tokens: int) -> int:
    """Estimate the bytes of a step's arrays that exist at the same time on one chip.

    In a layer these are the residual, the normalised input and both operands of the
    addition, which are replicated; and queries, keys, values, the output of attention
    and the MLP's gate and up products, which are divided over `tensor`. In the sampler
    they are logits, sorted values and their order: four bytes each, replicated.

    Args:
      config: sizes of the model.
      tensor: chips that share each matrix.
      rows: batch rows of the step.
      tokens: tokens of the step.
    """
    size = jnp.dtype(config.dtype).itemsize
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    inner = config.intermediate_size
    if config.num_experts:
        inner = max(inner, config.expert_size * config.num_experts_per_token)
        inner = max(inner, config.shared_expert_size)
    divided = heads * config.head_dim + 2 * inner
    layer = tokens * size * (4 * config.hidden_size + cdiv(divided, tensor))
    return max(layer, 3 * 4 * rows * config.vocab_size)


def predicted_collectives(
    config: ModelConfig, tensor: int, expert: int, rows: int, tokens: int
) -> dict[str, dict[str, int]]:
    """Return the collectives of a step: kind -> their count and each result's bytes.

    There are two all-reduces per layer and one for the embedding, and an all-gather of
    the logits if `tensor` divides the vocabulary.
    """
    size = jnp.dtype(config.dtype).itemsize
    has_split_words = tensor > 1 and config.vocab_size % tensor == 0
    sums = has_split_words * 1
    if tensor > 1:
        sums += 2 * config.num_layers
        if config.shared_expert_size:
            sums += sum(config.has_experts(layer) for layer in range(config.num_layers))
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
    """Check that sizes are positive and that the model divides over the mesh.

    Args:
      config: sizes of the model.
      **sizes: sizes by argument, "tensor" and "expert" among them.

    Raises:
      ValueError: a size is below 1, or an axis does not divide what it shares.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    tensor, expert = sizes["tensor"], sizes["expert"]
    split = split_sizes(config)
    for name, axis, size, of in (
        *(("tensor", tensor, size, name) for name, size in split.items()),
        ("expert", expert, config.num_experts or 1, "num_experts"),
    ):
        if size % axis:
            fitting = [n for n in range(1, axis) if size % n == 0]
            raise ValueError(
                f"{name}: expected a divisor of {of}={size}, such as "
                f"{' or '.join(map(str, fitting))}, got {axis}"
            )


def predicted_step_s(
    model: ServedModel, chip: Chip, tensor: int, rows: int, context: int
) -> float:
    """Predict the seconds of a decode step by the simulator's roofline.

    Args:
      model: sizes of the model.
      chip: the kind of chip.
      tensor: chips that share each matrix.
      rows: batch rows of the step.
      context: tokens of each row.
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


def _num_tokens(
    windows: cache_groups.Windows,
    blocks: int,
    block_size: int,
    context: int,
    chunk: int,
) -> int:
    """Return the tokens of all rows whose keys and values fit into the blocks."""
    if not cache_groups.has_windows(windows):
        return blocks * block_size
    each = cache_groups.blocks_of_length(windows, block_size, context, chunk)
    return blocks * cdiv(context, block_size) * block_size // each


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
    has_key_extremes: bool = False,
) -> MeshPlan:
    """Plan the memory of each chip of a mesh.

    Args:
      config: sizes of the model.
      chip: the kind of chip.
      tensor: chips that share each matrix.
      expert: chips that share the experts.
      data: replicas of the model.
      block_size: tokens per block.
      max_num_seqs: batch rows of a step.
      max_num_batched_tokens: token budget of a step.
      context: tokens of each row in the predicted step.
      memory_fraction: share of a chip's memory to use.
      has_key_extremes: blocks also have the extremes of their keys, for retention.

    Raises:
      ValueError: the model does not divide over the mesh, or a number is out of range.
    """
    sizes = {"tensor": tensor, "expert": expert, "data": data}
    sizes |= {"block_size": block_size, "max_num_seqs": max_num_seqs}
    sizes |= {"max_num_batched_tokens": max_num_batched_tokens, "context": context}
    check_mesh_sizes(config, **sizes)
    if not 0 < memory_fraction <= 1:
        raise ValueError(
            "memory_fraction: expected more than 0 and at most 1, got "
            f"{memory_fraction:g}"
        )
    model = ServedModel.of("model", config)
    weights = weight_bytes(config, tensor, expert)
    temporaries = temporary_bytes(config, tensor, max_num_seqs, max_num_batched_tokens)
    available = int(memory_fraction * chip.memory_bytes)
    groups = cache_groups.layer_groups(config.windows, config.default_length)
    block = kv_cache.bytes_per_block(
        num_layers=groups.num_layers,
        num_kv_heads=parallel.stored_kv_heads(config.num_kv_heads, tensor) // tensor,
        block_size=block_size,
        head_dim=config.head_dim,
        dtype=config.dtype,
        is_latent=config.latent is not None,
        has_key_extremes=has_key_extremes,
    )
    blocks = max(0, (available - weights - temporaries) // block)
    step_s = None
    if blocks:
        step_s = predicted_step_s(model, chip, tensor, max_num_seqs, context)
    return MeshPlan(
        weight_bytes=weights,
        temporary_bytes=temporaries,
        page_bytes=blocks * block,
        available_bytes=available,
        kv_tokens=_num_tokens(
            groups.windows, blocks, block_size, context, max_num_batched_tokens
        ),
        fits=blocks > 0,
        collectives=predicted_collectives(
            config, tensor, expert, max_num_seqs, max_num_seqs
        ),
        step_s=step_s,
    )
