"""Recomputation against swapping over block sizes, as in the paper's figure 19.

    python -m experiments.preemption
    python -m experiments.preemption --parts one --out preemption

Figure 19 of Kwon et al. 2023 (https://arxiv.org/abs/2309.06180) compares the two ways
to get a preempted sequence's keys and values back, for block sizes from 1 to 256: (a)
the time for one sequence of 256 tokens, (b) the normalised latency of a whole run.

Part `one` times, for each block size and each of --contexts: swapping a sequence out
to the host's memory and in again (the tables of both pools, and the copies of its
scattered blocks, in one program), and computing it again, which is a prompt of its
length in the engine, in chunks of --chunk tokens. Part `load` runs the same requests
in a pool of --pool_tokens, too small for all of them at once, with either way of
preemption, and once in a pool that holds everything.

What differs from the paper: here the host's memory is the device's too (a CPU), so a
copy costs what memory costs, where the paper's went over PCIe and each small copy had
its own price; the model is a random one with the flags' sizes; and the load is closed,
all requests waiting from the beginning, and timed as a whole.

The paper finds: recomputation does not depend on the block size; swapping is slow with
small blocks; from 16 to 64 the two are comparable end to end; recomputation's overhead
is never more than 20 % above swapping's. Expected here: swapping needs a hundredth of
recomputation's time, least with large blocks.

Time: about 15 minutes on two CPU cores, most of them to compile an engine for each
block size and way. The last line is JSON.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.lib.timing import Contender, Report, Times, progress, time_in_turn
from jpaged import engine
from jpaged.arithmetic import cdiv
from jpaged.attention import kv_cache
from jpaged.compat import HOST_MEMORY
from jpaged.config import EngineConfig
from jpaged.kv import block_manager, swap
from jpaged.models import Decoder, ModelConfig, init_model
from jpaged.params import SamplingParams

PARTS = ("one", "load")
ENOUGH = "no_preemption"
WAYS = ("recompute", "swap", ENOUGH)

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    sizes = [str(2**power) for power in range(9)]
    flags.DEFINE_list("parts", list(PARTS), f"What to measure, of {', '.join(PARTS)}.")
    flags.DEFINE_list("block_sizes", sizes, "Tokens per block.")
    flags.DEFINE_list("contexts", ["256", "1024"], "Tokens of the one sequence.")
    flags.DEFINE_integer("chunk", 256, "Tokens of a step, at most.", lower_bound=1)
    flags.DEFINE_integer("hidden_size", 512, "Of the model.")
    flags.DEFINE_integer("layers", 4, "Of the model.")
    flags.DEFINE_integer("heads", 8, "Query heads of the model.")
    flags.DEFINE_integer("kv_heads", 4, "Key and value heads of the model.")
    flags.DEFINE_integer("intermediate_size", 1408, "Of the model's MLP.")
    flags.DEFINE_integer("vocab_size", 8192, "Of the model.")
    flags.DEFINE_integer("requests", 16, "Of the part `load`.", lower_bound=1)
    flags.DEFINE_integer("prompt_len", 64, "Of its requests.", lower_bound=1)
    flags.DEFINE_integer("output_len", 128, "Of its requests.", lower_bound=1)
    flags.DEFINE_integer("pool_tokens", 1536, "Of its pool.", lower_bound=1)
    flags.DEFINE_integer("max_num_seqs", 16, "Sequences at once.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Timed rounds of each part.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of weights, prompts and scattered blocks.")
    flags.DEFINE_string("out", None, "Writes OUT.csv, and OUT.png with extra `plot`.")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One point: of one sequence, or of a whole load."""

    part: str
    block_size: int
    way: str  # of WAYS
    num_tokens: int  # of the sequence; of the load generated
    median_ms: float
    least_ms: float
    num_preemptions: int = 0
    num_swapped_blocks: int = 0
    computed_tokens: int = 0


def make_model() -> Decoder:
    """A random decoder with the flags' sizes."""
    sizes = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=FLAGS.vocab_size,
        hidden_size=FLAGS.hidden_size,
        intermediate_size=FLAGS.intermediate_size,
        num_hidden_layers=FLAGS.layers,
        num_attention_heads=FLAGS.heads,
        num_key_value_heads=FLAGS.kv_heads,
        max_position_embeddings=2048,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    return init_model(ModelConfig.from_hf(sizes), FLAGS.seed)


