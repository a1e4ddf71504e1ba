"""Algorithm checks: a user's functions, traced and run on examples before any request.

Pipeline: params -> [algorithm_checks] -> limits. Host only, but for `num_sequences`.

Shape symbols: W rows and Q sequences of one request, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.base import (
    NO_TOKEN,
    Context,
    Decision,
    DecodingAlgorithm,
    has_context,
    parameters_of,
)
from jpaged.decoding.parameters import Specs
from jpaged.engine.algorithm_states import as_arrays

_LENGTH = 16  # tokens of sequences in checks


@functools.lru_cache(maxsize=256)
def num_sequences(algorithm: DecodingAlgorithm, num_rows: int, vocab_size: int) -> int:
    """Return Q: a request's rows, and the sequences that the algorithm retains.

    Args:
      algorithm: the decoding algorithm.
      num_rows: W, rows of a request.
      vocab_size: V of the model.

    Raises:
      ValueError: the results of the algorithm's `step` have wrong shapes or dtypes.
    """
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_rows))
    logits = jax.ShapeDtypeStruct((num_rows, vocab_size), jnp.float32)
    before = jax.eval_shape(lambda: as_arrays(algorithm.init(num_rows)))
    context = ()
    if has_context(algorithm):
        context = (_abstract_context(algorithm, num_rows, vocab_size),)
    after, decision = jax.eval_shape(algorithm.step, keys, logits, before, *context)
    _check_state(before, after)
    if not isinstance(decision, Decision):
        raise ValueError(
            f"algorithm.step: expected a Decision as second result, got {decision!r}"
        )
    shape = jnp.shape(decision.tokens)
    count = shape[0] if len(shape) == 1 else 0  # 0 raises below
    dtypes = {"tokens": "int32", "parents": "int32", "logprobs": "float32"}
    for name, dtype in (dtypes | {"finished": "bool"}).items():
        got = getattr(decision, name)
        if got.shape != (count,) or got.dtype != dtype or count < num_rows:
            raise ValueError(
                f"algorithm.step: expected Decision.{name} of {dtype} with one shape "
                f"[Q], Q at least {num_rows} (its rows), got {got.dtype} of {got.shape}"
            )
    return count


def _abstract_context(algorithm: Any, num_rows: int, vocab_size: int) -> Context:
    """The shapes of a context."""

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    number, needs = array(num_rows), algorithm.needs
    layers = array(len(algorithm.layers), num_rows, vocab_size, dtype=jnp.float32)
    hidden = array(num_rows, algorithm.hidden_size, dtype=jnp.float32)
    return Context(
        parameters={
            name: array(*shape, dtype=dtype) for name, shape, dtype in algorithm.specs
        },
        prompt_lens=number,
        num_tokens=number,
        limits=number,
        tokens=array(num_rows, _LENGTH) if "history" in needs else None,
        hidden=hidden if "hidden" in needs else None,
        layers=layers if "layers" in needs else None,
        draft=(
            array(num_rows, vocab_size, dtype=jnp.float32) if "draft" in needs else None
        ),
    )


def check_examples(
    algorithm: Any,
    num_rows: int,
    vocab_size: int,
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Run two steps on examples, and check their decisions.

    Args:
      algorithm: an algorithm that `num_sequences` has checked.
      num_rows: W.
      vocab_size: V.
      parameters: the request's values of some of the algorithm's parameters.

    Raises:
      ValueError: a decision has a token or a parent that does not exist.
    """
    values = parameters_of(algorithm, parameters)
    key = tuple(values[name].tobytes() for name, *_ in getattr(algorithm, "specs", ()))
    problem = _problem(algorithm, num_rows, vocab_size, key)
    if problem is not None:
        raise ValueError(f"algorithm.step: {problem}")


