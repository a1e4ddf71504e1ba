"""Parity with transformers, live: its checkpoints loaded here, ours loaded there.

Needs the extra `huggingface`. The stored cases of decoder_test need nothing.
"""

import functools
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import relative_error

from jpaged.models import Decoder, load_model, rotary, save_model
from jpaged.models.checkpoint import load_config

pytestmark = pytest.mark.huggingface

TOLERANCE = 1e-4  # of float32 logits; wrong positions or weights are off by 1e-2
NUM_GREEDY = 64
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_linear": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 4.0,
            "rope_theta": 10000.0,
        },
    },
    "llama_llama3": {
        "model_type": "llama",
        "head_dim": 32,
        "rope_parameters": checkpoints.LLAMA3_SCALING | {"rope_theta": 500000.0},
    },
    "opt_125m_shape": {"model_type": "opt"},
    "opt_350m_shape": {
        "model_type": "opt",
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 32,
    },
    "opt_without_biases": {"model_type": "opt", "enable_bias": False},
}
SIZES = {
    "llama": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "opt": {
        "vocab_size": 256,
        "hidden_size": 64,
        "ffn_dim": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 256,
    },
}
apply = jax.jit(lambda model, tokens: model(tokens))


@functools.cache
def make(name: str):
    """A transformers model of this case, its weights large enough to say something."""
    import torch
    import transformers

    case = dict(CASES[name])
    family = case.pop("model_type")
    config = transformers.AutoConfig.for_model(family, **SIZES[family] | case)
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for key, param in model.named_parameters():
            noise = torch.randn_like(param) * (0.5 if "embed" in key else 0.2)
            is_norm = "norm" in key and key.endswith("weight")
            param.copy_(noise + 1.0 if is_norm else noise)
    return model


def theirs(model, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] by transformers, in float64 where the model is."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return logits.to(torch.float64).numpy()


def ours(model: Decoder, tokens: list[int]) -> np.ndarray:
    """Logits f32[T, V], through one compiled program for every length."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(apply(model, padded))[0, : len(tokens)]


def some_tokens(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 256, length).tolist()


def planted(kind: str, folder) -> None:
    """Spoils a saved checkpoint in place."""
    tensors = checkpoints.read_tensors(folder)
    if kind == "keys for values":
        for key in [key for key in tensors if "k_proj" in key]:
            other = key.replace("k_proj", "v_proj")
            tensors[key], tensors[other] = tensors[other], tensors[key]
    else:
        key = next(key for key in tensors if "k_proj.weight" in key)
        tensors[key][0, 0] += 1.0
    checkpoints.write_tensors(folder, tensors)


@pytest.mark.parametrize("name", CASES)
def test_float32_logits_equal_those_of_transformers(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    for length in (1, 5, 50, 128):
        tokens = some_tokens(length)
        assert relative_error(ours(loaded, tokens), theirs(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_those_of_transformers_over_64_steps(name, tmp_path):
    import torch

    model, prompt = make(name), some_tokens(9)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    want = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NUM_GREEDY,
        min_new_tokens=NUM_GREEDY,
        eos_token_id=None,
    )[0].tolist()
    assert len(want) == len(prompt) + NUM_GREEDY
    assert len(set(want[len(prompt) :])) > 1
    tokens = list(prompt)
    for _ in range(NUM_GREEDY):
        tokens.append(int(ours(loaded, tokens)[-1].argmax()))
    assert tokens == want


@pytest.mark.parametrize("name", ["llama", "opt_350m_shape"])
def test_a_sharded_save_of_transformers_is_read(name, tmp_path):
    model, tokens = make(name), some_tokens(20)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    got = ours(load_model(tmp_path), tokens)
    assert relative_error(got, theirs(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama_biases", "llama_tied", "opt_125m_shape"])
def test_a_bfloat16_save_of_transformers_is_read_in_both_dtypes(name, tmp_path):
    import torch
    import transformers

    make(name).save_pretrained(tmp_path)
    narrow = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16
    )
    narrow.save_pretrained(tmp_path / "narrow")
    tokens = some_tokens(30)
    assert load_config(tmp_path / "narrow").dtype == "bfloat16"
    exact = theirs(narrow.float(), tokens)
    got = ours(load_model(tmp_path / "narrow", dtype="float32"), tokens)
    assert relative_error(got, exact) < TOLERANCE
    got = ours(load_model(tmp_path / "narrow", dtype="bfloat16"), tokens)
    # 8 bits of mantissa through three layers; transformers in bfloat16 errs as much.
    assert relative_error(got, exact) < 5e-2


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_we_save(name, tmp_path):
    import transformers

    model, tokens = make(name), some_tokens(20)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    save_model(loaded, tmp_path / "ours")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    np.testing.assert_array_equal(theirs(back, tokens), theirs(model, tokens))
    assert load_config(tmp_path / "ours") == loaded.config


def test_token_ids_are_those_of_the_config_or_its_class(tmp_path):
    for name in ("llama", "opt_125m_shape"):
        model = make(name)
        model.save_pretrained(tmp_path / name)
        config = load_config(tmp_path / name)
        assert config.eos_token_ids == (model.config.eos_token_id,) == (2,)
        assert config.bos_token_id == model.config.bos_token_id
        assert config.pad_token_id == model.config.pad_token_id


@pytest.mark.parametrize("name", ["llama", "llama_linear", "llama_llama3"])
def test_rotary_frequencies_are_those_of_transformers_to_the_last_bits(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    want = model.model.rotary_emb.inv_freq.numpy()
    got = rotary.frequencies(load_config(tmp_path))
    # Two units in the last place: torch and numpy round powers differently.
    np.testing.assert_allclose(got, want, rtol=2.5e-7)


@pytest.mark.parametrize("kind", ["keys for values", "one weight"])
@pytest.mark.parametrize("name", ["llama", "opt_125m_shape"])
def test_planted_fault_breaks_the_tolerance(name, kind, tmp_path):
    model, tokens = make(name), some_tokens(50)
    model.save_pretrained(tmp_path)
    planted(kind, tmp_path)
    got = ours(load_model(tmp_path), tokens)
    assert relative_error(got, theirs(model, tokens)) > 10 * TOLERANCE


def test_planted_fault_of_late_queries_breaks_the_tolerance(tmp_path, monkeypatch):
    model, tokens = make("llama"), some_tokens(50)
    model.save_pretrained(tmp_path)
    loaded, rotate, calls = load_model(tmp_path), rotary.rotate, []

    def late(x, cos, sin):
        calls.append(x.shape)
        if len(calls) % 2 == 0:
            return rotate(x, cos, sin)
        one = rotary.tables(jnp.ones(len(x), jnp.int32), loaded.config)
        return rotate(rotate(x, cos, sin), *one)

    monkeypatch.setattr(rotary, "rotate", late)
    got = jax.jit(lambda model, tokens: model(tokens))(loaded, jnp.array([tokens]))[0]
    assert len(calls) == 2 * 3
    assert relative_error(got, theirs(model, tokens)) > 100 * TOLERANCE
