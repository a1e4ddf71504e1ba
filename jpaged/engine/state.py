"""Engine state: everything that a step reads and writes, and its counters.

Pipeline: parts of the state -> [state] -> engine.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jpaged import parallel, policies
from jpaged.attention import kv_cache
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import DEVICE_MEMORY, HOST_MEMORY, when
from jpaged.config import EngineConfig
from jpaged.engine import algorithms, events, replicas, request_table
from jpaged.engine.algorithms import States
from jpaged.engine.events import Occupancy, Timeline
from jpaged.engine.request_table import RequestTable
from jpaged.engine.speculation import DraftedModel
from jpaged.kv import block_manager, cache_groups, prefix_cache
from jpaged.kv.block_manager import BlockState
from jpaged.kv.drops import init_drops
from jpaged.kv.prefix_cache import PrefixCache
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.policies import SchedulerParams
from jpaged.scheduler import (
    BEFORE_ALL,
    NO_REQUEST,
    WAITING,
    Queue,
    is_new_request,
)

Model = Decoder | DraftedModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    """Running totals of the engine, for metrics.

    A field's name gives its dtype: `is_*` is bool, `*_share` float32, any other int32.
    """

    num_steps: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], tokens that the decoder computed
    num_generated: jax.Array  # i32[], tokens that decoding generated
    num_prompt_tokens: jax.Array  # i32[], of requests that were admitted
    num_cached_tokens: jax.Array  # i32[], those of them that were mapped, not computed
    num_preemptions: jax.Array  # i32[]
    num_swap_outs: jax.Array  # i32[], preemptions that moved blocks to the host
    num_swapped_blocks: jax.Array  # i32[], blocks copied to the host's memory
    num_block_copies: jax.Array  # i32[], copy-on-write
    num_drafts: jax.Array  # i32[], draft tokens of speculation
    num_accepted: jax.Array  # i32[], draft tokens that were accepted
    token_share: jax.Array  # f32[], sum over steps of tokens in blocks / used slots
    saved_share: jax.Array  # f32[], sum over steps of saved / unshared blocks
    max_used_blocks: jax.Array  # i32[], maximum of blocks in use after a step
    is_stalled: jax.Array  # bool[], a step had work and could do none of it: a bug
    # i32[], the most blocks of all groups that one table for all layers would have used
    # in a step with `max_used_blocks`; None if there is one table without a window
    single_table_blocks: jax.Array | None = None
    # i32[], tokens that retention has dropped, counted again after a recomputation;
    # None without a method
    num_dropped_tokens: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostPool:
    """Blocks of swapped sequences, in the host's memory."""

    blocks: BlockState  # its rows are sequence indices of the request table
    cache: KVCache | None  # None in a simulation
    draft_cache: KVCache | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """Everything that a step reads and writes."""

    requests: RequestTable
    states: States  # states of decoding algorithms, see `algorithms`
    rows: jax.Array  # i32[S], sequence index of each batch row, or NO_REQUEST
    blocks: BlockState
    prefix_cache: PrefixCache | None  # blocks that later requests may map
    cache: KVCache | None  # None in a simulation: lengths and tables decide a step
    draft_cache: KVCache | None  # pages of the draft model, if there is one
    host: HostPool | None  # None unless the config swaps
    counters: Counters
    timeline: Timeline
    scheduler_params: SchedulerParams  # to sweep over, set these and not the config
    clock: jax.Array | None  # i32[], ms, `host.set_clock`; None if no policy reads it
    config: EngineConfig = dataclasses.field(metadata={"static": True})
    # The mesh of `make_mesh`; None is one device, whichever it is. If its `data` axis
    # is larger than 1, replicas are the first axis of every array but the pages.
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})


