"""Serving: the engine as the host drives it, in slices of steps.

Place on the road: llm -> [serving] -> engine -> [serving] -> llm. Host only.

`EngineHost` owns the engine's state and makes all device calls; what it gives out are
numpy arrays. The request tables of several replicas are one long one outside, in which
they stand one behind the other. Whoever calls what touches the state holds its `lock`.
A call into a jitted function that donates the state can be interrupted after the old
state is gone and before the new one is ours: then `EngineHost` begins with a fresh one,
and says so by its `epoch`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

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
    parallel,
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
from jpaged.scheduler import RUNNING, SWAPPED, WAITING

READ_WIDTH = 64  # tokens of a sequence that come to the host in one piece
_READ_PIECES = 64  # pieces per device call
_FIRST_STEPS = 4  # steps of a slice while it is not known how long they take
_MOST_STEPS = 1 << 30
_MOST_RECORDS = 1 << 16  # of steps that the host keeps, of each replica
_LOOK_UPS = 16  # prompts that are looked up in one device call
# What the processes that share a mesh must be asked alike: the engine's sizes, who is
# put into the table, and who is ended or let go by the host.
_ASKED = ("config", "prompts", "params", "ends")


class Request(Protocol):
    """What `EngineHost.submit` needs to know."""

    arrival: int
    num_places: int
    prompt_token_ids: list[int]
    params: Params


class Progress(NamedTuple):
    """How far the sequences in the table are, as numpy arrays i32[R].

    In those of all replicas: i32[D * R].
    """

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
    """A prefix that the engine keeps, and where it is now, in each replica."""

    token_ids: list[int]
    places: list[int]


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
        self.num_replicas = parallel.num_replicas(mesh)
        # i64[D], places of the replicas' request tables
        self.empty_places = np.zeros((self.num_replicas,), np.int64)
        self.num_lost_events = 0  # overwritten before the host saw them
        self.pinned: list[Pinned] = []  # prefixes
        # Of the engine, as last seen: of each replica [D], and their sums.
        self.counters_of_each: dict[str, np.ndarray] = {}
        self.counters: dict[str, Any] = {}
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
        # Of the state's timelines, as last seen.
        self._num_events = np.zeros((self.num_replicas,), np.int64)
        self._events: list[tuple[int, Event]] = []  # with places, since `take_events`
        # Of step n the timeline's row, and when it ended, at n % _MOST_RECORDS.
        shape = (self.num_replicas, _MOST_RECORDS)
        num_columns = len(timeline.StepRow._fields)
        self._step_rows = np.full((*shape, num_columns), -1, np.int32)
        self._step_ends = np.zeros(shape)
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
        self.empty_places[:] = self.config.max_num_requests
        if not self.counters:
            return state
        values = engine.Counters(
            **self.counters_of_each
            | {"is_stalled": np.zeros((self.num_replicas,), np.bool_)}
        )
        counters = jax.tree.map(_like, state.counters, values)
        return dataclasses.replace(state, counters=counters)

    @property
    def num_empty(self) -> int:
        """Places of the request table, or of all replicas' tables, that are empty."""
        return int(self.empty_places.sum())

    def next_step(self, place: int | None = None) -> int:
        """The number of the next step, in the replica that has `place`.

        None is a request that is in none yet: no step that it will see comes before.
        """
        steps = self.counters_of_each["num_steps"]
        if place is None:
            return int(steps.min())
        return int(steps[place // self.config.max_num_requests])

    def clean(self) -> None:
        """Forgets what an interrupted call left behind, of which nobody knows.

        To be called while no request is in the table.
        """
        self.recover()
        num_open = self.config.max_num_requests - len(self.pinned)
        if (self.empty_places < num_open).any():
            kept = {place for pinned in self.pinned for place in pinned.places}
            num_places = self.num_replicas * self.config.max_num_requests
            self.drop(set(range(num_places)) - kept)
            self.empty_places[:] = num_open

    def recover(self) -> None:
        """Begins a new epoch where the state was lost."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state)):
            self._reset()

    def pin(self, tokens: Sequence[int]) -> Pinned:
        """A prefix that each replica will compute once and keep until `unpin`."""
        self._note("prompts", list(tokens))
        places: list[int] = []
        try:
            for replica in range(self.num_replicas):
                self._state, place = engine.pin(
                    self._state,
                    tokens,
                    vocab_size=self.model.config.vocab_size,
                    replica=replica,
                )
                places.append(place)
        except ValueError:
            # One replica may have a larger request than those before it.
            self._state = engine.unpin(self._state, places)
            raise
        self.empty_places -= 1
        pinned = Pinned(list(tokens), places)
        self.pinned.append(pinned)
        return pinned

    def unpin(self, pinned: Pinned) -> None:
        """Lets a prefix go; one that is gone already stays so."""
        if pinned in self.pinned:
            self._note("ends", pinned.places)
            self.pinned.remove(pinned)
            self._state = engine.unpin(self._state, pinned.places)
            self.empty_places += 1

    def _pin_again(self) -> None:
        """Prefixes that the last state had, for this one to compute."""
        before, self.pinned = self.pinned, []
        for pinned in before:
            pinned.places = self.pin(pinned.token_ids).places
        self.pinned = before

    def _pinned_places(self) -> list[int]:
        return [place for pinned in self.pinned for place in pinned.places]

    def num_open_blocks(self) -> int:
        """Blocks of a replica that are not pinned."""
        size = self.config.block_size
        pinned = sum(-(-len(one.token_ids) // size) for one in self.pinned)
        return self.config.num_blocks - pinned

    def _reset(self) -> None:
        self.epoch += 1
        self._note("ends", self.epoch)
        self._num_events[:] = 0
        self._events.clear()
        self._state = self._new_state()
        self._pin_again()

    def reconfigure(self, config: EngineConfig) -> None:
        """Begins with an empty request table of another config; pages stay.

        Pinned prefixes are computed again, at new places.
        """
        self.clean()
        if self.pinned:
            self._state = engine.unpin(self._state, self._pinned_places())
        self._note("config", config)
        self.config = config
        host = self._state.host

        def make() -> tuple[Any, ...]:
            # The host's rows are the table's places; nobody is there now.
            blocks = None if host is None else engine_state.init_host_blocks(config)
            return request_table.init_table(config), groups.init_states(config), blocks

        table, states, blocks = sharded.made(make, self._mesh)
        if host is not None:
            host = dataclasses.replace(host, blocks=blocks)
        self._state = dataclasses.replace(
            self._state, requests=table, states=states, host=host, config=config
        )
        self.empty_places[:] = config.max_num_requests
        self._compiled.clear()
        self._pin_again()

    def _choose_program(self) -> None:
        """Takes the smallest program that serves what is in the table.

        Compiles it where it is new, so that its time is nobody's first token.
        """
        num_seqs, num_tokens = self._live()
        self._limits = self.config.limits(int(num_seqs.max()), int(num_tokens.max()))
        if self._limits not in self._compiled:
            start = self.clock()
            self._run(0)
            self.compile_s += self.clock() - start
            self._compiled.add(self._limits)

    def _live(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each replica the sequences that wait or run, and their tokens; i64[D]."""
        shape = (self.num_replicas, self.config.max_num_requests)
        status = self._progress.status.reshape(shape)
        is_live = np.isin(status, (WAITING, RUNNING, SWAPPED))
        num_tokens = self._progress.num_tokens.reshape(shape)
        return is_live.sum(axis=1), (num_tokens * is_live).sum(axis=1, dtype=np.int64)

    def loads(self) -> np.ndarray:
        """i64[D], of each replica the tokens of what waits or runs, as last seen."""
        return self._live()[1]

    def hits(self, requests: Sequence[Request]) -> np.ndarray:
        """i32[n, D], tokens of each prompt that each replica's prefix cache holds."""
        found = np.zeros((len(requests), self.num_replicas), np.int32)
        if self._state.prefix_cache is None:
            return found
        for at in range(0, len(requests), _LOOK_UPS):
            chunk = requests[at : at + _LOOK_UPS]
            tokens = np.zeros((_LOOK_UPS, self.config.max_model_len), np.int32)
            most = np.zeros((_LOOK_UPS,), np.int32)
            for i, request in enumerate(chunk):
                prompt = request.prompt_token_ids
                tokens[i, : len(prompt)] = prompt
                if not request_limits.rates_prompt(request.params):
                    most[i] = len(prompt) - 1
            lens = jax.device_get(_cached_lens(self._state, tokens, most))
            lens = lens.reshape(self.num_replicas, _LOOK_UPS)
            found[at : at + len(chunk)] = lens[:, : len(chunk)].T
        return found

    def submit(
        self, requests: Sequence[Sequence[Request]]
    ) -> list[list[tuple[list[int], list[int]]]]:
        """Puts checked requests into the table, those of each replica into its own.

        Gives for each the places of all its sequences, and those of its outputs.
        """
        for request in itertools.chain.from_iterable(requests):
            self._note("prompts", (request.arrival, request.prompt_token_ids))
            self._note("params", (request.arrival, request.params))
        vocab_size = self.model.config.vocab_size
        placed: list[list[tuple[list[int], list[int]]]] = [[] for _ in requests]
        for replica, group in enumerate(requests):
            if not group:
                continue
            self._state, new = engine.submit(
                self._state,
                [request.prompt_token_ids for request in group],
                [request.params for request in group],
                seed=self._seed,
                arrivals=[request.arrival for request in group],
                vocab_size=vocab_size,
                eos_token_ids=self.model.config.eos_token_ids,
                replica=replica,
            )
            self.empty_places[replica] -= sum(map(len, new))
            for request, places in zip(group, new, strict=True):
                shape = request_limits.shape(request.params, self.config, vocab_size)
                placed[replica].append((places, shape.outputs(places)))
        return placed

    def has_room(self, requests: Sequence[Request], replica: int) -> bool:
        """Whether a replica can take these requests at once: places and automata."""
        num_places = sum(request.num_places for request in requests)
        if num_places > self.empty_places[replica]:
            return False
        params = [request.params for request in requests]
        if all(param.structured_outputs is None for param in params):
            return True
        table = engine.host_table(self._state, replica)
        try:
            submission.place_automata(table, self.config, params)
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
        first = self.counters_of_each["num_steps"]
        start = self.clock()
        progress = self._run(max_steps)
        end = self.clock()
        self.run_s += end - start
        last = self.counters_of_each["num_steps"]
        if num_steps := int((last - first).max()):
            self._seconds_per_step = (end - start) / num_steps
            steps = zip(first.tolist(), last.tolist(), strict=True)
            self._take_records([Slice(*pair, start, end) for pair in steps])
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
        columns, integers, floats = map(self._of_each, _summary(self._state))
        names = [field.name for field in dataclasses.fields(engine.Counters)]
        counters = jax.tree.leaves(self._state.counters)
        integers, floats = iter(integers.T), iter(floats.T)
        self.counters_of_each = {
            name: next(floats if counter.dtype == jnp.float32 else integers)
            for name, counter in zip(names, counters, strict=True)
        }
        self.counters = {
            name: counter.sum().item()
            for name, counter in self.counters_of_each.items()
        }
        self._progress = Progress(
            *(column.reshape(-1) for column in columns.swapaxes(0, 1))
        )
        return self._progress

    def _of_each(self, array: jax.Array) -> np.ndarray:
        """An array of `sharded.read` with the replicas as first axis, even of one."""
        found = jax.device_get(array)
        return found if self.num_replicas > 1 else found[None]

    def _take_records(self, ran: Sequence[Slice]) -> None:
        """Takes over what a slice left on the timeline of each replica."""
        recorded = map(self._of_each, _recorded(self._state))
        for replica, (one, *mine) in enumerate(zip(ran, *recorded, strict=True)):
            if one.last > one.first:
                self._take_records_of(replica, one, *mine)

    def _take_records_of(
        self, replica: int, ran: Slice, num_events, events, rows
    ) -> None:
        num_new = int(num_events - self._num_events[replica])
        self._num_events[replica] = num_events
        self.num_lost_events += max(num_new - len(events), 0)
        first = replica * self.config.max_num_requests
        for step, kind, place in events[max(len(events) - num_new, 0) :].tolist():
            is_late = kind >= timeline.NUM_BEFORE_DECODER
            time_s = ran.end_of(step) if is_late else ran.begin_of(step)
            event = Event(timeline.EVENTS[kind], time_s, step)
            self._events.append((first + place, event))
        rows = rows[len(rows) - min(ran.last - ran.first, len(rows)) :]
        steps = rows[:, 0]
        self._step_rows[replica, steps % _MOST_RECORDS] = rows
        self._step_ends[replica, steps % _MOST_RECORDS] = ran.end_of(steps)

    def take_events(self) -> list[tuple[int, Event]]:
        """What happened since the last time, in order, each with its place."""
        events, self._events = self._events, []
        return events

    def step_records(self, replica: int = 0) -> list[StepRecord]:
        """The last steps of a replica, oldest first."""
        last = int(self.counters_of_each["num_steps"][replica])
        rows, ends = self._step_rows[replica], self._step_ends[replica]
        steps = np.arange(max(last - _MOST_RECORDS, 0), last)
        at = steps[rows[steps % _MOST_RECORDS, 0] == steps] % _MOST_RECORDS
        return metrics.step_records(rows[at], ends[at], self.config.block_size)

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
        pieces: list[list[tuple[int, int, int]]] = [[] for _ in self.empty_places]
        for number, (place, start, end) in enumerate(wanted):
            replica, own = divmod(place, self.config.max_num_requests)
            # Nothing to read is a piece too, of no tokens.
            for first in range(start, max(end, start + 1), READ_WIDTH):
                pieces[replica].append((number, own, first))
        parts: list[list[Any]] = [[] for _ in wanted]
        for at in range(0, max(map(len, pieces)), _READ_PIECES):
            chunks = [mine[at : at + _READ_PIECES] for mine in pieces]
            index = np.zeros((2, self.num_replicas, _READ_PIECES), np.int32)
            for replica, chunk in enumerate(chunks):
                for i, (_, own, first) in enumerate(chunk):
                    index[:, replica, i] = own, first
            columns = _read(self._state, *(self._for_each(side) for side in index))
            columns = [self._of_each(column) for column in columns]
            for replica, chunk in enumerate(chunks):
                for i, (number, _, first) in enumerate(chunk):
                    size = min(READ_WIDTH, wanted[number][2] - first)
                    parts[number].append([c[replica, i, :size] for c in columns])
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
            mask = self._for_each(mask)
            self._state = engine.end(self._state, mask, np.int32(reason))

    def release(self, places: Iterable[int]) -> None:
        """Empties the places of finished sequences."""
        mask = self._mask(places)
        if mask.any():
            self._note("ends", np.flatnonzero(mask).tolist())
            self._state = engine.release(self._state, self._for_each(mask))
            self.empty_places += mask.sum(axis=1)

    def drop(self, places: Iterable[int]) -> None:
        """Ends and releases the sequences at `places`, in whatever state they are."""
        places = list(places)
        self.finish(places, request_table.ABORT)
        self.release(places)

    def _mask(self, places: Iterable[int]) -> np.ndarray:
        """bool[D, R]."""
        mask = np.zeros((self.num_replicas, self.config.max_num_requests), np.bool_)
        mask.flat[list(places)] = True
        return mask

    def _for_each(self, array: np.ndarray) -> np.ndarray:
        """What has the replicas as first axis, as the state wants it."""
        return array if self.num_replicas > 1 else array[0]

    def known_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each replica the blocks that hold nothing now, and those whose contents
        its prefix cache knows; i32[D]."""
        num_free, num_cached = map(self._of_each, _known_blocks(self._state))
        return num_free, num_cached

    def reset_prefix_cache(self) -> None:
        """Forgets what blocks hold; computes pinned prefixes again."""
        if self.pinned:
            self._state = engine.unpin(self._state, self._pinned_places())
            self.empty_places += len(self.pinned)
        self._state = engine.reset_prefix_cache(self._state)
        self._pin_again()

    def close(self) -> None:
        """Lets go of the pages and tables."""
        self.pinned.clear()
        del self._state, self.model, self._models


@jax.jit
def _summary(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Progress as i32[7, R], and the counters: new arrays, few transfers."""

    def summary(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
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

    return sharded.read(summary, state)


def _like(array: jax.Array, value: np.ndarray) -> jax.Array:
    """`value` of the array's shape and type, where the array lies."""
    value = np.asarray(value).astype(array.dtype).reshape(array.shape)
    return jax.make_array_from_callback(
        array.shape, array.sharding, lambda index: value[index]
    )


@jax.jit
def _recorded(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The timeline in order, as new arrays; the state's own are donated later."""

    def recorded(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
        ordered = timeline.in_order(state.timeline, state.counters.num_steps)
        return state.timeline.num_events, *ordered

    return sharded.read(recorded, state)


@jax.jit
def _known_blocks(state: EngineState) -> tuple[jax.Array, jax.Array]:
    """i32[] blocks that are free, and i32[] those that the prefix cache knows."""

    def known(state: EngineState) -> tuple[jax.Array, jax.Array]:
        cache, num_cached = state.prefix_cache, jnp.int32(0)
        if cache is not None:
            num_cached = jnp.sum(prefix_cache.is_cached(cache), dtype=jnp.int32)
        return block_manager.num_free_blocks(state.blocks), num_cached

    return sharded.read(known, state)


@jax.jit
def _cached_lens(state: EngineState, tokens: jax.Array, most: jax.Array) -> jax.Array:
    """i32[B], of prompts [B, L] the tokens that are cached, of the first `most`."""

    def match(state: EngineState, tokens: jax.Array, most: jax.Array) -> jax.Array:
        return prefix_cache.match(state.prefix_cache, tokens, most)[1]

    return sharded.read(match, state, *sharded.stacked((tokens, most), state.mesh))


@jax.jit
def _read(
    state: EngineState, places: jax.Array, starts: jax.Array
) -> tuple[jax.Array, ...]:
    """[B, READ_WIDTH] (and [B, READ_WIDTH, C]) of each column, zeros behind it."""

    def read(state: EngineState, places: jax.Array, starts: jax.Array):
        table = state.requests
        offsets = jnp.arange(READ_WIDTH, dtype=jnp.int32)
        positions = starts[:, None] + offsets[None, :]

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

    return sharded.read(read, state, places, starts)
