"""Engine state: everything that a step reads and writes, and what it counts.

Place on the road: the parts of the road -> [engine_state] -> engine.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jpaged import parallel
from jpaged.attention import kv_cache
from jpaged.attention.kv_cache import KVCache
from jpaged.compat import DEVICE_MEMORY, HOST_MEMORY
from jpaged.config import EngineConfig
from jpaged.engine import algorithms, events, request_table
from jpaged.engine import replicas as sharded
from jpaged.engine.algorithms import States
from jpaged.engine.events import Timeline
from jpaged.engine.request_table import RequestTable
from jpaged.engine.speculation import DraftedModel
from jpaged.kv import block_manager, prefix_cache
from jpaged.kv.block_manager import BlockState
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
    """Running totals of the engine, for metrics."""

    num_steps: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], tokens that the decoder computed
    num_generated: jax.Array  # i32[], tokens that decoding gave
    num_prompt_tokens: jax.Array  # i32[], of requests that were admitted
    num_cached_tokens: jax.Array  # i32[], of them those that were mapped from others
    num_preemptions: jax.Array  # i32[]
    num_swap_outs: jax.Array  # i32[], preemptions of sequences that kept their blocks
    num_swapped_blocks: jax.Array  # i32[], copied to the host's memory
    num_block_copies: jax.Array  # i32[], copy-on-write
    num_drafts: jax.Array  # i32[], tokens that speculation guessed
    num_accepted: jax.Array  # i32[], guesses that stood
    token_share: jax.Array  # f32[], sum over steps of tokens held / slots in use
    saved_share: jax.Array  # f32[], sum over steps of blocks saved / blocks unshared
    max_used_blocks: jax.Array  # i32[], most blocks in use after a step
    is_stalled: jax.Array  # bool[], a step found work and could do none: a bug


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostPool:
    """What preempted sequences keep in the host's memory."""

    blocks: BlockState  # its rows are the places of the request table
    cache: KVCache | None  # None in a simulation
    draft_cache: KVCache | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """Everything that a step reads and writes."""

    requests: RequestTable
    states: States  # of decoding algorithms, see `groups`
    rows: jax.Array  # i32[S], the sequence that each row runs, or NO_REQUEST
    blocks: BlockState
    prefix_cache: PrefixCache | None  # of blocks that may be wanted again
    cache: KVCache | None  # None in a simulation: lengths and tables decide a step
    draft_cache: KVCache | None  # of the small model that guesses, if there is one
    host: HostPool | None  # where the config swaps
    counters: Counters
    timeline: Timeline
    scheduler_params: (
        SchedulerParams  # of the scheduler; set them and not the config to sweep
    )
    config: EngineConfig = dataclasses.field(metadata={"static": True})
    # The devices that share it, of `make_mesh`; None is one device, whichever. Where
    # its `data` is more than one, replicas are the first axis of all but the pages.
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})


