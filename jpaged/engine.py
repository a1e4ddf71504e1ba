"""Engine: its whole state is a pytree, a step is EngineState -> EngineState.

Place on the road: it is the road. `schedule`, `append`, the decoder, the sampler and
the bookkeeping follow each other in `step`; `run` is a `lax.while_loop` of steps, one
device call in which requests of any lengths come, wait, run and end.

    state = init(model, config)
    state, places = submit(state, prompts, params)
    state = run(model, state)
    results = collect(state)

Source: Kwon et al. 2023, sections 4 and 5. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged import (
    block_manager,
    engine_state,
    forward,
    groups,
    kv_cache,
    next_tokens,
    prefix_cache,
    request_limits,
    request_table,
    scheduler,
    speculation,
    submission,
    swap,
    timeline,
)
from jpaged.block_manager import NO_BLOCK, Append, BlockState
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.engine_state import Counters as Counters
from jpaged.engine_state import EngineState as EngineState
from jpaged.engine_state import Model
from jpaged.engine_state import init as init
from jpaged.forward import Batch
from jpaged.groups import Logits, States
from jpaged.kv_cache import KVCache
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.prefix_cache import PrefixCache
from jpaged.request_limits import Params
from jpaged.request_limits import check_request as check_request
from jpaged.request_table import RequestTable
from jpaged.scheduler import (
    FINISHED,
    HELD,
    NO_REQUEST,
    RUNNING,
    SWAPPED,
    WAITING,
    Hits,
    Plan,
    Queue,
)
from jpaged.speculation import DraftedModel as DraftedModel
from jpaged.submission import FINISH_REASONS as FINISH_REASONS
from jpaged.submission import Result
from jpaged.swap import Swapped


def step(model: Model, state: EngineState) -> EngineState:
    """The state after one iteration: schedule, append, decode, commit.

    Jit it with `state` donated, and the pages are updated in place.
    """
    state, _ = _step(model, state, _working_memory(model, state), state.config)
    return state


class WorkingMemory(NamedTuple):
    """What a step writes before it reads it: allocated once for a run."""

    hidden: jax.Array | None  # [T, E]
    logits: jax.Array | None  # f32[N, V]
    draft_hidden: jax.Array | None = None  # [T, E] of the small model


def _working_memory(model: Model, state: EngineState) -> WorkingMemory:
    config = state.config

    def hidden(sizes: ModelConfig) -> jax.Array:
        shape = (config.max_num_batched_tokens, sizes.hidden_size)
        return jnp.zeros(shape, sizes.dtype)

    shape = (config.max_num_logits, model.config.vocab_size)
    is_drafted = isinstance(model, DraftedModel)
    return WorkingMemory(
        hidden(model.config),
        jnp.zeros(shape, jnp.float32),
        hidden(model.draft.config) if is_drafted else None,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Begun:
    """A step up to the decoder: who runs, and where its tokens go."""

    table: RequestTable
    rows: jax.Array  # i32[S]
    blocks: BlockState  # with room for the step's tokens
    plan: Plan  # drafts not included
    num_drafts: jax.Array  # i32[S]
    appended: Append  # the copies to do first
    batch: Batch
    prefix_cache: PrefixCache | None
    host_blocks: BlockState | None
    swapped: Swapped | None  # the copies to do before those


def begin_step(state: EngineState, config: EngineConfig) -> Begun:
    """Schedule and append: all of a step that comes before the decoder.

    Lengths and tables decide it; tokens are looked at only after a preemption, for
    what sequences have in common.
    """
    table = state.requests
    host_blocks = None if state.host is None else state.host.blocks
    queue, rows, blocks, plan = scheduler.schedule(
        table.queue,
        state.rows,
        state.blocks,
        config,
        _look_up(state, config),
        host_blocks,
    )
    table = dataclasses.replace(table, queue=queue)
    is_other = rows != state.rows
    lost = jnp.where(is_other, state.rows, NO_REQUEST)
    cache, swapped = state.prefix_cache, None
    if plan.swaps is not None:
        lost = jnp.where(plan.swaps.out == NO_REQUEST, lost, NO_REQUEST)
        cache, blocks, host_blocks, swapped = _swap_blocks(
            cache, blocks, host_blocks, plan.swaps
        )
    lost = jnp.where(lost == NO_REQUEST, config.max_num_requests, lost)
    table = when(
        plan.num_preempted > 0,
        lambda table: request_table.share_again(table, lost),
        table,
    )
    if config.enable_prefix_caching:
        table, blocks, plan = when(
            plan.num_admitted > 0,
            lambda carry: _share_new(*carry, rows, is_other),
            (table, blocks, plan),
        )
    starts, num_drafts = blocks.context_lens, jnp.zeros_like(rows)
    if config.speculation is not None:
        table, num_drafts = speculation.count_drafts(
            table, rows, blocks, plan.num_tokens, config
        )
    cache, blocks, appended = _append(cache, blocks, plan.num_tokens + num_drafts)
    # The scheduler's promise; broken, the engine stalls and writes no wrong token.
    num_tokens = jnp.where(appended.ok, plan.num_tokens, 0)
    num_drafts = jnp.where(appended.ok, num_drafts, 0)
    plan = dataclasses.replace(plan, num_tokens=num_tokens)
    batch = forward.make_batch(
        table, rows, starts, num_tokens + num_drafts, num_drafts, config
    )
    return Begun(
        table=table,
        rows=rows,
        blocks=blocks,
        plan=plan,
        num_drafts=num_drafts,
        appended=appended,
        batch=batch,
        prefix_cache=cache,
        host_blocks=host_blocks,
        swapped=swapped,
    )


def _look_up(state: EngineState, config: EngineConfig) -> Hits | None:
    """What the prefix cache has of the waiting sequences, if any can be admitted."""
    if state.prefix_cache is None:
        return None
    table, queue = state.requests, state.requests.queue
    # At least one token is left to compute: its logits are what follows.
    most = jnp.where(queue.status == WAITING, queue.num_tokens - 1, 0)
    most = jnp.where(table.asked.rates_prompt | queue.has_ended, 0, most)

    def match(hits: Hits) -> Hits:
        return Hits(*prefix_cache.match(state.prefix_cache, table.tokens, most))

    none = Hits.none(config.max_num_requests, config.max_blocks_per_seq)
    return when(scheduler.can_admit(queue, state.rows), match, none)


def _share_new(table, blocks, plan, rows, is_other) -> tuple:
    is_new = is_other & (rows != NO_REQUEST)
    table, blocks, waits = request_table.share_new(table, rows, blocks, is_new)
    num_tokens = jnp.where(waits, 0, plan.num_tokens)
    return table, blocks, dataclasses.replace(plan, num_tokens=num_tokens)


def _swap_blocks(cache: PrefixCache | None, blocks, host_blocks, swaps) -> tuple:
    """The prefix cache, which makes room, and both pools after rows went or came."""
    kept = None
    if cache is not None:
        cache = when(
            jnp.any(swaps.into != NO_REQUEST),
            lambda cache: prefix_cache.evict(
                cache, blocks.ref_counts, jnp.sum(swap.demand(host_blocks, swaps.into))
            ),
            cache,
        )
        kept = prefix_cache.is_cached(cache)
    return cache, *swap.swap_blocks(blocks, host_blocks, *swaps, kept)


def _append(cache: PrefixCache | None, blocks: BlockState, num_tokens: jax.Array):
    """The prefix cache, which makes room, the blocks with it taken, and the copies."""
    if cache is None:
        return None, *block_manager.append(blocks, num_tokens)
    needed = jnp.sum(block_manager.blocks_needed(blocks, num_tokens))
    cache = prefix_cache.evict(cache, blocks.ref_counts, needed)
    before, kept = blocks, prefix_cache.is_cached(cache)
    blocks, appended = block_manager.append(blocks, num_tokens, kept)
    # A row that was cut back may go on inside a cached block that it alone has left.
    is_writer = (num_tokens > 0) & (before.context_lens % before.block_size != 0)
    is_writer &= appended.ok & (appended.copy_dst == NO_BLOCK)
    rows = jnp.arange(is_writer.shape[0], dtype=jnp.int32)
    last = before.block_tables[rows, before.context_lens // before.block_size]
    is_writer &= kept[last]
    cache = when(
        jnp.any(is_writer),
        lambda cache: prefix_cache.forget(cache, jnp.where(is_writer, last, NO_BLOCK)),
        cache,
    )
    return cache, blocks, appended


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What decoding made of a step."""

    table: RequestTable  # with the new tokens
    states: States
    parents: jax.Array  # i32[S], the row that each row continues, NO_BLOCK: none
    num_new: jax.Array  # i32[], tokens that running sequences got
    num_accepted: jax.Array  # i32[], of them drafts that stood
    is_settled: jax.Array  # bool[], every row continues itself


