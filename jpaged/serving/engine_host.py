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
from typing import Any, NoReturn, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jpaged import engine, parallel
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.engine import (
    DraftedModel,
    EngineState,
    algorithms,
    limits,
    replicas,
    request_table,
    submission,
)
from jpaged.engine import (
    state as engine_state,
)
from jpaged.engine.limits import Params
from jpaged.models.decoder import Decoder
from jpaged.parallel import distributed
from jpaged.scheduler import RUNNING, SWAPPED, WAITING
from jpaged.serving import readout
from jpaged.serving.metrics import Event, Slice, StepRecord
from jpaged.serving.readout import Progress, Tokens, Wanted
from jpaged.serving.step_log import StepLog

_FIRST_STEPS = 4  # steps of a slice while it is not known how long they take
_MOST_STEPS = 1 << 30
# What the processes that share a mesh must be asked alike: the engine's sizes, who is
# put into the table, and who is ended or let go by the host.
_ASKED = ("config", "prompts", "params", "ends")


class Request(Protocol):
    """What `EngineHost.submit` needs to know."""

    arrival: int
    table_size: int
    prompt_token_ids: list[int]
    params: Params


@dataclasses.dataclass(eq=False)
class Pinned:
    """A prefix that the engine keeps, and where it is now, in each replica."""

    token_ids: list[int]
    seq_indices: list[int]


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
        self._asked = distributed.CallDigests(*_ASKED) if is_shared else None
        sizes = (model.config, None if draft is None else draft.config)
        self._note("config", (sizes, config, kv_dtype, seed))
        self._log = StepLog(self.num_replicas)
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
        return distributed.number_of_process_0(number)

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

    def next_step(self, seq_index: int | None = None) -> int:
        """The number of the next step, in the replica that has `seq_index`.

        None is a request that is in none yet: no step that it will see comes before.
        """
        steps = self.counters_of_each["num_steps"]
        if seq_index is None:
            return int(steps.min())
        return int(steps[seq_index // self.config.max_num_requests])

    def clean(self) -> None:
        """Forgets what an interrupted call left behind, of which nobody knows.

        To be called while no request is in the table.
        """
        self.recover()
        num_open = self.config.max_num_requests - len(self.pinned)
        if (self.empty_places < num_open).any():
            kept = {
                seq_index for pinned in self.pinned for seq_index in pinned.seq_indices
            }
            table_size = self.num_replicas * self.config.max_num_requests
            self.drop(set(range(table_size)) - kept)
            self.empty_places[:] = num_open

    def recover(self) -> None:
        """Begins a new epoch where the state was lost."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state)):
            self._reset()

    def pin(self, tokens: Sequence[int]) -> Pinned:
        """A prefix that each replica will compute once and keep until `unpin`."""
        self._note("prompts", list(tokens))
        seq_indices: list[int] = []
        try:
            for replica in range(self.num_replicas):
                self._state, seq_index = engine.pin(
                    self._state,
                    tokens,
                    vocab_size=self.model.config.vocab_size,
                    replica=replica,
                )
                seq_indices.append(seq_index)
        except ValueError:
            # One replica may have a larger request than those before it.
            self._state = engine.unpin(self._state, seq_indices)
            raise
        self.empty_places -= 1
        pinned = Pinned(list(tokens), seq_indices)
        self.pinned.append(pinned)
        return pinned

    def unpin(self, pinned: Pinned) -> None:
        """Lets a prefix go; one that is gone already stays so."""
        if pinned in self.pinned:
            self._note("ends", pinned.seq_indices)
            self.pinned.remove(pinned)
            self._state = engine.unpin(self._state, pinned.seq_indices)
            self.empty_places += 1

    def _pin_again(self) -> None:
        """Prefixes that the last state had, for this one to compute."""
        before, self.pinned = self.pinned, []
        for pinned in before:
            pinned.seq_indices = self.pin(pinned.token_ids).seq_indices
        self.pinned = before

    def _pinned_places(self) -> list[int]:
        return [seq_index for pinned in self.pinned for seq_index in pinned.seq_indices]

    def num_open_blocks(self) -> int:
        """Blocks of a replica that are not pinned."""
        size = self.config.block_size
        pinned = sum(cdiv(len(one.token_ids), size) for one in self.pinned)
        return self.config.num_blocks - pinned

    def _reset(self) -> None:
        self.epoch += 1
        self._note("ends", self.epoch)
        self._log.forget_events()
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
            return (
                request_table.init_table(config),
                algorithms.init_states(config),
                blocks,
            )

        table, states, blocks = replicas.init_on_mesh(make, self._mesh)
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
        prompts = [request.prompt_token_ids for request in requests]
        most = [
            0 if limits.keeps_prompt_logprobs(request.params) else len(prompt) - 1
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        return readout.cached_lens(self._state, prompts, most)

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
            for request, seq_indices in zip(group, new, strict=True):
                shape = limits.request_shape(request.params, self.config, vocab_size)
                placed[replica].append((seq_indices, shape.outputs(seq_indices)))
        return placed

    def has_room(self, requests: Sequence[Request], replica: int) -> bool:
        """Whether a replica can take these requests at once: places and automata."""
        table_size = sum(request.table_size for request in requests)
        if table_size > self.empty_places[replica]:
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
            ran = [Slice(*pair, start, end) for pair in steps]
            recorded = readout.records(self._state)
            self._log.take(ran, recorded, self.config.max_num_requests)
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
        self._progress, self.counters_of_each = readout.progress(self._state)
        self.counters = {
            name: counter.sum().item()
            for name, counter in self.counters_of_each.items()
        }
        return self._progress

    def take_events(self) -> list[tuple[int, Event]]:
        """What happened since the last time, in order, each with its place."""
        return self._log.take_events()

    def step_records(self, replica: int = 0) -> list[StepRecord]:
        """The last steps of a replica, oldest first."""
        last = int(self.counters_of_each["num_steps"][replica])
        return self._log.records(replica, last, self.config.block_size)

    @property
    def num_lost_events(self) -> int:
        """Events that the timeline's ring overwrote before the host saw them."""
        return self._log.num_lost_events

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

    def read(self, wanted: Sequence[Wanted]) -> list[Tokens]:
        """The tokens of each that is wanted."""
        return readout.tokens(self._state, wanted)

    def finish(self, seq_indices: Iterable[int], reason: int) -> None:
        """Ends the live sequences at `seq_indices`; their blocks are free again."""
        mask = self._mask(seq_indices)
        if mask.any():
            self._note("ends", (np.flatnonzero(mask).tolist(), reason))
            mask = readout.for_each(mask, self._state)
            self._state = engine.end(self._state, mask, np.int32(reason))

    def release(self, seq_indices: Iterable[int]) -> None:
        """Empties the places of finished sequences."""
        mask = self._mask(seq_indices)
        if mask.any():
            self._note("ends", np.flatnonzero(mask).tolist())
            each = readout.for_each(mask, self._state)
            self._state = engine.release(self._state, each)
            self.empty_places += mask.sum(axis=1)

    def drop(self, seq_indices: Iterable[int]) -> None:
        """Ends and releases the sequences at `seq_indices`, whatever their state."""
        seq_indices = list(seq_indices)
        self.finish(seq_indices, request_table.ABORT)
        self.release(seq_indices)

    def _mask(self, seq_indices: Iterable[int]) -> np.ndarray:
        """bool[D, R]."""
        mask = np.zeros((self.num_replicas, self.config.max_num_requests), np.bool_)
        mask.flat[list(seq_indices)] = True
        return mask

    def known_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """As `readout.known_blocks`."""
        return readout.known_blocks(self._state)

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


def _like(array: jax.Array, value: np.ndarray) -> jax.Array:
    """`value` of the array's shape and type, where the array lies."""
    value = np.asarray(value).astype(array.dtype).reshape(array.shape)
    return jax.make_array_from_callback(
        array.shape, array.sharding, lambda index: value[index]
    )
