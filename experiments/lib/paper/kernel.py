"""Figure 18a: attention over pages and over contiguous memory, measured.

Pipeline: settings -> [kernel: timing] -> rows and drawings.

This is the only figure that is measured on the current device and not simulated. It is
not included in `all`, whose report is the same on every machine, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.paper.curves import PaperRow, make_row
from experiments.lib.paper.figures import (
    Drawing,
    FigureContent,
    FigureSettings,
    PaperFigure,
)
from experiments.lib.paper.runs import PaperCase, PaperRun
from experiments.lib.runner import progress
from experiments.lib.timing import Contender, time_in_turn
from jpaged import attention

# Section 7.1 and figure 18a: batches, contexts, and the heads of OPT-13B.
BATCHES = (8, 32)
CONTEXTS = (64, 128, 256)
HEADS, HEAD_DIM, BLOCK_SIZE = 40, 128, 16
_REPEATS, _CALLS = 7, 4
_PAGED, _CONTIGUOUS = "over pages", "over contiguous memory"


def _repeated(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return a program of `_CALLS` calls, each of which depends on the previous one."""

    def run(q: jax.Array, *memory: jax.Array) -> jax.Array:
        def call(_: int, q: jax.Array) -> jax.Array:
            return attend(q, *memory).astype(q.dtype)

        return jax.lax.fori_loop(0, _CALLS, call, q)

    return jax.jit(run)


def _contenders(batch: int, context: int) -> dict[str, Contender]:
    """Return both contenders with the same numbers; blocks are in random order."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.float16
    rng = np.random.default_rng(0)
    width = context // BLOCK_SIZE
    order = rng.permutation(batch * width)
    tables = jnp.asarray(order.reshape(batch, width), jnp.int32)
    lens = jnp.full((batch,), context, jnp.int32)
    shape = (batch * width, HEADS, BLOCK_SIZE, HEAD_DIM)
    pages = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2)]
    heads = [
        jnp.swapaxes(pool[order].reshape(batch, width, *shape[1:]), 1, 2)
        for pool in pages
    ]
    contiguous = [x.reshape(batch, HEADS, context, HEAD_DIM) for x in heads]
    q = jnp.asarray(rng.normal(size=(batch, HEADS, HEAD_DIM)), dtype)

    def dense(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        scores = jnp.einsum("shd,shtd->sht", q, keys) * HEAD_DIM**-0.5
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(q.dtype)
        return jnp.einsum("sht,shtd->shd", weights, values)

    calls = {
        _PAGED: (attention.paged_attention, (q, *pages, tables, lens)),
        _CONTIGUOUS: (dense, (q, *contiguous)),
    }
    ends = [np.asarray(run(*given), np.float32) for run, given in calls.values()]
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-2)  # both compute the same
    return {
        name: Contender(_repeated(run), lambda given=given: given, units=_CALLS)
        for name, (run, given) in calls.items()
    }


def _show(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    del settings, found
    rows: list[PaperRow] = []
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for batch in BATCHES:
        for context in CONTEXTS:
            progress(f"fig18a: batch {batch}, context {context}")
            times = time_in_turn(_contenders(batch, context), _REPEATS)
            paged, dense = times[_PAGED], times[_CONTIGUOUS]
            ratios = np.divide(paged.seconds, dense.seconds)
            text = f"batch {batch}, context {context}: time over contiguous memory's"
            value = [float(np.median(ratios))]
            rows.append(make_row("fig18a", text, value, ("fig18a", "ratio")))
            for name, mine in times.items():
                xs, ys = lines.setdefault(f"{name}, batch {batch}", ([], []))
                xs.append(context)
                ys.append(mine.median * 1e6)
    device = jax.devices()[0].device_kind
    remark = (
        f"Measured on {device}, jax {jax.__version__}: medians of {_REPEATS} "
        f"interleaved rounds, blocks of {BLOCK_SIZE}. The paper compares its CUDA "
        "kernel with FasterTransformer's on an A100. Contiguous memory here is "
        "attention by XLA, with the tokens of a head side by side."
    )
    drawing = Drawing(
        "Attention of one layer, OPT-13B", "context (tokens)", "time (µs)", lines
    )
    return FigureContent(rows, [drawing], [remark])


FIGURES = {
    "fig18a": PaperFigure("Attention kernel, measured here", lambda _: [], _show)
}
