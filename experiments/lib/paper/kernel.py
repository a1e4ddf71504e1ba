"""Figure 18a: attention over pages beside attention over contiguous memory, measured.

The one figure that no clock can tell: it is timed on the device at hand, so it is not
of `all`, whose report is the same byte for byte wherever it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.paper.curves import Row, row
from experiments.lib.paper.figures import Drawing, Figure, Plan, Shown
from experiments.lib.paper.runs import Case, Run
from experiments.lib.runner import progress
from experiments.lib.timing import Contender, time_in_turn
from jpaged import attention

# Section 7.1 and figure 18a: batches, contexts, and OPT-13B's heads.
BATCHES = (8, 32)
CONTEXTS = (64, 128, 256)
HEADS, HEAD_DIM, BLOCK_SIZE = 40, 128, 16
_REPEATS, _CALLS = 7, 4
_PAGED, _CONTIGUOUS = "over pages", "over contiguous memory"


def _repeated(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`_CALLS` calls in one program, each waiting for the one before."""

    def run(q: jax.Array, *memory: jax.Array) -> jax.Array:
        def again(_: int, q: jax.Array) -> jax.Array:
            return attend(q, *memory).astype(q.dtype)

        return jax.lax.fori_loop(0, _CALLS, again, q)

    return jax.jit(run)


def _contenders(batch: int, context: int) -> dict[str, Contender]:
    """Both on the same numbers, in blocks that lie anywhere in the pool."""
    kind = jnp.float32 if jax.default_backend() == "cpu" else jnp.float16
    draw = np.random.default_rng(0)
    width = context // BLOCK_SIZE
    order = draw.permutation(batch * width)
    tables = jnp.asarray(order.reshape(batch, width), jnp.int32)
    lens = jnp.full((batch,), context, jnp.int32)
    shape = (batch * width, HEADS, BLOCK_SIZE, HEAD_DIM)
    pages = [jnp.asarray(draw.normal(size=shape), kind) for _ in range(2)]
    heads = [
        jnp.swapaxes(pool[order].reshape(batch, width, *shape[1:]), 1, 2)
        for pool in pages
    ]
    contiguous = [x.reshape(batch, HEADS, context, HEAD_DIM) for x in heads]
    q = jnp.asarray(draw.normal(size=(batch, HEADS, HEAD_DIM)), kind)

    def dense(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        scores = jnp.einsum("shd,shtd->sht", q, keys) * HEAD_DIM**-0.5
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(q.dtype)
        return jnp.einsum("sht,shtd->shd", weights, values)

    calls = {
        _PAGED: (attention.paged_attention, (q, *pages, tables, lens)),
        _CONTIGUOUS: (dense, (q, *contiguous)),
    }
    ends = [np.asarray(run(*given), np.float32) for run, given in calls.values()]
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-2)  # one thing, timed twice
    return {
        name: Contender(_repeated(run), lambda given=given: given, units=_CALLS)
        for name, (run, given) in calls.items()
    }


def _show(plan: Plan, found: Mapping[Case, list[Run]]) -> Shown:
    del plan, found
    rows: list[Row] = []
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for batch in BATCHES:
        for context in CONTEXTS:
            progress(f"fig18a: batch {batch}, context {context}")
            times = time_in_turn(_contenders(batch, context), _REPEATS)
            paged, dense = times[_PAGED], times[_CONTIGUOUS]
            ratios = np.divide(paged.seconds, dense.seconds)
            text = f"batch {batch}, context {context}: time over contiguous memory's"
            value = [float(np.median(ratios))]
            rows.append(row("fig18a", text, value, ("fig18a", "ratio")))
            for name, mine in times.items():
                xs, ys = lines.setdefault(f"{name}, batch {batch}", ([], []))
                xs.append(context)
                ys.append(mine.median * 1e6)
    device = jax.devices()[0].device_kind
    remark = (
        f"Measured on {device}, jax {jax.__version__}: medians of {_REPEATS} rounds in "
        f"turn, blocks of {BLOCK_SIZE}. The paper's are its CUDA kernel beside "
        "FasterTransformer's on an A100; contiguous memory here is "
        "XLA's, each head's tokens side by side."
    )
    drawing = Drawing("Attention of one layer", "tokens of context", "us", lines)
    return Shown(rows, [drawing], [remark])


FIGURES = {"fig18a": Figure("Attention kernel, measured here", lambda _: [], _show)}
