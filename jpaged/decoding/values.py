"""Values of texts: functions that a search maximises.

Pipeline: decoder -> [values] -> search, contrib.value_beam.

A value function is a pure function of one text, which a search batches with `vmap`:

    def short(leaf, *, target):
        return -jnp.abs(leaf.num_tokens - leaf.prompt_len - target)

Its parameters are data: a new value compiles nothing.

Shape symbols: L tokens of the longest text, V vocabulary, E hidden size, B texts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Leaf(NamedTuple):
    """The argument of a value function: a text, and the model's results for it."""

    tokens: jax.Array  # i32[L], prompt and output, then V, which is out of range
    prompt_len: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], tokens of prompt and output
    logprob: jax.Array  # f32[], sum of the output's log-probabilities
    logprobs: jax.Array  # f32[V], of the next token
    hidden: jax.Array | None  # [E], of the last token after the final norm
    is_terminal: jax.Array  # bool[], the output has ended


Value = Callable[..., jax.Array]  # (leaf, **parameters) -> f32[]


def mean_logprob(leaf: Leaf) -> jax.Array:
    """Return the mean log-probability of the output's tokens and of the next one.

    The next token counts with the expectation of its log-probability, unless the text
    has ended.
    """
    probabilities = jnp.exp(leaf.logprobs)
    terms = jnp.where(probabilities > 0, probabilities * leaf.logprobs, 0.0)
    total = leaf.logprob + jnp.where(leaf.is_terminal, 0.0, jnp.sum(terms))
    count = leaf.num_tokens - leaf.prompt_len + jnp.where(leaf.is_terminal, 0, 1)
    return total / jnp.maximum(count, 1).astype(jnp.float32)


def evaluate(value: Value, leaves: Leaf, parameters: dict[str, Any]) -> jax.Array:
    """Return the values f32[B] of B texts.

    Args:
      value: the value function.
      leaves: the texts; each array has a first axis B.
      parameters: keyword arguments of the value function.
    """
    found = jax.vmap(lambda leaf: value(leaf, **parameters))(leaves)
    return jnp.asarray(found, jnp.float32)


def check_value(
    value: Value, parameters: dict[str, Any], sizes: tuple[int, int, int], dtype: str
) -> None:
    """Trace a value function on the shapes of one text.

    Args:
      value: the function.
      parameters: its keyword arguments.
      sizes: L, V and E.
      dtype: of the hidden state.

    Raises:
      ValueError: the function cannot be traced, or does not return one number.
    """
    length, vocab_size, hidden_size = sizes

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    leaf = Leaf(
        tokens=array(length),
        prompt_len=array(),
        num_tokens=array(),
        logprob=array(dtype=jnp.float32),
        logprobs=array(vocab_size, dtype=jnp.float32),
        hidden=array(hidden_size, dtype=dtype),
        is_terminal=array(dtype=jnp.bool_),
    )
    given = (leaf, parameters)
    name = getattr(value, "__name__", type(value).__name__)
    try:
        found: Any = jax.eval_shape(lambda leaf, own: value(leaf, **own), *given)
    except Exception as cause:  # whatever a user's function raises
        raise ValueError(
            f"value: expected a function (leaf, **parameters) that jax can trace with "
            f"parameters {sorted(parameters)}, got {type(cause).__name__} with {name}: "
            f"{cause!s:.500}"
        ) from cause
    is_number = getattr(found, "shape", None) == () and (
        jnp.issubdtype(found.dtype, jnp.floating)
        or jnp.issubdtype(found.dtype, jnp.integer)
    )
    if not is_number:
        raise ValueError(
            f"value: expected a function that returns one number, f32[], got {found!r} "
            f"from {name}"
        )