def end_step(
    state: EngineState,
    begun: Begun,
    decoded: Decoded,
    cache: KVCache,
    draft_cache: KVCache | None = None,
) -> EngineState:
    """The state after a step: rows move or leave, the counters count."""
    table, rows, blocks = decoded.table, begun.rows, begun.blocks
    plan, copies = begun.plan, begun.appended.copy_dst != NO_BLOCK
    num_tokens = jnp.sum(plan.num_tokens + begun.num_drafts)
    is_stalled = num_tokens + plan.num_preempted + plan.num_admitted == 0
    host, num_swap_outs, num_swapped_blocks = state.host, jnp.int32(0), jnp.int32(0)
    if host is not None and plan.swaps is not None and begun.swapped is not None:
        host = dataclasses.replace(host, blocks=begun.host_blocks)
        num_swap_outs, num_swap_ins = (
            jnp.sum(places != NO_REQUEST, dtype=jnp.int32) for places in plan.swaps
        )
        num_swapped_blocks = begun.swapped.out.num_blocks
        is_stalled = (is_stalled & (num_swap_ins == 0)) | ~begun.swapped.ok
    counters = engine_state.count(
        state.counters,
        blocks,
        is_stalled=is_stalled,
        num_tokens=num_tokens,
        num_generated=decoded.num_new,
        **engine_state.admitted_tokens(state.requests.queue, table.queue),
        num_preemptions=plan.num_preempted,
        num_swap_outs=num_swap_outs,
        num_swapped_blocks=num_swapped_blocks,
        num_block_copies=jnp.sum(copies, dtype=jnp.int32),
        num_drafts=jnp.sum(begun.num_drafts),
        num_accepted=decoded.num_accepted,
    )
    recorded = timeline.record(
        state.timeline,
        state.counters.num_steps,
        state.requests,
        begun.table,
        table,
        blocks,
        num_tokens=num_tokens,
        num_generated=decoded.num_new,
    )
    if state.config.speculation is not None:
        blocks = when(
            jnp.any(begun.num_drafts > 0),
            lambda blocks: speculation.roll_back(table, rows, blocks, begun.num_drafts),
            blocks,
        )
    if state.config.max_num_prefixes:
        table = _hold_prefixes(table, rows, blocks)
    blocks = when(
        ~decoded.is_settled,
        lambda blocks: _move(table.queue, decoded.parents, rows, blocks),
        blocks,
    )
    prefixes = begun.prefix_cache
    if prefixes is not None:
        prefixes, blocks = _enter(
            prefixes, table, rows, blocks, state.counters.num_steps
        )
    rows, blocks = when(
        ~decoded.is_settled,
        lambda carry: _let_go(table.queue, *carry),
        (rows, blocks),
    )
    return EngineState(
        requests=table,
        states=decoded.states,
        rows=rows,
        blocks=blocks,
        prefix_cache=prefixes,
        cache=cache,
        draft_cache=draft_cache,
        host=host,
        counters=counters,
        timeline=recorded,
        config=state.config,
    )


