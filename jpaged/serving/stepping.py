"""Stepping: runs the engine's steps with a program for each part and size.

Pipeline: runner -> [stepping] -> compiled programs -> runner. Host only.

A step is `schedule`, `trunk`, `decode` and `settle` of `engine.programs`. Steps that
only decode run in `run_decode_loop`, many in one call. A program that is compiled for
more tokens, rows or features than a step has serves it too. So new sizes are compiled
beside the run, and only the first step of an engine, or of a feature, waits for a
compiler.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jpaged import engine
from jpaged.engine import EngineState, features
from jpaged.engine.features import Features
from jpaged.engine.programs import Pages, StepSize
from jpaged.models.decoder import Decoder
from jpaged.serving.compiled import CompiledPrograms
from jpaged.serving.model_arrays import ModelArrays
from jpaged.serving.program_specs import (
    GREEDY,
    PROMPT_LOGPROBS,
    Key,
    ProgramSpecs,
    pages_of,
    program_key,
)

# A smaller program than the one that serves is compiled when it would have saved this
# many seconds so far.
_WASTE_S = 3.0
_FIRST_STEPS = 4  # of a loop whose speed is not known


class Stepper:
    """Runs steps of one engine.

    Args:
      model: the model.
      mesh: devices that share the model; None is one device.
      is_shared: several processes run the engine. All must call the same programs, so
        none depends on the time or on what is compiled already.

    Attributes:
      compiled: the programs.
    """

    def __init__(self, model: Decoder, mesh: Mesh | None, is_shared: bool = False):
        self._is_shared, self._mesh = is_shared, mesh
        self.compiled: CompiledPrograms[Key] = CompiledPrograms()
        self._specs = ProgramSpecs(model, mesh)
        self._arrays = ModelArrays(model)
        # By what it has for algorithms beside logits.
        self._logits: dict[Any, Any] = {}
        # Seconds that programs which are not compiled would have saved.
        self._waste_s: dict[Key, float] = {}
        self._step_s: dict[Key, float] = {}  # seconds of a step of each loop
        self._parameters: list[Any] = []  # the model's, during a run

    # ---- programs

    def _start(self, key: Key, state: EngineState) -> Key:
        """Start to compile a program unless it is known."""
        self.compiled.start(key, lambda: self._specs.program(key, state))
        return key

    def _find(
        self,
        name: str,
        size: int,
        used: Features,
        state: EngineState,
        is_started: bool = False,
    ) -> Key | None:
        """Return the smallest program that serves this size and these features.

        Args:
          name: which part of a step.
          size: rows or tokens.
          used: features.
          state: the engine's state.
          is_started: also consider programs that are still being compiled.
        """
        found = [
            key
            for key in self.compiled.keys(is_started or self._is_shared)
            if key.name == name
            and key.size >= size
            and key.used.covers(used)
            and key.used.seen == used.seen  # its working memory differs
            # Programs for smaller arrays of a feature are of no use any more.
            and key == _key(name, key.size, key.used, state)
        ]
        return min(found, key=lambda key: (key.size, sum(key.used)), default=None)

    def prepare(
        self, state: EngineState, used: Features, num_rows: int, num_tokens: int
    ) -> list[Key]:
        """Start to compile what a load needs, as far as it is not known.

        Args:
          state: the state, with the arrays of these features.
          used: the features of the load.
          num_rows: its sequences.
          num_tokens: tokens of their prompts together.

        Returns:
          The programs without which the load cannot run.
        """
        config = state.config
        has_prompt_logprobs, used = used.prompt_logprobs, _own(used)
        num_rows = min(num_rows, config.max_num_seqs)
        trunk = self._find("trunk", 0, _seen(used), state, is_started=True)
        if trunk is None:
            most = min(max(num_tokens, num_rows), config.max_num_batched_tokens)
            trunk = _key("trunk", _fit(config.token_buckets, most), _seen(used), state)
        needed = [_key("schedule", 0, GREEDY, state), trunk]
        decode = self._find("decode", 0, used, state, is_started=True)
        needed.append(decode or _key("decode", 0, used, state))
        if has_prompt_logprobs:
            needed.append(_key("prompt_logprobs", trunk.size, PROMPT_LOGPROBS, state))
        needed.append(_key("settle", 0, GREEDY, state))
        for key in needed:
            self._start(key, state)
        is_looped = config.speculation is None
        if is_looped and self._find("loop", num_rows, used, state, True) is None:
            size = _fit(config.row_buckets, num_rows)
            self._start(_key("loop", size, used, state), state)
        return needed

    def prepare_all(
        self, state: EngineState, used: Features, max_num_seqs: int
    ) -> list[Key]:
        """Start to compile all sizes of up to `max_num_seqs` rows; return the keys."""
        config = state.config
        has_prompt_logprobs, used = used.prompt_logprobs, _own(used)
        keys = [_key(name, 0, GREEDY, state) for name in ("schedule", "settle")]
        keys += [
            _key("trunk", size, _seen(used), state) for size in config.token_buckets
        ]
        keys.append(_key("decode", 0, used, state))
        if has_prompt_logprobs:
            keys += [
                _key("prompt_logprobs", size, PROMPT_LOGPROBS, state)
                for size in config.token_buckets
            ]
        if config.speculation is None:
            most = _fit(config.row_buckets, min(max_num_seqs, config.max_num_seqs))
            keys += [
                _key("loop", size, used, state)
                for size in config.row_buckets
                if size <= most
            ]
        return [self._start(key, state) for key in keys]

    def max_num_tokens(self, state: EngineState, used: Features, wanted: int) -> int:
        """Return the tokens of the largest step that need not wait for a compiler.

        Args:
          state: the engine's state.
          used: features of the load.
          wanted: tokens that the load has; a program for as many is compiled beside the
            run.
        """
        most = state.config.max_num_batched_tokens
        if self._is_shared:
            return most
        seen = _seen(used)
        largest = max(
            (
                key.size
                for key in self.compiled.keys()
                if key.name == "trunk" and key.used == seen
            ),
            default=most,
        )
        if largest < min(wanted, most):
            size = _fit(state.config.token_buckets, min(wanted, most))
            self._start(_key("trunk", size, seen, state), state)
        return largest

    # ---- steps

    def run(
        self,
        state: EngineState,
        used: Features,
        *,
        least_steps: int,
        max_steps: int,
        seconds: float,
    ) -> EngineState:
        """Run steps until there is no work, for `max_steps` or about `seconds`.

        Args:
          state: the engine's state; donated.
          used: features of the requests in its table, which `prepare` has had.
          least_steps: at least this number of steps.
          max_steps: at most this number of steps.
          seconds: after `least_steps`, no step starts if less than half of a step's
            time is left of these seconds.

        Returns:
          The state, settled.
        """
        end = time.perf_counter() + seconds
        steps, margin_s = 0, 0.0
        self._parameters = self._arrays.leaves()
        while steps < max_steps and (
            steps < least_steps
            or self._is_shared
            or time.perf_counter() + margin_s < end
        ):
            start = time.perf_counter()
            state, gained = self._step(state, used, max_steps - steps, end)
            if not gained:
                break
            steps += gained
            # If less than half a step is left, a call costs more time than it uses.
            margin_s = (time.perf_counter() - start) / gained / 2
        self._parameters = []  # training code may replace them
        return state

    def _step(
        self, state: EngineState, used: Features, max_steps: int, end: float
    ) -> tuple[EngineState, int]:
        """Run one step, or several that only decode; return their number."""
        start = time.perf_counter()
        state = engine.set_clock(state, int(start * 1000))
        view, scheduled, size = self._call(
            _key("schedule", 0, GREEDY, state), features.view(state, GREEDY)
        )
        state = features.merge(state, view)
        is_live, rows, tokens, is_complete = _largest(size)
        if not is_live:
            return state, 0
        is_decode = rows == tokens and state.config.speculation is None
        # A chunk of one prompt token may have a log-probability.
        is_decode &= is_complete or not used.prompt_logprobs
        loop = self._find("loop", rows, _own(used), state) if is_decode else None
        if loop is not None:
            state, unsettled, steps = self._loop(loop, state, scheduled, max_steps, end)
        else:
            state, unsettled = self._one_step(state, used, scheduled, tokens)
            steps = 1
        view = self._call(
            _key("settle", 0, GREEDY, state), features.view(state, GREEDY), unsettled
        )[0]
        state = features.merge(state, view)
        self._learn(state, used, loop, rows, tokens, time.perf_counter() - start)
        return state, steps

    def _one_step(
        self, state: EngineState, used: Features, scheduled: Any, num_tokens: int
    ) -> tuple[EngineState, Any]:
        """Run `trunk` and `decode`; return the state and what is unsettled."""
        trunk = self._find("trunk", num_tokens, _seen(used), state)
        if trunk is None:  # a lower limit of the schedule did not take effect
            size = _fit(state.config.token_buckets, num_tokens)
            trunk = self._start(_key("trunk", size, _seen(used), state), state)
        pages, self._logits[_memory_kind(trunk)], hidden, blocks = self._call(
            trunk,
            self._parameters,
            pages_of(state),
            self._memory(trunk),
            state.requests.tokens,
            state.blocks,
            scheduled,
        )
        state = _with_pages(state, pages)
        if blocks is not None:  # with what retention has observed
            state = dataclasses.replace(state, blocks=blocks)
        if used.prompt_logprobs:
            key = _key("prompt_logprobs", trunk.size, PROMPT_LOGPROBS, state)
            self._start(key, state)
            view = features.view(state, key.used)
            (view,) = self._call(key, self._parameters, view, scheduled, hidden)
            state = features.merge(state, view)
        decode = self._find("decode", 0, _own(used), state)
        if decode is None:
            decode = self._start(_key("decode", 0, _own(used), state), state)
        view, unsettled = self._call(
            decode,
            features.view(state, decode.used),
            scheduled,
            self._logits[_memory_kind(decode)],
        )
        return features.merge(state, view), unsettled

    def _loop(
        self, key: Key, state: EngineState, scheduled: Any, max_steps: int, end: float
    ) -> tuple[EngineState, Any, int]:
        """Run decode steps; return the state, what is unsettled, and their number."""
        step_s = self._step_s.get(key)
        if self._is_shared:
            pass
        elif step_s is not None:
            left = round((end - time.perf_counter()) / step_s)
            max_steps = min(max_steps, max(left, 1))
        else:
            max_steps = min(max_steps, _FIRST_STEPS)
        first = _num_steps(state)
        start = time.perf_counter()
        pages, self._logits[_memory_kind(key)], view, unsettled = self._call(
            key,
            self._parameters,
            pages_of(state),
            self._memory(key),
            features.view(state, key.used),
            scheduled,
            np.int32(max_steps),
        )
        state = features.merge(_with_pages(state, pages), view)
        steps = int((_num_steps(state) - first).max())
        self._step_s[key] = (time.perf_counter() - start) / max(steps, 1)
        return state, unsettled, steps

    def _learn(
        self,
        state: EngineState,
        used: Features,
        loop: Key | None,
        num_rows: int,
        num_tokens: int,
        seconds: float,
    ) -> None:
        """Start to compile the best program for steps like this one, if it pays.

        Args:
          state: the state after the steps.
          used: features of its requests.
          loop: the loop that ran; None: a trunk ran.
          num_rows: rows of the steps.
          num_tokens: tokens of a step.
          seconds: time of the steps.
        """
        config = state.config
        is_decode = num_rows == num_tokens and config.speculation is None
        if is_decode:
            rows = _fit(config.row_buckets, num_rows)
            best = _key("loop", rows, _own(used), state)
            size = num_tokens if loop is None else loop.size
        else:
            tokens = _fit(config.token_buckets, num_tokens)
            best = _key("trunk", tokens, _seen(used), state)
            trunk = self._find("trunk", num_tokens, _seen(used), state)
            size = best.size if trunk is None else trunk.size
        if loop is None and is_decode:
            self._start(best, state)
        elif best.size < size and not self._is_shared:
            saved = seconds * (1 - best.size / size)
            self._waste_s[best] = self._waste_s.get(best, 0.0) + saved
            if self._waste_s[best] > _WASTE_S:
                self._start(best, state)

    def _call(self, key: Key, *args: Any) -> Any:
        return self.compiled.call(key, *args)

    def _memory(self, key: Key) -> Any:
        """Return the working memory for logits of a program."""
        memory = self._logits.get(_memory_kind(key))
        if memory is None or any(x.is_deleted() for x in jax.tree.leaves(memory)):
            memory = jax.tree.map(
                lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
                self._specs.logits(key.config),
            )
        return memory

    def replace_model(self, model: Any) -> None:
        """Use another model of the same config from now on."""
        self._arrays = ModelArrays(model)
        self._specs = ProgramSpecs(model, self._mesh)

    def close(self) -> None:
        """Free the programs and the working memory."""
        self.compiled.close()
        self._logits = {}


def _own(used: Features) -> Features:
    """Return the features of the programs for generated tokens."""
    return used._replace(prompt_logprobs=False)


def _seen(used: Features) -> Features:
    """Return the features of the programs that compute logits."""
    return Features(seen=used.seen)


def _memory_kind(key: Key) -> tuple[bool, tuple[int, ...]]:
    return key.config.seen_hidden, key.config.seen_layers


def _key(name: str, size: int, used: Features, state: EngineState) -> Key:
    return program_key(name, size, used, state.config)


def _fit(sizes: Sequence[int], number: int) -> int:
    """Return the first of `sizes` that is at least `number`."""
    return next(size for size in sizes if size >= number)


def _largest(size: StepSize) -> tuple[bool, int, int, bool]:
    """Return what holds for the step of all replicas together.

    Returns:
      Whether any has work; the most rows; the most tokens, above the rows if some
      replica computes prompts; and whether all rows complete their known tokens.
    """
    is_live, rows, tokens, logits = map(np.asarray, jax.device_get(size))
    most_rows, most_tokens = int(rows.max()), int(tokens.max())
    if (rows != tokens).any():
        most_tokens = max(most_tokens, most_rows + 1)
    return bool(is_live.any()), most_rows, most_tokens, bool((rows == logits).all())


def _num_steps(state: EngineState) -> np.ndarray:
    return np.asarray(jax.device_get(state.counters.num_steps))


def _with_pages(state: EngineState, pages: Pages) -> EngineState:
    host = state.host
    if host is not None:
        host = dataclasses.replace(host, cache=pages.host)
    return dataclasses.replace(state, cache=pages.cache, host=host)
