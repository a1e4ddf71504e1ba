"""Engine system: the engine itself, with a cost model in the decoder's place.

Place on the road: requests -> [scheduler, block manager, prefix cache] -> load.

Scheduler, block manager, prefix cache, preemption and the request table are those of
`jpaged.engine`, called and not written again; what differs is that outputs have the
lengths that the workload says, and that tokens are numbers made from who they belong
to. Beams are the engine's beam search on made-up log-probabilities (`_made_logits`).

Letters: R places of the request table, S rows, B sequences of one request.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import engine, scheduler
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.decoding import constraints
from jpaged.engine import (
    algorithms,
    events,
    iteration,
    request_table,
    submission,
)
from jpaged.engine import (
    state as engine_state,
)
from jpaged.engine.iteration import SampledStep, ScheduledStep
from jpaged.engine.request_table import (
    NO_ALGORITHM,
    NewTokens,
    RequestTable,
    Submission,
)
from jpaged.engine.state import EngineState
from jpaged.kv.block_manager import NO_BLOCK
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.scheduler import EMPTY, FINISHED, NO_REQUEST, RUNNING
from jpaged.simulator.costs.load import Load
from jpaged.simulator.systems.base import NOBODY, Progress, Request, System, Usage
from jpaged.simulator.workloads.workload import Workload

_VOCABULARY = 64  # tokens that beams choose among


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ServedState:
    """The engine's state, and whose its places are."""

    engine: EngineState
    requests: jax.Array  # i32[R], number in the workload, NOBODY where empty