def _step(model, state, memory, config) -> tuple[EngineState, WorkingMemory]:
    """`step` within the limits of `config`, with the working memory handed through."""
    begun = begin_step(state, config)
    state = _swap_pages(state, begun.swapped)
    begun, draft_cache, memory = _draft(model, state, begun, memory, config)
    target = _target(model)
    cache, hidden = forward.hidden_states(
        target,
        _copy_blocks(state.cache, begun),
        begun.table,
        begun.blocks,
        begun.batch,
        memory.hidden,
        config,
    )
    entries = next_tokens.make_entries(begun.table, begun.batch, config)
    logits = next_tokens.next_logits(target, entries, hidden, memory.logits, config)
    table = next_tokens.rate_prompts(target, begun.table, begun.batch, hidden, config)
    begun = dataclasses.replace(begun, table=table)
    decoded = _decode(state, begun, entries, logits, config)
    state = end_step(state, begun, decoded, cache, draft_cache)
    return state, WorkingMemory(hidden, logits, memory.draft_hidden)


def _target(model: Model) -> Decoder:
    return model.target if isinstance(model, DraftedModel) else model


def _swap_pages(state: EngineState, swapped: Swapped | None) -> EngineState:
    """The state after the pages have followed the rows that left or came back."""
    host = state.host
    if host is None or swapped is None:
        return state
    out, into = swapped.out, swapped.into

    def move(cache: KVCache | None, host_cache: KVCache | None):
        if cache is None or host_cache is None:
            return None, None
        host_cache = kv_cache.swap_out(cache, host_cache, out.src, out.dst)
        return kv_cache.swap_in(cache, host_cache, into.src, into.dst), host_cache

    cache, host_cache = move(state.cache, host.cache)
    draft_cache, host_draft_cache = move(state.draft_cache, host.draft_cache)
    host = dataclasses.replace(host, cache=host_cache, draft_cache=host_draft_cache)
    return dataclasses.replace(state, cache=cache, draft_cache=draft_cache, host=host)


