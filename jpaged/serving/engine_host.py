"""Engine host: the host's operations on the engine.

Pipeline: batcher -> [engine host] -> engine -> [engine host] -> batcher. Host only.

`EngineHost` makes all device calls and returns numpy arrays. Callers hold its `lock`
while they use the state. The request tables of all replicas are concatenated: a
sequence index is `replica * max_num_requests + index in the replica`.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jpaged import engine
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.engine import limits, request_table, submission
from jpaged.engine.features import Features
from jpaged.engine.limits import Params
from jpaged.models.decoder import Decoder
from jpaged.scheduler import RUNNING
from jpaged.serving import readout
from jpaged.serving.metrics import Event, StepRecord
from jpaged.serving.model_arrays import ModelArrays
from jpaged.serving.readout import SequenceProgress, SequenceTokens, TokenSpan
from jpaged.serving.request_state import RequestState
from jpaged.serving.runner import EngineRunner, needs_empty_table


@dataclasses.dataclass(eq=False)
class PinnedPrefix:
    """A prefix that the engine keeps, and its sequence index in each replica."""

    token_ids: list[int]
    seq_indices: list[int]


class EngineHost:
    """The engine as the host uses it: requests, pinned prefixes, slices of steps.

    Args:
      model: the model.
      config: the engine's config.
      draft: the draft model of speculation, or None.
      kv_dtype: dtype of keys and values; None is the model's.
      mesh: devices that share the model and the pages; None is one device.
      seed: seed of requests without one.
      check_invariants: run single steps, and check the state after each.

    Attributes:
      model: the model.
      arrays: its arrays.
      runner: owns the state and what was measured of it.
      lock: held by callers that use the state.
      epoch: number of times that the state was lost.
      empty_entries: i64[D], free entries of each replica's request table.
      pinned: the pinned prefixes.
    """

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
        self.arrays = ModelArrays(model)
        self.lock = threading.RLock()
        self.epoch = 0
        self.pinned: list[PinnedPrefix] = []
        self._seed = seed
        self.runner = EngineRunner(
            model,
            draft,
            config,
            kv_dtype=kv_dtype,
            mesh=mesh,
            seed=seed,
            check_invariants=check_invariants,
        )
        self.empty_entries = np.full(
            (self.num_replicas,), config.max_num_requests, np.int64
        )

    # What the runner has measured.

    @property
    def config(self) -> EngineConfig:
        """The engine's config; it grows with the features that requests need."""
        return self.runner.config

    @property
    def num_replicas(self) -> int:
        """Number of replicas."""
        return self.runner.num_replicas

    @property
    def counters(self) -> dict[str, Any]:
        """The engine's counters, summed over replicas."""
        return self.runner.counters

    @property
    def replica_counters(self) -> dict[str, np.ndarray]:
        """The engine's counters, [D] each."""
        return self.runner.replica_counters

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of running steps."""
        run_s = self.runner.run_s
        return self.counters["num_generated"] / run_s if run_s else 0.0

    def time_s(self) -> float:
        """Return the host's clock in seconds."""
        return self.runner.clock()

    def user_tokens(self) -> dict[int, int]:
        """Return the tokens of users in the request table, see `policies.Requests`."""
        attributes = self.runner.state.requests.queue.attributes
        if attributes is None:
            return {}
        users, tokens = np.asarray(attributes.users), np.asarray(attributes.user_tokens)
        found: dict[int, int] = {}
        for user, count in zip(users.flat, tokens.flat, strict=True):
            found[int(user)] = max(found.get(int(user), 0), int(count))
        return found

    def next_step(self, seq_index: int | None = None) -> int:
        """Return the number of the next step in the replica that has `seq_index`.

        None is for a request without a replica: the lowest number of any replica.
        """
        steps = self.replica_counters["num_steps"]
        if seq_index is None:
            return int(steps.min())
        return int(steps[seq_index // self.config.max_num_requests])

    def take_events(self) -> list[tuple[int, Event]]:
        """Return the events since the last call, in order, with sequence indices."""
        return self.runner.log.take_events()

    def step_records(self, replica: int = 0) -> list[StepRecord]:
        """Return the last steps of a replica, oldest first."""
        end = int(self.replica_counters["num_steps"][replica])
        return self.runner.log.records(replica, end, self.config.block_size)

    def count_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """See `readout.count_blocks`."""
        return readout.count_blocks(self.runner.state)

    # The state as a whole.

    def clean(self) -> None:
        """Drop sequences that an interrupted call left in the request table.

        Call it only while no request is in the table.
        """
        self.recover()
        num_open = self.config.max_num_requests - len(self.pinned)
        if (self.empty_entries < num_open).any():
            table_size = self.num_replicas * self.config.max_num_requests
            self.drop(set(range(table_size)) - set(self._pinned_indices()))
            self.empty_entries[:] = num_open

    def recover(self) -> None:
        """Start again with an empty state if the state was lost."""
        if self.runner.is_lost:
            self._restart()

    def _restart(self) -> None:
        self.epoch += 1
        self.runner.note("ends", self.epoch)
        self.runner.restart()
        self.empty_entries[:] = self.config.max_num_requests
        self._pin_again()

    def grow(self, config: EngineConfig) -> None:
        """Add the arrays for the features of another config; see `EngineRunner.grow`.

        If that needs an empty request table, pinned prefixes are computed again and get
        new sequence indices. Call it then only while no request is in the table.
        """
        if not needs_empty_table(self.config, config):
            self.runner.grow(config)
            return
        self.clean()
        self._unpin(self._pinned_indices())
        self.runner.grow(config)
        self.empty_entries[:] = config.max_num_requests
        self._pin_again()

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache; pinned prefixes are computed again."""
        self._unpin(self._pinned_indices())
        self.empty_entries += len(self.pinned)
        self.runner.state = engine.reset_prefix_cache(self.runner.state)
        self._pin_again()

    def use_model(self, model: Decoder) -> None:
        """Use another model of the same config; `change_weights` must follow."""
        self.model = model
        self.arrays = ModelArrays(model)
        self.runner.replace_model(model)

    def change_weights(self, requests: str = "recompute") -> None:
        """Drop the keys and values that older weights have computed.

        Args:
          requests: what happens to running requests. "recompute": they compute their
            tokens again. "keep": they go on with what they have, and share it with no
            other request.
        """
        self.recover()
        self.runner.note("ends", ("weights", requests))
        self._unpin(self._pinned_indices())
        self.empty_entries += len(self.pinned)
        change = engine.recompute if requests == "recompute" else engine.mark_stale
        if self._has_sequences():
            self.runner.state = change(self.runner.state)
            self.read_progress()
        self.runner.state = engine.reset_prefix_cache(self.runner.state)
        self._pin_again()

    def _has_sequences(self) -> bool:
        return bool((self.empty_entries < self.config.max_num_requests).any())

    def close(self) -> None:
        """Release the pages, the tables and the model."""
        self.pinned.clear()
        self.runner.close()
        del self.model, self.arrays

    # Pinned prefixes.

    def pin(self, tokens: Sequence[int]) -> PinnedPrefix:
        """Pin a prefix: each replica computes it once and keeps it until `unpin`.

        Raises:
          ValueError: `max_num_prefixes` are pinned, or the blocks do not suffice.
        """
        self.runner.note("prompts", list(tokens))
        seq_indices: list[int] = []
        try:
            for replica in range(self.num_replicas):
                self.runner.state, seq_index = engine.pin(
                    self.runner.state,
                    tokens,
                    vocab_size=self.model.config.vocab_size,
                    replica=replica,
                )
                seq_indices.append(seq_index)
        except ValueError:
            # A replica can have a larger request than those before it.
            self.runner.state = engine.unpin(self.runner.state, seq_indices)
            raise
        self.empty_entries -= 1
        pinned = PinnedPrefix(list(tokens), seq_indices)
        self.pinned.append(pinned)
        return pinned

    def unpin(self, pinned: PinnedPrefix) -> None:
        """Release a prefix; one that was released already is ignored."""
        if pinned in self.pinned:
            self.runner.note("ends", pinned.seq_indices)
            self.pinned.remove(pinned)
            self._unpin(pinned.seq_indices)
            self.empty_entries += 1

    def _unpin(self, seq_indices: Sequence[int]) -> None:
        if seq_indices:
            self.runner.state = engine.unpin(self.runner.state, seq_indices)

    def _pin_again(self) -> None:
        """Pin the prefixes of the previous state, to be computed again."""
        before, self.pinned = self.pinned, []
        for pinned in before:
            pinned.seq_indices = self.pin(pinned.token_ids).seq_indices
        self.pinned = before

    def _pinned_indices(self) -> list[int]:
        return [seq_index for pinned in self.pinned for seq_index in pinned.seq_indices]

    def num_open_blocks(self) -> int:
        """Return the number of blocks of a replica that are not pinned."""
        size = self.config.block_size
        pinned = sum(cdiv(len(each.token_ids), size) for each in self.pinned)
        return self.config.num_blocks - pinned * len(self.config.group_windows)

    # Requests.

    @property
    def num_empty(self) -> int:
        """Number of free entries of the request tables of all replicas."""
        return int(self.empty_entries.sum())

    def num_running(self) -> int:
        """Return the number of sequences with a batch row."""
        return int((self.read_progress().status == RUNNING).sum())

    def loads(self) -> np.ndarray:
        """Return the tokens of live sequences of each replica, as last read; i64[D]."""
        return self.runner.live_sequences()[1]

    def cached_lens(self, requests: Sequence[RequestState]) -> np.ndarray:
        """Return the cached tokens of each prompt in each replica; i32[n, D]."""
        prompts = [request.prompt_token_ids for request in requests]
        # The last token is always computed: its logits are needed. Prompt
        # log-probabilities need the logits of all tokens.
        most = [
            0 if limits.keeps_prompt_logprobs(request.params) else len(prompt) - 1
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        return readout.cached_lens(self.runner.state, prompts, most)

    def refusal(self, request: RequestState) -> str | None:
        """Return why the engine can never run a request, or None."""
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

    def has_capacity(self, requests: Sequence[RequestState], replica: int) -> bool:
        """Whether a replica has entries and automata for these requests together."""
        table_size = sum(request.table_size for request in requests)
        if table_size > self.empty_entries[replica]:
            return False
        params = [request.params for request in requests]
        if all(param.structured_outputs is None for param in params):
            return True
        table = engine.host_table(self.runner.state, replica)
        try:
            submission.place_automata(table, self.config, params)
        except ValueError:
            return False
        return True

    def submit(
        self, requests: Sequence[Sequence[RequestState]]
    ) -> list[list[tuple[list[int], list[int]]]]:
        """Put checked requests into the request tables.

        Args:
          requests: per replica, the requests that it gets.

        Returns:
          Per replica and request: the indices of all its sequences, and of those that
          are its outputs.
        """
        for request in itertools.chain.from_iterable(requests):
            self.runner.note("prompts", (request.arrival, request.prompt_token_ids))
            self.runner.note("params", (request.arrival, request.params))
        vocab_size = self.model.config.vocab_size
        found: list[list[tuple[list[int], list[int]]]] = [[] for _ in requests]
        for replica, group in enumerate(requests):
            if not group:
                continue
            self.runner.state, submitted = engine.submit(
                self.runner.state,
                [request.prompt_token_ids for request in group],
                [request.params for request in group],
                seed=self._seed,
                arrivals=[request.arrival for request in group],
                submitted_ms=[int(request.submitted_s * 1000) for request in group],
                vocab_size=vocab_size,
                eos_token_ids=self.model.config.eos_token_ids,
                replica=replica,
            )
            self.empty_entries[replica] -= sum(map(len, submitted))
            for request, seq_indices in zip(group, submitted, strict=True):
                shape = limits.request_shape(request.params, self.config, vocab_size)
                found[replica].append((seq_indices, shape.outputs(seq_indices)))
        return found

    def prepare(
        self, requests: Iterable[RequestState], others: Iterable[RequestState] = ()
    ) -> bool:
        """Start to compile what requests need; return whether it is ready.

        Args:
          requests: the requests.
          others: requests that run beside them.
        """
        requests = list(requests)
        used = self.features([*requests, *others])
        num_rows = sum(limits.num_rows(request.params) for request in requests)
        num_tokens = sum(len(request.prompt_token_ids) for request in requests)
        return self.runner.compiled.are_ready(
            self.runner.prepare(used, num_rows, num_tokens)
        )

    def warm_up(self, params: Iterable[Params], num_rows: int) -> None:
        """Compile all sizes of up to `num_rows` rows for requests with `params`."""
        self.runner.wait(self.runner.prepare_all(self._features(params), num_rows))

    def features(self, requests: Iterable[RequestState]) -> Features:
        """Return what these requests use."""
        return self._features(request.params for request in requests)

    def _features(self, params: Iterable[Params]) -> Features:
        used = Features()
        for one in params:
            used = used.union(Features.of(one, self.model.config.vocab_size))
        return used

    def run(
        self, used: Features, seconds: float, least_steps: int = 1
    ) -> SequenceProgress:
        """Run a slice of steps, see `EngineRunner.run`.

        Raises:
          RuntimeError: the engine stalled or violates its invariants, which is a bug.
          ValueError: other processes that run this engine made other calls.
        """
        progress = self.runner.run(used, seconds, least_steps)
        if fault := self.runner.fault():
            self._restart()
            raise RuntimeError(fault)
        return progress

    def read_progress(self) -> SequenceProgress:
        """Return the progress of all sequences."""
        return self.runner.read_progress()

    def read_tokens(self, spans: Sequence[TokenSpan]) -> list[SequenceTokens]:
        """Return the tokens of each span."""
        return readout.read_tokens(self.runner.state, spans)

    def read_masks(self, span: TokenSpan) -> np.ndarray:
        """Return the masks of a span, bool[n, V]."""
        masks = readout.read_masks(self.runner.state, *span)
        return masks[:, : self.model.config.vocab_size]

    def finish(self, seq_indices: Iterable[int], reason: int) -> None:
        """End the live sequences at `seq_indices`; their blocks become free."""
        mask = self._mask(seq_indices)
        if mask.any():
            self.runner.note("ends", (np.flatnonzero(mask).tolist(), reason))
            mask = readout.for_state(mask, self.runner.state)
            self.runner.state = engine.end(self.runner.state, mask, np.int32(reason))

    def release(self, seq_indices: Iterable[int]) -> None:
        """Free the entries of finished sequences."""
        mask = self._mask(seq_indices)
        if mask.any():
            self.runner.note("ends", np.flatnonzero(mask).tolist())
            own = readout.for_state(mask, self.runner.state)
            self.runner.state = engine.release(self.runner.state, own)
            self.empty_entries += mask.sum(axis=1)

    def drop(self, seq_indices: Iterable[int]) -> None:
        """End and release the sequences at `seq_indices` in any status."""
        seq_indices = list(seq_indices)
        self.finish(seq_indices, request_table.ABORT)
        self.release(seq_indices)

    def _mask(self, seq_indices: Iterable[int]) -> np.ndarray:
        """Return bool[D, R], True at `seq_indices`."""
        mask = np.zeros((self.num_replicas, self.config.max_num_requests), np.bool_)
        mask.flat[list(seq_indices)] = True
        return mask