@dataclasses.dataclass(frozen=True)
class EngineSystem:
    """The engine under `config`, as a `System`.

    Attributes:
      config: as for `jpaged.engine`; with room for beams if the workload has any.
      kinds: the pairs (num_samples, beam_width) that requests may have; a beam_width of
        0 is sampling.
      content_size: prompt tokens that an id of `Request.content` stands for.
      beam_concentration: exponent of the next token's Zipf distribution, from which
        beams choose: the higher, the more often all beams follow the best one.

    Raises:
      ValueError: the config speculates, or a kind does not fit into it.
    """

    config: EngineConfig
    kinds: tuple[tuple[int, int], ...] = ((1, 0),)
    content_size: int = 1
    beam_concentration: float = 2.0

    def __post_init__(self) -> None:
        if self.config.speculation is not None:
            raise ValueError(
                "config.speculation: expected None, for no cost model knows which "
                f"guesses stand, got {self.config.speculation}"
            )
        if self.config.max_num_prefixes:
            raise ValueError(
                "config.max_num_prefixes: expected 0, for workloads pin nothing, got "
                f"{self.config.max_num_prefixes}; use enable_prefix_caching"
            )
        _templates(self.config, self.kinds)

    @property
    def num_slots(self) -> int:
        """Tokens whose keys and values fit into the pool."""
        return self.config.num_blocks * self.config.block_size

    def program(self, others: Sequence[System]) -> EngineSystem:
        """The engine under a config with room for all of theirs; see `System`.

        They may differ in the policy's parameters, the watermark, and the limits of
        rows, of tokens in a step and of a prompt's chunk.
        """
        configs = [
            one.config for one in (self, *others) if isinstance(one, EngineSystem)
        ]
        most = {
            name: max(getattr(config, name) for config in configs)
            for name in ("max_num_seqs", "max_num_batched_tokens")
        }
        program = self._under(most)
        for other in others:
            if not isinstance(other, EngineSystem) or other._under(most) != program:
                raise ValueError(
                    "systems: expected engines that differ in policy_parameters, "
                    "watermark, max_num_seqs, max_num_batched_tokens and "
                    f"max_prompt_chunk only, got {self!r:.1000} and {other!r:.1000}"
                )
        return program

    def _under(self, limits: dict[str, int]) -> EngineSystem:
        none = (0.0,) * len(self.config.policy_parameters)
        config = dataclasses.replace(
            self.config,
            watermark=0.0,
            policy_parameters=none,
            max_prompt_chunk=None,
            **limits,
        )
        return dataclasses.replace(self, config=config)

    def enter(self, state: ServedState) -> ServedState:
        """The state with the scheduler's numbers of this config; see `System`."""
        inner = dataclasses.replace(
            state.engine, scheduler_params=self.config.scheduler_params
        )
        return dataclasses.replace(state, engine=inner)

    def check(self, workload: Workload) -> None:
        """Raises ValueError for a request that the engine would refuse; see `System`.

        The longest of each kind decides, for longer ones need more.
        """
        pairs = np.stack([workload.num_samples, workload.beam_widths], axis=1)
        unknown = np.flatnonzero(
            [tuple(pair) not in self.kinds for pair in pairs.tolist()]
        )
        if unknown.size:
            index = int(unknown[0])
            raise ValueError(
                f"workload: expected requests of the kinds (num_samples, beam_width) "
                f"{list(self.kinds)}, got {tuple(pairs[index].tolist())} at index "
                f"{index}; give EngineSystem its kinds"
            )
        totals = workload.prompt_lens.astype(np.int64) + workload.output_lens
        for kind in self.kinds:
            mine = np.flatnonzero(np.all(pairs == kind, axis=1))
            if not mine.size:
                continue
            index = int(mine[np.argmax(totals[mine])])
            prompt_len = int(workload.prompt_lens[index])
            params = _params(kind, int(workload.output_lens[index]))
            limit = self.config.max_model_len
            try:
                if totals[index] > limit:
                    raise ValueError(
                        f"expected at most max_model_len ({limit}) tokens, prompt and "
                        f"output, got {totals[index]}"
                    )
                engine.check_request(self.config, range(prompt_len), params)
            except ValueError as error:
                raise ValueError(
                    f"workload: the request at index {index} could never run: {error}"
                ) from None
        if workload.contents is not None and workload.content_size != self.content_size:
            raise ValueError(
                f"workload.content_size: expected {self.content_size}, as the "
                f"system's, got {workload.content_size}"
            )

    def counters(self, state: ServedState) -> dict[str, int]:
        """The engine's own; see `jpaged.engine.Counters`."""
        found = dataclasses.asdict(state.engine.counters)
        return {
            name: int(value) for name, value in found.items() if name.startswith("num_")
        }

    def init(self) -> ServedState:
        """An engine with nothing to do, and without pages."""
        seq_indices = self.config.max_num_requests
        state = engine_state.init(None, self.config)
        return ServedState(state, jnp.full((seq_indices,), NOBODY, jnp.int32))

    def submit(
        self, state: ServedState, request: Request
    ) -> tuple[ServedState, jax.Array]:
        """The state with the request's sequences waiting; see `System`."""
        templates = _templates(self.config, self.kinds)
        kinds = jnp.array(self.kinds, jnp.int32)
        params = jnp.stack([request.num_samples, request.beam_width])
        kind = jnp.argmax(jnp.all(kinds == params[None, :], axis=1))
        template = jax.tree.map(lambda leaf: jnp.asarray(leaf)[kind], templates)
        (size,) = template.seq_indices.shape
        table_size = self.config.max_num_requests
        is_used = template.seq_indices < table_size
        is_empty = state.engine.requests.queue.status == EMPTY
        (empty,) = jnp.nonzero(is_empty, size=size, fill_value=table_size)
        ok = jnp.sum(is_empty) >= jnp.sum(is_used)
        seq_indices = jnp.where(is_used & ok, empty.astype(jnp.int32), table_size)

        def insert(state: ServedState) -> ServedState:
            new = self._submission(template, request, seq_indices)
            table = request_table.insert_sequences(state.engine.requests, new)
            inner = dataclasses.replace(
                state.engine,
                requests=table,
                states=algorithms.insert_states(state.engine.states, new),
            )
            requests = state.requests.at[seq_indices].set(request.number, mode="drop")
            return ServedState(inner, requests)

        return when(ok, insert, state), ok

    def _submission(self, template, request, seq_indices) -> Submission:
        """The template's sequences at `seq_indices`, with the request's lengths."""
        tokens = _prompt_tokens(request, self.config.max_model_len, self.content_size)
        shared = jnp.where(template.queue["shared_lens"] > 0, request.prompt_len - 1, 0)
        own = jnp.arange(seq_indices.shape[0], dtype=jnp.int32)
        sources = jnp.where(shared > 0, template.queue["sources"], own)
        columns = template.queue | dict(
            arrivals=jnp.full_like(seq_indices, request.number),
            prompt_lens=jnp.full_like(seq_indices, request.prompt_len),
            num_tokens=jnp.full_like(seq_indices, request.prompt_len),
            leaders=seq_indices[template.queue["leaders"]],
            sources=seq_indices[sources],
            shared_lens=shared,
        )
        limit = request.prompt_len + request.output_len
        sampling = dataclasses.replace(
            template.params.sampling,
            seed=jnp.full_like(template.params.sampling.seed, request.number),
        )
        params = dataclasses.replace(
            template.params,
            token_limits=jnp.full_like(seq_indices, limit),
            sampling=sampling,
        )
        states = template.states
        if self.config.max_beam_width:
            most = jnp.full_like(states[0].max_tokens, request.output_len)
            states = (dataclasses.replace(states[0], max_tokens=most), *states[1:])
        return Submission(
            seq_indices=seq_indices,
            queue=columns,
            tokens=jnp.broadcast_to(tokens, (seq_indices.shape[0], *tokens.shape)),
            params=params,
            states=states,
        )

    def has_work(self, state: ServedState) -> jax.Array:
        """bool[]: a sequence waits or runs, and the engine has not stalled."""
        return engine.has_work(state.engine)

    def begin(
        self, state: ServedState
    ) -> tuple[tuple[ServedState, ScheduledStep], Load, Usage]:
        """The engine's step up to the decoder; see `System`."""
        scheduled = iteration.begin_step(state.engine, self.config)
        return (state, scheduled), self._load(scheduled), self._usage(scheduled)

    def _load(self, scheduled: ScheduledStep) -> Load:
        size = self.config.block_size
        num_copies = jnp.sum(scheduled.appended.copy_dst != NO_BLOCK, dtype=jnp.int32)
        num_moved = jnp.int32(0)
        if scheduled.swapped is not None:
            num_moved = (
                scheduled.swapped.out.num_blocks + scheduled.swapped.into.num_blocks
            )
        is_last = _computes_last(scheduled)
        return Load(
            query_lens=scheduled.plan.num_tokens,
            context_lens=scheduled.blocks.context_lens,
            num_logits=jnp.sum(is_last, dtype=jnp.int32),
            num_copied_tokens=num_copies * size,
            num_swapped_tokens=num_moved * size,
            num_swap_copies=num_moved,
        )

    def _usage(self, scheduled: ScheduledStep) -> Usage:
        size, queue = self.config.block_size, scheduled.table.queue
        used, held, saved = events.occupancy(scheduled.blocks)
        seq_indices = jnp.arange(queue.status.shape[0], dtype=jnp.int32)
        is_leader = queue.leaders == seq_indices
        # What is left of a row's last block it will fill, or end before.
        limits = scheduler.row_values(
            scheduled.table.params.token_limits, scheduled.rows
        )
        lens = scheduled.blocks.context_lens
        room = jnp.where(lens > 0, -lens % size, 0)
        # The last token is never stored: nothing follows it.
        reservation = jnp.sum(jnp.minimum(room, jnp.maximum(limits - 1 - lens, 0)))
        spare = used * size - held
        reservation = jnp.minimum(reservation, spare)
        return Usage(
            num_requests=jnp.sum((queue.status == RUNNING) & is_leader),
            num_waiting=jnp.sum((queue.status == scheduler.WAITING) & is_leader),
            token_states=held,
            reservation=reservation,
            internal=spare - reservation,
            external=jnp.int32(0),
            free=self.num_slots - used * size,
            num_blocks=used,
            num_saved_blocks=saved,
        )

    def end(
        self, scheduled: tuple[ServedState, ScheduledStep]
    ) -> tuple[ServedState, Progress]:
        """The engine's state with the step's tokens; see `System`."""
        before, inner = scheduled
        step = before.engine.counters.num_steps
        sampled = self._decode(before.engine, inner)
        state = iteration.end_step(before.engine, inner, sampled)
        queue = state.requests.queue
        has_first = state.requests.first_steps == step
        has_first &= queue.leaders == jnp.arange(queue.leaders.shape[0])
        progress = Progress(
            requests=before.requests,
            has_first=has_first,
            has_ended=jnp.zeros_like(has_first),
        )

        def release(carry):
            served, progress = carry
            has_ended, gone = _ended_requests(served.engine.requests)
            requests = jnp.where(gone, NOBODY, served.requests)
            inner = engine.release(served.engine, gone)
            return ServedState(inner, requests), progress._replace(has_ended=has_ended)

        return when(
            jnp.any(queue.status == FINISHED),
            release,
            (ServedState(state, before.requests), progress),
        )

    def _decode(self, state: EngineState, scheduled: ScheduledStep) -> SampledStep:
        """Tokens for all rows that have computed their last known one."""
        table, table_size = scheduled.table, self.config.max_num_requests
        number = state.counters.num_steps
        seq_indices = jnp.where(_computes_last(scheduled), scheduled.rows, table_size)
        known = jnp.minimum(seq_indices, table_size - 1)
        is_grouped = table.params.algorithms[known] != NO_ALGORITHM
        sampled = jnp.where(is_grouped, table_size, seq_indices)
        position = table.queue.num_tokens[known]
        sampling = jax.tree.map(lambda leaf: leaf[known], table.params.sampling)
        new = NewTokens.zeros(sampled, self.config.num_logprobs)
        new = dataclasses.replace(
            new,
            tokens=_mix(_mix(sampling.seed, sampling.sample + 1), position),
        )
        table, ended = request_table.extend(table, new, number)
        states, num_grouped = state.states, jnp.int32(0)
        parents = jnp.arange(scheduled.rows.shape[0], dtype=jnp.int32)
        grouped = jnp.where(is_grouped, seq_indices, table_size)
        if algorithms.config_algorithms(self.config):
            logits = self._made_logits(table, grouped)
            table, states, parents, num_grouped = algorithms.step_algorithms(
                table,
                states,
                scheduled.rows,
                algorithms.Logits(logits, grouped),
                number,
                self.config,
            )
        return SampledStep(
            table=table,
            states=states,
            parents=parents,
            num_new=jnp.sum(sampled < table_size, dtype=jnp.int32) + num_grouped,
            num_accepted=jnp.int32(0),
            is_settled=~jnp.any(ended) & ~jnp.any(grouped < table_size),
        )

    def _made_logits(self, table: RequestTable, seq_indices: jax.Array) -> jax.Array:
        """Log-probabilities f32[S, V] of the rows' next tokens.

        A Zipf distribution over tokens in an order that the sequence's last token and
        position decide, so that equal beams see equal ones and different beams others.
        """
        known = jnp.minimum(seq_indices, self.config.max_num_requests - 1)
        length = table.queue.num_tokens[known]
        last = table.tokens[known, length - 1]
        seed = _mix(table.params.sampling.seed[known], length)
        token = jnp.arange(_VOCABULARY, dtype=jnp.int32)
        order = _mix(_mix(seed, last)[:, None], token[None, :])
        noise = (order.astype(jnp.float32) + 0.5) / jnp.float32(2**31)
        # Scores of a Gumbel kind make a random order; the exponent spreads them.
        gumbel = -jnp.log(-jnp.log(noise))
        return jax.nn.log_softmax(self.beam_concentration * gumbel, axis=1)


