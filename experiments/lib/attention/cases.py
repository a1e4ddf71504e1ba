"""Cases of the attention benchmark: shapes, inputs and expected outputs.

All contenders get the same inputs, and their outputs are compared with float64 before
they are timed.

Shape symbols: S rows, H query heads, K KV heads, D head_dim, C tokens of context, N
blocks, P tokens per block.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.pages import quantised as quantised_pages

# Relative L2 error against float64 on the stored values: docs/decisions/attention.md.
# For 8-bit pages these are the dequantised values.
TOLERANCES = {
    "float32": 1e-5,
    "float16": 1e-3,
    "bfloat16": 4e-3,
    "int8": 5e-3,
    "fp8": 5e-3,
}
_CHECKED_ROWS = 2  # rows compared with float64, which is slow on the host
_DISTINCT = 4_194_301  # distinct numbers; a prime, so that no rows or blocks are equal


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes of one decode-attention call."""

    rows: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    kv_dtype: str | None = None  # "int8" or "fp8"; None: dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that a call has to read, including scales."""
        heads = 2 * self.rows * self.context * self.num_kv_heads
        if self.kv_dtype is not None:
            return heads * (self.head_dim + 4)
        return heads * self.head_dim * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Inputs of one shape in its dtype; for 8-bit pages, dequantised float32."""

    shape: AttentionShape
    q: np.ndarray  # [S, H, D]
    keys: np.ndarray  # [S, C, K, D]
    values: np.ndarray  # [S, C, K, D]
    block_tables: np.ndarray  # i32[S, ceil(C / P)], shuffled

    def pages(self, contiguous: np.ndarray) -> np.ndarray:
        """Lays keys or values [S, C, K, D] out as pages [N, K, P, D] by the tables."""
        shape, size = self.shape, self.shape.block_size
        rows, width = self.block_tables.shape
        sizes = (rows, width * size, *contiguous.shape[2:])
        padded = np.zeros(sizes, contiguous.dtype)
        padded[:, : shape.context] = contiguous
        blocks = padded.reshape(rows * width, size, *contiguous.shape[2:])
        pages = np.empty_like(blocks)
        pages[self.block_tables.reshape(-1)] = blocks
        return pages.transpose(0, 2, 1, 3)


def make_case(shape: AttentionShape) -> AttentionCase:
    """Inputs that are equal in every process; large arrays repeat their numbers."""
    rng = np.random.default_rng(0)

    def sample(*sizes: int) -> np.ndarray:
        values = rng.standard_normal(min(math.prod(sizes), _DISTINCT), np.float32)
        return np.resize(values.astype(jnp.dtype(shape.dtype)), sizes)

    def stored(*sizes: int) -> np.ndarray:
        if shape.kv_dtype is None:
            return sample(*sizes)
        page = quantised_pages.page_dtype(shape.kv_dtype)
        numbers, scale = quantised_pages.quantise(jnp.asarray(sample(*sizes)), page)
        return np.asarray(quantised_pages.widen(numbers) * scale[..., None])

    sizes = (shape.rows, shape.context, shape.num_kv_heads, shape.head_dim)
    width = cdiv(shape.context, shape.block_size)
    order = rng.permutation(shape.rows * width).astype(np.int32)
    return AttentionCase(
        shape,
        sample(shape.rows, shape.num_heads, shape.head_dim),
        stored(*sizes),
        stored(*sizes),
        order.reshape(shape.rows, width),
    )


def expected_output(case: AttentionCase) -> np.ndarray:
    """softmax(q . k / sqrt(D)) . v of the first rows, float64[min(S, 2), H, D]."""
    group = case.shape.num_heads // case.shape.num_kv_heads
    q, keys, values = (
        x[:_CHECKED_ROWS].astype(np.float64) for x in (case.q, case.keys, case.values)
    )
    keys, values = (np.repeat(x, group, axis=2) for x in (keys, values))
    scores = np.einsum("shd,schd->shc", q, keys) / np.sqrt(case.shape.head_dim)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("shc,schd->shd", weights, values)


def relative_error(case: AttentionCase, out: np.ndarray) -> float:
    """Relative L2 error of an output [S, H, D] against float64."""
    expected = expected_output(case)
    found = np.asarray(out[:_CHECKED_ROWS], np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# A contender's output [S, H, D], and a function that computes it `loops` times.
BuiltContender = tuple[np.ndarray, Callable[[int], Any]]

_INNER_LOOPS = 16  # repetitions in a loop whose length the compiler knows


def repeat(loops: jax.Array | int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """Applies `body(index, state)` `loops` times, where `loops` is traced.

    Most repetitions run in inner loops of known length. In a loop of unknown length a
    GPU asks the host after every repetition whether there is another one, which takes
    longer than some kernels.
    """

    def several(run: Any, state: Any) -> Any:
        return lax.fori_loop(
            0,
            _INNER_LOOPS,
            lambda index, state: body(run * _INNER_LOOPS + index, state),
            state,
        )

    runs = loops // _INNER_LOOPS
    state = lax.fori_loop(0, runs, several, state)
    return lax.fori_loop(runs * _INNER_LOOPS, loops, body, state)


def jax_loop(attend: Callable[..., Any], q: jax.Array, *arrays: Any) -> BuiltContender:
    """Builds a contender from a jax function; its repetitions are one program.

    Args:
      attend: Returns the output [S, H, D] of (q, *arrays).
      q: Queries [S, H, D].
      *arrays: Further arguments of `attend`.
    """

    @jax.jit
    def run(loops: jax.Array, q: jax.Array, *arrays: Any) -> jax.Array:
        def attend_again(_: Any, x: jax.Array) -> jax.Array:
            return q + 1e-3 * attend(x, *arrays).astype(q.dtype)

        return repeat(loops, attend_again, q)

    out = np.asarray(jax.jit(attend)(q, *arrays).astype(jnp.float32))
    return out, lambda loops: jax.block_until_ready(run(loops, q, *arrays))


def median_seconds(
    run: Callable[[int], Any], repeats: int, least_s: float
) -> dict[str, Any]:
    """Times one repetition.

    Args:
      run: Runs the given number of repetitions and waits for the result.
      repeats: Rounds; the median counts.
      least_s: Shortest duration of a round, in seconds.

    Returns:
      "seconds" of one repetition, and "loops", the repetitions in a round.
    """
    run(2)
    begin = time.perf_counter()
    run(2)
    once = max((time.perf_counter() - begin) / 2, 1e-7)
    loops = max(2, round(least_s / once))
    run(loops)
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run(loops)
        taken.append((time.perf_counter() - begin) / loops)
    return {"seconds": float(np.median(taken)), "loops": loops}
