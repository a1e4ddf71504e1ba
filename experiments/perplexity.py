"""Perplexity of text files under a model, and what 8-bit weights change.

    python -m experiments.perplexity --file notes.txt --model FOLDER
    python -m experiments.perplexity --quantization none --quantization int8

Without --file it scores Python files of the standard library that the bundled model did
not see; a model without a tokenizer scores random tokens. Each --quantization is a row:
perplexity, bits per character, scored tokens per second, bytes of the weights, and with
--decode_tokens the tokens per second of a greedy request alone, rows in turn, the
fastest of --repeats. A minute on two CPU cores. The last line on stdout is one JSON
object with the rows, versions and device.
"""

from __future__ import annotations

import json
import logging
import math
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.lib import python_text
from jpaged.llm import LLM
from jpaged.models import scoring
from jpaged.params import SamplingParams

FLAGS = flags.FLAGS
_PROMPT = [1, 2, 3]


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_multi_string("file", [], "UTF-8 text to score; may be repeated.")
    flags.DEFINE_string("model", "tiny-python", "Folder, hub id, bundled, random:NAME.")
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "Of the weights."
    )
    flags.DEFINE_multi_enum(
        "quantization", ["none"], ["none", "int8"], "A row for each; may be repeated."
    )
    flags.DEFINE_integer("window", None, "Tokens at once; default: up to 1024.")
    flags.DEFINE_integer("overlap", None, "Tokens of context; default: half of them.")
    flags.DEFINE_integer("max_files", 20, "Of the standard library, without --file.")
    flags.DEFINE_integer("decode_tokens", 0, "Also time a request of so many tokens.")
    flags.DEFINE_integer("repeats", 3, "Rounds of that; the fastest counts.")


def texts(llm: LLM) -> list[str | list[int]]:
    """What is scored: the files, held-out Python, or without a tokenizer noise."""
    if FLAGS.file:
        return [scoring.read_text(pathlib.Path(name)) for name in FLAGS.file]
    if llm.tokenizer is None:
        rng = np.random.default_rng(0)
        return [rng.integers(0, llm.model.config.vocab_size, 256).tolist()]
    _, held_out = python_text.split_files(python_text.library_files())
    return list(held_out[: FLAGS.max_files])


def scored(llm: LLM) -> dict[str, Any]:
    """Perplexity over all texts, each from its own beginning."""
    parts = [
        llm.perplexity(text, window=FLAGS.window, overlap=FLAGS.overlap)
        for text in texts(llm)
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
    """Tokens per second of one greedy request, without compiling."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    begin = llm.stats()
    llm.generate([_PROMPT], params, progress=False)
    end = llm.stats()
    return num_tokens / (end["run_s"] - begin["run_s"])


def rows() -> list[dict[str, Any]]:
    """A row for each quantisation."""
    llms, found = [], []
    for name in FLAGS.quantization:
        llm = LLM(
            FLAGS.model,
            dtype=FLAGS.dtype,
            max_num_seqs=1,
            max_model_len=max(64, FLAGS.decode_tokens + len(_PROMPT)),
            quantization=None if name == "none" else name,
        )
        row = scored(llm)  # compiles
        begin = time.perf_counter()
        scored(llm)
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


def show(found: list[dict[str, Any]]) -> None:
    """The rows as a table for people."""
    for row in found:
        bits, speed = row["bits_per_character"], row.get("decode_tokens_per_s")
        print(
            f"{row['quantization']:5} perplexity {row['perplexity']:9.4f}"
            + (f"  {bits:.4f} bits/character" if bits is not None else "")
            + f"  {row['num_tokens']} tokens, {row['tokens_per_s']:.0f}/s scored"
            + (f", {speed:.1f}/s decoded" if speed is not None else "")
            + f"  {row['weight_bytes'] / 1e6:.1f} MB of weights"
        )


def main(argv: list[str]) -> int:
    """Reads flags, prints."""
    # jax tells at this level which accelerators it did not find.
    logging.getLogger("jax").setLevel(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"a text file needs its flag: --file {argv[1]!r}")
    try:
        found = rows()
    except (ValueError, OSError) as error:
        print(f"perplexity: {error}", file=sys.stderr)
        return 1
    show(found)
    device = jax.devices()[0]
    result = {
        "model": FLAGS.model,
        "rows": found,
        "device": f"{device.platform} {device.device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
