"""Memory: the default sizes of the KV pool, of sequences and of the request table.

Pipeline: model, device -> [memory] -> EngineConfig. Host only.
"""

from __future__ import annotations

import logging
import os
import pathlib

import jax
from jax.sharding import Mesh

from jpaged import parallel
from jpaged.attention import kv_cache
from jpaged.kv import cache_groups
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.parallel import distributed
from jpaged.retention import Retention

_LOG = logging.getLogger(__name__)
# On a CPU the pool uses the same memory as other programs, so its default is small.
CPU_POOL_BYTES = 2**30
_TABLE_BYTES = 2**30  # limit of the request table's default size
_TABLE_BYTES_PER_TOKEN = 8  # token id and log-probability
_TABLE_BYTES_PER_LOGPROB = 8  # id and log-probability


def block_bytes(
    model: ModelConfig,
    block_size: int,
    kv_dtype: str,
    attention: str | None = None,
    tensor: int = 1,
    num_layers: int | None = None,
    retention: Retention | None = None,
) -> int:
    """Return the bytes of one block per device: keys and values of its layers.

    `num_layers` is that of a cache group; None: all layers. A `retention` method that
    reads extremes of keys stores them for each block.
    """
    stored = parallel.stored_kv_heads(model.num_kv_heads, tensor)
    return kv_cache.bytes_per_block(
        num_layers=model.num_layers if num_layers is None else num_layers,
        num_kv_heads=stored // tensor,
        block_size=block_size,
        head_dim=model.head_dim,
        dtype=kv_dtype,
        implementation=attention,
        is_latent=model.latent is not None,
        has_key_extremes=retention is not None and retention.only_reads,
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
    is_grouped: bool = False,
    chunk: int = 1,
    retention: Retention | None = None,
) -> tuple[int, int]:
    """Return (num_blocks, max_model_len), with defaults in place of None.

    With `is_grouped`, layers form cache groups: a given `num_blocks` counts blocks of
    all layers, and the returned one those of single groups (`kv.cache_groups`). `chunk`
    is the largest number of tokens that a row computes in one step. `retention` is the
    method of the engine.

    The default of `num_blocks` is what `max_num_seqs` sequences of `max_model_len`
    tokens can fill, limited to `memory_fraction` of the device's free memory. On a CPU
    it is also limited to 1 GiB or the model's own size, whichever is more. The default
    of `max_model_len` is the model's `default_length`, limited so that one such
    sequence fits into the pool.

    Raises:
      ValueError: max_model_len exceeds the model's maximum, or not even one block fits
        into memory.
    """
    models = [model] if draft is None else [model, draft]
    longest = min(each.config.max_length for each in models)
    if max_model_len is not None and max_model_len > longest:
        raise ValueError(
            f"max_model_len: expected at most the model's {model.config.longest_name} "
            f"({longest}), got {max_model_len}"
        )
    default = min(each.config.default_length for each in models)
    length = default if max_model_len is None else max_model_len
    windows = model.config.windows
    draft_windows = () if draft is None else draft.config.windows

    def groups_of(length: int) -> cache_groups.LayerGroups:
        return cache_groups.choose_groups(windows, length, is_grouped, draft_windows)

    groups = groups_of(length)
    given = num_blocks
    if num_blocks is not None:
        num_blocks *= len(groups.windows)
    else:
        budget = pool_budget(model, memory_fraction)
        tensor = 1 if mesh is None else mesh.shape["tensor"]
        if mesh is not None and mesh.devices.flat[0].platform == "cpu":
            budget //= mesh.size  # virtual devices share the machine's memory
        if distributed.is_shared(mesh):
            budget = distributed.min_over_processes(budget)
        sizes = (kv_dtype, attention, tensor)
        size = block_bytes(
            model.config, block_size, *sizes, groups.num_layers, retention
        )
        if draft is not None:  # pages of its own under the same block tables
            placed = cache_groups.groups_of_layers(
                draft_windows, groups.windows, length
            )
            size += block_bytes(draft.config, block_size, *sizes, placed.num_layers)
        useful = max_num_seqs * cache_groups.blocks_of_length(
            groups.windows, block_size, length, chunk
        )
        chosen = int(min(useful, budget // size))
        if chosen < len(groups.windows):
            size *= len(groups.windows)
            raise ValueError(
                f"num_blocks: expected memory for at least one block of {size} bytes, "
                f"got {budget} bytes ({memory_fraction:g} of what is free); use a "
                "smaller block_size or model, or set num_blocks"
            )
        num_blocks = chosen
    fitting = cache_groups.longest_length(groups.windows, block_size, num_blocks, chunk)
    if max_model_len is None and length > fitting:
        if groups_of(fitting) != groups:
            # No sequence is longer than the window, which is none then.
            num_blocks, length = choose_sizes(
                model,
                draft,
                block_size=block_size,
                kv_dtype=kv_dtype,
                num_blocks=given,
                memory_fraction=memory_fraction,
                max_num_seqs=max_num_seqs,
                max_model_len=None,
                attention=attention,
                mesh=mesh,
                chunk=chunk,
                retention=retention,
            )
            return num_blocks, min(length, fitting)
        _LOG.warning(
            "max_model_len: %d instead of the model's %d, because the pool has %d "
            "blocks of %d tokens; raise num_blocks for longer sequences, or set "
            "max_model_len",
            fitting,
            length,
            num_blocks,
            block_size,
        )
        length = fitting
    return num_blocks, length


def pool_budget(model: Decoder, memory_fraction: float) -> int:
    """Return the bytes that the pool may use per device of this process."""
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
    """Return the bytes of main memory that are available to programs."""
    try:
        for line in pathlib.Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # macOS does not report free memory to Python; usually half of it is free.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def max_table_size(
    max_num_seqs: int, max_model_len: int, num_logprobs: int, num_mask_words: int = 0
) -> int:
    """Return the default size of the request table, in sequences.

    It is four times `max_num_seqs`, or less where entries are large, but at least
    `max_num_seqs`.
    """
    entry_bytes = max_model_len * (
        _TABLE_BYTES_PER_TOKEN
        + _TABLE_BYTES_PER_LOGPROB * num_logprobs
        + 4 * num_mask_words
    )
    return max(max_num_seqs, min(4 * max_num_seqs, _TABLE_BYTES // entry_bytes))
