"""Experts and 8-bit weights against numpy: their results and their cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM
from jpaged.models import load_model, save_model
from jpaged.models.loading import checkpoint
from jpaged.models.moe import _ragged_dot, grouped_matmul
from jpaged.models.quantize import product_int8, quantize_int8
from tests.support.models import checkpoints
from tests.support.models.paged_greedy import served
from tests.support.models.reference_models import relative_error

SUMS = 1e-5  # float32 sums of 40 products in another order
apply = jax.jit(lambda model, tokens: model(tokens))


def grouped_by_numpy(x, weight, counts) -> np.ndarray:
    ends = np.cumsum(counts)
    return np.concatenate(
        [
            np.asarray(x[end - count : end], np.float64) @ np.asarray(each, np.float64)
            for each, count, end in zip(weight, counts, ends, strict=True)
        ]
    )


def random_array(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    "counts",
    [
        [1, 0, 0, 0, 0],
        [0, 2, 0, 1, 0],
        [4, 4, 4, 4, 4],
        [0, 0, 0, 0, 77],
        [33, 1, 0, 64, 32],
    ],
)
def test_each_row_is_multiplied_by_its_expert(counts):
    x, weight = random_array(sum(counts), 40), random_array(5, 40, 24, seed=1)
    want = grouped_by_numpy(x, weight, counts)
    for product in (grouped_matmul, _ragged_dot):
        got = jax.jit(product)(x, weight, jnp.asarray(counts, jnp.int32))
        assert got.dtype == jnp.float32
        assert relative_error(got, want) < SUMS


def test_on_a_cpu_experts_multiply_only_their_own_rows():
    def flops(product, num_experts: int) -> float:
        x, weight = jnp.zeros((64, 128)), jnp.zeros((num_experts, 128, 128))
        counts = jnp.zeros(num_experts, jnp.int32)
        compiled = jax.jit(product).lower(x, weight, counts).compile()
        return compiled.cost_analysis()["flops"]

    # On a CPU, ragged_dot is a product with every expert: the cost grows with them.
    assert flops(_ragged_dot, 32) > 3.9 * flops(_ragged_dot, 8)
    # cost_analysis counts one iteration of a loop: 8 rows of one expert, or 2 of 32.
    assert flops(grouped_matmul, 32) <= flops(grouped_matmul, 8)
    assert flops(grouped_matmul, 8) < flops(_ragged_dot, 8) / 8


def test_gradients_of_the_grouped_product_equal_those_of_a_loop_over_experts():
    counts = [3, 0, 5, 1]
    x, weight, probe = (
        random_array(9, 6),
        random_array(4, 6, 7, seed=1),
        random_array(9, 7, seed=2),
    )

    def loss(x, weight):
        return jnp.sum(
            grouped_matmul(x, weight, jnp.asarray(counts, jnp.int32)) * probe
        )

    def by_loop(x, weight):
        ends = np.cumsum(counts)
        parts = [
            x[end - count : end] @ weight[i]
            for i, (count, end) in enumerate(zip(counts, ends, strict=True))
        ]
        return jnp.sum(jnp.concatenate(parts) * probe)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weight)
    want = jax.grad(by_loop, argnums=(0, 1))(x, weight)
    for left, right in zip(got, want, strict=True):
        assert relative_error(left, right) < SUMS


# 8-bit weights.


def test_the_error_of_quantised_weights_is_at_most_half_a_scale():
    weight = random_array(60, 9) * jnp.arange(9.0)[None, :]  # also a channel of zeros
    values, scale = jax.jit(quantize_int8)(weight)
    assert (values.dtype, values.shape, scale.shape) == (jnp.int8, (60, 9), (9,))
    back = np.asarray(values, np.float64) * np.asarray(scale, np.float64)
    assert np.all(np.abs(back - np.asarray(weight)) <= np.asarray(scale) * 0.5001)
    assert np.all(np.abs(np.asarray(values)).max(0)[1:] == 127)
    assert not np.any(back[:, 0])


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 8e-3), ("float16", 2e-3)]
)
def test_a_product_with_int8_weights_equals_that_with_the_dequantised_weights(
    dtype, limit
):
    values, scale = quantize_int8(random_array(2048, 16) * 0.01)
    x = (random_array(3, 2048, seed=1) * 20).astype(dtype)
    want = np.asarray(x, np.float64) @ (
        np.asarray(values, np.float64) * np.asarray(scale, np.float64)
    )
    got = product_int8(x, values, scale)
    assert got.dtype == jnp.dtype(dtype)
    assert relative_error(got, want) < limit


@functools.cache
def tiny_llm(quantization: str | None) -> LLM:
    return LLM("tiny-python", max_model_len=64, quantization=quantization)


def test_an_int8_model_is_smaller_and_predicts_nearly_as_well():
    plain, small = tiny_llm(None), tiny_llm("int8")
    kinds = {leaf.dtype for leaf in jax.tree.leaves(small.model)}
    assert kinds == {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}
    sizes = [sum(x.nbytes for x in jax.tree.leaves(m.model)) for m in (plain, small)]
    assert sizes[1] < 0.27 * sizes[0]
    text = "import os\n\n\ndef read(path):\n    with open(path) as file:\n" * 3
    before, after = plain.perplexity(text), small.perplexity(text)
    assert before.perplexity != after.perplexity
    assert after.perplexity == pytest.approx(before.perplexity, rel=0.02)


@pytest.mark.long
def test_greedy_tokens_of_an_int8_engine_equal_those_of_its_plain_forward(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    model = load_model(folder, quantization="int8")
    prompt = list(range(5, 25))
    (tokens,) = served(model, [prompt], 16, block_size=4)
    # The model is causal: one forward pass predicts each of the tokens.
    logits = apply(model, jnp.asarray([prompt + tokens]))[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    assert len(set(tokens)) > 1


def test_each_expert_of_an_int8_model_is_quantised_separately(tmp_path):
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
    }
    shapes = {
        "model.embed_tokens.weight": (64, 32),
        "lm_head.weight": (64, 32),
        "model.norm.weight": (32,),
    }
    layer = "model.layers.0."
    for name, shape in {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "block_sparse_moe.gate": (3, 32),
        "input_layernorm": (32,),
        "post_attention_layernorm": (32,),
        **{f"block_sparse_moe.experts.{i}.w1": (48, 32) for i in range(3)},
        **{f"block_sparse_moe.experts.{i}.w2": (32, 48) for i in range(3)},
        **{f"block_sparse_moe.experts.{i}.w3": (48, 32) for i in range(3)},
    }.items():
        shapes[f"{layer}{name}.weight"] = shape
    folder = checkpoints.write_shapes(tmp_path, config, shapes)
    plain, small = load_model(folder), load_model(folder, quantization="int8")
    stored = checkpoints.read_tensors(folder)
    experts = small.layers[0].experts
    assert experts.router.weight[...].dtype == jnp.float32
    for i in range(3):
        want = stored[f"{layer}block_sparse_moe.experts.{i}.w2.weight"].T
        got = np.asarray(experts.down.weight[...][i], np.float32)
        scale = np.asarray(experts.down.scale[...][i])
        assert np.all(np.abs(got * scale - want) <= scale * 0.5001)
    tokens = np.arange(20, dtype=np.int32)[None]
    error = relative_error(apply(small, tokens), apply(plain, tokens))
    assert 1e-4 < error < 5e-2


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("vocab_first", [True, False])
def test_output_and_tied_embedding_are_quantised_by_word(
    tmp_path, monkeypatch, is_tied, vocab_first
):

    def as_stored(config):
        return dataclasses.replace(config, vocab_first=vocab_first)

    monkeypatch.setattr(checkpoint, "as_stored", as_stored)
    folder = checkpoints.write_tiny_llama(tmp_path, tie_word_embeddings=is_tied)
    model = load_model(folder, quantization="int8")
    stored = checkpoints.read_tensors(folder)
    name = "model.embed_tokens" if is_tied else "lm_head"
    want = stored[f"{name}.weight"]
    # In float32, so that halves are rounded to the same side.
    scale = np.abs(want).max(axis=1, keepdims=True) / np.float32(127)
    rounded = np.rint(want / scale).astype(np.float64) * scale
    output = model.output
    kept = output.rows if vocab_first else output.weight
    assert kept[...].dtype == jnp.int8
    assert kept.shape == (want.shape if vocab_first else want.T.shape)
    x = random_array(3, want.shape[1])
    np.testing.assert_allclose(
        output(x), np.asarray(x, np.float64) @ rounded.T, atol=1e-5
    )
    words = jnp.asarray([0, 7, 7, len(want) - 1])
    table = rounded if is_tied else stored["model.embed_tokens.weight"]
    np.testing.assert_allclose(model._embed(words), table[words], rtol=1e-5, atol=1e-7)


def test_saving_a_quantised_model_and_unknown_quantisations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model: expected unquantised weights"):
        save_model(tiny_llm("int8").model, tmp_path)
    with pytest.raises(ValueError, match=r"quantization: expected None or .*'awq"):
        load_model(tmp_path, quantization="awq")
    with pytest.raises(ValueError, match=r"quantization: .* the Decoder's own"):
        LLM(tiny_llm(None).model, quantization="int8")
