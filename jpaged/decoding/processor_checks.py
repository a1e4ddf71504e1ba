"""Processor checks: a logits processor runs on examples before a request may use it.

Pipeline: params -> [processor_checks] -> submission. Host only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.processors import LogitsProcessor, ProcessorKind, Row

_LENGTH = 16  # tokens of the examples' sequences


def check_processors(processors: Sequence[LogitsProcessor], vocab_size: int) -> None:
    """Raise ValueError if a processor fails on an example, which the message shows.

    Args:
      processors: in the order of the request.
      vocab_size: V.
    """
    for index, one in enumerate(processors):
        name = f"logits_processors[{index}] ({one.name})"
        _check_shapes(name, one, vocab_size)
        values = tuple(x.tobytes() for x in one.parameters.values())
        problem = _problem(one.kind, values, vocab_size)
        if problem is not None:
            raise ValueError(f"{name}: {problem}; with parameters {one!r}")


def _check_shapes(name: str, one: LogitsProcessor, vocab_size: int) -> None:
    """Trace the functions without running them."""
    kind = one.kind
    logits, row = _abstract(vocab_size)

    def trace(part: str, function: Any, *args: Any) -> Any:
        try:
            return jax.eval_shape(function, *args)
        except Exception as cause:
            raise ValueError(
                f"{name}: expected a {part} that jax can trace with logits f32"
                f"[{vocab_size}] and parameters {one!r}, got {type(cause).__name__}: "
                f"{cause!s:.500}{_advice(kind.function)}"
            ) from cause

    state: Any = ()
    if kind.init is not None:
        state = trace(
            "function init", lambda p: _arrays(kind.init, p), dict(one.parameters)
        )
    result = trace("function", kind.apply, logits, row, state, dict(one.parameters))
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
    if shape != (vocab_size,) or dtype != jnp.float32:
        got = f"{dtype} of shape {shape}" if shape is not None else f"{result!r:.200}"
        raise ValueError(
            f"{name}: expected logits float32 of shape ({vocab_size},) for logits "
            f"float32 of shape ({vocab_size},), got {got}{_advice(kind.function)}"
        )
    if kind.init is None:
        return
    token = jax.ShapeDtypeStruct((), jnp.int32)
    after = trace(
        "function update", kind.updated, logits, row, state, token, dict(one.parameters)
    )
    if _spec(state) != _spec(after):
        raise ValueError(
            f"{name}: expected update to keep the structure, shapes and dtypes of the "
            f"state that init returns, {_spec(state)}, got {_spec(after)}"
        )


def _advice(function: Any) -> str:
    """What to add to a message about a function that looks like one of vLLM's."""
    try:
        first = next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):
        return ""
    if "ids" not in first:
        return ""
    return (
        "; the arguments are (logits, row) and not (token_ids, logits): row.tokens has "
        "the token ids"
    )


def _arrays(init: Any, parameters: dict[str, Any]) -> Any:
    return jax.tree.map(jnp.asarray, init(**parameters))


def _spec(state: Any) -> str:
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", state))


def _abstract(vocab_size: int) -> tuple[Any, Row]:
    number = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    tokens = jax.ShapeDtypeStruct((_LENGTH,), jnp.int32)
    logits = jax.ShapeDtypeStruct((vocab_size,), jnp.float32)
    columns: list[Any] = [tokens, number, number, key]
    return logits, Row(*columns)


def _examples(vocab_size: int) -> list[tuple[str, np.ndarray, np.ndarray, int]]:
    """What is special, logits f32[V], tokens i32[L], and the length of the prompt."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, vocab_size).astype(np.float32)
    tokens = rng.integers(0, vocab_size, _LENGTH).astype(np.int32)
    repeated = np.resize(tokens[:2], _LENGTH)
    peaked = np.where(np.arange(vocab_size) == 1, 0, -np.float32(60)).astype("float32")
    masked = np.where(np.arange(vocab_size) % 3 == 1, logits, -np.inf)
    one = np.where(np.arange(vocab_size) == vocab_size - 1, logits, -np.inf)
    return [
        ("random logits", logits, tokens, 4),
        ("the first token of an output", logits, tokens, _LENGTH),
        ("equal logits", np.zeros_like(logits), repeated, 4),
        ("one probable token", peaked, repeated, 1),
        ("two thirds of the tokens forbidden", masked.astype("float32"), tokens, 4),
        ("all tokens but one forbidden", one.astype("float32"), tokens, 4),
        ("large logits", logits * np.float32(1e4), tokens, 4),
    ]


@functools.lru_cache(maxsize=64)
def _compiled(kind: ProcessorKind, has_state: bool) -> Any:
    """Both functions for all examples: logits, whether states are finite."""

    def run(logits: Any, row: Row, parameters: Any) -> tuple[jax.Array, jax.Array]:
        state: Any = () if kind.init is None else _arrays(kind.init, parameters)
        is_finite = jnp.bool_(True)
        found = logits
        for _ in range(2 if has_state else 1):
            found = kind.apply(logits, row, state, parameters)
            if kind.init is not None:
                token = jnp.argmax(logits).astype(jnp.int32)
                state = kind.updated(logits, row, state, token, parameters)
                for leaf in jax.tree.leaves(state):
                    is_finite &= ~jnp.any(jnp.isnan(leaf))
        return found, is_finite

    return jax.jit(jax.vmap(run, in_axes=(0, 0, None)))


@functools.lru_cache(maxsize=1024)
def _problem(
    kind: ProcessorKind, values: tuple[bytes, ...], vocab_size: int
) -> str | None:
    """What is wrong with the results on the examples."""
    parameters = {
        name: np.frombuffer(value, dtype).reshape(shape)
        for (name, shape, dtype), value in zip(kind.parameters, values, strict=True)
    }
    what, logits, tokens, lens = zip(*_examples(vocab_size), strict=True)
    rows = Row(
        tokens=jnp.stack(tokens),
        prompt_len=jnp.asarray(lens, jnp.int32),
        num_tokens=jnp.full((len(lens),), _LENGTH, jnp.int32),
        key=jax.random.split(jax.random.key(0, impl="threefry2x32"), len(lens)),
    )
    run = _compiled(kind, kind.init is not None)
    found, is_finite = jax.device_get(run(np.stack(logits), rows, parameters))
    for i, given in enumerate(logits):
        wrong = np.isnan(found[i]) | (found[i] == np.inf)
        wrong &= given > -np.inf
        at = int(np.argmax(wrong))
        example = (
            f"for the example with {what[i]}: logits[:6]={given[:6].tolist()}, "
            f"tokens={tokens[i].tolist()}, prompt_len={lens[i]}, num_tokens={_LENGTH}"
        )
        if wrong.any():
            return (
                f"expected finite logits or -inf, got {found[i][at]} for token {at} "
                f"{example}"
            )
        if not is_finite[i]:
            return f"expected a state without NaN, got one with NaN {example}"
    return None
