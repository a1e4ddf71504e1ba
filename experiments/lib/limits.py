"""What the machine and XLA can reach, to compare the engine's speed with.

Read bandwidth and GEMM rate are limits of the machine. The matrix products of a decode
step are a limit of XLA: no step that uses its products can be faster. Attention on
contiguous memory shows the cost of paging.

Shape symbols: S rows, H query heads, K KV heads, D head_dim, C tokens of context, N
blocks, P tokens per block, L layers, E hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.lib.timing import Contender, time_in_turn
from jpaged import attention
from jpaged.arithmetic import cdiv
from jpaged.models import Decoder, ModelConfig

LOOPS = 10  # repetitions in one program, so that its dispatch time is small


class MachineLimits(NamedTuple):
    """Measured rates of the machine."""

    read_bytes_per_s: float
    gemm_flops_per_s: float


def reading(size_bytes: int) -> Contender:
    """A sum over a float32 array of this size."""
    x = jax.block_until_ready(jnp.ones((size_bytes // 4,), jnp.float32))
    return Contender(jax.jit(jnp.sum), lambda: (x,))


def gemm(size: int, dtype: str = "float32") -> Contender:
    """A product of two square matrices."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((size, size), np.float32), dtype)
    return Contender(jax.jit(jnp.matmul), lambda: (x, x))


def measure_limits(
    size_gb: float, gemm_size: int, repeats: int, dtype: str = "float32"
) -> MachineLimits:
    """Measures the read bandwidth and the GEMM rate.

    Args:
      size_gb: Size of the array that is read, in GB.
      gemm_size: Rows and columns of the matrices.
      repeats: Timed rounds.
      dtype: Of the matrices.
    """
    size = int(size_gb * 1e9) // 4 * 4
    contenders = {"read": reading(size), "gemm": gemm(gemm_size, dtype)}
    times = time_in_turn(contenders, repeats)
    return MachineLimits(
        size / times["read"].median, 2 * gemm_size**3 / times["gemm"].median
    )