def _copy_blocks(cache: KVCache, begun: Begun) -> KVCache:
    """The cache after the copies that must come before this step's writes."""
    src, dst = begun.appended.copy_src, begun.appended.copy_dst
    return when(
        jnp.any(dst != NO_BLOCK),
        lambda cache: kv_cache.copy_blocks(cache, src, dst),
        cache,
    )


def _draft(
    model, state, begun, memory, config
) -> tuple[Begun, KVCache | None, WorkingMemory]:
    """The step with the small model's guesses in its table, if there is one."""
    if not isinstance(model, DraftedModel):
        return begun, state.draft_cache, memory
    table, cache, hidden, logits = speculation.draft(
        model.draft,
        _copy_blocks(state.draft_cache, begun),
        begun.table,
        begun.blocks,
        begun.batch,
        memory.draft_hidden,
        memory.logits,
        config,
    )
    memory = memory._replace(logits=logits, draft_hidden=hidden)
    return dataclasses.replace(begun, table=table), cache, memory


def _decode(state, begun, entries, logits, config) -> Decoded:
    """Tokens for all rows with logits: sampled one by one, or by their algorithms."""
    number = state.counters.num_steps
    new = next_tokens.sample_tokens(begun.table, entries, logits, config)
    if config.speculation is None:
        table, ended = request_table.extend(begun.table, new, number)
        has_ended, num_new = jnp.any(ended), entries.num_sampled
        num_accepted = jnp.zeros_like(num_new)
    else:
        table, has_ended, num_new = speculation.accept(
            begun.table, new, entries, number, config.num_drafts
        )
        num_rows = jnp.sum(
            (new.places < config.max_num_requests) & (entries.offsets == 0)
        )
        # Each row gains a token of its own, unless none was allowed.
        num_accepted = jnp.maximum(num_new - num_rows, 0)
    rated = Logits(logits, entries.places)
    table, states, parents, num_grouped = groups.decide(
        table, state.states, begun.rows, rated, number, config
    )
    return Decoded(
        table=table,
        states=states,
        parents=parents,
        num_new=num_new + num_grouped,
        num_accepted=num_accepted,
        is_settled=~has_ended & (entries.num_grouped == 0),
    )


def _enter(cache, table, rows, blocks, clock) -> tuple[PrefixCache, BlockState]:
    """The prefix cache with all blocks that are full now, and the blocks in use."""
    places = jnp.maximum(rows, 0)
    cache, blocks = prefix_cache.insert(cache, blocks, table.tokens, clock, places)
    return prefix_cache.touch(cache, blocks.ref_counts, clock), blocks


