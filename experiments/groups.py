"""Compares the KV memory of one row with and without cache groups, by context length.

    python -m experiments.groups --plot groups.png

A row of each model grows to each context length in chunks of `--chunk` tokens, through
the engine's block manager (no weights, no pages). Printed are the MiB of its blocks
when it decodes:

- one table: all layers keep all blocks.
- groups: layers with a window give blocks back (`jpaged.kv.cache_groups`); counted in
  the block tables.
- arithmetic: each layer stores exactly the tokens that the next one sees, without
  blocks and without the next token's own. No paged scheme is below it.
- vllm: groups of equal numbers of layers, as its hybrid KV cache manager chooses them,
  with blocks freed in front of the window.
- transformers: a ring of pages per layer with a window, as its continuous batching has.

`peak` is the most that the groups needed on the way: a chunk is written before blocks
in front of its window can be released. The schemes of vLLM and transformers are
computed by the rules of their source code (November 2026), and not run.

Takes half a minute. Expected: gemma-3-27b at 131,072 tokens needs 17 % of one table.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.lib import runner
from jpaged.arithmetic import cdiv
from jpaged.attention import kv_cache
from jpaged.kv import block_manager, cache_groups
from jpaged.models.config import ModelConfig
from jpaged.models.shapes import random_config
from jpaged.plot import curves, style

FLAGS = flags.FLAGS
SCHEMES = ("one_table", "groups", "arithmetic", "vllm", "transformers")
MODELS = ("mistral-7b", "gemma-2-9b", "gemma-3-1b", "gemma-3-27b", "gpt-oss-20b")


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_list("models", list(MODELS), "Names of shapes, or gemma-3-27b.")
    flags.DEFINE_list(
        "contexts",
        [str(2**n) for n in range(10, 18)],
        "Tokens of the row; longer ones than the model's are skipped.",
    )
    flags.DEFINE_integer("block_size", 16, "Tokens per block.", lower_bound=1)
    flags.DEFINE_integer("chunk", 512, "Prompt tokens of a step.", lower_bound=1)
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


def find_model(name: str) -> ModelConfig:
    """Returns the sizes of a model; those of its attention are what counts here."""
    if name != "gemma-3-27b":
        return random_config(name)
    return dataclasses.replace(
        random_config("gemma-3-1b"),
        num_layers=62,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        sliding_window=1024,
        full_layers=tuple(range(5, 62, 6)),
        max_position_embeddings=131072,
    )


def measure(
    config: ModelConfig, context: int, block_size: int, chunk: int
) -> dict[str, float]:
    """Returns the MiB of a row of `context` tokens by scheme, and the groups' peak."""
    longest = config.max_length
    groups = cache_groups.layer_groups(config.windows, longest)
    used, peak = grown_row(groups.windows, context, block_size, chunk)
    layer = kv_cache.bytes_per_block(
        num_layers=1,
        num_kv_heads=config.num_kv_heads,
        block_size=block_size,
        head_dim=config.head_dim,
        dtype=config.dtype,
    )
    pages = {  # pages of one layer
        "one_table": config.num_layers * cdiv(context, block_size),
        "groups": groups.num_layers * used,
        "arithmetic": needed_tokens(config, context) / block_size,
        "vllm": vllm_pages(config, context, block_size),
        "transformers": transformers_pages(config, context, block_size),
        "peak": groups.num_layers * peak,
    }
    return {name: number * layer / 2**20 for name, number in pages.items()}


def grown_row(
    windows: cache_groups.Windows, context: int, block_size: int, chunk: int
) -> tuple[int, int]:
    """Returns the blocks of a row when it decodes, and the most on the way there."""
    state = block_manager.init_state(
        num_blocks=cache_groups.blocks_of_length(windows, block_size, context, chunk),
        block_size=block_size,
        max_seqs=1,
        max_blocks_per_seq=cdiv(context, block_size),
        windows=windows,
    )
    peak, step = 0, _step()
    for start in range(0, context, chunk):
        state, ok, used = step(state, jnp.array([min(chunk, context - start)]))
        if not ok:
            raise RuntimeError("the block manager refused a row that has to fit")
        peak = max(peak, int(used))
    state = cache_groups.release_front(state, jnp.array([False]))
    return int(jnp.sum(state.ref_counts)), peak