@functools.lru_cache(maxsize=1024)
def _problem(
    algorithm: Any, num_rows: int, vocab_size: int, values: tuple[bytes, ...]
) -> str | None:
    """What is wrong with the decisions on the examples; None if nothing is."""
    specs: Specs = getattr(algorithm, "specs", ())
    parameters = {
        name: np.frombuffer(value, dtype).reshape(shape)
        for (name, shape, dtype), value in zip(specs, values, strict=True)
    }
    run = _compiled(algorithm, num_rows, vocab_size)
    count = num_sequences(algorithm, num_rows, vocab_size)
    for name, number in (("random", 0), ("very uneven", 1)):
        logits, decisions = jax.device_get(run(np.int32(number), parameters))
        had_ended = np.zeros((count,), np.bool_)
        for step, one in enumerate(decisions):
            where = (
                f"in step {step} of the example with {name} log-probabilities "
                f"(logits[0, :4]={logits[step][0, :4].tolist()}, {num_rows} rows)"
            )
            if not getattr(algorithm, "keeps_rows", False):
                wrong = (one.parents < 0) | (one.parents >= count)
                if wrong.any():
                    return (
                        f"expected parents from 0 to {count - 1}, the sequences of the "
                        f"request, got {one.parents[wrong][0]} {where}"
                    )
                had_ended = had_ended[one.parents]
            wrong = (one.tokens < NO_TOKEN) | (one.tokens >= vocab_size)
            wrong &= ~had_ended
            if wrong.any():
                return (
                    f"expected tokens from 0 to {vocab_size - 1} (the model's "
                    f"vocabulary), or NO_TOKEN (-1) for a sequence that ends, got "
                    f"{one.tokens[wrong][0]} {where}"
                )
            had_ended = had_ended | one.finished | (one.tokens == NO_TOKEN)
            had_ended[num_rows:] = False  # retained sequences are not inputs
    return None


@functools.lru_cache(maxsize=64)
def _compiled(algorithm: Any, num_rows: int, vocab_size: int) -> Any:
    """A compiled function that returns the logits and decisions of two steps."""

    def run(number: jax.Array, values: dict[str, Any]) -> Any:
        root = jax.random.key(number, impl="threefry2x32")
        state = as_arrays(algorithm.init(num_rows))
        found, seen = [], []
        for step in range(2):
            key = jax.random.fold_in(root, step)
            keys = jax.random.split(key, num_rows)
            shape = (num_rows if step else 1, vocab_size)  # equal in the first step
            scale = jnp.where(number == 0, 1.0, 20.0)
            logits = jax.nn.log_softmax(scale * jax.random.normal(key, shape))
            logits = jnp.broadcast_to(logits, (num_rows, vocab_size))
            context: tuple[Any, ...] = ()
            if has_context(algorithm):
                one = _abstract_context(algorithm, num_rows, vocab_size)
                context = (_example_context(one, key, step, vocab_size, values),)
            state, decision = algorithm.step(keys, logits, state, *context)
            found.append(decision)
            seen.append(logits)
        return seen, found

    return jax.jit(run)


def _example_context(
    shapes: Context, key: jax.Array, step: int, vocab_size: int, values: dict[str, Any]
) -> Context:
    """A context of the shapes `shapes`, in step `step` after a prompt of 4 tokens."""
    length = 4 + step

    def random(shape: Any) -> Any:
        if shape is None:
            return None
        numbers = jax.random.normal(key, shape.shape)
        is_logits = shape.shape[-1] == vocab_size
        return jax.nn.log_softmax(numbers) if is_logits else numbers

    tokens = None
    if shapes.tokens is not None:
        tokens = jax.random.randint(key, shapes.tokens.shape, 0, vocab_size, jnp.int32)
        index = jnp.arange(_LENGTH, dtype=jnp.int32)[None, :]
        tokens = jnp.where(index < length, tokens, vocab_size)
    number = shapes.num_tokens
    assert number is not None
    return shapes._replace(
        parameters={name: jnp.asarray(x) for name, x in values.items()},
        prompt_lens=jnp.full(number.shape, 4, jnp.int32),
        num_tokens=jnp.full(number.shape, length, jnp.int32),
        limits=jnp.full(number.shape, _LENGTH, jnp.int32),
        tokens=tokens,
        hidden=random(shapes.hidden),
        layers=random(shapes.layers),
        draft=random(shapes.draft),
    )


def _check_state(before: Any, after: Any) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            "algorithm.step: expected a state of the structure that init returns, "
            f"{jax.tree.structure(before)}, got {jax.tree.structure(after)}"
        )
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"algorithm.step: expected a state like the one that init returns, "
                f"{old.dtype} of {old.shape}, got {new.dtype} of {new.shape}"
            )
