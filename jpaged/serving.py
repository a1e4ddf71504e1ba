"""Serving: the engine as the host drives it, in slices of steps.

Place on the road: llm -> [serving] -> engine -> [serving] -> llm. Host only.

`EngineHost` owns the engine's state and makes all device calls; what it gives out are
numpy arrays. Whoever calls what touches the state holds its `lock`. A call into a
jitted function that donates the state can be interrupted after the old state is gone
and before the new one is ours: then `EngineHost` begins with a fresh one, and says so
by its `epoch`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jpaged import (
    block_manager,
    distributed,
    engine,
    engine_state,
    groups,
    metrics,
    prefix_cache,
    request_limits,
    request_table,
    sharded,
    submission,
    timeline,
)
from jpaged.config import EngineConfig
from jpaged.engine import DraftedModel, EngineState
from jpaged.metrics import Event, Slice, StepRecord
from jpaged.models.decoder import Decoder
from jpaged.request_limits import Params
from jpaged.request_table import RequestTable
from jpaged.scheduler import RUNNING, SWAPPED, WAITING

READ_WIDTH = 64  # tokens of a sequence that come to the host in one piece
_READ_PIECES = 64  # pieces per device call
_FIRST_STEPS = 4  # steps of a slice while it is not known how long they take
_MOST_STEPS = 1 << 30
_MOST_RECORDS = 1 << 16  # of steps that the host keeps
# What the processes that share a mesh must be asked alike: the engine's sizes, who is
# put into the table, and who is ended or let go by the host.
_ASKED = ("config", "prompts", "params", "ends")
Arrays = TypeVar("Arrays")


class Request(Protocol):
    """What `EngineHost.submit` needs to know."""

    arrival: int
    prompt_token_ids: list[int]
    params: Params


class Progress(NamedTuple):
    """How far the sequences in the table are, as numpy arrays i32[R]."""

    status: np.ndarray
    num_tokens: np.ndarray
    finish_reasons: np.ndarray
    first_steps: np.ndarray
    last_steps: np.ndarray
    num_preemptions: np.ndarray
    num_cached: np.ndarray


class Tokens(NamedTuple):
    """Generated tokens of one sequence, in order."""

    ids: list[int]
    logprobs: np.ndarray  # f32[n]
    ranks: np.ndarray  # i32[n], or i32[n, 0] where none are kept
    top_ids: np.ndarray  # i32[n, C]
    top_logprobs: np.ndarray  # f32[n, C]


@dataclasses.dataclass(eq=False)
class Pinned:
    """A prefix that the engine keeps, and where it is now."""

    token_ids: list[int]
    place: int


class EngineHost:
    """The engine, its state, and what was measured of it."""

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        *,
        draft: Decoder | None = None,
        kv_dtype: str | None = None,
        mesh: Mesh | None = None,
        seed: int = 0,
        check_invariants: bool = False,
    ):
        self.model = model
        self._models = model if draft is None else DraftedModel(model, draft)
        self.config = config
        self.clock = time.perf_counter
        self.lock = threading.RLock()
        self.epoch = 0  # grows when the state was lost
        self.num_empty = 0  # places of the request table
        self.num_lost_events = 0  # overwritten before the host saw them
        self.pinned: list[Pinned] = []  # prefixes
        self.counters: dict[str, Any] = {}  # of the engine, as last seen
        self.run_s = 0.0  # seconds of running steps
        self.compile_s = 0.0  # seconds of compiling `engine.run`, or loading it
        self.num_compilations = 0
        self._kv_dtype = kv_dtype
        self._mesh = mesh
        self._seed = seed
        self._checks = check_invariants
        self._seconds_per_step: float | None = None
        self._compiled: set[tuple[int, int]] = set()  # limits of compiled programs
        self._limits = config.limits(1, 1)
        # Where several processes run this engine, each for itself.
        is_shared = distributed.is_shared(mesh)
        self._asked = distributed.Asked(*_ASKED) if is_shared else None
        sizes = (model.config, None if draft is None else draft.config)
        self._note("config", (sizes, config, kv_dtype, seed))
        self._num_events = 0  # of the state's timeline, as last seen
        self._events: list[tuple[int, Event]] = []  # with places, since `take_events`
        # Of step n the timeline's row, and when it ended, at n % _MOST_RECORDS.
        num_columns = len(timeline.StepRow._fields)
        self._step_rows = np.full((_MOST_RECORDS, num_columns), -1, np.int32)
        self._step_ends = np.zeros((_MOST_RECORDS,))
        self._state = self._new_state()
        self.look()

    def _note(self, kind: str, what: Any) -> None:
        if self._asked is not None:
            self._asked.note(kind, what)

    def _agreed(self, number: int) -> int:
        """Process 0's number, where several processes were asked the same."""
        if self._asked is None:
            return number
        self._asked.check()
        return distributed.first(number)

    def _made(self, make: Callable[[], Arrays]) -> Arrays:
        """What `make` makes, on the devices that have the state."""
        return make() if self._mesh is None else sharded.made(make, self._mesh)

    def _new_state(self) -> EngineState:
        """An empty engine whose counters go on where the last one's were seen."""
        init = functools.partial(
            engine.init,
            self._models,
            self.config,
            kv_dtype=self._kv_dtype,
            mesh=self._mesh,
        )
        # One program, and not one for each of the arrays; on a mesh it is one already.
        state = jax.jit(init)() if self._mesh is None else init()
        self.num_empty = self.config.max_num_requests
        if not self.counters:
            return state
        values = engine.Counters(**self.counters | {"is_stalled": False})
        kinds = jax.tree.map(lambda new: new.dtype, state.counters)
        counters = self._made(lambda: jax.tree.map(jnp.asarray, values, kinds))
        return dataclasses.replace(state, counters=counters)

    def clean(self) -> None:
        """Forgets what an interrupted call left behind, of which nobody knows.

        To be called while no request is in the table.
        """
        self.recover()
        if self.num_empty < self.config.max_num_requests - len(self.pinned):
            kept = {pinned.place for pinned in self.pinned}
            self.drop(set(range(self.config.max_num_requests)) - kept)
            self.num_empty = self.config.max_num_requests - len(kept)

    def recover(self) -> None:
        """Begins a new epoch where the state was lost."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state)):
            self._reset()

    def pin(self, tokens: Sequence[int]) -> Pinned:
        """A prefix that will be computed once and kept until `unpin`."""
        self._note("prompts", list(tokens))
        self._state, place = engine.pin(
            self._state, tokens, vocab_size=self.model.config.vocab_size
        )
        self.num_empty -= 1
        pinned = Pinned(list(tokens), place)
        self.pinned.append(pinned)
        return pinned

    def unpin(self, pinned: Pinned) -> None:
        """Lets a prefix go; one that is gone already stays so."""
        if pinned in self.pinned:
            self._note("ends", pinned.place)
            self.pinned.remove(pinned)
            self._state = engine.unpin(self._state, [pinned.place])
            self.num_empty += 1

    def _pin_again(self) -> None:
        """Prefixes that the last state had, for this one to compute."""
        before, self.pinned = self.pinned, []
        for pinned in before:
            pinned.place = self.pin(pinned.token_ids).place
        self.pinned = before

    def num_open_blocks(self) -> int:
        """Blocks that are not pinned."""
        size = self.config.block_size
        pinned = sum(-(-len(one.token_ids) // size) for one in self.pinned)
        return self.config.num_blocks - pinned

    def _reset(self) -> None:
        self.epoch += 1
        self._note("ends", self.epoch)
        self._num_events = 0
        self._events.clear()
        self._state = self._new_state()
        self._pin_again()

    def reconfigure(self, config: EngineConfig) -> None:
        """Begins with an empty request table of another config; pages stay.

        Pinned prefixes are computed again, at new places.
        """
        self.clean()
        if self.pinned:
            self._state = engine.unpin(self._state, [one.place for one in self.pinned])
        self._note("config", config)
        self.config = config
        table, states = self._made(
            lambda: (request_table.init_table(config), groups.init_states(config))
        )
        host = self._state.host
        if host is not None:  # its rows are the table's places; nobody is there now
            blocks = self._made(lambda: engine_state.init_host_blocks(config))
            host = dataclasses.replace(host, blocks=blocks)
        self._state = dataclasses.replace(
            self._state, requests=table, states=states, host=host, config=config
        )
        self.num_empty = config.max_num_requests
        self._compiled.clear()
        self._pin_again()

    def _choose_program(self) -> None:
        """Takes the smallest program that serves what is in the table.

        Compiles it where it is new, so that its time is nobody's first token.
        """
        is_live = np.isin(self._progress.status, (WAITING, RUNNING, SWAPPED))
        num_tokens = int(self._progress.num_tokens[is_live].sum())
        self._limits = self.config.limits(int(is_live.sum()), num_tokens)
        if self._limits not in self._compiled:
            start = self.clock()
            self._run(0)
            self.compile_s += self.clock() - start
            self._compiled.add(self._limits)

    def submit(self, requests: Sequence[Request]) -> list[tuple[list[int], list[int]]]:
        """Puts checked requests into the table.

        Gives for each the places of all its sequences, and those of its outputs.
        """
        placed = []
        for request in requests:
            self._note("prompts", (request.arrival, request.prompt_token_ids))
            self._note("params", (request.arrival, request.params))
        vocab_size = self.model.config.vocab_size
        # `engine.submit` numbers arrivals one after another.
        runs = itertools.groupby(
            enumerate(requests), key=lambda pair: pair[1].arrival - pair[0]
        )
        for _, run in runs:
            group = [request for _, request in run]
            self._state, new = engine.submit(
                self._state,
                [request.prompt_token_ids for request in group],
                [request.params for request in group],
                seed=self._seed,
                first_arrival=group[0].arrival,
                vocab_size=vocab_size,
                eos_token_ids=self.model.config.eos_token_ids,
            )
            self.num_empty -= sum(map(len, new))
            for request, places in zip(group, new, strict=True):
                shape = request_limits.shape(request.params, self.config, vocab_size)
                placed.append((places, shape.outputs(places)))
        return placed

    def has_room(self, requests: Sequence[Request]) -> bool:
        """Whether the pool of automata can take what these requests need at once."""
        params = [request.params for request in requests]
        try:
            submission.place_automata(self._state.requests, self.config, params)
        except ValueError:
            return False
        return True

    def run(self, seconds: float, least_steps: int = 1) -> Progress:
        """Runs steps until all sequences have ended, or for about `seconds`.

        At least `least_steps` are run, so that no machine is too slow to be worth
        the call.

        Raises:
          RuntimeError: the engine stalled, or its state is found unsound, which is a
            bug.
          ValueError: other processes that run this engine were asked something else.
        """
        max_steps = self._agreed(self._num_steps(seconds, least_steps))
        self.look()
        self._choose_program()
        first = self.counters["num_steps"]
        start = self.clock()
        progress = self._run(max_steps)
        ran = Slice(first, self.counters["num_steps"], start, self.clock())
        elapsed = ran.end_s - ran.start_s
        self.run_s += elapsed
        if ran.last > ran.first:
            self._seconds_per_step = elapsed / (ran.last - ran.first)
            self._take_records(ran)
        if self.counters["is_stalled"]:
            self._give_up("the engine found work and could do none of it")
        if self._checks and (found := engine.violations(self._state)):
            self._give_up(f"the engine's state is unsound: {'; '.join(found)}")
        return progress

    def _num_steps(self, seconds: float, least_steps: int) -> int:
        """Steps of about so many seconds, by this process's clock."""
        if self._checks:
            return 1
        steps = _FIRST_STEPS
        if self._seconds_per_step is not None:
            steps = int(seconds / self._seconds_per_step)
        # The records of more steps would overwrite each other before they are seen.
        most = self.config.num_recorded_steps or _MOST_STEPS
        return min(max(steps, least_steps), most)

    def _give_up(self, why: str) -> NoReturn:
        report = f"{self.config}, counters {self.counters}"
        self._reset()
        raise RuntimeError(
            f"{why}. This is a bug: please report it with the prompts' lengths and "
            f"params, and {report}. The requests of this call are lost; the LLM can be "
            "used again"
        )

    def _run(self, max_steps: int) -> Progress:
        known = engine.run._cache_size()
        max_num_seqs, max_num_batched_tokens = self._limits
        self._state = engine.run(
            self._models,
            self._state,
            np.int32(max_steps),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.num_compilations += engine.run._cache_size() - known
        return self.look()

    def look(self) -> Progress:
        """How far the sequences are; the counters are fresh then too."""
        columns, integers, floats = jax.device_get(_summary(self._state))
        names = [field.name for field in dataclasses.fields(engine.Counters)]
        counters = jax.tree.leaves(self._state.counters)
        integers, floats = iter(integers.tolist()), iter(floats.tolist())
        self.counters = {
            name: next(floats if counter.dtype == jnp.float32 else integers)
            for name, counter in zip(names, counters, strict=True)
        }
        self._progress = Progress(*columns)
        return self._progress

    def _take_records(self, ran: Slice) -> None:
        """Takes over what a slice left on the device's timeline."""
        num_events, events, rows = jax.device_get(_recorded(self._state))
        num_new = int(num_events) - self._num_events
        self._num_events = int(num_events)
        self.num_lost_events += max(num_new - len(events), 0)
        for step, kind, place in events[max(len(events) - num_new, 0) :].tolist():
            is_late = kind >= timeline.NUM_BEFORE_DECODER
            time_s = ran.end_of(step) if is_late else ran.begin_of(step)
            self._events.append((place, Event(timeline.EVENTS[kind], time_s, step)))
        rows = rows[len(rows) - min(ran.last - ran.first, len(rows)) :]
        steps = rows[:, 0]
        self._step_rows[steps % _MOST_RECORDS] = rows
        self._step_ends[steps % _MOST_RECORDS] = ran.end_of(steps)

    def take_events(self) -> list[tuple[int, Event]]:
        """What happened since the last time, in order, each with its place."""
        events, self._events = self._events, []
        return events

    def step_records(self) -> list[StepRecord]:
        """The last steps, oldest first."""
        last = self.counters["num_steps"]
        steps = np.arange(max(last - _MOST_RECORDS, 0), last)
        at = steps[self._step_rows[steps % _MOST_RECORDS, 0] == steps] % _MOST_RECORDS
        return metrics.step_records(
            self._step_rows[at], self._step_ends[at], self.config.block_size
        )

    def refusal(self, request: Request) -> str | None:
        """Why the engine cannot run a request as it is now, or None."""
        try:
            engine.check_request(
                self.config,
                request.prompt_token_ids,
                request.params,
                vocab_size=self.model.config.vocab_size,
                eos_token_ids=self.model.config.eos_token_ids,
                num_blocks=self.num_open_blocks(),
            )
        except ValueError as error:
            return str(error)
        return None

    def read(self, wanted: Sequence[tuple[int, int, int]]) -> list[Tokens]:
        """The tokens of each (place, start, end), positions in the table's rows."""
        pieces = [
            (number, place, first)
            for number, (place, start, end) in enumerate(wanted)
            # Nothing to read is a piece too, of no tokens.
            for first in range(start, max(end, start + 1), READ_WIDTH)
        ]
        parts: list[list[Any]] = [[] for _ in wanted]
        for at in range(0, len(pieces), _READ_PIECES):
            chunk = pieces[at : at + _READ_PIECES]
            index = np.zeros((2, _READ_PIECES), np.int32)
            index[:, : len(chunk)] = np.array(chunk, np.int32)[:, 1:].T
            columns = jax.device_get(_read(self._state.requests, *index))
            for i, (number, _, first) in enumerate(chunk):
                size = min(READ_WIDTH, wanted[number][2] - first)
                parts[number].append([column[i, :size] for column in columns])
        found = []
        for mine in parts:
            ids, *rest = (np.concatenate(column) for column in zip(*mine, strict=True))
            found.append(Tokens(ids.tolist(), *rest))
        return found

    def finish(self, places: Iterable[int], reason: int) -> None:
        """Ends the live sequences at `places`; their blocks are free again."""
        mask = self._mask(places)
        if mask.any():
            self._note("ends", (np.flatnonzero(mask).tolist(), reason))
            self._state = engine.end(self._state, mask, np.int32(reason))

    def release(self, places: Iterable[int]) -> None:
        """Empties the places of finished sequences."""
        mask = self._mask(places)
        if mask.any():
            self._note("ends", np.flatnonzero(mask).tolist())
            self._state = engine.release(self._state, mask)
            self.num_empty += int(mask.sum())

    def drop(self, places: Iterable[int]) -> None:
        """Ends and releases the sequences at `places`, in whatever state they are."""
        places = list(places)
        self.finish(places, request_table.ABORT)
        self.release(places)

    def _mask(self, places: Iterable[int]) -> np.ndarray:
        mask = np.zeros((self.config.max_num_requests,), np.bool_)
        mask[list(places)] = True
        return mask

    def num_free_blocks(self) -> int:
        """Blocks that hold nothing now."""
        return int(block_manager.num_free_blocks(self._state.blocks))

    def num_cached_blocks(self) -> int:
        """Blocks whose contents the prefix cache knows."""
        cache = self._state.prefix_cache
        return 0 if cache is None else int(prefix_cache.is_cached(cache).sum())

    def reset_prefix_cache(self) -> None:
        """Forgets what blocks hold; computes pinned prefixes again."""
        pinned = [one.place for one in self.pinned]
        if pinned:
            self._state = engine.unpin(self._state, pinned)
            self.num_empty += len(pinned)
        self._state = engine.reset_prefix_cache(self._state)
        self._pin_again()

    def close(self) -> None:
        """Lets go of the pages and tables."""
        self.pinned.clear()
        del self._state, self.model, self._models


@jax.jit
def _summary(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Progress as i32[7, R], and the counters: new arrays, few transfers."""
    table, queue = state.requests, state.requests.queue
    columns = (
        queue.status,
        queue.num_tokens,
        table.finish_reasons,
        table.first_steps,
        table.last_steps,
        queue.num_preemptions,
        queue.num_cached,
    )
    counters = jax.tree.leaves(state.counters)
    floats = [counter for counter in counters if counter.dtype == jnp.float32]
    others = [counter for counter in counters if counter.dtype != jnp.float32]
    integers = [counter.astype(jnp.int32) for counter in others]
    return jnp.stack(columns), jnp.stack(integers), jnp.stack(floats)


@jax.jit
def _recorded(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The timeline in order, as new arrays; the state's own are donated later."""
    events, steps = timeline.in_order(state.timeline, state.counters.num_steps)
    return state.timeline.num_events, events, steps


@functools.partial(jax.jit, static_argnames="width")
def _read(
    table: RequestTable, places: jax.Array, starts: jax.Array, width: int = READ_WIDTH
) -> tuple[jax.Array, ...]:
    """[B, width] (and [B, width, C]) of each column from `starts` on; zeros behind."""
    positions = starts[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]

    def window(column: jax.Array) -> jax.Array:
        if 0 in column.shape:
            return jnp.zeros((*positions.shape, 0), column.dtype)
        at = column.at[places[:, None], positions]
        return at.get(mode="fill", fill_value=0)

    return (
        window(table.tokens),
        window(table.logprobs),
        window(table.ranks),
        window(table.top_ids),
        window(table.top_logprobs),
    )