@functools.cache
def _step() -> Any:
    def step(state: Any, num_tokens: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        state = cache_groups.release_front(state, jnp.array([False]))
        state, appended = block_manager.append(state, num_tokens)
        return state, appended.ok, jnp.sum(state.ref_counts)

    return jax.jit(step)


def needed_tokens(config: ModelConfig, context: int) -> int:
    """Returns the tokens that all layers together must store for the next token."""
    return sum(
        context if window is None else min(context, window - 1)
        for window in config.windows
    )


def _counts(config: ModelConfig) -> dict[int | None, int]:
    """Returns the number of layers with each window."""
    windows = config.windows
    return {window: windows.count(window) for window in dict.fromkeys(windows)}


def vllm_pages(config: ModelConfig, context: int, block_size: int) -> int:
    """Returns the pages of vLLM's groups (v1/core/kv_cache_planning.py).

    All groups have as many layers as the smallest kind of layers, or as the largest if
    that has less than 1.5 times as many.
    """
    counts = _counts(config)
    size, most = min(counts.values()), max(counts.values())
    if most < 1.5 * size:
        size = most
    total = 0
    for window, count in counts.items():
        skipped = 0 if window is None else max(0, context - window + 1)
        blocks = cdiv(context, block_size) - skipped // block_size
        total += cdiv(count, size) * size * blocks
    return total


def transformers_pages(config: ModelConfig, context: int, block_size: int) -> int:
    """Returns the pages of transformers' rings (generation/continuous_batching)."""
    total = 0
    for window, count in _counts(config).items():
        seen = context if window is None else min(context, window)
        total += count * cdiv(seen, block_size)
    return total


def draw(path: str, found: dict[str, dict[int, dict[str, float]]]) -> None:
    """Draws the figure: a panel for each model, a line for each scheme."""
    figure, panels = style.new_figure(1, len(found))
    for axes, (name, rows) in zip(panels[0], found.items(), strict=True):
        lines = {
            scheme: [(context, row[scheme]) for context, row in rows.items()]
            for scheme in SCHEMES
        }
        curves.lines(
            axes, lines, x_label="context (tokens)", y_label="MiB of a row", title=name
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    style.save(figure, path)


def main(argv: list[str]) -> None:
    """Measures all models and context lengths and prints the table."""
    del argv
    with runner.user_errors("groups"):
        contexts = runner.positive_integers("contexts")
        configs = {name: find_model(name) for name in FLAGS.models}
    rows, found = [], {}
    for name, config in configs.items():
        groups = cache_groups.layer_groups(config.windows, config.max_length)
        print(f"{name}: groups of {groups.num_layers} layers, windows {groups.windows}")
        columns = ("context", *SCHEMES, "peak", "share")
        print("".join(f"{column:>13}" for column in columns))
        found[name] = {}
        for context in contexts:
            if context > config.max_length:
                continue
            sizes = measure(config, context, FLAGS.block_size, FLAGS.chunk)
            share = sizes["groups"] / sizes["one_table"]
            found[name][context] = sizes
            rows.append({"model": name, "context": context, "share": share, **sizes})
            cells = "".join(f"{value:>13,.1f}" for value in sizes.values())
            print(f"{context:>13,}{cells}{share:>12.1%}", flush=True)
    if FLAGS.plot is not None:
        draw(FLAGS.plot, found)
    runner.print_json({"rows": rows, "flags": runner.flag_values(__name__)})


if __name__ == "__main__":
    runner.start(main, define_flags)
