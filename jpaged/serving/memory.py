"""Memory: how many KV blocks the pool gets, and how long a sequence may become.

Place on the road: model, device -> [memory] -> EngineConfig. Host only.
"""

from __future__ import annotations

import os
import pathlib

import jax
from jax.sharding import Mesh

from jpaged import parallel
from jpaged.arithmetic import cdiv
from jpaged.attention import kv_cache
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.parallel import distributed

# On a CPU the pool's memory is the user's own, so it is kept modest.
CPU_POOL_BYTES = 2**30
_TABLE_BYTES = 2**30  # most that the request table takes without being told
_TABLE_BYTES_PER_TOKEN = 8  # token id and log-probability
_TABLE_BYTES_PER_LOGPROB = 8  # id and log-probability


def block_bytes(
    model: ModelConfig,
    block_size: int,
    kv_dtype: str,
    attention: str | None = None,
    tensor: int = 1,
) -> int:
    """Bytes of one block on a device: keys and values of its tokens in all layers."""
    stored = parallel.stored_kv_heads(model.num_kv_heads, tensor)
    return kv_cache.bytes_per_block(
        num_layers=model.num_layers,
        num_kv_heads=stored // tensor,
        block_size=block_size,
        head_dim=model.head_dim,
        dtype=kv_dtype,
        implementation=attention,
    )


def choose_sizes(
    model: Decoder,
    draft: Decoder | None = None,
    *,
    block_size: int,
    kv_dtype: str,
    num_blocks: int | None,
    memory_fraction: float,
    max_num_seqs: int,
    max_model_len: int | None,
    attention: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[int, int]:
    """(num_blocks, max_model_len), where the user left them open.

    The pool is never larger than `max_num_seqs` sequences of `max_model_len` tokens
    can fill. Up to there it takes `memory_fraction` of the device's free memory; on a
    CPU also at most 1 GiB or the model's own size, whichever is more. `max_model_len`
    is the model's longest, as far as one such sequence fits into the pool.

    Raises:
      ValueError: max_model_len exceeds the model's positions, or not even a block
        fits into memory.
    """
    models = [model] if draft is None else [model, draft]
    longest = min(each.config.max_length for each in models)
    if max_model_len is not None and max_model_len > longest:
        raise ValueError(
            f"max_model_len: expected at most the model's {model.config.longest_name} "
            f"({longest}), got {max_model_len}"
        )
    length = longest if max_model_len is None else max_model_len
    if num_blocks is None:
        budget = pool_budget(model, memory_fraction)
        # The draft model's pages lie under the same block tables.
        tensor = 1 if mesh is None else mesh.shape["tensor"]
        if mesh is not None and mesh.devices.flat[0].platform == "cpu":
            budget //= mesh.size  # virtual devices share the machine's memory
        if distributed.is_shared(mesh):
            budget = distributed.min_over_processes(budget)
        size = sum(
            block_bytes(each.config, block_size, kv_dtype, attention, tensor)
            for each in models
        )
        useful = max_num_seqs * cdiv(length, block_size)
        num_blocks = min(useful, budget // size)
        if num_blocks < 1:
            raise ValueError(
                f"num_blocks: expected memory for at least one block of {size} bytes, "
                f"got {budget} bytes ({memory_fraction:g} of what is free); take a "
                "smaller block_size or model, or give num_blocks"
            )
    if max_model_len is None:
        length = min(length, num_blocks * block_size)
    return num_blocks, length


def pool_budget(model: Decoder, memory_fraction: float) -> int:
    """Bytes that the pool may take on the model's device, one of this process."""
    leaves = jax.tree.leaves(model)
    device = leaves[0].addressable_shards[0].device
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        return int(memory_fraction * free)
    model_bytes = sum(leaf.nbytes for leaf in leaves)
    return min(
        int(memory_fraction * available_bytes()), max(CPU_POOL_BYTES, model_bytes)
    )


def available_bytes() -> int:
    """Bytes of main memory that programs can still have."""
    try:
        for line in pathlib.Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # macOS does not say in Python what is free; half of all memory usually is.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def max_places(max_num_seqs: int, max_model_len: int, num_logprobs: int) -> int:
    """Places of the request table: four times the rows, fewer where they are large."""
    place_bytes = max_model_len * (
        _TABLE_BYTES_PER_TOKEN + _TABLE_BYTES_PER_LOGPROB * num_logprobs
    )
    return max(max_num_seqs, min(4 * max_num_seqs, _TABLE_BYTES // place_bytes))