def _move(queue: Queue, parents, rows, blocks) -> BlockState:
    """The blocks after a step: rows continue their parents.

    A row that waits for a source which finishes now maps its blocks before they go.
    """
    has_finished = scheduler.row_values(queue.status, rows) == FINISHED
    sources = scheduler.row_values(queue.sources, rows, NO_REQUEST)
    shared = scheduler.row_values(queue.shared_lens, rows)
    is_source = (rows[None, :] == sources[:, None]) & has_finished[None, :]
    source_row = jnp.argmax(is_source, axis=1).astype(jnp.int32)
    inherits = jnp.any(is_source, axis=1) & (blocks.context_lens == 0) & ~has_finished
    inherits &= (shared > 0) & (blocks.context_lens[source_row] >= shared)
    blocks = block_manager.fork(blocks, jnp.where(inherits, source_row, parents))
    return block_manager.truncate(
        blocks, jnp.where(inherits, shared, blocks.context_lens)
    )


def _let_go(queue: Queue, rows, blocks) -> tuple[jax.Array, BlockState]:
    """Rows and blocks without those that have finished."""
    has_finished = scheduler.row_values(queue.status, rows) == FINISHED
    blocks = block_manager.free(blocks, has_finished)
    return jnp.where(has_finished, NO_REQUEST, rows), blocks


def _hold_prefixes(table, rows, blocks) -> RequestTable:
    """The table in which prefixes that are computed now are held."""
    is_prefix = scheduler.row_values(table.asked.is_prefix, rows, False)
    known = scheduler.row_values(table.queue.num_tokens, rows)
    is_done = is_prefix & (blocks.context_lens == known)
    at = jnp.where(is_done, rows, table.queue.status.shape[0])
    status = table.queue.status.at[at].set(HELD, mode="drop")
    queue = dataclasses.replace(table.queue, status=status)
    return dataclasses.replace(table, queue=queue)


def _is_going(status: jax.Array) -> jax.Array:
    return (status == WAITING) | (status == RUNNING) | (status == SWAPPED)


def has_work(state: EngineState) -> jax.Array:
    """bool[]: some sequence waits or runs, and the engine has not stalled."""
    status = state.requests.queue.status
    is_any = jnp.any(_is_going(status))
    return is_any & ~state.counters.is_stalled


@functools.partial(
    jax.jit,
    donate_argnames="state",
    static_argnames=("max_num_seqs", "max_num_batched_tokens"),
)
def run(
    model: Model,
    state: EngineState,
    max_steps: int | jax.Array | None = None,
    *,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
) -> EngineState:
    """The state after steps until all sequences have ended, or `max_steps` steps.

    One device call; donates `state`. `max_steps` is traced: changing it compiles
    nothing. `max_num_seqs` and `max_num_batched_tokens` replace the config's by lower
    limits, at least the rows that run already: a program for fewer sizes, compiled in
    less time.
    """
    config = dataclasses.replace(
        state.config,
        max_num_seqs=max_num_seqs or state.config.max_num_seqs,
        max_num_batched_tokens=(
            max_num_batched_tokens or state.config.max_num_batched_tokens
        ),
    )
    limit = jnp.int32(jnp.iinfo(jnp.int32).max)
    if max_steps is not None:
        limit = state.counters.num_steps + max_steps

    def goes_on(carry) -> jax.Array:
        state, _ = carry
        return has_work(state) & (state.counters.num_steps < limit)

    def advance(carry):
        return _step(model, *carry, config)

    carry = (state, _working_memory(model, state))
    state, _ = lax.while_loop(goes_on, advance, carry)
    return state


