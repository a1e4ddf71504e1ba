"""Measures the perplexity of text files, and what 8-bit weights change.

    python -m experiments.perplexity --file notes.txt --model FOLDER
    python -m experiments.perplexity --quantization none --quantization int8

Without `--file`, the texts are Python files of the standard library that were not used
to train the bundled model; a model without a tokenizer scores random tokens. There is a
row for each `--quantization`: perplexity, bits per character, scored tokens per second
and bytes of the weights. With `--decode_tokens` a row also has the tokens per second of
one greedy request. The rows run in turn, and the fastest of `--repeats` rounds counts.

Time: a minute on two CPU cores. The last line on stdout is one JSON object with the
rows, versions and device.
"""

from __future__ import annotations

import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.lib import python_text, runner
from jpaged.llm import LLM
from jpaged.models import scoring
from jpaged.params import SamplingParams

FLAGS = flags.FLAGS
_PROMPT = [1, 2, 3]


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_multi_string("file", [], "UTF-8 text to score; may be repeated.")
    flags.DEFINE_string(
        "model", "tiny-python", "Folder, GGUF file, hub id, name or random:NAME."
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16", "float16"],
        "dtype of the weights.",
    )
    flags.DEFINE_multi_enum(
        "quantization",
        ["none"],
        ["none", "int8"],
        "Quantisation of the weights; may be repeated.",
    )
    flags.DEFINE_integer("window", None, "Tokens scored at once; default: up to 1024.")
    flags.DEFINE_integer(
        "overlap", None, "Tokens of a window that are only context; default: half."
    )
    flags.DEFINE_integer(
        "max_files", 20, "Files of the standard library, without --file."
    )
    flags.DEFINE_integer(
        "decode_tokens", 0, "Also time a request with this many output tokens."
    )
    flags.DEFINE_integer("repeats", 3, "Rounds of --decode_tokens; the fastest counts.")


def scored_texts(llm: LLM) -> list[str | list[int]]:
    """The files of the flags, held-out Python, or random tokens without a tokenizer."""
    if FLAGS.file:
        return [scoring.read_text(pathlib.Path(name)) for name in FLAGS.file]
    if llm.tokenizer is None:
        rng = np.random.default_rng(0)
        return [rng.integers(0, llm.model.config.vocab_size, 256).tolist()]
    _, held_out = python_text.split_files(python_text.library_files())
    return list(held_out[: FLAGS.max_files])


def total_perplexity(llm: LLM) -> dict[str, Any]:
    """Scores each text separately; returns the perplexity over all of them."""
    parts = [
        llm.perplexity(text, window=FLAGS.window, overlap=FLAGS.overlap)
        for text in scored_texts(llm)
    ]
    total = math.fsum(part.cumulative_logprob for part in parts)
    num_tokens = sum(part.num_tokens for part in parts)
    num_characters = sum(part.num_characters for part in parts)
    bits = -total / math.log(2)
    return {
        "perplexity": math.exp(-total / num_tokens),
        "bits_per_character": bits / num_characters if num_characters else None,
        "num_tokens": num_tokens,
    }


def decode_tokens_per_s(llm: LLM, num_tokens: int) -> float:
    """Tokens per second of one greedy request, without compilation."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    begin = llm.stats()
    llm.generate([_PROMPT], params, progress=False)
    end = llm.stats()
    return num_tokens / (end["run_s"] - begin["run_s"])


def perplexity_rows() -> list[dict[str, Any]]:
    """Measures each quantisation."""
    llms, found = [], []
    for name in FLAGS.quantization:
        llm = LLM(
            FLAGS.model,
            dtype=FLAGS.dtype,
            max_num_seqs=1,
            max_model_len=max(64, FLAGS.decode_tokens + len(_PROMPT)),
            quantization=None if name == "none" else name,
        )
        row = total_perplexity(llm)  # compiles
        begin = time.perf_counter()
        total_perplexity(llm)
        row["tokens_per_s"] = row["num_tokens"] / (time.perf_counter() - begin)
        leaves = jax.tree.leaves(llm.model)
        row["weight_bytes"] = sum(leaf.nbytes for leaf in leaves)
        llms.append(llm)
        found.append({"quantization": name} | row)
    if FLAGS.decode_tokens:
        rounds = [
            [decode_tokens_per_s(llm, FLAGS.decode_tokens) for llm in llms]
            for _ in range(FLAGS.repeats + 1)
        ][1:]
        for row, speeds in zip(found, zip(*rounds, strict=True), strict=True):
            row["decode_tokens_per_s"] = max(speeds)
    return found


def _print_rows(found: list[dict[str, Any]]) -> None:
    for row in found:
        bits, speed = row["bits_per_character"], row.get("decode_tokens_per_s")
        print(
            f"{row['quantization']:5} perplexity {row['perplexity']:9.4f}"
            + (f"  {bits:.4f} bits/character" if bits is not None else "")
            + f"  {row['num_tokens']} tokens, {row['tokens_per_s']:.0f}/s scored"
            + (f", {speed:.1f}/s decoded" if speed is not None else "")
            + f"  {row['weight_bytes'] / 1e6:.1f} MB of weights"
        )


def main(argv: list[str]) -> None:
    """Measures all quantisations and prints the results."""
    del argv
    with runner.user_errors("perplexity"):
        found = perplexity_rows()
    _print_rows(found)
    runner.print_json({"model": FLAGS.model, "rows": found})


if __name__ == "__main__":
    runner.start(main, define_flags, argument_flag="file")
