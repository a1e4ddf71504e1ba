"""Logits processors: a user's changes to the logits of ordinary requests.

Pipeline: rules -> logits f32[V] -> [processors] -> temperature, filters, sampling.

A logits processor is a pure function of one row, which the engine batches with `vmap`:

    def no_echo(logits, row, *, penalty):
        last = row.tokens[row.num_tokens - 1]
        return logits.at[last].add(-penalty)

    SamplingParams(logits_processors=[processor(no_echo, penalty=2.0)])

Its functions are compiled into the engine's programs. Its parameters are data: a new
value compiles nothing. A processor may have a state for each sequence, which `update`
changes after each token.

Shape symbols: V vocabulary, L tokens of the longest sequence, S rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.parameters import Specs, as_parameters, specs_of
from jpaged.decoding.sample import GREEDY_BELOW


class Row(NamedTuple):
    """What a logits processor sees beside the logits."""

    tokens: jax.Array  # i32[L], prompt and output; V after the last: writes to it drop
    prompt_len: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], tokens of prompt and output
    key: jax.Array  # key[], new for each token and processor


class ProcessorKind(NamedTuple):
    """What is compiled of a processor: everything but the values of parameters."""

    function: Callable[..., Any]
    init: Callable[..., Any] | None
    update: Callable[..., Any] | None
    after_temperature: bool
    parameters: Specs

    def zeros(self) -> dict[str, np.ndarray]:
        """Parameters of rows that do not use the processor."""
        return {name: np.zeros(shape, dt) for name, shape, dt in self.parameters}

    def init_state(self, parameters: Mapping[str, Any]) -> Any:
        """Return the state before the first token; () without `init`."""
        if self.init is None:
            return ()
        state = jax.tree.map(jnp.asarray, self.init(**parameters))
        return jax.tree.map(np.asarray, state)

    def apply(self, logits: Any, row: Row, state: Any, parameters: Any) -> Any:
        """Return the processed logits f32[V] of one row."""
        if self.init is None:
            return self.function(logits, row, **parameters)
        return self.function(logits, row, state, **parameters)

    def updated(
        self, logits: Any, row: Row, state: Any, token: Any, parameters: Any
    ) -> Any:
        """Return the state after `token`; `logits` are those that `apply` got."""
        assert self.update is not None
        return self.update(logits, row, state, token, **parameters)


Chain = tuple[ProcessorKind, ...]  # the processors of a request, in order


@dataclasses.dataclass(frozen=True, eq=False)
class LogitsProcessor:
    """A logits processor with the values of its parameters.

    Attributes:
      function: `(logits f32[V], row, **parameters) -> f32[V]`, or with a state
        `(logits, row, state, **parameters)`. Logits that are -inf stay -inf whatever it
        returns: no processor allows what another rule of the request forbids.
      parameters: numbers or arrays by name; data of the request. Python's int, float
        and bool become int32, float32 and bool.
      init: `(**parameters) -> state`, a pytree of arrays.
      update: `(logits, row, state, token, **parameters) -> state`, after each token.
        `logits` are those that `function` got, `row` is without the token.
      after_temperature: whether it gets the logits divided by the temperature. Such
        processors come after the others, and before min_p, top_k and top_p.

    Raises:
      ValueError: a function is not callable, `init` and `update` do not come together,
        or a parameter is neither a finite number nor an array of finite numbers.
    """

    function: Callable[..., jax.Array]
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init: Callable[..., Any] | None = None
    update: Callable[..., Any] | None = None
    after_temperature: bool = False

    def __post_init__(self) -> None:
        for name in ("function", "init", "update"):
            value = getattr(self, name)
            if not callable(value) and not (value is None and name != "function"):
                raise ValueError(f"{name}: expected a function, got {value!r}")
        if (self.init is None) != (self.update is None):
            raise ValueError(
                "init, update: expected both (a processor with a state) or none, got "
                f"init={self.init!r} and update={self.update!r}"
            )
        object.__setattr__(self, "parameters", as_parameters(self.parameters))

    @property
    def name(self) -> str:
        """Name of the function, for messages."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @functools.cached_property
    def kind(self) -> ProcessorKind:
        """What is compiled of it."""
        return ProcessorKind(
            self.function,
            self.init,
            self.update,
            self.after_temperature,
            specs_of(self.parameters),
        )

    def __repr__(self) -> str:
        values = ", ".join(
            f"{k}={v.tolist()!r:.60}" for k, v in self.parameters.items()
        )
        return f"{self.name}({values})"