def submit(
    state: EngineState,
    prompts: Sequence[Sequence[int]],
    params: Params | Sequence[Params],
    *,
    seed: int = 0,
    first_arrival: int | None = None,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
) -> tuple[EngineState, list[list[int]]]:
    """The state with the requests waiting, and the places of each one's sequences.

    A prompt that begins as a pinned prefix does (see `pin`) maps its blocks. Donates
    `state`. Host code: it checks every request before anything changes.

    Args:
      state: the engine.
      prompts: token ids.
      params: one for all, or one for each prompt.
      seed: requests without a seed of their own draw with one that is made of this
        and their arrival number.
      first_arrival: arrival number of the first prompt; None counts on.
      vocab_size: where given, token ids are checked against it. Algorithms that hold
        sequences besides their rows need it.
      eos_token_ids: end a sequence unless its `ignore_eos`.

    Raises:
      ValueError: a request that could never run, or more sequences than empty places.
    """
    config = state.config
    prompts = [list(map(int, prompt)) for prompt in prompts]
    if isinstance(params, Params):
        params = [params] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(
            f"params: expected one, or one for each of {len(prompts)} prompts, "
            f"got {len(params)}"
        )
    num_blocks = config.num_blocks - num_pinned_blocks(state)
    for prompt, param in zip(prompts, params, strict=True):
        check_request(
            config,
            prompt,
            param,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            num_blocks=num_blocks,
        )
    automata, loads = submission.place_automata(state.requests, config, params)
    new, places = submission.encode(
        state.requests,
        config,
        prompts,
        params,
        automata,
        seed=seed,
        first_arrival=first_arrival,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
    )
    for load in loads:
        state = _load_automaton(state, *load)
    return state if new is None else _place(state, new), places


@functools.partial(jax.jit, donate_argnums=0)
def _load_automaton(state: EngineState, index, one, digest) -> EngineState:
    table = request_table.put_automaton(state.requests, index, one, digest)
    return dataclasses.replace(state, requests=table)


@functools.partial(jax.jit, donate_argnums=0)
def _place(state: EngineState, new: request_table.Submission) -> EngineState:
    return dataclasses.replace(
        state,
        requests=request_table.place(state.requests, new),
        states=groups.place_states(state.states, new),
    )


def num_pinned_blocks(state: EngineState) -> int:
    """Blocks that pinned prefixes hold, or will hold when they are computed."""
    return request_limits.num_pinned_blocks(state.requests, state.config.block_size)


def pin(
    state: EngineState, tokens: Sequence[int], *, vocab_size: int | None = None
) -> tuple[EngineState, int]:
    """The state in which a prefix will be computed once and kept, and its place.

    Requests that are submitted afterwards and begin like it map its blocks, the last
    one copy-on-write, until `unpin`. Donates `state`; host code.

    Raises:
      ValueError: too many prefixes, or so long that requests already submitted could
        never run beside it.

    Source: paper section 4.4, shared prefix.
    """
    tokens = list(map(int, tokens))
    request_limits.check_prefix(
        state.requests,
        state.config,
        tokens,
        num_pinned_blocks=num_pinned_blocks(state),
        vocab_size=vocab_size,
    )
    new, place = submission.encode_prefix(state.requests, state.config, tokens)
    return _place(state, new), place


def unpin(state: EngineState, places: Sequence[int]) -> EngineState:
    """The state without the pinned prefixes at `places`; donates `state`.

    Who maps their blocks keeps them.

    Raises:
      ValueError: there is no pinned prefix at a place.
    """
    is_prefix = np.array(state.requests.asked.is_prefix)
    is_prefix &= np.asarray(state.requests.queue.status) != scheduler.EMPTY
    mask = np.zeros(is_prefix.shape, np.bool_)
    for place in places:
        if not 0 <= place < len(mask) or not is_prefix[place]:
            raise ValueError(f"places: expected a pinned prefix's, got {place}")
        mask[place] = True
    return release(end(state, mask, np.int32(request_table.ABORT)), mask)


def reset_prefix_cache(state: EngineState) -> EngineState:
    """The state that knows of no block what it holds; rows keep theirs.

    After a change of the model's weights what was computed before must not be found.
    """
    if state.prefix_cache is None:
        return state
    config = state.config
    cache = prefix_cache.init_cache(config.num_blocks, config.block_size)
    return dataclasses.replace(state, prefix_cache=cache)


def collect(state: EngineState) -> list[Result]:
    """The finished outputs, by arrival and number. Host code; changes nothing."""
    return submission.results(state.requests)


