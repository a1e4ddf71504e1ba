"""Attention over pages in float64 numpy, one query and one head at a time, and cases.

There are no tiles, no online softmax and no batch here: each query reads its table
token by token, collects the tokens that it sees, and applies the formula. A case fills
everything that must not be read with NaN or garbage, so that a read of it shows.
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from jpaged.arithmetic import cdiv

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Table entries after a sequence's last block.
GARBAGE = (-1, 2**31 - 1, -(2**31), 10**6)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `paged_attention` as numpy arrays; `query_start_loc` may be None."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    block_tables: np.ndarray
    context_lens: np.ndarray
    query_start_loc: np.ndarray | None = None


def make_case(
    context_lens: list[int],
    query_lens: list[int] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 16,
    dtype: str = "float32",
    num_padding: int = 0,
    shared_blocks: int = 0,
    spare_columns: int = 3,
    seed: int = 0,
) -> Case:
    """Return rows of the given lengths over a shuffled pool.

    With `query_lens` the queries are chunks, followed by `num_padding` queries that no
    row owns. All rows share their first `shared_blocks` full blocks. Slots after a
    row's length and unused blocks hold NaN.
    """
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads = heads
    num_used = [cdiv(length, block_size) for length in context_lens]
    width = max(*num_used, 1) + spare_columns
    num_blocks = sum(num_used) + 5
    order = iter(rng.permutation(num_blocks).tolist())
    prefix = [next(order) for _ in range(shared_blocks)]

    tables = rng.choice(GARBAGE + tuple(range(num_blocks)), (len(num_used), width))
    pages_shape = (num_blocks, num_kv_heads, block_size, head_dim)
    k_pages, v_pages = np.full((2, *pages_shape), np.nan)
    for row, length in enumerate(context_lens):
        own = [next(order) for _ in range(num_used[row])]
        num_shared = min(shared_blocks, length // block_size)
        own[:num_shared] = prefix[:num_shared]
        tables[row, : len(own)] = own
        for position in range(length):
            block, offset = own[position // block_size], position % block_size
            if position // block_size < num_shared and row != _first(
                context_lens, shared_blocks, block_size, position // block_size
            ):
                continue
            k_pages[block, :, offset] = rng.standard_normal((num_kv_heads, head_dim))
            v_pages[block, :, offset] = rng.standard_normal((num_kv_heads, head_dim))

    query_start_loc = None
    num_queries = len(context_lens)
    if query_lens is not None:
        query_start_loc = np.cumsum([0, *query_lens]).astype(np.int32)
        num_queries = int(query_start_loc[-1]) + num_padding
    kind = DTYPES[dtype]
    return Case(
        q=rng.standard_normal((num_queries, num_heads, head_dim)).astype(kind),
        k_pages=k_pages.astype(kind),
        v_pages=v_pages.astype(kind),
        block_tables=tables.astype(np.int32),
        context_lens=np.array(context_lens, np.int32),
        query_start_loc=query_start_loc,
    )


def _first(context_lens: list[int], shared: int, block_size: int, column: int) -> int:
    """Return the first row with the shared block of this column; it fills the block."""
    return next(
        row
        for row, length in enumerate(context_lens)
        if min(shared, length // block_size) > column
    )


def attention(
    case: Case,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the output float64 [T, H, D] and natural log-sum-exp float64 [T, H].

    softmax(scale * q . k) . v over the tokens that the query sees; zeros and -inf if it
    sees none.
    """
    num_queries, num_heads, head_dim = case.q.shape
    _, num_kv_heads, block_size, _ = case.k_pages.shape
    scale = head_dim**-0.5 if scale is None else scale
    q = case.q.astype(np.float64)
    out = np.zeros((num_queries, num_heads, head_dim))
    lse = np.full((num_queries, num_heads), -np.inf)
    for row, query, num_visible in _queries(case):
        first = 0 if sliding_window is None else max(0, num_visible - sliding_window)
        slots = [
            (case.block_tables[row, position // block_size], position % block_size)
            for position in range(first, num_visible)
        ]
        if not slots:
            continue
        blocks, offsets = np.array(slots).T
        keys = case.k_pages[blocks, :, offsets].astype(np.float64)  # [visible, K, D]
        values = case.v_pages[blocks, :, offsets].astype(np.float64)
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = keys[:, kv_head] @ q[query, head] * scale
            if logits_soft_cap is not None:
                scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
            highest = scores.max()
            weights = np.exp(scores - highest)
            total = weights.sum()
            if sinks is not None:
                total += np.exp(float(sinks[head]) - highest)
            out[query, head] = weights @ values[:, kv_head] / total
            lse[query, head] = highest + np.log(total)
    return out, lse


def _queries(case: Case):
    """Yield (row, index in q, number of tokens it sees) for every query."""
    for row, length in enumerate(case.context_lens.tolist()):
        if case.query_start_loc is None:
            yield row, row, length
            continue
        start, end = case.query_start_loc[row : row + 2].tolist()
        for query in range(start, end):
            yield row, query, length - (end - 1 - query)


def relative_errors(got: Any, expected: np.ndarray) -> np.ndarray:
    """Return |got - expected| / |expected| of every vector of the last axis, float64.

    Each vector is divided by its own norm. Divided by the norm of all outputs, an error
    in a row with a long context, whose outputs are small averages, would be hidden by
    rows with few tokens. If a vector should be zero, the error is 0 or infinite. NaN
    stays NaN.
    """
    got = np.asarray(got).astype(np.float64)
    difference = np.linalg.norm(got - expected, axis=-1)
    norm = np.linalg.norm(expected, axis=-1)
    is_zero = norm == 0
    empty = np.where(difference == 0, 0.0, np.where(difference > 0, np.inf, np.nan))
    return np.where(is_zero, empty, difference / np.where(is_zero, 1.0, norm))


def arrays(case: Case) -> dict[str, np.ndarray]:
    """Return the case's arguments by name, without those that are None."""
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    return {name: value for name, value in fields.items() if value is not None}


def check_result(
    case: Case, out: Any, lse: Any, tolerance: float, lse_tolerance: float, **options
) -> None:
    """Assert that a kernel's output and log-sum-exp equal the oracle's."""
    expected_out, expected_lse = attention(case, **options)
    assert out.shape == case.q.shape
    assert out.dtype == case.q.dtype
    worst = relative_errors(out, expected_out).max()
    assert worst < tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=lse_tolerance, rtol=0)


def without_front(case: Case, window: int) -> Case:
    """Return the case without the blocks that no query of a row's window sees.

    Their entries are -1, as after `cache_groups.release_front`, and their pages hold
    NaN, as do the first and the last block of the pool, which -1 must not read.
    """
    pages = [case.k_pages.copy(), case.v_pages.copy()]
    num_blocks, _, size, _ = case.k_pages.shape
    starts = case.query_start_loc
    tables = case.block_tables.copy()
    tables[(tables >= 0) & (tables < num_blocks)] += 1
    pages = [np.pad(x, ((1, 1), (0, 0), (0, 0), (0, 0))) for x in pages]
    for row, length in enumerate(case.context_lens.tolist()):
        queries = 1 if starts is None else int(starts[row + 1] - starts[row])
        front = max(0, length - max(queries, 1) + 1 - window) // size
        for x in pages:
            x[[0, -1, *tables[row, :front]]] = np.nan
        tables[row, :front] = -1
    return dataclasses.replace(
        case, k_pages=pages[0], v_pages=pages[1], block_tables=tables
    )
