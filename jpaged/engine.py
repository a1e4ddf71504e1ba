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

from jpaged import block_manager, forward, kv_cache, request_table, scheduler
from jpaged.block_manager import NO_BLOCK, BlockState
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.decoding.sample import SamplingRows
from jpaged.kv_cache import KVCache
from jpaged.models.decoder import Decoder
from jpaged.request_table import RequestTable, Submission
from jpaged.requests import SamplingParams
from jpaged.scheduler import NO_REQUEST

FINISH_REASONS = (None, "stop", "length", "abort")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    """Running totals of the engine, for metrics."""

    num_steps: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], tokens that the decoder computed
    num_generated: jax.Array  # i32[], tokens that decoding gave
    num_preemptions: jax.Array  # i32[]
    num_block_copies: jax.Array  # i32[], copy-on-write
    token_share: jax.Array  # f32[], sum over steps of tokens held / slots in use
    saved_share: jax.Array  # f32[], sum over steps of blocks saved / blocks unshared
    max_used_blocks: jax.Array  # i32[], most blocks in use after a step
    is_stalled: jax.Array  # bool[], a step found work and could do none: a bug


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """Everything that a step reads and writes."""

    requests: RequestTable
    rows: jax.Array  # i32[S], the sequence that each row runs, or NO_REQUEST
    blocks: BlockState
    cache: KVCache
    counters: Counters
    config: EngineConfig = dataclasses.field(metadata={"static": True})


class Result(NamedTuple):
    """A finished sequence as the engine holds it."""

    place: int
    arrival: int  # the request's number, in order of submission
    sample: int  # which of the request's samples
    prompt_token_ids: list[int]
    token_ids: list[int]  # with the token that ended it
    logprobs: np.ndarray  # f32[generated]
    ranks: np.ndarray  # i32[generated], or empty
    top_ids: np.ndarray  # i32[generated, num_logprobs]
    top_logprobs: np.ndarray  # f32[generated, num_logprobs]
    finish_reason: str | None
    first_step: int
    last_step: int
    num_preemptions: int


def init(
    model: Decoder, config: EngineConfig, *, kv_dtype: str | None = None
) -> EngineState:
    """An engine with nothing to do.

    Args:
      model: gives the cache's shape.
      config: sizes and policy.
      kv_dtype: of the pages; None takes the model's.
    """
    sizes = model.config
    return EngineState(
        requests=request_table.init_table(config),
        rows=jnp.full((config.max_num_seqs,), NO_REQUEST, jnp.int32),
        blocks=block_manager.init_state(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_seqs=config.max_num_seqs,
            max_blocks_per_seq=config.max_blocks_per_seq,
        ),
        cache=kv_cache.init_cache(
            num_layers=sizes.num_layers,
            num_blocks=config.num_blocks,
            num_kv_heads=sizes.num_kv_heads,
            block_size=config.block_size,
            head_dim=sizes.head_dim,
            dtype=sizes.dtype if kv_dtype is None else kv_dtype,
        ),
        counters=Counters(
            **{name: jnp.zeros((), kind) for name, kind in _COUNTER_TYPES.items()}
        ),
        config=config,
    )


_COUNTER_TYPES = dict(
    num_steps="int32",
    num_tokens="int32",
    num_generated="int32",
    num_preemptions="int32",
    num_block_copies="int32",
    token_share="float32",
    saved_share="float32",
    max_used_blocks="int32",
    is_stalled="bool",
)


def step(model: Decoder, state: EngineState) -> EngineState:
    """The state after one iteration: schedule, append, decode, commit.

    Jit it with `state` donated, and the pages are updated in place.
    """
    state, _ = _step(model, state, _working_memory(model, state), state.config)
    return state


def _working_memory(model: Decoder, state: EngineState) -> jax.Array:
    """Room for one step's logits, f32[S, V]."""
    return jnp.zeros((state.rows.shape[0], model.config.vocab_size), jnp.float32)


