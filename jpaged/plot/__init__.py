"""Plots: figures of live engines, block tables, caches and latencies, for papers.

Pipeline: step records, outputs, block tables, curves -> [plot] -> matplotlib.

Every function accepts matplotlib axes (`ax=`) or creates a figure, and returns what it
drew on. The package needs the extra `plot`.

    from jpaged import plot

    ax = plot.occupancy(llm)
    ax.figure.savefig("occupancy.pdf")
"""

from jpaged.plot.blocks import block_tables as block_tables
from jpaged.plot.curves import hit_ratio as hit_ratio
from jpaged.plot.curves import latency_rate as latency_rate
from jpaged.plot.live import live_load as live_load
from jpaged.plot.live import occupancy as occupancy
from jpaged.plot.live import sequences as sequences
from jpaged.plot.live import timeline as timeline

__all__ = [
    "block_tables",
    "hit_ratio",
    "latency_rate",
    "live_load",
    "occupancy",
    "sequences",
    "timeline",
]
