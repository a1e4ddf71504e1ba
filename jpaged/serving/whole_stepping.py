"""Whole stepping: runs steps of an engine with a draft model, in one program.

Pipeline: runner -> [whole_stepping] -> compiled programs -> runner. Host only.

A draft model runs several times in a step, with other sizes than the model, so the
parts of a step are not programs of their own. `engine.run` has all sizes in one.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np

from jpaged import engine
from jpaged.engine import EngineState, Model
from jpaged.engine.features import Features
from jpaged.serving.compiled import CompiledPrograms, Program

# The function that `engine.run` jits.
_run = engine.run.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]


class WholeStepper:
    """Has the functions of `stepping.Stepper`, for models with a draft model.

    Args:
      model: the model and its draft model.

    Attributes:
      compiled: the programs.
    """

    def __init__(self, model: Model):
        self.compiled: CompiledPrograms[Any] = CompiledPrograms()
        self._model = model
        self._key: Any = None  # of the program for the load

    def prepare(
        self, state: EngineState, used: Features, num_rows: int, num_tokens: int
    ) -> list[Any]:
        """Start to compile the program for the state's config and a load."""
        del used
        limits = state.config.limits(num_rows, num_tokens)
        known = [key for key in self.compiled.keys(True) if key[0] == state.config]
        for key in known:
            if all(a >= b for a, b in zip(key[1], limits, strict=True)):
                self._key = key
                return [key]
        self._key = self._start(state, limits)
        return [self._key]

    def prepare_all(
        self, state: EngineState, used: Features, max_num_seqs: int
    ) -> list[Any]:
        """Start to compile the program for all sizes."""
        del used, max_num_seqs
        config = state.config
        most = (config.max_num_seqs, config.max_num_batched_tokens)
        return [self._start(state, most)]

    def _start(self, state: EngineState, limits: tuple[int, int]) -> Any:
        key = (state.config, limits)
        rows, tokens = limits
        run = functools.partial(
            _run,
            max_num_seqs=rows,
            max_num_batched_tokens=tokens,
        )
        name = f"steps of up to {rows} rows and {tokens} tokens"
        args = (self._model, state, np.int32(1))
        self.compiled.start(key, lambda: Program(name, run, args, (1,)))
        return key

    def max_num_tokens(self, state: EngineState, used: Features, wanted: int) -> int:
        """Return the tokens of the largest step, see `Stepper`."""
        del used, wanted
        return state.config.max_num_batched_tokens

    def run(
        self,
        state: EngineState,
        used: Features,
        *,
        least_steps: int,
        max_steps: int,
        seconds: float,
    ) -> EngineState:
        """Run steps in one call; `max_steps` follows from `seconds` already."""
        del used, least_steps, seconds
        state = engine.set_clock(state, int(time.perf_counter() * 1000))
        return self.compiled.call(self._key, self._model, state, np.int32(max_steps))

    def replace_model(self, model: Model) -> None:
        """Use another model of the same config from now on."""
        self._model = model

    def close(self) -> None:
        """Free the programs."""
        self.compiled.close()
