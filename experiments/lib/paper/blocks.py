"""Figures of block size and preemption: 18 and 19.

Pipeline: settings -> cases -> runs -> [blocks] -> rows and drawings.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.paper import numbers
from experiments.lib.paper.curves import make_row
from experiments.lib.paper.figures import (
    Drawing,
    FigureContent,
    FigureSettings,
    PaperFigure,
    by_seed,
)
from experiments.lib.paper.runs import PaperCase, PaperRun, roofline_of
from jpaged.arithmetic import cdiv
from jpaged.simulator.costs.load import StepLoad

_X = "block size (tokens)"
_LATENCY = "normalized_latency_s"
SWAPPED_TOKENS = 256  # of figure 19's sequence
GOOD = 0.05  # a block size is good if its latency is within this share of the least
PREEMPTIONS = ("recompute", "swap")


def _cases_18(settings: FigureSettings) -> list[PaperCase]:
    duration = settings.duration("fig18")
    return [
        settings.case("vllm", requests, [rate], duration=duration, block_size=size)
        for requests, rate in numbers.RATES_18.items()
        for size in numbers.BLOCK_SIZES
    ]


def _show_18(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    rows, lines = [], {}
    cases = _cases_18(settings)
    for requests in numbers.RATES_18:
        mine = [case for case in cases if case.requests == requests]
        latencies = np.array([by_seed(found[case], _LATENCY) for case in mine])
        sizes = [case.block_size for case in mine]
        is_good = latencies <= (1 + GOOD) * latencies.min(axis=0)
        best = [float(max(np.array(sizes)[good])) for good in is_good.T]
        text = f"{requests}: largest block size within {GOOD:.0%} of the least latency"
        rows.append(make_row("fig18b", text, best, ("fig18b", requests)))
        sixteen = latencies[sizes.index(16)]
        for size, latency in zip(sizes, latencies, strict=True):
            text = f"{requests}, block size {size}: latency over that of 16"
            rows.append(make_row("fig18b", text, (latency / sixteen).tolist()))
        points = [
            (s, one) for s, some in zip(sizes, latencies, strict=True) for one in some
        ]
        name = numbers.REQUEST_NAMES[requests]
        lines[name] = ([s for s, _ in points], [float(one) for _, one in points])
    remarks = [
        "18a, the kernel's latency, is measured and not simulated: --figure fig18a.",
        "The cost model does not depend on the block size, so small blocks have no "
        "extra cost here, although they have one in a kernel. The smallest of the "
        "paper's good sizes is therefore not reproduced; the memory that large blocks "
        "waste is.",
    ]
    title = "Latency by block size, OPT-13B"
    drawing = Drawing(title, _X, "normalised latency (s/token)", lines, log_x=True)
    return FigureContent(rows, [drawing], remarks)


def _cases_19(settings: FigureSettings) -> list[PaperCase]:
    duration = settings.duration("fig19")
    return [
        settings.case(
            "vllm",
            "sharegpt",
            [numbers.RATE_19],
            duration=duration,
            block_size=size,
            preemption=how,
        )
        for how in PREEMPTIONS
        for size in numbers.BLOCK_SIZES
    ]


def recompute_and_swap_s(size: int) -> tuple[float, float]:
    """Return the seconds to recompute 256 tokens, and to swap them out and in."""
    model = roofline_of("opt-13b")
    none, one = jnp.zeros((1,), jnp.int32), jnp.full((1,), SWAPPED_TOKENS, jnp.int32)
    zero, blocks = jnp.int32(0), jnp.int32(cdiv(SWAPPED_TOKENS, size))

    def seconds(
        lens: jax.Array, swapped: jax.Array | int, pieces: jax.Array | int
    ) -> float:
        load = StepLoad(lens, lens, zero, zero, jnp.int32(swapped), jnp.int32(pieces))
        return float(model(load)) - float(model.step_s)

    moved = blocks * size
    return seconds(one, 0, 0), seconds(none, 2 * moved, 2 * blocks)


def _show_19(
    settings: FigureSettings, found: Mapping[PaperCase, list[PaperRun]]
) -> FigureContent:
    rows, micro = [], {how: ([], []) for how in PREEMPTIONS}
    for size in numbers.BLOCK_SIZES:
        both = recompute_and_swap_s(size)
        for how, seconds in zip(PREEMPTIONS, both, strict=True):
            micro[how][0].append(size)
            micro[how][1].append(seconds * 1e3)
        printed = ("fig19a", "recompute over swap") if 16 <= size else None
        text = f"256 tokens, block size {size}: recomputing over swapping"
        rows.append(make_row("fig19a", text, [both[0] / both[1]], printed))
    cases = _cases_19(settings)
    load = {how: ([], []) for how in PREEMPTIONS}
    latencies = {}
    for case in cases:
        values = by_seed(found[case], _LATENCY)
        latencies[case.preemption, case.block_size] = np.array(values)
        load[case.preemption][0].extend([case.block_size] * len(values))
        load[case.preemption][1].extend(values)
    for size in numbers.BLOCK_SIZES:
        ratio = latencies["recompute", size] / latencies["swap", size]
        printed = ("fig19b", "recompute over swap") if 16 <= size <= 64 else None
        text = f"ShareGPT, block size {size}: latency, recomputing over swapping"
        rows.append(make_row("fig19b", text, ratio.tolist(), printed))
    counts = [sum(by_seed(found[case], "num_preemptions")) for case in cases]
    remarks = [
        f"Preemptions in a case's runs: {min(counts):g} to {max(counts):g}.",
        "A swapped block takes two copies per layer, for keys and values; each takes "
        "the time of a call and of its bytes on the host link (`costs.transfers`).",
    ]
    drawings = [
        Drawing("256 tokens, OPT-13B", _X, "overhead (ms)", _named(micro), log_x=True),
        Drawing(
            "ShareGPT end to end, OPT-13B",
            _X,
            "normalised latency (s/token)",
            _named(load),
            log_x=True,
        ),
    ]
    return FigureContent(rows, drawings, remarks)


def _named(lines: Mapping[str, tuple]) -> dict[str, tuple]:
    """Return lines by names for people."""
    names = {"recompute": "recomputation", "swap": "swapping"}
    return {names[how]: line for how, line in lines.items()}


FIGURES = {
    "fig18": PaperFigure("Figure 18: block size", _cases_18, _show_18),
    "fig19": PaperFigure("Figure 19: recomputing or swapping", _cases_19, _show_19),
}
