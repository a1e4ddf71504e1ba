"""Program specs: the arguments that each of the engine's programs is compiled for.

Pipeline: state -> [program_specs] -> compiled. Host only.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jpaged import compat
from jpaged.config import EngineConfig
from jpaged.engine import (
    EngineState,
    bookkeeping,
    features,
    programs,
    replicas,
    sampling,
)
from jpaged.engine.bookkeeping import Unsettled
from jpaged.engine.features import Features
from jpaged.models.decoder import Decoder
from jpaged.serving.compiled import Program

GREEDY = Features()
# One program for all requests, whatever else they use.
PROMPT_LOGPROBS = Features(logprobs=True, prompt_logprobs=True)
# Programs whose arrays are so small that optimising them gains little. The same is true
# of greedy decoding after a trunk; decode loops contain their own decoding.
_SMALL = ("schedule", "settle")
_KINDS = {"m": "model", "p": "pages", "s": "state", "w": "whole"}


class Key(NamedTuple):
    """Identifies a program of an engine."""

    name: str  # "schedule", "trunk", "prompt_logprobs", "decode", "loop" or "settle"
    size: int  # tokens of a trunk, rows of a loop; 0 for the others
    used: Features
    config: EngineConfig  # with these features only

    def __str__(self) -> str:
        unit = {"trunk": " tokens", "prompt_logprobs": " tokens", "loop": " rows"}
        size = f" of {self.size}{unit[self.name]}" if self.size else ""
        used = f" ({self.used})" if any(self.used) else ""
        return f"{self.name}{size}{used}"


def program_key(name: str, size: int, used: Features, config: EngineConfig) -> Key:
    """Return the key of a program for a state with this config."""
    return Key(name, size, used, features.program_config(config, used))


class ProgramSpecs:
    """Describes the programs of one engine.

    Args:
      model: the model.
      mesh: devices that share the model; None is one device.
    """

    def __init__(self, model: Decoder, mesh: Mesh | None):
        self._model, self._mesh = model, mesh
        self._shapes: dict[Any, Any] = {}

    def program(self, key: Key, state: EngineState) -> Program:
        """Describe a program for states like this one.

        Args:
          key: which program.
          state: the engine's state, with pages.
        """
        view = features.view(state, key.used)
        config = view.config
        model = jax.tree.leaves(self._model)
        pages = pages_of(state)
        fixed: dict[str, Any] = dict(size=key.size, config=config)
        scheduled = logits = None
        if key.name not in _SMALL:
            scheduled, logits = self._scheduled(state), self.logits(config)
        tokens, blocks = state.requests.tokens, state.blocks
        # What each argument and result is, see `replicas.per_device`.
        function, inputs, outputs, donated, args = {
            "schedule": lambda: (programs.schedule, "s", "sss", (0,), (view,)),
            "settle": lambda: (
                _settle,
                "ss",
                "s",
                (0,),
                (view, self._like(Unsettled.none, config)),
            ),
            "trunk": lambda: (
                functools.partial(programs.trunk, **fixed),
                "mpssss",
                "psss",
                (1, 2),
                (model, pages, logits, tokens, blocks, scheduled),
            ),
            "prompt_logprobs": lambda: (
                _prompt_logprobs,
                "msss",
                "s",
                (1,),
                (model, view, scheduled, self._hidden(key.size)),
            ),
            "decode": lambda: (
                programs.decode,
                "sss",
                "ss",
                (0,),
                (view, scheduled, logits),
            ),
            "loop": lambda: (
                functools.partial(programs.run_decode_loop, **fixed),
                "mpsssw",
                "psss",
                (1, 2, 3),
                (model, pages, logits, view, scheduled, np.int32(1)),
            ),
        }[key.name]()
        mapped = replicas.per_device(
            function,
            self._mesh,
            self._model,
            [_KINDS[kind] for kind in inputs],
            [_KINDS[kind] for kind in outputs],
        )
        is_quick = key.name in _SMALL or (key.name == "decode" and key.used == GREEDY)
        options = None
        if is_quick and jax.default_backend() == "cpu":
            options = compat.quick_compilation()
        return Program(str(key), mapped, args, donated, options)

    def logits(self, config: EngineConfig) -> Any:
        """Return the shape of the working memory for logits, [N, V] per replica."""
        return self._like(sampling.init_logits, config, self._model.config)

    def _hidden(self, size: int) -> Any:
        shape = (size, self._model.config.hidden_size)
        return self._like(jnp.zeros, shape, self._model.config.dtype)

    def _scheduled(self, state: EngineState) -> Any:
        """Return the shapes of a scheduled step."""
        config = features.program_config(state.config, GREEDY)
        return self._like(bookkeeping.idle_step, config)

    def _like(self, make: Any, *args: Any) -> Any:
        """Return the shapes and placements of arrays that differ between replicas."""
        key = (make, args)
        if key not in self._shapes:
            shapes = replicas.shapes_on_mesh(lambda: make(*args), self._mesh)
            self._shapes[key] = shapes
        return self._shapes[key]


def pages_of(state: EngineState) -> programs.Pages:
    """Return the pages of the state's model."""
    host = state.host
    assert state.cache is not None
    return programs.Pages(state.cache, None if host is None else host.cache)


def _settle(state: EngineState, unsettled: Unsettled) -> tuple[EngineState]:
    return (bookkeeping.settle(state, unsettled),)


def _prompt_logprobs(*args: Any) -> tuple[EngineState]:
    return (programs.prompt_logprobs(*args),)
