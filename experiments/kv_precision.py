"""Measures what 8-bit keys and values change: memory, perplexity, tokens, attention.

    python -m experiments.kv_precision
    python -m experiments.kv_precision --model FOLDER --num_texts 20

The first table has a row for each kv_dtype: the blocks that fit into the same memory,
the perplexity of held-out Python as the engine computes it through its pages, the
largest change of a token's log-probability, and the share of greedy tokens that equal
those with float32. The second table compares granularities of the scales, on the
model's own keys and values: the relative error of attention's output with one scale per
token and head, per block and head, per head, or for everything.

Time: four minutes on a CPU core. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.lib import python_text, runner
from jpaged.llm import LLM
from jpaged.models.layers import causal_attention
from jpaged.params import SamplingParams
from jpaged.serving import memory

FLAGS = flags.FLAGS
KV_DTYPES = ("float32", "bfloat16", "int8", "fp8")
# Axes of the blocks [B, P, K, D] of keys or values [T, K, D] that share a scale.
GRANULARITIES = {
    "token and head": (3,),
    "block and head": (1, 3),
    "head": (0, 1, 3),
    "all": (0, 1, 2, 3),
}
_BLOCK_SIZE = 16


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string(
        "model", "tiny-python", "Folder, GGUF file, hub id, name or random:NAME."
    )
    flags.DEFINE_integer("num_texts", 8, "Held-out Python files.", lower_bound=1)
    flags.DEFINE_integer(
        "length", 256, "Tokens of each file.", lower_bound=2 * _BLOCK_SIZE
    )
    flags.DEFINE_integer("max_tokens", 64, "Greedy tokens after half of each file.")


def held_out_tokens(llm: LLM) -> list[list[int]]:
    """The first tokens of held-out files; random tokens without a tokenizer."""
    if llm.tokenizer is None:
        rng = np.random.default_rng(0)
        shape = (FLAGS.num_texts, FLAGS.length)
        return rng.integers(0, llm.model.config.vocab_size, shape).tolist()
    _, held_out = python_text.split_files(python_text.library_files())
    tokens = (llm.tokenizer.encode(text)[: FLAGS.length] for text in held_out)
    long = [one for one in tokens if len(one) == FLAGS.length]
    return long[: FLAGS.num_texts]


def prompt_logprobs(llm: LLM, tokens: list[list[int]]) -> np.ndarray:
    """Log-probabilities of every token after the first, f64[texts, length - 1]."""
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


def greedy_tokens(llm: LLM, tokens: list[list[int]]) -> list[list[int]]:
    """The greedy tokens after the first half of each text."""
    params = SamplingParams(
        temperature=0.0, max_tokens=FLAGS.max_tokens, ignore_eos=True
    )
    halves = [one[: len(one) // 2] for one in tokens]
    outputs = llm.generate(halves, params, progress=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def precision_rows() -> list[dict[str, Any]]:
    """Measures each kv_dtype and compares it with the first one."""
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
        tokens = held_out_tokens(llm)
        now = prompt_logprobs(llm, tokens), greedy_tokens(llm, tokens)
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
    """Rounds x [T, K, D] to 8 bits, with one scale over `axes` of its blocks."""
    blocks = x.reshape(-1, _BLOCK_SIZE, *x.shape[1:])
    largest = {"int8": 127.0, "fp8": 448.0}[name]
    scale = np.abs(blocks).max(axis=axes, keepdims=True) / largest
    numbers = blocks / np.maximum(scale, np.finfo(np.float32).tiny)
    if name == "int8":
        back = np.round(numbers)
    else:
        back = np.asarray(jnp.asarray(numbers).astype(jnp.float8_e4m3fn), np.float32)
    return jnp.asarray((back * scale).reshape(x.shape), jnp.float32)


def granularity_rows() -> list[dict[str, Any]]:
    """Relative error of attention: root mean square over output vectors and layers."""
    llm = LLM(FLAGS.model, dtype="float32", num_blocks=64, max_num_seqs=1)
    model, seen = llm.model, []
    size = FLAGS.length // _BLOCK_SIZE * _BLOCK_SIZE
    tokens = jnp.asarray(held_out_tokens(llm)[0][:size], jnp.int32)

    latent = model.config.latent
    used = None if latent is None else latent.rank  # numbers of attention's output

    def attend(layer: int, q: jax.Array, k: jax.Array, v: Any) -> jax.Array:
        options = model.attention_options(layer)
        v = k if v is None else v  # latent pages have no values
        out = causal_attention(q[None], k[None], v[None], **options)[0]
        seen.append((q, np.asarray(k), np.asarray(v), out, options))
        return out.reshape(q.shape)

    model.trunk(tokens, jnp.arange(size, dtype=jnp.int32), attend)
    found = []
    for granularity, axes in GRANULARITIES.items():
        row: dict[str, Any] = {"scale_for_each": granularity}
        for name in ("int8", "fp8"):
            errors = []
            for q, k, v, out, options in seen:
                kv = (rounded(x, name, axes)[None] for x in (k, v))
                got = causal_attention(q[None], *kv, **options)[0]
                norms = [
                    np.linalg.norm(np.asarray(x).reshape(q.shape)[..., :used], axis=-1)
                    for x in (got - out, out)
                ]
                errors.append(norms[0] / norms[1])
            row[name] = float(np.sqrt(np.mean(np.square(errors))))
        found.append(row)
    return found


def _print_table(found: list[dict[str, Any]]) -> None:
    print("  ".join(f"{name:>18}" for name in found[0]))
    for row in found:
        values = (v if isinstance(v, str) else f"{v:.5g}" for v in row.values())
        print("  ".join(f"{value:>18}" for value in values))


def main(argv: list[str]) -> None:
    """Measures both tables and prints them."""
    del argv
    with runner.user_errors("kv_precision"):
        found, compared = precision_rows(), granularity_rows()
    _print_table(found)
    _print_table(compared)
    given = {name: getattr(FLAGS, name) for name in ("model", "num_texts", "length")}
    runner.print_json({"rows": found, "grains": compared, "flags": given})


if __name__ == "__main__":
    runner.start(main, define_flags)
