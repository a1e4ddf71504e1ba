"""What keys and values of 8 bits change: memory, perplexity, tokens, attention.

    python -m experiments.kv_precision
    python -m experiments.kv_precision --model FOLDER --num_texts 20

Each kv_dtype is a row: blocks that fit into the same memory, perplexity of held-out
Python as the engine computes it through its pages, the largest change of a token's
log-probability, and how many greedy tokens come out as with float32. A second table
compares grains of the scales on the model's own keys and values: the relative error of
attention's output with one scale for each token and head, block and head, head, or for
all. Four minutes on a CPU core. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.lib import python_text
from experiments.lib.timing import environment
from jpaged.llm import LLM
from jpaged.models.layers import causal_attention
from jpaged.params import SamplingParams
from jpaged.serving import memory

FLAGS = flags.FLAGS
KV_DTYPES = ("float32", "bfloat16", "int8", "fp8")
# Axes of [T, K, D] in blocks [B, P, K, D] that share a scale.
GRAINS = {
    "token and head": (3,),
    "block and head": (1, 3),
    "head": (0, 1, 3),
    "all": (0, 1, 2, 3),
}
_BLOCK_SIZE = 16


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_string("model", "tiny-python", "Folder, hub id, bundled, random:NAME.")
    flags.DEFINE_integer("num_texts", 8, "Held-out Python files.", lower_bound=1)
    flags.DEFINE_integer("length", 256, "Tokens of each.", lower_bound=2 * _BLOCK_SIZE)
    flags.DEFINE_integer("max_tokens", 64, "Greedy tokens behind half of each.")


def texts(llm: LLM) -> list[list[int]]:
    """The beginnings of held-out files, in tokens; noise without a tokenizer."""
    if llm.tokenizer is None:
        rng = np.random.default_rng(0)
        shape = (FLAGS.num_texts, FLAGS.length)
        return rng.integers(0, llm.model.config.vocab_size, shape).tolist()
    _, held_out = python_text.split_files(python_text.library_files())
    tokens = (llm.tokenizer.encode(text)[: FLAGS.length] for text in held_out)
    long = [one for one in tokens if len(one) == FLAGS.length]
    return long[: FLAGS.num_texts]


def logprobs(llm: LLM, tokens: list[list[int]]) -> np.ndarray:
    """f64[texts, length - 1]: of each token after the first, through the pages."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    outputs = llm.generate(tokens, params, progress=False)
    return np.array(
        [
            [
                (entry or {})[token].logprob
                for token, entry in zip(
                    output.prompt_token_ids[1:],
                    (output.prompt_logprobs or [])[1:],
                    strict=True,
                )
            ]
            for output in outputs
        ]
    )


def greedy(llm: LLM, tokens: list[list[int]]) -> list[list[int]]:
    """The tokens that follow the first half of each text."""
    ends = dict(max_tokens=FLAGS.max_tokens, ignore_eos=True)
    params = SamplingParams(temperature=0.0, **ends)
    halves = [one[: len(one) // 2] for one in tokens]
    outputs = llm.generate(halves, params, progress=False)
    return [output.outputs[0].token_ids for output in outputs]


def rows() -> list[dict[str, Any]]:
    """A row for each kv_dtype; the first is what the others are compared with."""
    found: list[dict[str, Any]] = []
    base: tuple[np.ndarray, list[list[int]]] | None = None
    for name in KV_DTYPES:
        llm = LLM(
            FLAGS.model,
            dtype="float32",
            kv_dtype=name,
            num_blocks=1024,
            block_size=_BLOCK_SIZE,
            max_num_seqs=8,
            max_model_len=FLAGS.length + FLAGS.max_tokens,
            enable_prefix_caching=False,
        )
        tokens = texts(llm)
        now = logprobs(llm, tokens), greedy(llm, tokens)
        base = now if base is None else base
        size = memory.block_bytes(llm.model.config, _BLOCK_SIZE, name)
        same = np.array(now[1]) == np.array(base[1])
        found.append(
            {
                "kv_dtype": name,
                "bytes_per_token": size // _BLOCK_SIZE,
                "blocks_per_gib": 2**30 // size,
                "perplexity": math.exp(-float(now[0].mean())),
                "max_logprob_change": float(np.abs(now[0] - base[0]).max()),
                "rms_logprob_change": float(np.sqrt(((now[0] - base[0]) ** 2).mean())),
                "same_greedy_tokens": float(same.mean()),
            }
        )
    return found


def rounded(x: np.ndarray, name: str, axes: tuple[int, ...]) -> jax.Array:
    """x [T, K, D] as 8 bits hold it, with a scale for all that `axes` share."""
    blocks = x.reshape(-1, _BLOCK_SIZE, *x.shape[1:])
    largest = {"int8": 127.0, "fp8": 448.0}[name]
    scale = np.abs(blocks).max(axis=axes, keepdims=True) / largest
    numbers = blocks / np.maximum(scale, np.finfo(np.float32).tiny)
    if name == "int8":
        back = np.round(numbers)
    else:
        back = np.asarray(jnp.asarray(numbers).astype(jnp.float8_e4m3fn), np.float32)
    return jnp.asarray((back * scale).reshape(x.shape), jnp.float32)


def grains() -> list[dict[str, Any]]:
    """Relative error of attention, root mean square over output vectors and layers."""
    llm = LLM(FLAGS.model, dtype="float32", num_blocks=64, max_num_seqs=1)
    model, seen = llm.model, []
    size = FLAGS.length // _BLOCK_SIZE * _BLOCK_SIZE
    tokens = jnp.asarray(texts(llm)[0][:size], jnp.int32)

    def attend(layer, q, k, v):
        options = model.attention_options(layer)
        out = causal_attention(q[None], k[None], v[None], **options)[0]
        seen.append((q, np.asarray(k), np.asarray(v), out, options))
        return out.reshape(q.shape)

    model.trunk(tokens, jnp.arange(size, dtype=jnp.int32), attend)
    found = []
    for grain, axes in GRAINS.items():
        row: dict[str, Any] = {"scale_for_each": grain}
        for name in ("int8", "fp8"):
            errors = []
            for q, k, v, out, options in seen:
                kv = (rounded(x, name, axes)[None] for x in (k, v))
                got = causal_attention(q[None], *kv, **options)[0]
                norms = [
                    np.linalg.norm(np.asarray(x).reshape(q.shape), axis=-1)
                    for x in (got - out, out)
                ]
                errors.append(norms[0] / norms[1])
            row[name] = float(np.sqrt(np.mean(np.square(errors))))
        found.append(row)
    return found


def show(found: list[dict[str, Any]]) -> None:
    """The rows as a table for people."""
    print("  ".join(f"{name:>18}" for name in found[0]))
    for row in found:
        values = (v if isinstance(v, str) else f"{v:.5g}" for v in row.values())
        print("  ".join(f"{value:>18}" for value in values))


def main(argv: list[str]) -> int:
    """Reads flags, prints."""
    # jax tells at this level which accelerators it did not find.
    logging.getLogger("jax").setLevel(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument: {argv[1]!r}")
    try:
        found, compared = rows(), grains()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(found)
    show(compared)
    flags_given = {k: FLAGS[k].value for k in ("model", "num_texts", "length")}
    result = {"rows": found, "grains": compared, "flags": flags_given}
    print(json.dumps(result | environment()))
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