def measure_bandwidths(size_gb: float, repeats: int) -> dict[str, float]:
    """Measures bytes per second of reading an array, and of copying it.

    Copying counts the bytes read and the bytes written.
    """
    size = int(size_gb * 1e9) // 4 * 4
    x = jax.block_until_ready(jnp.ones((size // 4,), jnp.float32))
    copy = Contender(jax.jit(lambda x: x + 1), lambda: (x,))
    times = time_in_turn({"read": reading(size), "copy": copy}, repeats)
    return {
        "read_bytes_per_s": size / times["read"].median,
        "copy_bytes_per_s": 2 * size / times["copy"].median,
    }


def default_read_gb() -> float:
    """Size of an array that fits no cache and takes milliseconds to read."""
    return 1.0 if jax.default_backend() == "cpu" else 8.0


def num_matrix_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights that multiply every token: of all layers, and of the output."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    return config.num_layers * layer, config.hidden_size * config.vocab_size


def kv_bytes_per_token(config: ModelConfig, itemsize: int = 4) -> int:
    """Bytes of one token's keys and values, by default in float32."""
    arrays = 1 if config.latent is not None else 2
    return arrays * itemsize * config.num_layers * config.num_kv_heads * config.head_dim


def step_bytes(
    config: ModelConfig,
    rows: int,
    context: int,
    itemsize: int = 4,
    weight_itemsize: int | None = None,
) -> int:
    """Bytes that a decode step has to read: weights, keys and values.

    Args:
      config: The model's sizes.
      rows: Sequences of the step.
      context: Mean tokens of a sequence.
      itemsize: Bytes of a number.
      weight_itemsize: Bytes of a weight; None is `itemsize`.
    """
    tokens = rows * context * kv_bytes_per_token(config, itemsize)
    return (weight_itemsize or itemsize) * sum(num_matrix_weights(config)) + tokens


def step_limit_s(
    config: ModelConfig, limits: MachineLimits, rows: int, context: int
) -> float:
    """Shortest possible decode step: the longer of reading and multiplying."""
    weights = sum(num_matrix_weights(config))
    scores = 2 * config.num_layers * config.num_heads * config.head_dim * context
    flops = 2 * rows * (weights + scores)
    size_bytes = step_bytes(config, rows, context)
    return max(size_bytes / limits.read_bytes_per_s, flops / limits.gemm_flops_per_s)


def burst_limit_s(
    config: ModelConfig,
    limits: MachineLimits,
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
) -> float:
    """Shortest possible time of requests that arrive at once.

    It is the time of the prompts plus that of the decode steps. A step computes only
    the sequences that have not ended. Attention is left out.
    """
    in_layers, _ = num_matrix_weights(config)
    prefill = 2 * in_layers * sum(prompt_lens) / limits.gemm_flops_per_s
    live = [sum(n > t for n in output_lens) for t in range(1, max(output_lens))]
    return prefill + sum(step_limit_s(config, limits, rows, 0) for rows in live)


def matrix_products(model: Decoder, rows: int) -> Contender:
    """The matrix products of a decode step, with the model's weights.

    Between two products there are only one or two additions of [rows, E] arrays, so
    that each product depends on the previous ones.
    """

    def step(model: Any, x: jax.Array) -> jax.Array:
        for layer in model.layers:
            heads = layer.attention
            k_and_v = heads.key(x) + heads.value(x)
            repeats = model.config.num_heads // model.config.num_kv_heads
            x = x + heads.out(heads.query(x) + jnp.tile(k_and_v, (1, repeats)))
            x = x + layer.mlp.down(layer.mlp.gate(x) + layer.mlp.up(x))
        return model.output(x)

    rng = np.random.default_rng(1)
    shape = (rows, model.config.hidden_size)
    x = jnp.asarray(rng.standard_normal(shape, np.float32))

    @jax.jit
    def run(model: Decoder, x: jax.Array) -> jax.Array:
        # The carry holds all logits: XLA would shrink the product if only a slice of
        # its result were used.
        def repeat(_: Any, logits: jax.Array) -> jax.Array:
            return step(model, x + 1e-3 * jnp.resize(logits, x.shape))

        vocab = model.config.vocab_size
        return lax.fori_loop(0, LOOPS, repeat, jnp.zeros((rows, vocab), x.dtype))

    return Contender(run, lambda: (model, x), units=LOOPS)


def paged_attention_layers(
    config: ModelConfig, rows: int, context: int, block_size: int, max_blocks: int
) -> Contender:
    """Attention of all layers over pages, as in a decode step.

    Args:
      config: Sizes of the model.
      rows: Batch rows S.
      context: Tokens of each row.
      block_size: Tokens per block.
      max_blocks: Columns of the block tables. The blocks are in random order.
    """
    used = cdiv(context, block_size)
    rng = np.random.default_rng(0)
    tables = np.full((rows, max_blocks), -1, np.int32)
    tables[:, :used] = rng.permutation(rows * used).reshape(rows, used)
    sizes = (rows * used, config.num_kv_heads, block_size, config.head_dim)
    q, k_pages, v_pages = _random_qkv(config, rows, (config.num_layers, *sizes))
    block_tables = jnp.asarray(tables)
    context_lens = jnp.full((rows,), context, jnp.int32)

    @jax.jit
    def run(
        q: jax.Array,
        k_pages: jax.Array,
        v_pages: jax.Array,
        block_tables: jax.Array,
        context_lens: jax.Array,
    ) -> jax.Array:
        def attend(layer: Any, x: jax.Array) -> jax.Array:
            attended: Any = attention.paged_attention(
                x, k_pages, v_pages, block_tables, context_lens, layer=layer
            )
            return q + 1e-3 * attended

        def all_layers(_: Any, x: jax.Array) -> jax.Array:
            return lax.fori_loop(0, config.num_layers, attend, x)

        return lax.fori_loop(0, LOOPS, all_layers, q)

    arguments = (q, k_pages, v_pages, block_tables, context_lens)
    return Contender(run, lambda: arguments, units=LOOPS)


def contiguous_attention_layers(
    config: ModelConfig, rows: int, context: int
) -> Contender:
    """The same attention over arrays [S, K, C, D] of exactly the context's length."""
    sizes = (rows, config.num_kv_heads, context, config.head_dim)
    q, keys, values = _random_qkv(config, rows, (config.num_layers, *sizes))
    layers = tuple((keys[layer], values[layer]) for layer in range(config.num_layers))

    @jax.jit
    def run(q: jax.Array, layers: tuple[tuple[jax.Array, jax.Array], ...]) -> jax.Array:
        def all_layers(_: Any, x: jax.Array) -> jax.Array:
            for keys, values in layers:
                x = x.reshape(rows, config.num_kv_heads, -1, config.head_dim)
                scores = jnp.einsum("skgd,skcd->skgc", x, keys)
                weights = jax.nn.softmax(scores * config.head_dim**-0.5, axis=-1)
                out = jnp.einsum("skgc,skcd->skgd", weights, values)
                x = q + 1e-3 * out.reshape(q.shape)
            return x

        return lax.fori_loop(0, LOOPS, all_layers, q)

    return Contender(run, lambda: (q, layers), units=LOOPS)


def _random_qkv(
    config: ModelConfig, rows: int, kv_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normal queries [S, H, D], and keys and values of `kv_shape`."""
    rng = np.random.default_rng(2)
    q_shape = (rows, config.num_heads, config.head_dim)
    q = jnp.asarray(rng.standard_normal(q_shape, np.float32))
    keys = jnp.asarray(rng.standard_normal(kv_shape, np.float32))
    return q, keys, jnp.asarray(rng.standard_normal(kv_shape, np.float32))