def _computes_last(scheduled: ScheduledStep) -> jax.Array:
    """Rows that compute the last token they know: another one follows; bool[S]."""
    known = scheduler.row_values(scheduled.table.queue.num_tokens, scheduled.rows)
    is_last = scheduled.blocks.context_lens == known
    return is_last & (scheduled.plan.num_tokens > 0) & (scheduled.rows != NO_REQUEST)


def _ended_requests(table: RequestTable) -> tuple[jax.Array, jax.Array]:
    """Which places lead a request of which nothing goes on, and all of its, bool[R]."""
    queue = table.queue
    is_live = (queue.status != FINISHED) & (queue.status != EMPTY)
    num_going = jnp.zeros_like(queue.leaders)
    num_going = num_going.at[queue.leaders].add(is_live.astype(jnp.int32))
    gone = (queue.status == FINISHED) & (num_going[queue.leaders] == 0)
    own = jnp.arange(queue.leaders.shape[0], dtype=jnp.int32)
    return gone & (queue.leaders == own), gone


def _prompt_tokens(request: Request, length: int, content_size: int) -> jax.Array:
    """The prompt's tokens i32[L]: equal where the ids of their pieces are equal."""
    position = jnp.arange(length, dtype=jnp.int32)
    tokens = _mix(_mix(request.number, -1), position)
    if request.content.shape[0]:
        piece = request.content.at[position // content_size]
        piece = piece.get(mode="fill", fill_value=-1)
        shared = _mix(piece, position % content_size)
        tokens = jnp.where(piece >= 0, shared, tokens)
    return jnp.where(position < request.prompt_len, tokens, 0)


def _mix(seed: jax.Array, value: jax.Array) -> jax.Array:
    """A number from 0 to below 2**31 that looks drawn, i32 of their common shape."""
    word = jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    word = word ^ jnp.asarray(value).astype(jnp.uint32)
    for factor in (0x7FEB352D, 0x846CA68B):
        word = (word ^ (word >> 16)) * jnp.uint32(factor)
    return ((word ^ (word >> 15)) >> 1).astype(jnp.int32)


def _params(
    kind: tuple[int, int], max_tokens: int
) -> BeamSearchParams | SamplingParams:
    num_samples, beam_width = kind
    if beam_width:
        return BeamSearchParams(beam_width, max_tokens=max_tokens, ignore_eos=True)
    return SamplingParams(
        n=num_samples, temperature=1.0, max_tokens=max_tokens, ignore_eos=True
    )


@functools.lru_cache(maxsize=64)
def _templates(config: EngineConfig, kinds: tuple[tuple[int, int], ...]) -> Submission:
    """The engine's own submission of a request of each kind, numpy [K, B, ...].

    At the first places of an empty table, so that its places are sequences' numbers.
    """
    table = jax.eval_shape(lambda: request_table.init_table(config))
    table = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), table)
    found = []
    for kind in kinds:
        encoded, _ = submission.encode_requests(
            table,
            config,
            [[0, 0]],
            [_params(kind, max_tokens=1)],
            [constraints.UNCONSTRAINED],
            seed=0,
            arrivals=[0],
            vocab_size=_VOCABULARY,
            eos_token_ids=(),
        )
        assert encoded is not None
        found.append(dataclasses.replace(encoded, tokens=encoded.tokens[:, :0]))
    most = max(len(one.seq_indices) for one in found)

    def pad(leaf: np.ndarray, fill: int = 0) -> np.ndarray:
        shape = ((0, most - leaf.shape[0]),) + ((0, 0),) * (leaf.ndim - 1)
        return np.pad(leaf, shape, constant_values=fill)

    padded = [
        dataclasses.replace(
            jax.tree.map(pad, one),
            seq_indices=pad(one.seq_indices, config.max_num_requests),
        )
        for one in found
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
