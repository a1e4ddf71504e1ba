"""Limits: what the machine and XLA reach, beside which the engine's speed is stated.

Read bandwidth and GEMM are the machine's. The matrix products of a decode step alone
are XLA's: no step that uses its products can be faster. Attention on contiguous memory
is what paging is compared with.

Letters: S rows, H query heads, K kv heads, D head_dim, C tokens of context, N blocks,
P tokens per block, L layers, E hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.lib.timing import Contender, time_in_turn
from jpaged import attention
from jpaged.arithmetic import cdiv
from jpaged.models import Decoder, ModelConfig

LOOPS = 10  # steps inside one program, so that its dispatch does not count


class Limits(NamedTuple):
    """What the machine reaches."""

    read_bytes_per_s: float
    gemm_flops_per_s: float


def read(size_bytes: int) -> Contender:
    """A sum over so many bytes of float32."""
    x = jax.block_until_ready(jnp.ones((size_bytes // 4,), jnp.float32))
    return Contender(jax.jit(jnp.sum), lambda: (x,))


def bandwidths(size_gb: float, repeats: int) -> dict[str, float]:
    """Bytes a second of reading one array, and of copying (read and written)."""
    size = int(size_gb * 1e9) // 4 * 4
    x = jax.block_until_ready(jnp.ones((size // 4,), jnp.float32))
    copy = Contender(jax.jit(lambda x: x + 1), lambda: (x,))
    times = time_in_turn({"read": read(size), "copy": copy}, repeats)
    return {
        "read_bytes_per_s": size / times["read"].median,
        "copy_bytes_per_s": 2 * size / times["copy"].median,
    }


def bandwidth_gb() -> float:
    """Size of an array that no cache holds and that is not read in microseconds."""
    return 1.0 if jax.default_backend() == "cpu" else 8.0


def gemm(size: int, dtype: str = "float32") -> Contender:
    """One product of two square matrices."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((size, size), np.float32), dtype)
    return Contender(jax.jit(jnp.matmul), lambda: (x, x))


def num_matrix_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights of the matrices that every token meets: of all layers, of the output."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    return config.num_layers * layer, config.hidden_size * config.vocab_size


def kv_bytes_per_token(config: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of one token's keys and values, by default in float32."""
    return 2 * itemsize * config.num_layers * config.num_kv_heads * config.head_dim


def step_bytes(config: ModelConfig, rows: int, context: int, itemsize: int = 4) -> int:
    """Bytes that a decode step has to read: weights, keys and values."""
    tokens = rows * context * kv_bytes_per_token(config, itemsize)
    return itemsize * sum(num_matrix_weights(config)) + tokens


def step_limit_s(config: ModelConfig, limits: Limits, rows: int, context: int) -> float:
    """Least time of a decode step: reading or multiplying, whichever takes longer."""
    weights = sum(num_matrix_weights(config))
    scores = 2 * config.num_layers * config.num_heads * config.head_dim * context
    flops = 2 * rows * (weights + scores)
    size_bytes = step_bytes(config, rows, context)
    return max(size_bytes / limits.read_bytes_per_s, flops / limits.gemm_flops_per_s)


def workload_limit_s(
    config: ModelConfig,
    limits: Limits,
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
) -> float:
    """Least time of a workload that starts at once: its prompts, then its steps.

    Every step computes only the sequences that have not ended; attention is left out.
    """
    in_layers, _ = num_matrix_weights(config)
    prefill = 2 * in_layers * sum(prompt_lens) / limits.gemm_flops_per_s
    live = [sum(n > t for n in output_lens) for t in range(1, max(output_lens))]
    return prefill + sum(step_limit_s(config, limits, rows, 0) for rows in live)


def matrix_products(model: Decoder, rows: int) -> Contender:
    """The products of a decode step, with the model's weights, and nothing else.

    What lies between two products are one or two additions of [rows, E] arrays, which
    make each depend on the ones before.
    """

    def step(model: Decoder, x: jax.Array) -> jax.Array:
        for layer in model.layers:
            heads = layer.attention
            k_and_v = heads.key(x) + heads.value(x)
            repeats = model.config.num_heads // model.config.num_kv_heads
            x = x + heads.out(heads.query(x) + jnp.tile(k_and_v, (1, repeats)))
            x = x + layer.mlp.down(layer.mlp.gate(x) + layer.mlp.up(x))
        return model.output(x)

    @jax.jit
    def run(model: Decoder, x: jax.Array) -> jax.Array:
        # The carry holds all logits: a slice of them would be a smaller product.
        def again(_, logits):
            return step(model, x + 1e-3 * jnp.resize(logits, x.shape))

        vocab = model.config.vocab_size
        return lax.fori_loop(0, LOOPS, again, jnp.zeros((rows, vocab), x.dtype))

    rng = np.random.default_rng(1)
    shape = (rows, model.config.hidden_size)
    x = jnp.asarray(rng.standard_normal(shape, np.float32))
    return Contender(run, lambda: (model, x), units=LOOPS)


def paged_attention(
    config: ModelConfig, rows: int, context: int, block_size: int, max_blocks: int
) -> Contender:
    """Attention of all layers over pages, as in a decode step.

    Tables have `max_blocks` columns, and their blocks lie scattered over the pool.
    """
    used = cdiv(context, block_size)
    rng = np.random.default_rng(0)
    tables = np.full((rows, max_blocks), -1, np.int32)
    tables[:, :used] = rng.permutation(rows * used).reshape(rows, used)
    sizes = (rows * used, config.num_kv_heads, block_size, config.head_dim)
    q, k_pages, v_pages = _random(config, rows, (config.num_layers, *sizes))
    block_tables = jnp.asarray(tables)
    context_lens = jnp.full((rows,), context, jnp.int32)

    @jax.jit
    def run(q, k_pages, v_pages, block_tables, context_lens):
        def attend(layer, x):
            return q + 1e-3 * attention.paged_attention(
                x, k_pages, v_pages, block_tables, context_lens, layer=layer
            )

        def again(_, x):
            return lax.fori_loop(0, config.num_layers, attend, x)

        return lax.fori_loop(0, LOOPS, again, q)

    arguments = (q, k_pages, v_pages, block_tables, context_lens)
    return Contender(run, lambda: arguments, units=LOOPS)


def contiguous_attention(config: ModelConfig, rows: int, context: int) -> Contender:
    """The same attention over arrays [S, K, C, D] of exactly the context's length."""
    sizes = (rows, config.num_kv_heads, context, config.head_dim)
    q, keys, values = _random(config, rows, (config.num_layers, *sizes))
    layers = tuple((keys[layer], values[layer]) for layer in range(config.num_layers))

    @jax.jit
    def run(q, layers):
        def again(_, x):
            for keys, values in layers:
                x = x.reshape(rows, config.num_kv_heads, -1, config.head_dim)
                scores = jnp.einsum("skgd,skcd->skgc", x, keys)
                weights = jax.nn.softmax(scores * config.head_dim**-0.5, axis=-1)
                out = jnp.einsum("skgc,skcd->skgd", weights, values)
                x = q + 1e-3 * out.reshape(q.shape)
            return x

        return lax.fori_loop(0, LOOPS, again, q)

    return Contender(run, lambda: (q, layers), units=LOOPS)


def _random(config: ModelConfig, rows: int, shape: tuple[int, ...]):
    """Queries [S, H, D], and keys and values of the shape; normal."""
    rng = np.random.default_rng(2)
    shapes = ((rows, config.num_heads, config.head_dim), shape, shape)
    return (jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes)