def _step(model, state, logits, config) -> tuple[EngineState, jax.Array]:
    """`step` within the limits of `config`, with the working memory handed through."""
    table = state.requests
    queue, rows, blocks, plan = scheduler.schedule(
        table.queue, state.rows, state.blocks, config
    )
    table = dataclasses.replace(table, queue=queue)
    starts = blocks.context_lens
    blocks, appended = block_manager.append(blocks, plan.num_tokens)
    # The scheduler's promise; broken, the engine stalls and writes no wrong token.
    num_tokens = jnp.where(appended.ok, plan.num_tokens, 0)
    plan = dataclasses.replace(plan, num_tokens=num_tokens)
    copies = appended.copy_dst != NO_BLOCK
    cache = when(
        jnp.any(copies),
        lambda c: kv_cache.copy_blocks(c, appended.copy_src, appended.copy_dst),
        state.cache,
    )
    batch = forward.make_batch(table, rows, starts, plan.num_tokens)
    cache, hidden = forward.hidden_states(model, cache, table, blocks, batch, config)
    logits = forward.next_logits(model, batch, hidden, logits, config)
    new = forward.sample_tokens(table, batch, logits, config)
    counters = _count(state.counters, plan, new.places, copies, blocks, config)
    table, ended = request_table.extend(table, new, state.counters.num_steps)
    rows, blocks = _release_rows(table, rows, blocks, jnp.any(ended))
    state = EngineState(table, rows, blocks, cache, counters, state.config)
    return state, logits


def has_work(state: EngineState) -> jax.Array:
    """bool[]: some sequence waits or runs, and the engine has not stalled."""
    status = state.requests.queue.status
    is_live = (status == scheduler.WAITING) | (status == scheduler.RUNNING)
    return jnp.any(is_live) & ~state.counters.is_stalled


