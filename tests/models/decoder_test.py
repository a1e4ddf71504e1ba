"""The decoder against float64 numpy, stored transformers logits, and invariants."""

import functools
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.models import Decoder, ModelConfig, init_model, load_model, rotary
from jpaged.models.config import ACTIVATIONS
from jpaged.models.layers import ACTIVATION_FUNCTIONS, causal_attention
from tests.support.models import checkpoints
from tests.support.models.reference_models import (
    forward,
    reference_logits,
    relative_error,
)
from tests.support.paths import ROOT

# Float32 sums of 100 products differ by 1e-6 in another order. Wrong weights, positions
# or epsilons cause differences of 1e-3 and more (see the planted faults below).
TOLERANCE = 1e-4
# The same products in another shape: a few float32 roundings (2e-6 was measured).
SAME_SUMS = 1e-5
GOLDEN = json.loads(
    (ROOT / "tests" / "support" / "golden" / "models.json").read_text("utf-8")
)
apply = jax.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: checkpoints.write_case(root / name, name) for name in checkpoints.CASES
    }


@pytest.fixture(scope="module")
def models(folders) -> dict[str, Decoder]:
    return {name: load_model(folder) for name, folder in folders.items()}


def some_tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 128, length).tolist()


def logits_of(model: Decoder, tokens: list[int]) -> np.ndarray:
    """Logits f32[T, V], through one compiled program for every length up to 64."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(apply(model, padded))[0, : len(tokens)]


def greedy(model: Decoder, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens, recomputing the whole sequence for each one."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@functools.partial(jax.jit, static_argnames="lengths")
def packed_trunk(
    model: Decoder, tokens: jax.Array, positions: jax.Array, lengths: tuple[int, ...]
) -> jax.Array:
    """Trunk over concatenated sequences, each of which attends only to itself."""
    ends = list(itertools.accumulate(lengths))

    def attend(layer, q, k, v):
        del layer
        parts = [
            causal_attention(*(x[None, end - length : end] for x in (q, k, v)))[0]
            for length, end in zip(lengths, ends, strict=True)
        ]
        return jnp.concatenate(parts)

    return model.trunk(tokens, positions, attend)


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_logits_equal_those_of_the_float64_reference(name, folders, models):
    # The model is causal: one run of 50 tokens covers every shorter prompt.
    tokens = some_tokens(50)
    got = logits_of(models[name], tokens)
    assert got.dtype == np.float32
    assert relative_error(got, reference_logits(folders[name], tokens)) < TOLERANCE


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_logits_and_greedy_tokens_equal_those_stored_from_transformers(name, models):
    golden = GOLDEN[name]
    for prompt, want in zip(golden["prompts"], golden["last_logits"], strict=True):
        assert relative_error(logits_of(models[name], prompt)[-1], want) < TOLERANCE
    got = greedy(models[name], golden["prompts"][1], len(golden["greedy"]))
    assert got == golden["greedy"]


def test_stored_cases_are_those_of_the_tests_and_no_greedy_text_is_constant():
    assert GOLDEN.keys() == checkpoints.CASES.keys()
    assert all(len(set(case["greedy"])) > 1 for case in GOLDEN.values())


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_later_token_never_changes_an_earlier_logit(name, models):
    tokens = some_tokens(12)
    changed = [*tokens[:7], (tokens[7] + 1) % 128, *tokens[8:]]
    before, after = logits_of(models[name], tokens), logits_of(models[name], changed)
    np.testing.assert_array_equal(before[:7], after[:7])
    assert np.all(np.abs(before[7:] - after[7:]).max(axis=-1) > 1e-3)


@pytest.mark.parametrize("name", ["llama_biases", "opt_350m_shape"])
def test_logits_of_a_batch_row_do_not_depend_on_the_other_rows(name, models):
    rows = [some_tokens(9, seed) for seed in range(3)]
    together = apply(models[name], jnp.array(rows))
    alone = [logits_of(models[name], row) for row in rows]
    assert relative_error(together, alone) < SAME_SUMS


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt", "opt_350m_shape"])
def test_trunk_on_flat_tokens_of_two_sequences_equals_two_calls(name, models):
    model = models[name]
    first, second = some_tokens(5, 1), some_tokens(8, 2)
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(8)])
    hidden = packed_trunk(model, jnp.array(first + second), positions, (5, 8))
    assert hidden.shape == (13, model.config.hidden_size)
    want = [logits_of(model, tokens) for tokens in (first, second)]
    assert relative_error(model.logits(hidden), np.concatenate(want)) < SAME_SUMS


@pytest.mark.parametrize("name", ["llama_wide_heads", "opt"])
def test_attend_is_called_once_per_layer_in_order_with_an_axis_of_heads(name, models):
    model, calls = models[name], []

    def attend(layer, q, k, v):
        calls.append((layer, q.shape, k.shape, v.shape))
        return q

    tokens = jax.ShapeDtypeStruct((13,), jnp.int32)
    jax.eval_shape(lambda t, p: model.trunk(t, p, attend), tokens, tokens)
    num_kv_heads, head_dim = model.config.num_kv_heads, model.config.head_dim
    q_shape, kv_shape = (13, 4, head_dim), (13, num_kv_heads, head_dim)
    assert calls == [(i, q_shape, kv_shape, kv_shape) for i in range(2)]


def test_rotary_attention_depends_on_distances_and_learned_positions_do_not(models):
    def shifted(model: Decoder, shift: int) -> jax.Array:
        tokens = jnp.array(some_tokens(6))
        return packed_trunk(model, tokens, jnp.arange(6) + shift, (6,))

    llama, opt = models["llama"], models["opt"]
    assert relative_error(shifted(llama, 9), shifted(llama, 0)) < SAME_SUMS
    assert relative_error(shifted(opt, 9), shifted(opt, 0)) > 1e-2


@pytest.mark.parametrize("name", ["llama", "llama_tied", "opt_350m_shape"])
def test_gradients_equal_finite_differences_of_the_float64_reference(
    name, folders, models
):
    config = json.loads((folders[name] / "config.json").read_text("utf-8"))
    stored = checkpoints.read_tensors(folders[name])
    weights = {key: array.astype(np.float64) for key, array in stored.items()}
    tokens = some_tokens(6)
    probe = np.random.default_rng(1).normal(size=(6, 128))

    def loss(model: Decoder) -> jax.Array:
        return jnp.sum(jax.nn.log_softmax(model(jnp.array([tokens]))[0]) * probe32)

    def reference_loss() -> float:
        logits = forward(config, weights, tokens)
        shifted = logits - logits.max(-1, keepdims=True)
        return float(
            np.sum((shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))) * probe)
        )

    probe32 = jnp.asarray(probe, jnp.float32)
    gradient = jax.jit(jax.grad(loss))(models[name])
    top = "model." if config["model_type"] == "llama" else "model.decoder."
    layer = gradient.layers[1]
    checked = {
        f"{top}layers.1.self_attn.k_proj.weight": layer.attention.key.weight[...].T,
        f"{top}embed_tokens.weight": (
            gradient.output.weight[...].T
            if config["tie_word_embeddings"]
            else gradient.embedding[...]
        ),
    }
    for key, got in checked.items():
        # The slope in the direction of the gradient is the norm of the gradient.
        direction = np.asarray(got, np.float64)
        direction /= np.linalg.norm(direction)
        original, step = weights[key], 1e-5
        weights[key] = original + step * direction
        above = reference_loss()
        weights[key] = original - step * direction
        slope = (above - reference_loss()) / (2 * step)
        weights[key] = original
        assert float(jnp.linalg.norm(got)) == pytest.approx(slope, rel=1e-3), key


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama_biases", "bfloat16"), ("opt_350m_shape", "float16")]
)
def test_half_precision_is_kept_up_to_the_logits(name, dtype, folders):
    model = load_model(folders[name], dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(dtype)}
    tokens = some_tokens(20)
    hidden = packed_trunk(model, jnp.array(tokens), jnp.arange(20), (20,))
    assert hidden.dtype == jnp.dtype(dtype)
    logits = logits_of(model, tokens)
    assert logits.dtype == np.float32
    # 8 and 11 bits of mantissa, through two layers.
    limit = {"bfloat16": 5e-2, "float16": 1e-2}[dtype]
    assert relative_error(logits, reference_logits(folders[name], tokens)) < limit


def test_activations_are_their_formulas():
    x = np.linspace(-4, 4, 33)
    cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    formulas = {
        "gelu": 0.5 * x * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x])),
        "gelu_tanh": 0.5 * x * (1 + np.tanh(cubic)),
        "relu": np.maximum(x, 0),
        "silu": x / (1 + np.exp(-x)),
    }
    assert formulas.keys() == ACTIVATION_FUNCTIONS.keys() == set(ACTIVATIONS)
    for name, want in formulas.items():
        got = ACTIVATION_FUNCTIONS[name](jnp.asarray(x, jnp.float32))
        # The two gelus differ by 5e-4.
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=name)


def test_a_tied_model_stores_its_embedding_once(models):
    def size(model: Decoder) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(model))

    assert size(models["llama"]) - size(models["llama_tied"]) == 128 * 64


def test_two_models_of_one_config_share_one_compiled_program(folders):
    count = jax.jit(lambda model, tokens: model(tokens))
    tokens = jnp.array([some_tokens(4)])
    for _ in range(2):
        count(load_model(folders["llama"]), tokens)
    assert count._cache_size() == 1


def test_random_weights_depend_on_the_seed_and_have_the_configured_deviation():
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=512,
        hidden_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=64,
        mlp_bias=True,
    )
    model, again = init_model(config, seed=3), init_model(config, seed=3)
    other = init_model(config, seed=4, dtype="bfloat16")
    embedding = np.asarray(model.embedding[...])
    np.testing.assert_array_equal(embedding, again.embedding[...])
    assert embedding.std() == pytest.approx(0.02, rel=0.02)
    assert not np.array_equal(embedding[:64], model.output.weight[...].T[:64])
    assert not np.any(model.layers[0].mlp.up.bias[...])
    assert other.embedding[...].dtype == jnp.bfloat16
    assert other.config.dtype == "bfloat16"
    assert not np.allclose(embedding, other.embedding[...].astype(jnp.float32))


def test_tokens_of_the_wrong_rank_and_too_many_tokens_are_refused(models):
    with pytest.raises(
        ValueError, match=r"tokens: expected shape \[B, T\], got \(3,\)"
    ):
        models["llama"](jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"at most max_position_embeddings \(256\)"):
        models["opt"](jnp.zeros((1, 257), jnp.int32))


@pytest.mark.parametrize("name", ["llama_llama3", "llama_linear"])
def test_planted_fault_ignored_rope_scaling_exceeds_the_tolerance(
    name, folders, models, monkeypatch
):
    want = reference_logits(folders[name], some_tokens(50))
    plain = rotary.frequencies(models["llama"].config)
    monkeypatch.setattr(rotary, "frequencies", lambda config, **_: plain)
    got = jax.jit(lambda model, tokens: model(tokens))(
        models[name], jnp.array([some_tokens(50)])
    )
    assert relative_error(got[0], want) > 100 * TOLERANCE


def test_planted_fault_queries_rotated_by_one_position_exceed_the_tolerance(
    folders, models
):
    # Rotary positions are relative: rotating queries and keys by one more position
    # would change nothing. So only the queries are rotated.
    model, tokens = models["llama"], some_tokens(50)

    def attend(layer, q, k, v):
        one = jnp.ones(50, jnp.int32)
        rotated = rotary.rotate(q, *rotary.tables(one, model.config))
        return causal_attention(rotated[None], k[None], v[None])[0]

    trunk = jax.jit(lambda model, *inputs: model.trunk(*inputs, attend))
    got = model.logits(trunk(model, jnp.array(tokens), jnp.arange(50)))
    want = reference_logits(folders["llama"], tokens)
    assert relative_error(got, want) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_planted_fault_exchanged_keys_and_values_exceed_the_tolerance(
    name, tmp_path, folders
):
    folder = checkpoints.write_case(tmp_path, name)
    tensors = checkpoints.read_tensors(folder)
    swapped = {
        key.replace("k_proj", "*")
        .replace("v_proj", "k_proj")
        .replace("*", "v_proj"): array
        for key, array in tensors.items()
    }
    checkpoints.write_tensors(folder, swapped)
    tokens = some_tokens(20)
    got = logits_of(load_model(folder), tokens)
    want = reference_logits(folders[name], tokens)
    assert relative_error(got, want) > 100 * TOLERANCE