def swapping(model: ModelConfig, block_size: int, context: int, seed: int) -> Contender:
    """A sequence of `context` tokens goes to the host's memory and comes back."""
    held = cdiv(context, block_size)
    num_blocks = 4 * held
    sizes = dict(
        num_blocks=num_blocks, block_size=block_size, max_blocks_per_seq=num_blocks
    )
    device = block_manager.init_state(max_seqs=1, **sizes)
    host = block_manager.init_state(max_seqs=1, **sizes)
    # Its blocks lie anywhere, as in a pool that was used for a while.
    scattered = np.random.default_rng(seed).permutation(num_blocks)[:held]
    tables = np.full((1, num_blocks), block_manager.NO_BLOCK, np.int32)
    tables[0, :held] = scattered
    device = dataclasses.replace(
        device,
        ref_counts=device.ref_counts.at[scattered].set(1),
        block_tables=jnp.asarray(tables),
        context_lens=jnp.array([context], jnp.int32),
    )
    init = functools.partial(
        kv_cache.init_kv_cache,
        num_layers=model.num_layers,
        num_blocks=num_blocks,
        num_kv_heads=model.num_kv_heads,
        block_size=block_size,
        head_dim=model.head_dim,
        dtype=model.dtype,
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2, 3))
    def there_and_back(device, host, cache, host_cache):
        row = jnp.zeros((1,), jnp.int32)
        device, host, copies, _ = swap.swap_out(device, host, row)
        host_cache = kv_cache.swap_out_pages(cache, host_cache, copies.src, copies.dst)
        device, host, copies, _ = swap.swap_in(device, host, row)
        cache = kv_cache.swap_in_pages(cache, host_cache, copies.src, copies.dst)
        return device, host, cache, host_cache

    # Once, so that what the program gets is what it gave.
    pools = there_and_back(device, host, init(), init(memory=HOST_MEMORY))
    latest = [pools]

    def run(*pools):
        latest[0] = there_and_back(*pools)
        return latest[0]

    return Contender(run, lambda: latest[0])


def config_of(block_size: int, way: str) -> EngineConfig:
    """An engine whose pool makes it preempt; or one that holds everything.

    The latter serves both parts, so that it is compiled once.
    """
    length = max(FLAGS.prompt_len + FLAGS.output_len, 1 + max(map(int, FLAGS.contexts)))
    num_tokens = FLAGS.pool_tokens
    if way == ENOUGH:
        num_tokens = max(FLAGS.requests, 2) * (length + block_size)
    return EngineConfig(
        num_blocks=cdiv(num_tokens, block_size),
        block_size=block_size,
        max_num_seqs=FLAGS.max_num_seqs,
        max_model_len=length,
        max_num_batched_tokens=max(FLAGS.chunk, FLAGS.max_num_seqs),
        max_num_requests=max(FLAGS.requests, FLAGS.max_num_seqs),
        max_num_stop_ids=1,
        preemption="swap" if way == "swap" else "recompute",
        num_swap_blocks=(
            FLAGS.max_num_seqs * cdiv(length, block_size) if way == "swap" else 0
        ),
    )


def running(
    model: Decoder, config: EngineConfig, prompts: list[list[int]], output_len: int
) -> Contender:
    """The engine from the requests' arrival to their end."""
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)

    def prepare() -> tuple[engine.EngineState]:
        state, _ = engine.submit(engine.init(model, config), prompts, params)
        return (state,)

    return Contender(functools.partial(engine.run, model), prepare)


def random_prompts(count: int, length: int) -> list[list[int]]:
    """Prompts that have nothing in common."""
    rng = np.random.default_rng(FLAGS.seed)
    return rng.integers(0, FLAGS.vocab_size, (count, length)).tolist()


def figure(times: Times, **known) -> Figure:
    """What was timed, in milliseconds, and what is known of it."""
    return Figure(median_ms=times.median * 1e3, least_ms=times.least * 1e3, **known)


def measure_one(
    model: Decoder, block_size: int, contexts: Sequence[int], repeats: int
) -> list[Figure]:
    """Of one sequence: its time to be swapped out and in, and to be computed again."""
    config = config_of(block_size, ENOUGH)
    contenders = {}
    for context in contexts:
        contenders["recompute", context] = running(
            model, config, random_prompts(1, context), 1
        )
        contenders["swap", context] = swapping(
            model.config, block_size, context, FLAGS.seed
        )
    found = time_in_turn(contenders, repeats)
    return [
        figure(times, part="one", block_size=block_size, way=way, num_tokens=context)
        for (way, context), times in found.items()
    ]


def measure_load(model: Decoder, block_size: int, repeats: int) -> list[Figure]:
    """Of the load: its time with either way, and with a pool that holds everything."""
    prompts = random_prompts(FLAGS.requests, FLAGS.prompt_len)
    contenders, counters = {}, {}
    for name in WAYS:
        config = config_of(block_size, name)
        contenders[name] = running(model, config, prompts, FLAGS.output_len)
        state = contenders[name].run(*contenders[name].prepare())
        counters[name] = jax.device_get(state.counters)
    found = time_in_turn(contenders, repeats, is_warm=True)
    return [
        figure(
            times,
            part="load",
            block_size=block_size,
            way=name,
            num_tokens=int(counters[name].num_generated),
            num_preemptions=int(counters[name].num_preemptions),
            num_swapped_blocks=int(counters[name].num_swapped_blocks),
            computed_tokens=int(counters[name].num_tokens),
        )
        for name, times in found.items()
    ]