def init(
    model: Model | None,
    config: EngineConfig,
    *,
    kv_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> EngineState:
    """An engine with nothing to do.

    Args:
      model: gives the cache's shape; None: no pages, for a simulation (`simulator`).
      config: sizes and policy.
      kv_dtype: of the pages, a float's name, "int8" or "fp8"; None takes the model's.
      mesh: of `jpaged.make_mesh`, on which the model lies: pages are split over its
        devices, and `step` and `run` run on all of them. With `data` of more than one,
        each replica has what the config says: replicas are the first axis of every
        array but the pages, where their blocks lie side by side.

    Raises:
      ValueError: the config's speculation needs a draft model and there is none, or
        the other way round; or the two have different vocabularies.
    """
    _check_draft(model, config)
    make = functools.partial(_make, model, config, kv_dtype, mesh)
    return sharded.made(make, mesh)


def _make(
    model: Model | None, config: EngineConfig, kv_dtype: str | None, mesh: Mesh | None
) -> EngineState:
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    replicas = parallel.num_replicas(mesh)

    def cache(sizes: ModelConfig | None, is_host: bool = False) -> KVCache | None:
        if sizes is None:
            return None
        return kv_cache.init_kv_cache(
            num_layers=sizes.num_layers,
            num_blocks=replicas
            * (config.num_swap_blocks if is_host else config.num_blocks),
            memory=HOST_MEMORY if is_host else DEVICE_MEMORY,
            num_kv_heads=parallel.stored_kv_heads(sizes.num_kv_heads, tensor),
            block_size=config.block_size,
            head_dim=sizes.head_dim,
            implementation=config.attention,
            dtype=sizes.dtype if kv_dtype is None else kv_dtype,
        )

    sizes = None if model is None else model.config
    draft_sizes = model.draft.config if isinstance(model, DraftedModel) else None
    host = None
    if config.swaps:
        host = HostPool(
            blocks=init_host_blocks(config),
            cache=cache(sizes, is_host=True),
            draft_cache=cache(draft_sizes, is_host=True),
        )
    return EngineState(
        requests=request_table.init_table(config),
        states=algorithms.init_states(config),
        rows=jnp.full((config.num_rows,), NO_REQUEST, jnp.int32),
        blocks=block_manager.init_state(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_seqs=config.num_rows,
            max_blocks_per_seq=config.max_blocks_per_seq,
        ),
        prefix_cache=(
            prefix_cache.init_cache(config.num_blocks, config.block_size)
            if config.enable_prefix_caching
            else None
        ),
        cache=cache(sizes),
        draft_cache=cache(draft_sizes),
        host=host,
        counters=Counters(
            **{name: jnp.zeros((), kind) for name, kind in _COUNTER_TYPES.items()}
        ),
        timeline=events.init(config),
        scheduler_params=config.scheduler_params,
        config=config,
        mesh=mesh,
    )


def init_host_blocks(config: EngineConfig) -> BlockState:
    """The host's blocks, all free; of a config that swaps."""
    return block_manager.init_state(
        num_blocks=config.num_swap_blocks,
        block_size=config.block_size,
        max_seqs=config.max_num_requests,
        max_blocks_per_seq=config.max_blocks_per_seq,
    )


def _check_draft(model: Model | None, config: EngineConfig) -> None:
    method = None if config.speculation is None else config.speculation.method
    if isinstance(model, DraftedModel) != (method == "model"):
        raise ValueError(
            "speculation: method 'model' and a DraftedModel go together; got method "
            f"{method!r} and {type(model).__name__}"
        )
    if isinstance(model, DraftedModel):
        sizes = (model.draft.config.vocab_size, model.config.vocab_size)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"draft: expected the target's vocabulary of {sizes[1]} tokens, got "
                f"{sizes[0]}; take a smaller model of the same family"
            )


_COUNTER_TYPES = dict(
    num_steps="int32",
    num_tokens="int32",
    num_generated="int32",
    num_prompt_tokens="int32",
    num_cached_tokens="int32",
    num_preemptions="int32",
    num_swap_outs="int32",
    num_swapped_blocks="int32",
    num_block_copies="int32",
    num_drafts="int32",
    num_accepted="int32",
    token_share="float32",
    saved_share="float32",
    max_used_blocks="int32",
    is_stalled="bool",
)


def admitted_tokens(before: Queue, after: Queue) -> dict[str, jax.Array]:
    """What a step adds to `num_prompt_tokens` and `num_cached_tokens`.

    Requests count when they are admitted for the first time; pinned prefixes do not.
    """
    seq_index = jnp.arange(before.status.shape[0], dtype=jnp.int32)
    is_first = (before.status == WAITING) & (after.status != WAITING)
    is_first &= is_new_request(before, seq_index)
    is_first &= before.priorities != BEFORE_ALL
    return dict(
        num_prompt_tokens=jnp.sum(jnp.where(is_first, before.prompt_lens, 0)),
        num_cached_tokens=jnp.sum(after.num_cached - before.num_cached),
    )


def count(
    counters: Counters, blocks: BlockState, is_stalled: jax.Array, **gained: jax.Array
) -> Counters:
    """The counters after a step.

    Args:
      counters: before it.
      blocks: with the step's tokens.
      is_stalled: bool[], the step found nothing that it could do.
      gained: i32[] of the counters `num_*` by name, what the step added.
    """
    used, held, saved = events.occupancy(blocks)
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    slots = jnp.maximum(used * blocks.block_size, 1)
    saved_share = as_float(saved) / as_float(jnp.maximum(used + saved, 1))
    totals = {name: getattr(counters, name) + value for name, value in gained.items()}
    return dataclasses.replace(
        counters,
        num_steps=counters.num_steps + 1,
        token_share=counters.token_share + as_float(held) / as_float(slots),
        saved_share=counters.saved_share + saved_share,
        max_used_blocks=jnp.maximum(counters.max_used_blocks, used),
        is_stalled=is_stalled,
        **totals,
    )
