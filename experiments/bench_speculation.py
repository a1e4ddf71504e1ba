"""Speculative decoding on this machine: rate of acceptance, and tokens/s beside plain.

    python -m experiments.bench_speculation

The bundled model continues pieces of the Python standard library, greedily and
sampled: without drafts, with drafts of prompt lookup, and with those of a small model,
which here is the model itself up to half of its layers. First all must give the same
tokens. Then they run in turn, and medians are compared. Takes about three minutes on
two CPU cores.

What to expect: a step with drafts computes more rows, which on a CPU cost time even for
one sequence (8 rows take about 1.4 times as long as 1), so drafts must stand often to
gain. With prompt lookup the gain is that of the text: the bundled model repeats itself
often. The bound beside each row is tokens per step: a machine for which 5 rows cost
what 1 costs would gain that factor.
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
from absl import app, flags
from flax import nnx

from experiments.lib.timing import Contender, Times, environment, progress, time_in_turn
from jpaged import engine, load_model
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig, Speculation
from jpaged.models import Decoder
from jpaged.models.loading import sources
from jpaged.params import SamplingParams
from jpaged.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS
MODEL = "tiny-python"
_FLAG_NAMES = (
    "rows",
    "num_drafts",
    "prompt_tokens",
    "output_tokens",
    "temperatures",
    "repeats",
)


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_list("rows", ["1", "4"], "Sequences that run at the same time.")
    flags.DEFINE_integer("num_drafts", 3, "Drafts of a row and step.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 128, "Tokens of each prompt.", lower_bound=1)
    flags.DEFINE_integer("output_tokens", 96, "Tokens generated.", lower_bound=2)
    flags.DEFINE_list("temperatures", ["0", "0.8"], "0 is greedy.")
    flags.DEFINE_integer("repeats", 7, "Rounds.", lower_bound=1)


class Row(NamedTuple):
    """One line of the table."""

    method: str
    rows: int
    temperature: float
    tokens_per_s: float
    acceptance_rate: float
    tokens_per_step: float  # of one sequence
    speedup: float  # over plain decoding in the same rounds


def first_layers(model: Decoder) -> Decoder:
    """The model up to half of its layers: a draft model that costs no training."""
    small = copy.copy(model)
    number = max(1, model.config.num_layers // 2)
    small.config = dataclasses.replace(model.config, num_layers=number)
    small.layers = nnx.List(list(model.layers)[:number])
    return small


def prompts(tokenizer: Tokenizer, number: int, length: int) -> list[list[int]]:
    """Pieces of the standard library, each from another place."""
    sources = [inspect.getsource(module) for module in (textwrap, json, dataclasses)]
    tokens = [tokenizer.encode(source) for source in sources]
    pieces = []
    for i in range(number):
        mine = tokens[i % len(tokens)]
        start = (i * 7 * length) % max(1, len(mine) - length)
        pieces.append(mine[start : start + length])
    return pieces


def contender(
    model: engine.Model, config: EngineConfig, load: list[list[int]], params: list[Any]
) -> Contender:
    """The load through an engine, again and again."""

    def prepare() -> tuple[engine.EngineState]:
        state = engine.init(model, config)
        state, _ = engine.submit(state, load, params)
        return (state,)

    return Contender(
        lambda state: engine.run(model, state),
        prepare,
        units=sum(param.max_tokens for param in params),
    )


def compare(
    rows: int, temperature: float, *, num_drafts: int, lengths: tuple[int, int], repeats
) -> list[Row]:
    """The methods beside each other for one load; their tokens must be equal."""
    folder = sources.bundled_path(MODEL)
    model, tokenizer = load_model(folder, "float32"), Tokenizer.from_folder(folder)
    assert tokenizer is not None
    prompt_len, output_len = lengths
    load = prompts(tokenizer, rows, prompt_len)
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
        max_num_batched_tokens=max(128, rows * (1 + num_drafts)),
        max_num_requests=rows,
    )
    lookup = Speculation("prompt_lookup", num_drafts)
    small = Speculation("model", num_drafts)
    setups = {
        "plain": (model, plain),
        "prompt lookup": (model, dataclasses.replace(plain, speculation=lookup)),
        "half of the layers": (
            engine.DraftedModel(model, first_layers(model)),
            dataclasses.replace(plain, speculation=small),
        ),
    }
    contenders = {
        name: contender(*setup, load, params) for name, setup in setups.items()
    }
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
            raise RuntimeError(f"{name}: other tokens than plain decoding; a bug")
    progress(f"{rows} rows, temperature {temperature:g}: {repeats} rounds")
    times = time_in_turn(contenders, repeats)
    return [
        _row(name, rows, temperature, times, jax.device_get(state.counters))
        for name, state in finished.items()
    ]


def _row(
    name: str, rows: int, temperature: float, times: dict[str, Times], counters: Any
) -> Row:
    seconds = times[name].median
    ratios = np.array(times["plain"].seconds) / np.array(times[name].seconds)
    return Row(
        method=name,
        rows=rows,
        temperature=temperature,
        tokens_per_s=1 / seconds,
        acceptance_rate=float(counters.num_accepted / max(counters.num_drafts, 1)),
        tokens_per_step=float(counters.num_generated / counters.num_steps / rows),
        speedup=float(np.median(ratios)),
    )


def main(argv: list[str]) -> None:
    """Prints the table, then one JSON line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    table = []
    heads = ("method", "rows", "temp.", "tokens/s", "accepted", "per step", "speedup")
    print(f"{heads[0]:<20}" + "".join(f"{head:>10}" for head in heads[1:]))
    for rows in map(int, FLAGS.rows):
        for temperature in map(float, FLAGS.temperatures):
            found = compare(
                rows,
                temperature,
                num_drafts=FLAGS.num_drafts,
                lengths=(FLAGS.prompt_tokens, FLAGS.output_tokens),
                repeats=FLAGS.repeats,
            )
            for row in found:
                print(
                    f"{row.method:<20}{row.rows:>10}{row.temperature:>10g}"
                    f"{row.tokens_per_s:>10.0f}{row.acceptance_rate:>10.2f}"
                    f"{row.tokens_per_step:>10.2f}{row.speedup:>9.2f}x",
                    flush=True,
                )
            table += found
    found = {
        "rows": [row._asdict() for row in table],
        "flags": {name: getattr(FLAGS, name) for name in _FLAG_NAMES},
        **environment(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    define_flags()
    app.run(main)
