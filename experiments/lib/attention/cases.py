"""Cases of the attention benchmark: shapes, their numbers, and what is right.

Beside the road: whoever is compared is built from the same numbers, and its output is
held against float64 before it is timed.

Letters: S rows, H query heads, K kv heads, D head_dim, C tokens of context, N blocks,
P tokens per block.
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

# Relative L2 against float64 on the stored values: docs/decisions/attention.md. Of
# pages of 8 bits, against the values that they stand for.
TOLERANCES = {
    "float32": 1e-5,
    "float16": 1e-3,
    "bfloat16": 4e-3,
    "int8": 5e-3,
    "fp8": 5e-3,
}
_CHECKED_ROWS = 2  # of each shape, for float64 on the host is slow
_DISTINCT = 4_194_301  # numbers; a prime, so that no two rows or blocks are equal


@dataclasses.dataclass(frozen=True)
class Shape:
    """One line of the benchmark."""

    rows: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    kv_dtype: str | None = None  # "int8" or "fp8"; None: that of q

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that a step has to read, scales included."""
        heads = 2 * self.rows * self.context * self.num_kv_heads
        if self.kv_dtype is not None:
            return heads * (self.head_dim + 4)
        return heads * self.head_dim * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape's numbers in its dtype; of 8-bit pages, the float32 they stand for."""

    shape: Shape
    q: np.ndarray  # [S, H, D]
    keys: np.ndarray  # [S, C, K, D]
    values: np.ndarray
    block_tables: np.ndarray  # i32[S, ceil(C / P)], shuffled

    def pages(self, contiguous: np.ndarray) -> np.ndarray:
        """[N, K, P, D] of [S, C, K, D], where the tables say."""
        shape, size = self.shape, self.shape.block_size
        rows, width = self.block_tables.shape
        sizes = (rows, width * size, *contiguous.shape[2:])
        padded = np.zeros(sizes, contiguous.dtype)
        padded[:, : shape.context] = contiguous
        blocks = padded.reshape(rows * width, size, *contiguous.shape[2:])
        pages = np.empty_like(blocks)
        pages[self.block_tables.reshape(-1)] = blocks
        return pages.transpose(0, 2, 1, 3)


def make_case(shape: Shape) -> Case:
    """Numbers that are the same in every process; large arrays repeat them."""
    rng = np.random.default_rng(0)

    def drawn(*sizes: int) -> np.ndarray:
        values = rng.standard_normal(min(math.prod(sizes), _DISTINCT), np.float32)
        return np.resize(values.astype(jnp.dtype(shape.dtype)), sizes)

    def stored(*sizes: int) -> np.ndarray:
        if shape.kv_dtype is None:
            return drawn(*sizes)
        page = quantised_pages.page_dtype(shape.kv_dtype)
        numbers, scale = quantised_pages.quantise(jnp.asarray(drawn(*sizes)), page)
        return np.asarray(quantised_pages.widen(numbers) * scale[..., None])

    sizes = (shape.rows, shape.context, shape.num_kv_heads, shape.head_dim)
    width = cdiv(shape.context, shape.block_size)
    order = rng.permutation(shape.rows * width).astype(np.int32)
    return Case(
        shape,
        drawn(shape.rows, shape.num_heads, shape.head_dim),
        stored(*sizes),
        stored(*sizes),
        order.reshape(shape.rows, width),
    )


def expected(case: Case) -> np.ndarray:
    """float64[min(S, 2), H, D], softmax(q . k / sqrt(D)) . v of the first rows."""
    group = case.shape.num_heads // case.shape.num_kv_heads
    q, keys, values = (
        x[:_CHECKED_ROWS].astype(np.float64) for x in (case.q, case.keys, case.values)
    )
    keys, values = (np.repeat(x, group, axis=2) for x in (keys, values))
    scores = np.einsum("shd,schd->shc", q, keys) / np.sqrt(case.shape.head_dim)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("shc,schd->shd", weights, values)


def relative_error(case: Case, out: np.ndarray) -> float:
    """Relative L2 of an output [S, H, D] against float64."""
    wanted = expected(case)
    found = np.asarray(out[:_CHECKED_ROWS], np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# A contender: the output [S, H, D], and a function that attends `loops` times.
Built = tuple[np.ndarray, Callable[[int], Any]]


_RUN = 16  # repetitions of which the number is known to the compiler


def repeat(loops: jax.Array, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """`state` after `body(index, state)` so many times, a number that is traced.

    Most of them in runs of a known length: after each turn of another loop a GPU would
    ask the host whether there is one more, which takes longer than some kernels.
    """

    def several(run, state):
        return lax.fori_loop(
            0, _RUN, lambda turn, state: body(run * _RUN + turn, state), state
        )

    runs = loops // _RUN
    state = lax.fori_loop(0, runs, several, state)
    return lax.fori_loop(runs * _RUN, loops, body, state)


def jax_loop(attend: Callable[..., Any], q: jax.Array, *arrays: Any) -> Built:
    """A contender of a function of q and arrays, looped within one program."""

    @jax.jit
    def run(loops, q, *arrays):
        def again(_, x):
            return q + 1e-3 * attend(x, *arrays).astype(q.dtype)

        return repeat(loops, again, q)

    out = np.asarray(jax.jit(attend)(q, *arrays).astype(jnp.float32))
    return out, lambda loops: jax.block_until_ready(run(loops, q, *arrays))


def median_seconds(
    run: Callable[[int], Any], repeats: int, least_s: float
) -> dict[str, Any]:
    """Of one loop, the median over `repeats` rounds of at least `least_s` each."""
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