@functools.partial(
    jax.jit,
    donate_argnames="state",
    static_argnames=("max_num_seqs", "max_num_batched_tokens"),
)
def run(
    model: Decoder,
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


def _release_rows(table, rows, blocks, is_any):
    """Rows and blocks without those of sequences that have ended."""

    def release(carry):
        rows, blocks = carry
        status = scheduler.row_values(table.queue.status, rows)
        ended = status == scheduler.FINISHED
        return jnp.where(ended, NO_REQUEST, rows), block_manager.free(blocks, ended)

    return when(is_any, release, (rows, blocks))


def _count(counters, plan, places, copies, blocks, config) -> Counters:
    num_tokens = jnp.sum(plan.num_tokens)
    num_new = jnp.sum(places < config.max_num_requests, dtype=jnp.int32)
    used = config.num_blocks - block_manager.num_free_blocks(blocks)
    unshared = jnp.sum(-(-blocks.context_lens // config.block_size))
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    # Tokens in shared blocks count once, so shared blocks are not over-full.
    shared_slots = (unshared - used) * config.block_size
    held = jnp.sum(blocks.context_lens) - shared_slots
    slots = jnp.maximum(used * config.block_size, 1)
    saved = as_float(unshared - used) / as_float(jnp.maximum(unshared, 1))
    return Counters(
        num_steps=counters.num_steps + 1,
        num_tokens=counters.num_tokens + num_tokens,
        num_generated=counters.num_generated + num_new,
        num_preemptions=counters.num_preemptions + plan.num_preempted,
        num_block_copies=counters.num_block_copies + jnp.sum(copies, dtype=jnp.int32),
        token_share=counters.token_share + as_float(held) / as_float(slots),
        saved_share=counters.saved_share + saved,
        max_used_blocks=jnp.maximum(counters.max_used_blocks, used),
        is_stalled=(num_tokens == 0) & (plan.num_preempted == 0),
    )


def check_request(
    config: EngineConfig,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
) -> None:
    """Raises ValueError where the engine could not run a request."""
    length = len(prompt)
    if length == 0:
        raise ValueError("prompt: expected at least one token, got none")
    if length >= config.max_model_len:
        raise ValueError(
            f"prompt: expected fewer than max_model_len ({config.max_model_len}) "
            f"tokens, so that one can be generated, got {length}; shorten the prompt "
            "or raise max_model_len"
        )
    if vocab_size is not None:
        wrong = [t for t in prompt if not 0 <= t < vocab_size]
        if wrong:
            raise ValueError(
                f"prompt: expected token ids from 0 to {vocab_size - 1} "
                f"(the model's vocabulary), got {wrong[0]}"
            )
    num_blocks = -(-_token_limit(config, length, params) // config.block_size)
    if num_blocks > config.num_blocks:
        raise ValueError(
            f"prompt: {length} tokens and up to {params.max_tokens} generated ones "
            f"need {num_blocks} blocks of {config.block_size}, the pool has "
            f"{config.num_blocks}; raise num_blocks, or lower max_tokens"
        )
    num_stop_ids = len(set(_stop_ids(params, eos_token_ids)))
    if num_stop_ids > config.max_num_stop_ids:
        raise ValueError(
            f"stop_token_ids: expected at most max_num_stop_ids "
            f"({config.max_num_stop_ids}) ids, EOS included, got {num_stop_ids}"
        )
    if params.n > config.max_num_requests:
        raise ValueError(
            f"n: expected at most max_num_requests ({config.max_num_requests}), "
            f"got {params.n}"
        )
    if (params.logprobs or 0) > config.num_logprobs:
        raise ValueError(
            f"logprobs: expected at most num_logprobs ({config.num_logprobs}), got "
            f"{params.logprobs}; raise num_logprobs in the config"
        )


def submit(
    state: EngineState,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    seed: int = 0,
    first_arrival: int | None = None,
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
) -> tuple[EngineState, list[list[int]]]:
    """The state with the requests waiting, and the places of each one's samples.

    Donates `state`. Host code: it checks every request before anything changes.

    Args:
      state: the engine.
      prompts: token ids.
      params: one for all, or one for each prompt.
      seed: requests without a seed of their own draw with one that is made of this
        and their arrival number.
      first_arrival: arrival number of the first prompt; None counts on.
      vocab_size: where given, token ids are checked against it.
      eos_token_ids: end a sequence unless its `ignore_eos`.

    Raises:
      ValueError: a request that could never run, or more samples than empty places.
    """
    config = state.config
    prompts = [list(map(int, prompt)) for prompt in prompts]
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(
            f"params: expected one, or one for each of {len(prompts)} prompts, "
            f"got {len(params)}"
        )
    for prompt, param in zip(prompts, params, strict=True):
        check_request(
            config,
            prompt,
            param,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
        )
    queue = state.requests.queue
    status = np.asarray(queue.status)
    empty = np.flatnonzero(status == scheduler.EMPTY)
    wanted = sum(param.n for param in params)
    if wanted > len(empty):
        raise ValueError(
            f"prompts: expected at most {len(empty)} sequences, the empty places of "
            f"the request table, got {wanted}; run, collect and release first, or "
            "raise max_num_requests"
        )
    if first_arrival is None:
        arrivals = np.asarray(queue.arrivals)[status != scheduler.EMPTY]
        first_arrival = int(arrivals.max()) + 1 if len(arrivals) else 0

    places, columns = [], []
    for number, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        mine = [int(place) for place in empty[: param.n]]
        empty = empty[param.n :]
        places.append(mine)
        arrival = first_arrival + number
        columns += [
            _entry(config, prompt, param, sample, mine, arrival, seed, eos_token_ids)
            for sample in range(param.n)
        ]
    if not columns:
        return state, places
    new = _stack(columns, config)
    return dataclasses.replace(state, requests=_place(state.requests, new)), places


_place = jax.jit(request_table.place, donate_argnums=0)


def _entry(config, prompt, params, sample, places, arrival, seed, eos) -> Submission:
    """One sequence as a Submission of numpy scalars and rows."""
    length = len(prompt)
    tokens = np.zeros((config.max_model_len,), np.int32)
    tokens[:length] = prompt
    stop_ids = np.full((config.max_num_stop_ids,), -1, np.int32)
    mine = sorted(set(_stop_ids(params, eos)))
    stop_ids[: len(mine)] = mine
    if params.seed is None:
        own = int(np.random.SeedSequence((seed, arrival)).generate_state(1)[0])
    else:
        own = params.seed
    return Submission(
        places=np.int32(places[sample]),
        leaders=np.int32(places[0]),
        arrivals=np.int32(arrival),
        priorities=np.int32(params.priority if config.policy == "priority" else 0),
        tokens=tokens,
        prompt_lens=np.int32(length),
        token_limits=np.int32(_token_limit(config, length, params)),
        stop_ids=stop_ids,
        sampling=SamplingRows(
            temperature=np.float32(params.temperature),
            top_k=np.int32(max(params.top_k, 0)),
            top_p=np.float32(params.top_p),
            min_p=np.float32(params.min_p),
            seed=np.uint32(own),
            sample=np.int32(sample),
        ),
    )


def _stack(entries: list[Submission], config: EngineConfig) -> Submission:
    """Entries side by side, padded to a power of two so that few shapes compile."""
    size = 1 << (len(entries) - 1).bit_length()
    nobody = dataclasses.replace(entries[0], places=np.int32(config.max_num_requests))
    entries = entries + [nobody] * (size - len(entries))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *entries)


def _token_limit(config: EngineConfig, length: int, params: SamplingParams) -> int:
    if params.max_tokens is None:
        return config.max_model_len
    return min(config.max_model_len, length + params.max_tokens)


def _stop_ids(params: SamplingParams, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    eos = () if params.ignore_eos else tuple(eos_token_ids)
    return (*params.stop_token_ids, *eos)


def collect(state: EngineState) -> list[Result]:
    """The finished sequences, by arrival and sample. Host code; changes nothing."""
    table = state.requests
    queue = jax.device_get(table.queue)
    finished = np.flatnonzero(queue.status == scheduler.FINISHED)
    samples = np.asarray(table.sampling.sample)
    finished = sorted(finished, key=lambda p: (queue.arrivals[p], samples[p]))
    host = jax.device_get(dataclasses.replace(table, queue=None))
    results = []
    for place in map(int, finished):
        start, end = int(queue.prompt_lens[place]), int(queue.num_tokens[place])
        results.append(
            Result(
                place=place,
                arrival=int(queue.arrivals[place]),
                sample=int(samples[place]),
                prompt_token_ids=host.tokens[place, :start].tolist(),
                token_ids=host.tokens[place, start:end].tolist(),
                logprobs=host.logprobs[place, start:end],
                ranks=host.ranks[place, start:end],
                top_ids=host.top_ids[place, start:end],
                top_logprobs=host.top_logprobs[place, start:end],
                finish_reason=FINISH_REASONS[int(host.finish_reasons[place])],
                first_step=int(host.first_steps[place]),
                last_step=int(host.last_steps[place]),
                num_preemptions=int(queue.num_preemptions[place]),
            )
        )
    return results


@functools.partial(jax.jit, donate_argnames="state")
def end(state: EngineState, places: jax.Array, reason: jax.Array) -> EngineState:
    """The state in which the marked live sequences have ended; `places` is bool[R].

    `reason` is an index of FINISH_REASONS. Their blocks are free again.
    """
    table = state.requests
    status = table.queue.status
    ends = places & ((status == scheduler.WAITING) | (status == scheduler.RUNNING))
    queue = dataclasses.replace(
        table.queue, status=jnp.where(ends, scheduler.FINISHED, status)
    )
    table = dataclasses.replace(
        table,
        queue=queue,
        finish_reasons=jnp.where(ends, reason, table.finish_reasons),
    )
    rows, blocks = _release_rows(table, state.rows, state.blocks, jnp.any(ends))
    return dataclasses.replace(state, requests=table, rows=rows, blocks=blocks)


@functools.partial(jax.jit, donate_argnames="state")
def release(state: EngineState, places: jax.Array) -> EngineState:
    """The state in which the marked finished sequences' places are empty; bool[R]."""
    queue = state.requests.queue
    gone = places & (queue.status == scheduler.FINISHED)
    # Whoever takes a leader's place next is a stranger to the samples that it leaves.
    own = jnp.arange(gone.shape[0], dtype=jnp.int32)
    queue = dataclasses.replace(
        queue,
        status=jnp.where(gone, scheduler.EMPTY, queue.status),
        leaders=jnp.where(gone[queue.leaders], own, queue.leaders),
    )
    table = dataclasses.replace(state.requests, queue=queue)
    return dataclasses.replace(state, requests=table)