def print_rows(report: Report, found: Sequence[Figure]) -> None:
    """A line for each length or load: recomputation, and swapping beside it."""
    for part, num_tokens in dict.fromkeys((one.part, one.num_tokens) for one in found):
        mine = {
            one.way: one
            for one in found
            if (one.part, one.num_tokens) == (part, num_tokens)
        }
        again, swapped = mine["recompute"], mine["swap"]
        name = f"block size {again.block_size}: "
        name += f"{num_tokens} tokens" if part == "one" else "load"
        ratio = again.median_ms / swapped.median_ms
        report.row(
            name,
            f"{again.median_ms:.2f} ms",
            f"swapping {swapped.median_ms:.3f} ms",
            f"{ratio:.2f} x as long",
        )
        report.ratios[f"{part}_{num_tokens}_{again.block_size}"] = ratio
        if part == "load":
            report.row(
                "  preempted",
                f"{again.num_preemptions}",
                f"swapping {swapped.num_preemptions}, "
                f"{swapped.num_swapped_blocks} blocks",
                f"without {mine[ENOUGH].median_ms:.2f} ms",
            )


def write(found: Sequence[Figure], out: str) -> None:
    """Writes OUT.csv, and OUT.png: time over block size, one panel for each part."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    path, names = pathlib.Path(out), [one.name for one in dataclasses.fields(Figure)]
    with path.with_name(path.name + ".csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, names)
        rows.writeheader()
        rows.writerows(dataclasses.asdict(one) for one in found)
    parts = list(dict.fromkeys(one.part for one in found))
    figure_, axes = pyplot.subplots(
        1, len(parts), figsize=(6 * len(parts), 4), squeeze=False
    )
    for axis, part in zip(axes[0], parts, strict=True):
        mine = [one for one in found if one.part == part]
        for way, tokens in dict.fromkeys((one.way, one.num_tokens) for one in mine):
            line = [one for one in mine if (one.way, one.num_tokens) == (way, tokens)]
            axis.plot(
                [one.block_size for one in line],
                [one.median_ms for one in line],
                marker="o",
                label=f"{way}, {tokens} tokens",
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("block size, tokens")
        axis.set_ylabel("time, ms")
        axis.set_title("one sequence" if part == "one" else "a load that is preempted")
        axis.legend(fontsize=7)
    figure_.tight_layout()
    figure_.savefig(path.with_name(path.name + ".png"), dpi=150)
    pyplot.close(figure_)


def check_flags() -> tuple[list[int], list[int]]:
    """Block sizes and contexts.

    Raises:
      ValueError: a flag that is wrong.
    """
    lists = {}
    for name in ("block_sizes", "contexts"):
        values = FLAGS[name].value
        if not values or not all(x.isdecimal() and int(x) > 0 for x in values):
            raise ValueError(f"{name}: wanted numbers of at least 1, got {values}")
        lists[name] = [int(x) for x in values]
    if not FLAGS.parts or set(FLAGS.parts) - set(PARTS):
        raise ValueError(f"parts: wanted some of {PARTS}, got {FLAGS.parts}")
    length = FLAGS.prompt_len + FLAGS.output_len
    if "load" in FLAGS.parts and FLAGS.pool_tokens < length:
        raise ValueError(
            f"pool_tokens: wanted at least prompt_len + output_len ({length}), one "
            f"request alone, got {FLAGS.pool_tokens}"
        )
    return lists["block_sizes"], lists["contexts"]


def main(argv: list[str]) -> int:
    """Reads flags, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"no arguments are taken but flags, got {argv[1]!r}")
    try:
        block_sizes, contexts = check_flags()
    except ValueError as error:
        print(f"preemption: {error}", file=sys.stderr)
        return 1
    report, found = Report(), []
    model = make_model()
    for block_size in block_sizes:
        progress(f"block size {block_size}")
        new = []
        if "one" in FLAGS.parts:
            new += measure_one(model, block_size, contexts, FLAGS.repeats)
        if "load" in FLAGS.parts:
            new += measure_load(model, block_size, FLAGS.repeats)
        print_rows(report, new)
        found += new
    if FLAGS.out is not None:
        write(found, FLAGS.out)
    report.details["figures"] = [dataclasses.asdict(one) for one in found]
    used = FLAGS.get_key_flags_for_module(__name__)
    report.last_line({flag.name: flag.value for flag in used})
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