def processor(function: Callable[..., jax.Array], **parameters: Any) -> LogitsProcessor:
    """Return the processor of a function without a state.

    Args:
      function: see `LogitsProcessor`.
      **parameters: the function's keyword arguments, which are data.
    """
    return LogitsProcessor(function, parameters)


def as_processor(name: str, value: Any) -> LogitsProcessor:
    """Return a processor; a function becomes one without parameters."""
    if isinstance(value, LogitsProcessor):
        return value
    if not callable(value) or isinstance(value, type):
        raise ValueError(
            f"{name}: expected a LogitsProcessor, or a function (logits, row) -> "
            f"logits, got {value!r} ({type(value).__name__})"
        )
    function: Any = value
    return LogitsProcessor(function)


# ---- batches of rows


class Processed(NamedTuple):
    """Logits of S rows after a chain, and what `next_states` needs."""

    logits: jax.Array  # f32[S, V]
    temperature: jax.Array  # f32[S], what is left to apply
    inputs: tuple[jax.Array, ...]  # f32[S, V] for each processor with a state
    is_faulty: jax.Array  # bool[S], one returned NaN or +inf: no token is allowed


def process(
    chain: Chain,
    is_mine: jax.Array,
    logits: jax.Array,
    rows: Row,
    values: tuple[dict[str, jax.Array], ...],
    states: tuple[Any, ...],
    temperature: jax.Array,
) -> Processed:
    """Apply a chain to the rows that use it; other rows do not change at all.

    Args:
      chain: the processors.
      is_mine: bool[S], the rows that use it.
      logits: f32[S, V].
      rows: arrays with the axis S; keys of the rows' tokens.
      values: parameters of each processor, with the axis S.
      states: state of each processor, with the axis S.
      temperature: f32[S]; below GREEDY_BELOW: greedy, and not divided by.
    """
    is_late = [kind.after_temperature for kind in chain]
    number_of_inputs = sum(kind.init is not None for kind in chain)

    def run() -> Processed:
        found, left = logits, temperature
        inputs: list[Any] = [None] * len(chain)
        is_faulty = jnp.zeros(is_mine.shape, jnp.bool_)
        for late in (False, True):
            if late and any(is_late):
                divides = is_mine & (temperature >= GREEDY_BELOW)
                found = jnp.where(
                    divides[:, None],
                    found / jnp.where(divides, temperature, 1.0)[:, None],
                    found,
                )
                left = jnp.where(divides, 1.0, temperature)
            for i, kind in enumerate(chain):
                if is_late[i] == late:
                    inputs[i] = found
                    mine = rows._replace(key=_own_keys(rows.key, i))
                    new = jax.vmap(kind.apply)(found, mine, states[i], values[i])
                    is_open = is_mine[:, None] & (found != -jnp.inf)
                    is_wrong = is_open & jnp.isfinite(found) & ~(new < jnp.inf)
                    is_faulty |= jnp.any(is_wrong, axis=1)
                    found = jnp.where(is_open, new, found)
        kept = (x for x, kind in zip(inputs, chain, strict=True) if kind.init)
        found = jnp.where(is_faulty[:, None], -jnp.inf, found)
        return Processed(found, left, tuple(kept), is_faulty)

    return jax.lax.cond(
        jnp.any(is_mine),
        run,
        lambda: Processed(
            logits,
            temperature,
            (logits,) * number_of_inputs,
            jnp.zeros(is_mine.shape, jnp.bool_),
        ),
    )


def next_states(
    chain: Chain,
    is_mine: jax.Array,
    inputs: tuple[jax.Array, ...],
    rows: Row,
    values: tuple[dict[str, jax.Array], ...],
    states: tuple[Any, ...],
    tokens: jax.Array,
) -> tuple[Any, ...]:
    """Return the states after `tokens` i32[S]; see `process`."""
    if not inputs:
        return states

    def run() -> tuple[Any, ...]:
        left, found = iter(inputs), []
        for i, (kind, value, state) in enumerate(
            zip(chain, values, states, strict=True)
        ):
            if kind.init is not None:
                mine = rows._replace(key=_own_keys(rows.key, i))
                new = jax.vmap(kind.updated)(next(left), mine, state, tokens, value)
                state = jax.tree.map(functools.partial(_select, is_mine), new, state)
            found.append(state)
        return tuple(found)

    return jax.lax.cond(jnp.any(is_mine), run, lambda: states)


def _own_keys(keys: jax.Array, index: int) -> jax.Array:
    """Keys that neither the sampler nor another processor uses."""
    return jax.vmap(functools.partial(jax.random.fold_in, data=index + 1))(keys)


def _select(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(mask.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
