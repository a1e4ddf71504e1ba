"""Benchmarks speculative decoding: acceptance rate, and tokens/s beside plain decoding.

    python -m experiments.bench_speculation

The bundled model continues parts of the Python standard library, greedily and by
sampling: without drafts, with drafts by prompt lookup, and with drafts by a small
model, which here is the model itself up to half of its layers. All methods must return
the same tokens; this is checked first. The methods then run in turn, and medians are
compared.

Time: about three minutes on two CPU cores.

What to expect: a step with drafts computes more rows. On a CPU they cost time even for
one sequence (8 rows take about 1.4 times as long as 1), so only drafts that are often
accepted gain anything. The gain of prompt lookup depends on the text: the bundled model
repeats itself often. The tokens per step would be the gain on a machine on which 5 rows
take as long as 1.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import textwrap
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx

from experiments.lib import runner
from experiments.lib.runner import progress
from experiments.lib.timing import Contender, Times, time_in_turn
from jpaged import engine, load_model
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig, Speculation
from jpaged.models import Decoder
from jpaged.models.loading import sources
from jpaged.params import SamplingParams
from jpaged.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS
MODEL = "tiny-python"


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_list("rows", ["1", "4"], "Sequences that run at the same time.")
    flags.DEFINE_integer("num_drafts", 3, "Drafts per row and step.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 128, "Tokens of each prompt.", lower_bound=1)
    flags.DEFINE_integer("output_tokens", 96, "Tokens of each output.", lower_bound=2)
    flags.DEFINE_list("temperatures", ["0", "0.8"], "Temperatures; 0 is greedy.")
    flags.DEFINE_integer("repeats", 7, "Rounds; the median counts.", lower_bound=1)


class SpeculationRow(NamedTuple):
    """One line of the table."""

    method: str
    rows: int
    temperature: float
    tokens_per_s: float
    acceptance_rate: float
    tokens_per_step: float  # of one sequence
    speedup: float  # over plain decoding in the same rounds


def first_layers(model: Decoder) -> Decoder:
    """The model up to half of its layers: a draft model that needs no training."""
    small = copy.copy(model)
    number = max(1, model.config.num_layers // 2)
    small.config = dataclasses.replace(model.config, num_layers=number)
    small.layers = nnx.List(list(model.layers)[:number])
    return small


def library_prompts(tokenizer: Tokenizer, number: int, length: int) -> list[list[int]]:
    """Prompts of `length` tokens from different parts of the standard library."""
    sources = [inspect.getsource(module) for module in (textwrap, json, dataclasses)]
    tokens = [tokenizer.encode(source) for source in sources]
    prompts = []
    for i in range(number):
        source = tokens[i % len(tokens)]
        start = (i * 7 * length) % max(1, len(source) - length)
        prompts.append(source[start : start + length])
    return prompts


def engine_contender(
    model: engine.Model,
    config: EngineConfig,
    prompts: list[list[int]],
    params: list[SamplingParams],
) -> Contender:
    """All requests through an engine; the time of one token counts."""

    def prepare() -> tuple[engine.EngineState]:
        state = engine.init(model, config)
        state, _ = engine.submit(state, prompts, params)
        return (state,)

    return Contender(
        lambda state: engine.run(model, state),
        prepare,
        units=sum(param.max_tokens or 0 for param in params),
    )


def method_contenders(rows: int, temperature: float) -> dict[str, Contender]:
    """Plain decoding and both kinds of drafts, for the same requests."""
    folder = sources.bundled_path(MODEL)
    model, tokenizer = load_model(folder, "float32"), Tokenizer.from_folder(folder)
    assert tokenizer is not None
    prompt_len, output_len = FLAGS.prompt_tokens, FLAGS.output_tokens
    prompts = library_prompts(tokenizer, rows, prompt_len)
    params = [
        SamplingParams(
            temperature=temperature, seed=i, max_tokens=output_len, ignore_eos=True
        )
        for i in range(rows)
    ]
    plain = EngineConfig(
        num_blocks=rows * (cdiv(prompt_len + output_len, 16) + 1),
        max_num_seqs=rows,
        max_model_len=prompt_len + output_len,
        max_num_batched_tokens=max(128, rows * (1 + FLAGS.num_drafts)),
        max_num_requests=rows,
    )
    lookup = Speculation("prompt_lookup", FLAGS.num_drafts)
    small = Speculation("model", FLAGS.num_drafts)
    drafted = engine.DraftedModel(model, first_layers(model))
    setups: dict[str, tuple[engine.Model, EngineConfig]] = {
        "plain": (model, plain),
        "prompt lookup": (model, dataclasses.replace(plain, speculation=lookup)),
        "half of the layers": (drafted, dataclasses.replace(plain, speculation=small)),
    }
    return {
        name: engine_contender(*setup, prompts, params)
        for name, setup in setups.items()
    }


def compare_methods(
    rows: int, temperature: float, repeats: int
) -> list[SpeculationRow]:
    """Times all methods at one size.

    Raises:
      RuntimeError: A method returned other tokens than plain decoding.
    """
    contenders = method_contenders(rows, temperature)
    finished = {}
    for name, one in contenders.items():
        progress(f"{rows} rows, temperature {temperature:g}: compiling {name}")
        finished[name] = one.run(*one.prepare())
    tokens = {
        name: [result.token_ids for result in engine.collect(state)]
        for name, state in finished.items()
    }
    for name, found in tokens.items():
        if found != tokens["plain"]:
            raise RuntimeError(f"{name}: expected the tokens of plain decoding")
    progress(f"{rows} rows, temperature {temperature:g}: {repeats} rounds")
    times = time_in_turn(contenders, repeats)
    return [
        _row_of(name, rows, temperature, times, jax.device_get(state.counters))
        for name, state in finished.items()
    ]


def _row_of(
    name: str, rows: int, temperature: float, times: dict[str, Times], counters: Any
) -> SpeculationRow:
    seconds = times[name].median
    ratios = np.array(times["plain"].seconds) / np.array(times[name].seconds)
    return SpeculationRow(
        method=name,
        rows=rows,
        temperature=temperature,
        tokens_per_s=1 / seconds,
        acceptance_rate=float(counters.num_accepted / max(counters.num_drafts, 1)),
        tokens_per_step=float(counters.num_generated / counters.num_steps / rows),
        speedup=float(np.median(ratios)),
    )


def main(argv: list[str]) -> None:
    """Compares the methods at all sizes and prints the results."""
    del argv
    with runner.user_errors("bench_speculation"):
        sizes = runner.positive_integers("rows")
        temperatures = [float(value) for value in FLAGS.temperatures]
    table = []
    heads = ("method", "rows", "temp.", "tokens/s", "accepted", "per step", "speedup")
    print(f"{heads[0]:<20}" + "".join(f"{head:>10}" for head in heads[1:]))
    for rows in sizes:
        for temperature in temperatures:
            found = compare_methods(rows, temperature, FLAGS.repeats)
            for row in found:
                print(
                    f"{row.method:<20}{row.rows:>10}{row.temperature:>10g}"
                    f"{row.tokens_per_s:>10.0f}{row.acceptance_rate:>10.2f}"
                    f"{row.tokens_per_step:>10.2f}{row.speedup:>9.2f}x",
                    flush=True,
                )
            table += found
    rows = [row._asdict() for row in table]
    runner.print_json({"rows": rows, "flags": runner.flag_values(__name__)})


if __name__ == "__main__":
    runner.start(main, define_flags)