def violations(state: EngineState) -> list[str]:
    """What is wrong with the state between steps, a sentence each; empty if sound.

    Host side: rows and places, block tables and the prefix cache, counted anew.
    """
    queue = jax.device_get(state.requests.queue)
    rows, lens = np.asarray(state.rows), np.asarray(state.blocks.context_lens)
    found = block_manager.violations(state.blocks)
    for row, (place, length) in enumerate(np.stack([rows, lens], axis=1).tolist()):
        if place == NO_REQUEST:
            if length:
                found.append(f"row {row}: is empty and holds {length} tokens")
            continue
        if queue.status[place] not in (RUNNING, HELD):
            found.append(f"row {row}: place {place} has status {queue.status[place]}")
        if length > queue.num_tokens[place]:
            found.append(
                f"row {row}: holds {length} tokens, place {place} knows "
                f"{queue.num_tokens[place]}"
            )
    for place in np.flatnonzero(queue.status == RUNNING).tolist():
        if (times := int((rows == place).sum())) != 1:
            found.append(f"place {place}: runs in {times} rows")
    if state.prefix_cache is not None:
        tokens = state.requests.tokens[np.maximum(rows, 0)]
        found += prefix_cache.violations(state.prefix_cache, state.blocks, tokens)
    return found + _host_violations(state)


def _host_violations(state: EngineState) -> list[str]:
    status, rows = np.asarray(state.requests.queue.status), np.asarray(state.rows)
    if state.host is None:
        away = np.flatnonzero(status == SWAPPED).tolist()
        return [f"place {place}: is swapped, and there is no host" for place in away]
    found = [f"host: {one}" for one in block_manager.violations(state.host.blocks)]
    known = np.asarray(state.requests.queue.num_tokens)
    for place, length in enumerate(np.asarray(state.host.blocks.context_lens).tolist()):
        if length and status[place] != SWAPPED:
            found.append(f"place {place}: has blocks on the host, is {status[place]}")
        if length > known[place]:
            found.append(
                f"place {place}: holds {length} tokens on the host, knows "
                f"{known[place]}"
            )
        if status[place] == SWAPPED and place in rows:
            found.append(f"place {place}: is swapped and has a row")
    return found


@functools.partial(jax.jit, donate_argnames="state")
def end(state: EngineState, places: jax.Array, reason: jax.Array) -> EngineState:
    """The state in which the marked live sequences have ended; `places` is bool[R].

    `reason` is an index of FINISH_REASONS. Their blocks are free again. Of a request
    of an algorithm, mark all sequences or none.
    """
    table = state.requests
    status = table.queue.status
    ends = places & (_is_going(status) | (status == HELD))
    queue = dataclasses.replace(table.queue, status=jnp.where(ends, FINISHED, status))
    table = dataclasses.replace(
        table,
        queue=queue,
        finish_reasons=jnp.where(ends, reason, table.finish_reasons),
    )
    own = jnp.arange(state.rows.shape[0], dtype=jnp.int32)
    blocks = _move(queue, own, state.rows, state.blocks)
    rows, blocks = _let_go(queue, state.rows, blocks)
    host = state.host
    if host is not None:
        host_blocks = block_manager.free(host.blocks, ends)
        host = dataclasses.replace(host, blocks=host_blocks)
    return dataclasses.replace(
        state, requests=table, rows=rows, blocks=blocks, host=host
    )


@functools.partial(jax.jit, donate_argnames="state")
def release(state: EngineState, places: jax.Array) -> EngineState:
    """The state in which the marked finished sequences' places are empty; bool[R]."""
    queue = state.requests.queue
    gone = places & (queue.status == FINISHED)
    # Whoever takes a place next is a stranger to the sequences that name it.
    own = jnp.arange(gone.shape[0], dtype=jnp.int32)
    is_stranger = gone[queue.sources]
    queue = dataclasses.replace(
        queue,
        status=jnp.where(gone, scheduler.EMPTY, queue.status),
        leaders=jnp.where(gone[queue.leaders], own, queue.leaders),
        sources=jnp.where(is_stranger, own, queue.sources),
        shared_lens=jnp.where(is_stranger, 0, queue.shared_lens),
    )
    table = dataclasses.replace(state.requests, queue=queue)
    return dataclasses.replace(state, requests=table)
