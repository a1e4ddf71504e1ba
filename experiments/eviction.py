"""Compares eviction policies of the prefix cache: hit ratio against capacity.

    python -m experiments.eviction --plot eviction.png
    python -m experiments.eviction --trace conversation.jsonl.gz \\
        --trace synthetic.jsonl.gz --capacity_blocks=1000,10000,50000

The requests of a trace are processed one after the other, as by
`experiments.prefix_cache`: the blocks of the longest cached prefix are hits, then all
blocks of the prompt are cached, and a policy of `jpaged.policies.eviction` chooses what
is evicted until `--capacity_blocks` are left. All policies are one compiled program
per capacity: which one evicts is data. `belady` evicts what is used last in the future,
which no policy can know and none can beat (`jpaged.simulator.optimum`). `unlimited`
evicts nothing.

`--trace` is a file in the format of the Mooncake traces (Qin et al., FAST'25), and may
be repeated; without it the runner generates conversations.

Time: some seconds for generated conversations; 4 minutes for Mooncake's conversation
trace at the default capacities on two CPU cores.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import prefix_cache
from experiments.lib import runner
from jpaged import plot
from jpaged.plot import style
from jpaged.policies import EVICTION, CachedBlocks
from jpaged.simulator.optimum import belady_hits
from jpaged.simulator.workloads.traces import read_prompts

FLAGS = flags.FLAGS
BLOCK_SIZE = 512  # tokens of a block of the traces
BOUNDS = ("belady", "unlimited")


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_multi_string("trace", None, "JSONL file, also gzipped; repeat it.")
    flags.DEFINE_list(
        "capacity_blocks",
        ["300", "1000", "3000", "10000", "30000"],
        "Blocks that the cache keeps.",
    )
    flags.DEFINE_list("policies", None, "Policies to compare; default: all.")
    flags.DEFINE_integer(
        "num_requests", 1000, "Requests of the generated trace.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Seed of the generated trace.")
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


def by_number(blocks: CachedBlocks) -> jax.Array:
    """All policies in one program: the first parameter selects one."""
    view = blocks._replace(parameters=blocks.parameters[1:], block_size=BLOCK_SIZE)
    scores = [policy(view).astype(jnp.float32) for policy in EVICTION.policies.values()]
    return jnp.stack(scores)[blocks.parameters[0].astype(jnp.int32)]


def hit_ratios(
    prompts: Sequence[Sequence[int]], capacity: int, policies: Sequence[str]
) -> dict[str, float]:
    """Blocks that were hits, divided by all blocks, for each policy and bound."""
    num_blocks, names = max(sum(map(len, prompts)), 1), list(EVICTION.policies)
    hits = {}
    for policy in policies:
        number = float(names.index(policy))
        hits[policy], *_ = prefix_cache.replay_prompts(
            prompts, capacity, by_number, (number,)
        )
    hits["belady"] = belady_hits(prompts, capacity)
    hits["unlimited"] = belady_hits(prompts, num_blocks)
    return {name: float(found.sum()) / num_blocks for name, found in hits.items()}


def draw(path: str, found: dict[str, dict[int, dict[str, float]]]) -> None:
    """Draws the figure: a panel for each trace, a line for each policy."""
    figure, panels = style.new_figure(1, len(found))
    for axes, (trace, rows) in zip(panels[0], found.items(), strict=True):
        curves = {
            name: [(capacity, row[name]) for capacity, row in rows.items()]
            for name in next(iter(rows.values()))
        }
        most = curves.pop("unlimited")[0][1]
        axes.axhline(100 * most, color=style.GREY, linestyle=":", label="unlimited")
        plot.hit_ratio(curves, optimum=curves.pop("belady"), title=trace, ax=axes)
    style.save(figure, path)


def main(argv: list[str]) -> None:
    """Replays the traces under all policies and prints the results."""
    del argv
    with runner.user_errors("eviction", EOFError):
        capacities = runner.positive_integers("capacity_blocks")
        policies = runner.some_of("policies", FLAGS.policies, list(EVICTION.policies))
        traces = {
            pathlib.Path(one).name: read_prompts(one) for one in FLAGS.trace or ()
        }
    if not traces:
        traces["generated conversations"] = prefix_cache.synthetic_trace(
            FLAGS.num_requests, BLOCK_SIZE, FLAGS.seed
        )
    found: dict[str, dict[int, dict[str, float]]] = {}
    columns = ["capacity", *policies, *BOUNDS]
    for trace, requests in traces.items():
        print(f"{trace}: {len(requests)} requests")
        print("".join(f"{name:>11}" for name in columns), flush=True)
        prompts = [request.hash_ids for request in requests]
        found[trace] = {}
        for capacity in capacities:
            ratios = hit_ratios(prompts, capacity, policies)
            found[trace][capacity] = ratios
            cells = "".join(f"{ratio:>11.4f}" for ratio in ratios.values())
            print(f"{capacity:>11}{cells}", flush=True)
    if FLAGS.plot is not None:
        draw(FLAGS.plot, found)
    rows: list[dict[str, Any]] = [
        {"trace": trace, "capacity_blocks": capacity, **ratios}
        for trace, by_capacity in found.items()
        for capacity, ratios in by_capacity.items()
    ]
    runner.print_json({"rows": rows, "flags": runner.flag_values(__name__)})


if __name__ == "__main__":
    runner.start(main, define_flags)