def init(
    model: Model | None,
    config: EngineConfig,
    *,
    kv_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> EngineState:
    """Create an engine without requests.

    Args:
      model: determines the shape of the pages. None: no pages, for a simulation
        (`jpaged.simulator`).
      config: sizes and policies.
      kv_dtype: dtype of the pages: the name of a float dtype, "int8" or "fp8". None
        uses the model's dtype.
      mesh: the mesh of `jpaged.make_mesh` on which the model is placed. The pages are
        split over its devices, and `step` and `run` use all of them. If its `data` axis
        is larger than 1, each replica has the sizes of the config: replicas are the
        first axis of every array but the pages, which hold the blocks of all replicas
        side by side.

    Raises:
      ValueError: the config's speculation needs a draft model and there is none, or
        the other way round, or the two models have different vocabularies.
    """
    _check_draft(model, config)
    _check_retention(model, config, mesh)
    _check_groups(model, config)
    make = functools.partial(_make_state, model, config, kv_dtype, mesh)
    return replicas.init_on_mesh(make, mesh)


def _make_state(
    model: Model | None, config: EngineConfig, kv_dtype: str | None, mesh: Mesh | None
) -> EngineState:
    make_cache = functools.partial(_make_cache, config, kv_dtype, mesh)
    sizes = None if model is None else model.config
    draft_sizes = model.draft.config if isinstance(model, DraftedModel) else None
    host = None
    if config.swaps:
        host = HostPool(
            blocks=init_host_blocks(config),
            cache=make_cache(sizes, is_host=True),
            draft_cache=make_cache(draft_sizes, is_host=True),
        )
    known_blocks = None
    if config.enable_prefix_caching:
        known_blocks = prefix_cache.init_prefix_cache(
            config.num_blocks,
            config.block_size,
            config.uses(policies.EVICTION),
            config.group_windows,
        )
    return EngineState(
        requests=request_table.init_table(config),
        states=algorithms.init_states(config),
        rows=jnp.full((config.num_rows,), NO_REQUEST, jnp.int32),
        blocks=init_blocks(config),
        prefix_cache=known_blocks,
        cache=make_cache(sizes),
        draft_cache=make_cache(draft_sizes),
        host=host,
        counters=_init_counters(config),
        timeline=events.init_timeline(config),
        scheduler_params=jax.tree.map(jnp.asarray, config.scheduler_params),
        clock=jnp.int32(0) if config.has_attributes else None,
        config=config,
        mesh=mesh,
    )


def _make_cache(
    config: EngineConfig,
    kv_dtype: str | None,
    mesh: Mesh | None,
    sizes: ModelConfig | None,
    is_host: bool = False,
) -> KVCache | None:
    """Create the pages of all replicas for a model of `sizes`; None without a model."""
    if sizes is None:
        return None
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    num_blocks = config.num_swap_blocks if is_host else config.num_blocks
    cache = kv_cache.init_kv_cache(
        num_layers=layers_of_block(sizes, config),
        num_blocks=parallel.num_replicas(mesh) * num_blocks,
        memory=HOST_MEMORY if is_host else DEVICE_MEMORY,
        num_kv_heads=parallel.stored_kv_heads(sizes.num_kv_heads, tensor),
        block_size=config.block_size,
        head_dim=sizes.head_dim,
        implementation=config.attention,
        dtype=sizes.dtype if kv_dtype is None else kv_dtype,
        is_latent=sizes.latent is not None,
    )
    if config.retention is not None and config.retention.only_reads:
        return kv_cache.with_key_extremes(cache, sizes.head_dim)
    return cache


def init_blocks(config: EngineConfig) -> BlockState:
    """Create the block state with all blocks free."""
    return _init_blocks(config, config.num_blocks, config.num_rows)


def init_host_blocks(config: EngineConfig) -> BlockState:
    """Create the host pool's block state with all blocks free."""
    return _init_blocks(config, config.num_swap_blocks, config.max_num_requests)


def _init_blocks(config: EngineConfig, num_blocks: int, max_seqs: int) -> BlockState:
    width = config.max_blocks_per_seq
    blocks = block_manager.init_state(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_seqs=max_seqs,
        max_blocks_per_seq=width,
        windows=config.group_windows,
    )
    if (method := config.retention) is None:
        return blocks
    has_statistic = method.statistic is not None and not method.only_reads
    drops = init_drops(max_seqs, width, has_statistic)
    return dataclasses.replace(blocks, drops=drops)


def layers_of_block(model: ModelConfig, config: EngineConfig) -> int:
    """Return the layers whose keys and values a block stores: those of a group."""
    return cache_groups.groups_of_layers(
        model.windows, config.group_windows, config.max_model_len
    ).num_layers


def _check_groups(model: Model | None, config: EngineConfig) -> None:
    windows = config.group_windows
    if model is None or windows == (None,):
        return
    layers = model.config.windows
    found = cache_groups.layer_groups(layers, config.max_model_len).windows
    if windows != found:
        raise ValueError(
            f"group_windows: expected (None,), or the model's {found}, got {windows}"
        )
    if isinstance(model, DraftedModel):
        draft = model.draft.config.windows
        cache_groups.groups_of_layers(draft, windows, config.max_model_len)


def _check_draft(model: Model | None, config: EngineConfig) -> None:
    method = None if config.speculation is None else config.speculation.method
    if isinstance(model, DraftedModel) != (method == "model"):
        raise ValueError(
            "speculation: expected method 'model' together with a DraftedModel, got "
            f"method {method!r} and {type(model).__name__}"
        )
    if isinstance(model, DraftedModel):
        draft, target = model.draft.config.vocab_size, model.config.vocab_size
        if draft != target:
            raise ValueError(
                f"draft: expected the target's vocabulary of {target} tokens, got "
                f"{draft}; use a smaller model of the same family"
            )


def _check_retention(
    model: Model | None, config: EngineConfig, mesh: Mesh | None
) -> None:
    if config.retention is None or model is None:
        return
    if mesh is not None:
        raise ValueError(
            "retention: expected None on a mesh, whose devices would decide from their "
            "own heads, got a method; use one device"
        )
    if model.config.latent is not None and config.retention.statistic is not None:
        raise ValueError(
            "retention: expected a method without a statistic for a model with latent "
            f"attention, got one that reads {config.retention.statistic!r}"
        )
    windows = model.config.windows
    if any(window is not None for window in windows):
        raise ValueError(
            "retention: expected None for a model with sliding windows, which count "
            "stored tokens and not positions, got a method and layers with windows of "
            f"{sorted({one for one in windows if one is not None})} tokens"
        )


def _init_counters(config: EngineConfig) -> Counters:
    def dtype(name: str) -> str:
        if name.startswith("is_"):
            return "bool"
        return "float32" if name.endswith("_share") else "int32"

    names = {field.name for field in dataclasses.fields(Counters)}
    if not cache_groups.has_windows(config.group_windows):
        names -= {"single_table_blocks"}
    if config.retention is None:
        names -= {"num_dropped_tokens"}
    return Counters(**{name: jnp.zeros((), dtype(name)) for name in names})


def count_admitted(counters: Counters, before: Queue, after: Queue) -> Counters:
    """Add the prompt tokens of newly admitted requests, and those that were mapped.

    A request counts when it is admitted for the first time. Pinned prefixes do not
    count.

    Args:
      counters: the counters before the step.
      before: the queue before the step.
      after: the queue after scheduling.
    """
    is_first = (before.status == WAITING) & (after.status != WAITING)
    is_first &= is_new_request(before)
    is_first &= before.priorities != BEFORE_ALL
    num_prompt_tokens = jnp.sum(jnp.where(is_first, before.prompt_lens, 0))
    num_cached_tokens = jnp.sum(after.num_cached - before.num_cached)
    return dataclasses.replace(
        counters,
        num_prompt_tokens=counters.num_prompt_tokens + num_prompt_tokens,
        num_cached_tokens=counters.num_cached_tokens + num_cached_tokens,
    )


def count(
    counters: Counters,
    blocks: BlockState,
    found: Occupancy,
    *,
    is_live: jax.Array,
    is_stalled: jax.Array,
    **gained: jax.Array,
) -> Counters:
    """Update the counters after a step.

    Args:
      counters: the counters before the step.
      blocks: with the step's tokens appended.
      found: their occupancy.
      is_live: bool[], False: there was no work, and nothing is counted.
      is_stalled: bool[], the step could do nothing.
      **gained: i32[], what the step adds to the counters `num_*`, by name.
    """
    used, num_tokens, saved = found
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    slots = jnp.maximum(used * blocks.block_size, 1)
    saved_share = as_float(saved) / as_float(jnp.maximum(used + saved, 1))
    totals = {name: getattr(counters, name) + value for name, value in gained.items()}
    if counters.single_table_blocks is not None:
        before = jnp.where(
            used > counters.max_used_blocks, 0, counters.single_table_blocks
        )
        totals["single_table_blocks"] = when(
            used >= counters.max_used_blocks,
            lambda before: jnp.maximum(
                before, cache_groups.num_single_table_blocks(blocks)
            ),
            before,
        )
    after = dataclasses.replace(
        counters,
        num_steps=counters.num_steps + 1,
        token_share=counters.token_share + as_float(num_tokens) / as_float(slots),
        saved_share=counters.saved_share + saved_share,
        max_used_blocks=jnp.maximum(counters.max_used_blocks, used),
        is_stalled=is_stalled,
        **totals,
    )
    return jax.tree.map(lambda new, old: jnp.where(is_live, new, old), after, counters)
