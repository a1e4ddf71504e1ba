"""Engine runner: the engine's state, and the programs that run on it.

Pipeline: engine host -> [runner] -> stepping -> [runner] -> engine host. Host only.

A call of a program that donates the state can be interrupted after the old
state is deleted and before the new one is assigned. The state is then lost
(`EngineRunner.is_lost`), and `EngineRunner.restart` creates a new one.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jpaged import engine, parallel
from jpaged.compat import quick_jit
from jpaged.config import EngineConfig
from jpaged.cpu import huge_pages
from jpaged.engine import (
    DraftedModel,
    EngineState,
    algorithms,
    features,
    replicas,
    request_table,
)
from jpaged.engine import state as engine_state
from jpaged.engine.features import Features
from jpaged.log import LOG
from jpaged.models.decoder import Decoder
from jpaged.parallel import distributed
from jpaged.progress import progress_bar
from jpaged.scheduler import RUNNING, SWAPPED, WAITING
from jpaged.serving import readout
from jpaged.serving.compiled import CompiledPrograms
from jpaged.serving.readout import SequenceProgress
from jpaged.serving.step_log import Slice, StepLog
from jpaged.serving.stepping import Stepper
from jpaged.serving.whole_stepping import WholeStepper

_FIRST_STEPS = 4  # steps of a slice while the time of a step is unknown
_MAX_STEPS = 1 << 30
_QUIET_S = 1.0  # waiting for a compiler this long is not worth a message
# What all processes that share a mesh must do in the same order: use the same sizes,
# submit the same requests, and end or release the same sequences.
_SHARED_CALLS = ("config", "prompts", "params", "ends")


class EngineRunner:
    """Owns the engine's state and runs its compiled programs.

    Args:
      model: the model.
      draft: the draft model of speculation, or None.
      config: the engine's config.
      kv_dtype: dtype of keys and values; None is the model's.
      mesh: devices that share the model and the pages; None is one device.
      seed: seed of requests without one.
      check_invariants: run single steps, and check the state after each.

    Attributes:
      state: the engine's state.
      config: its config.
      progress: progress of all sequences, as last read.
      replica_counters: counters of each replica, [D] each, as last read.
      counters: sums of the counters over replicas.
      log: events and steps.
      run_s: seconds of running steps.
      seconds_per_step: mean of the last slice; 0 before the first slice.
      compile_s: seconds in which requests waited for a compiler.
    """

    def __init__(
        self,
        model: Decoder,
        draft: Decoder | None,
        config: EngineConfig,
        *,
        kv_dtype: str | None,
        mesh: Mesh | None,
        seed: int,
        check_invariants: bool,
    ):
        self.config = config
        self.mesh = mesh
        self.clock = time.perf_counter
        self.num_replicas = parallel.num_replicas(mesh)
        self.replica_counters: dict[str, np.ndarray] = {}
        self.counters: dict[str, Any] = {}
        self.run_s = 0.0
        self.compile_s = 0.0
        self.log = StepLog(self.num_replicas)
        self._models = model if draft is None else DraftedModel(model, draft)
        self._kv_dtype = kv_dtype
        self._checks = check_invariants
        self.seconds_per_step = 0.0
        self._max_num_tokens = config.max_num_batched_tokens  # of the state's params
        is_shared = distributed.is_shared(mesh)
        self._stepper: Stepper | WholeStepper
        if draft is None:
            self._stepper = Stepper(model, mesh, is_shared)
        else:
            self._stepper = WholeStepper(self._models)
        self._calls = distributed.CallDigests(*_SHARED_CALLS) if is_shared else None
        sizes = (model.config, None if draft is None else draft.config)
        self.note("config", (sizes, config, kv_dtype, seed))
        self.state = self._new_state()
        huge_pages.move_in_background((self._models, self.state.cache))
        self.read_progress()

    def note(self, kind: str, what: Any) -> None:
        """Note a call, to be compared with those of other processes before a slice."""
        if self._calls is not None:
            self._calls.note(kind, what)

    @property
    def is_lost(self) -> bool:
        """Whether an interrupted call deleted the state."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))

    def restart(self) -> None:
        """Replace the state by an empty one; counters continue as last read."""
        self.log.forget_events()
        self.state = self._new_state()
        self._max_num_tokens = self.config.max_num_batched_tokens

    def _new_state(self) -> EngineState:
        init = functools.partial(
            engine.init,
            self._models,
            self.config,
            kv_dtype=self._kv_dtype,
            mesh=self.mesh,
        )
        # jit makes one program of it instead of one per array; a mesh does so already.
        state = quick_jit(init)() if self.mesh is None else init()
        if not self.counters:
            return state
        is_stalled = np.zeros((self.num_replicas,), np.bool_)
        values: dict[str, Any] = self.replica_counters | {"is_stalled": is_stalled}
        counters = jax.tree.map(_placed_like, state.counters, engine.Counters(**values))
        return dataclasses.replace(state, counters=counters)

    @property
    def compiled(self) -> CompiledPrograms[Any]:
        """The programs."""
        return self._stepper.compiled

    def grow(self, config: EngineConfig) -> None:
        """Give the state the arrays for the features of another config.

        Sequences in the request table keep what they have and go on, unless
        `needs_empty_table`.

        Args:
          config: has all features of the present one.
        """
        self.note("config", config)
        if needs_empty_table(self.config, config):
            self.state = self._with_new_table(config)
        else:
            self.state = features.grow(self.state, config)
        self.config = config

    def _with_new_table(self, config: EngineConfig) -> EngineState:
        """Return the state with an empty request table for another config."""
        host = self.state.host

        def make() -> tuple[Any, ...]:
            # The host pool's block tables have one row per entry of the request table.
            blocks = None if host is None else engine_state.init_host_blocks(config)
            return (
                request_table.init_table(config),
                algorithms.init_states(config),
                blocks,
            )

        if config.seen_draft != self.config.seen_draft:
            # The draft model has not computed the blocks of algorithms before.
            self.state = engine.reset_prefix_cache(self.state)
            host = self.state.host
        table, states, blocks = replicas.init_on_mesh(make, self.mesh)
        if host is not None:
            host = dataclasses.replace(host, blocks=blocks)
        return dataclasses.replace(
            self.state, requests=table, states=states, host=host, config=config
        )

    def prepare(self, used: Features, num_rows: int, num_tokens: int) -> list[Any]:
        """Start to compile what a load needs; see `Stepper.prepare`."""
        return self._stepper.prepare(self.state, used, num_rows, num_tokens)

    def prepare_all(self, used: Features, max_num_seqs: int) -> list[Any]:
        """Start to compile all sizes; see `Stepper.prepare_all`."""
        return self._stepper.prepare_all(self.state, used, max_num_seqs)

    def wait(self, keys: Sequence[Any]) -> None:
        """Wait for programs."""
        keys = [key for key in keys if not self.compiled.are_ready([key])]
        if not keys:
            return
        start = time.perf_counter()
        try:
            if not self.compiled.are_done(keys, _QUIET_S):
                self._wait_visibly(keys)
            self.compiled.wait(keys)
        finally:
            self.compile_s += time.perf_counter() - start

    def _wait_visibly(self, keys: Sequence[Any]) -> None:
        """Wait for programs with a progress bar, or messages where there is none."""
        is_shown = LOG.isEnabledFor(logging.INFO)
        with progress_bar(
            len(keys), "compiling", "program", is_shown, leave=False
        ) as bar:
            if bar.disable:
                LOG.info("compiling %s ...", ", ".join(map(str, keys)))
            start = time.perf_counter()
            for key in keys:
                bar.set_postfix_str(str(key))
                while not self.compiled.are_done([key], 0.2):
                    bar.refresh()
                bar.update()
            if bar.disable:
                LOG.info("compiled in %.1f s", time.perf_counter() - start)

    def run(self, used: Features, seconds: float, least_steps: int) -> SequenceProgress:
        """Run steps until all sequences have ended, or for about `seconds`.

        Args:
          used: features of the sequences in the request table.
          seconds: length of the slice; process 0's where processes share a mesh.
          least_steps: minimum number of steps, so that a call is worth its overhead on
            slow machines too.

        Raises:
          ValueError: other processes that run this engine made other calls.
        """
        max_steps = self._num_steps(seconds, least_steps)
        if self._calls is not None:
            self._calls.check()
            max_steps = distributed.number_of_process_0(max_steps)
        num_rows, num_tokens = self._load()
        self.wait(self.prepare(used, num_rows, num_tokens))
        self._limit_tokens(used, num_tokens)
        first = self.replica_counters["num_steps"]
        start = self.clock()
        self.state = self._stepper.run(
            self.state,
            used,
            least_steps=least_steps,
            max_steps=max_steps,
            seconds=seconds,
        )
        progress = self.read_progress()
        end = self.clock()
        self.run_s += end - start
        last = self.replica_counters["num_steps"]
        if num_steps := int((last - first).max()):
            self.seconds_per_step = (end - start) / num_steps
            steps = zip(first.tolist(), last.tolist(), strict=True)
            slices = [Slice(*pair, start, end) for pair in steps]
            timelines = readout.read_timelines(self.state)
            self.log.add(slices, timelines, self.config.max_num_requests)
        return progress

    def _limit_tokens(self, used: Features, wanted: int) -> None:
        """Let the scheduler plan only steps for which a program is compiled."""
        most = self._stepper.max_num_tokens(self.state, used, wanted)
        if most == self._max_num_tokens:
            return
        self._max_num_tokens = most
        params = self.state.scheduler_params
        limit = params.max_num_batched_tokens
        full = self.config.scheduler_params.max_num_batched_tokens
        value = np.minimum(np.int32(most), np.asarray(full))
        params = dataclasses.replace(
            params,
            max_num_batched_tokens=_placed_like(limit, np.full(limit.shape, value)),
        )
        self.state = dataclasses.replace(self.state, scheduler_params=params)

    def fault(self) -> str | None:
        """Return what is wrong with the engine after a slice, which is a bug."""
        found = None
        if self.counters["is_stalled"]:
            found = "the engine has work and cannot continue"
        elif self._checks and (wrong := engine.violations(self.state)):
            found = f"the engine's state violates invariants: {'; '.join(wrong)}"
        if found is None:
            return None
        return (
            f"{found}. This is a bug: please report it with the prompts' lengths and "
            f"params, and {self.config}, counters {self.counters}. The requests of "
            "this call are lost; the LLM can be used again"
        )

    def _num_steps(self, seconds: float, least_steps: int) -> int:
        """Return the largest number of steps of a slice.

        If the stepper cannot stop in time by itself, they take about `seconds`.
        """
        if self._checks:
            return 1
        # Records of more steps would overwrite each other before the host reads them.
        most = self.config.num_recorded_steps or _MAX_STEPS
        if self._calls is None and isinstance(self._stepper, Stepper):
            return most
        steps = _FIRST_STEPS
        if self.seconds_per_step:
            steps = int(seconds / self.seconds_per_step)
        return min(max(steps, least_steps), most)

    def live_sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of live sequences and of their tokens, each i64[D].

        Live sequences wait, run, or are swapped out.
        """
        shape = (self.num_replicas, self.config.max_num_requests)
        status = self.progress.status.reshape(shape)
        is_live = np.isin(status, (WAITING, RUNNING, SWAPPED))
        num_tokens = self.progress.num_tokens.reshape(shape)
        return is_live.sum(axis=1), (num_tokens * is_live).sum(axis=1, dtype=np.int64)

    def _load(self) -> tuple[int, int]:
        """Return the live sequences, and the tokens that they have to compute.

        Both are those of the replica that has most. What a preempted sequence computes
        again is not counted.
        """
        num_seqs, _ = self.live_sequences()
        is_new = np.isin(self.progress.status, (WAITING, RUNNING))
        is_new &= self.progress.first_steps == request_table.NEVER
        num_tokens = np.where(is_new, self.progress.num_tokens, 0)
        shape = (self.num_replicas, self.config.max_num_requests)
        num_tokens = num_tokens.reshape(shape).sum(axis=1)
        return int(num_seqs.max()), int((num_tokens + num_seqs).max())

    def read_progress(self) -> SequenceProgress:
        """Read the progress of all sequences and the counters from the state."""
        self.progress, self.replica_counters = readout.read_progress(self.state)
        self.counters = {
            name: counter.sum().item()
            for name, counter in self.replica_counters.items()
        }
        return self.progress

    def replace_model(self, model: Decoder) -> None:
        """Use another model of the same config from now on."""
        if isinstance(self._models, DraftedModel):
            self._models = dataclasses.replace(self._models, target=model)
        else:
            self._models = model
        huge_pages.move_in_background(model)
        self._stepper.replace_model(self._models)

    def close(self) -> None:
        """Release the state, the models and the programs."""
        self._stepper.close()
        del self.state, self._models, self._stepper


def needs_empty_table(config: EngineConfig, grown: EngineConfig) -> bool:
    """Return whether an engine can only get the grown config without requests.

    Beams of running requests have the old width. A table with many log-probabilities
    per token has fewer entries. A draft model must have computed all tokens of rows
    whose algorithms read its logits.
    """
    if grown.seen_draft != config.seen_draft:
        return True
    is_smaller = grown.max_num_requests != config.max_num_requests
    return is_smaller or 0 < config.max_beam_width < grown.max_beam_width


def _placed_like(array: jax.Array, value: np.ndarray) -> jax.Array:
    """Return `value` with the shape, the dtype and the placement of `array`."""
    value = np.asarray(value).astype(array.dtype).reshape(array.shape)
    if not array.committed:
        # A committed array would compile the engine's program again.
        return jnp.asarray(value)
    return jax.make_array_from_callback(
        array.shape, array.sharding, lambda index: value[index]
    )
