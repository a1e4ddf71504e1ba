"""Every family against stored results of transformers: plain forward and engine.

numpy generates the weights, the same ones as for the stored results; see
`tests/support/golden/make_families.py`. `model(tokens)` computes whole sequences; the
engine splits prompts into chunks and decodes from pages.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.models import Decoder, load_model, save_model
from jpaged.models.loading import checkpoint
from jpaged.models.loading.checkpoint import load_config
from tests.support.models import checkpoints, families
from tests.support.models.paged_greedy import LENGTH, PAGED, QUICK, served
from tests.support.models.reference_models import relative_error
from tests.support.paths import ROOT

# The float32 error is at most 2e-6, that of the planted faults below at least 1e-2.
TOLERANCE = 1e-4
STRIDE = 4  # every 4th logit is stored: tests/support/golden
GOLDEN = json.loads(
    (ROOT / "tests" / "support" / "golden" / "families.json").read_text("utf-8")
)
# decoder_test compares the same variants of Llama and OPT with transformers.
STORED = [name for name in families.CASES if name not in checkpoints.CASES]
apply = jax.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Function that returns the decoder of a case; each is loaded once."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def load_case(name: str) -> Decoder:
        return load_model(write_case(root / name, name))

    return load_case


def write_case(folder: pathlib.Path, name: str) -> pathlib.Path:
    case = GOLDEN[name]
    return checkpoints.write_shapes(
        folder, case["config"], case["shapes"], seed=case["seed"]
    )


def logits_of(model: Decoder, tokens: list[int]) -> np.ndarray:
    """Logits f32[T, V], through one compiled program for every length."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(apply(model, padded))[0, : len(tokens)]


def test_stored_cases_are_those_of_the_live_tests_and_exceed_their_windows():
    assert GOLDEN.keys() == families.CASES.keys()
    assert {families.CASES[name][0] for name in PAGED} == families.SIZES.keys()
    assert set(QUICK) <= PAGED.keys()
    lengths = {len(prompt) for case in GOLDEN.values() for prompt in case["prompts"]}
    windows = {case["config"].get("sliding_window") for case in GOLDEN.values()}
    assert max(lengths) > 4 * 8
    assert 8 in windows


@pytest.mark.parametrize("name", STORED)
def test_logits_and_greedy_tokens_equal_those_stored_from_transformers(name, load):
    case, model = GOLDEN[name], load(name)
    for prompt, want in zip(case["prompts"], case["last_logits"], strict=True):
        got = logits_of(model, prompt)[-1, ::STRIDE]
        assert relative_error(got, want) < TOLERANCE
    for prompt, want in zip(case["prompts"], case["greedy"], strict=True):
        # The model is causal: one forward pass predicts each of the tokens.
        chosen = logits_of(model, prompt + want)[len(prompt) - 1 : -1].argmax(-1)
        assert chosen.tolist() == want


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.long)
        for name in PAGED
    ],
)
def test_paged_decode_after_chunked_prompts_gives_the_stored_tokens(name, load):
    case = GOLDEN[name]
    got = served(load(name), case["prompts"], len(case["greedy"][0]), PAGED[name])
    assert got == case["greedy"]


@pytest.mark.parametrize("name", STORED)
def test_a_saved_model_has_the_tensors_of_the_original_checkpoint(name, load, tmp_path):
    model = load(name)
    save_model(model, tmp_path / "saved")
    want = checkpoints.read_tensors(write_case(tmp_path / "first", name))
    got = checkpoints.read_tensors(tmp_path / "saved")
    assert got.keys() == want.keys()
    for key, array in want.items():
        np.testing.assert_array_equal(got[key], array, err_msg=key)
    # The original config has the style of transformers 5, ours that of 4.
    assert load_config(tmp_path / "saved") == model.config


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_output_weights_in_the_layout_of_tpus_are_the_same_model(
    name, load, tmp_path, monkeypatch
):
    def vocab_first(config):
        return dataclasses.replace(config, vocab_first=True)

    plain = load(name)
    monkeypatch.setattr(checkpoint, "as_stored", vocab_first)
    model = load_model(write_case(tmp_path / "first", name))
    assert model.output.weight is None
    np.testing.assert_array_equal(model.output.rows[...].T, plain.output.weight[...])
    tokens = GOLDEN[name]["prompts"][0]
    error = relative_error(logits_of(model, tokens), logits_of(plain, tokens))
    assert error < 1e-6  # float32 sums in another order
    save_model(model, tmp_path / "saved")
    want = checkpoints.read_tensors(tmp_path / "first")
    got = checkpoints.read_tensors(tmp_path / "saved")
    assert got.keys() == want.keys()
    for key, array in want.items():
        np.testing.assert_array_equal(got[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2_window", "gpt_oss"])
def test_layers_with_and_without_a_window_alternate(name, load):
    windows = load(name).config.windows
    assert set(windows) == {None, 8}
    assert windows[-1] == (8 if name == "qwen2_window" else (8, None)[name != "gemma3"])


def with_wrong_config(name: str, folder: pathlib.Path, **changes) -> Decoder:
    """The weights of a case with changed entries in config.json."""
    write_case(folder, name)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), "utf-8")
    return load_model(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 9}),
        ("gemma2", {"layer_types": ["full_attention"] * 4}),
        ("gemma2", {"attn_logit_softcapping": 1.0}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 1e6}}}),
        ("phi3_longrope", {"rope_parameters": families.LONGROPE | {"factor": 3.0}}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts_per_tok": 3}),
        ("gpt_oss", {"swiglu_limit": 3.0}),
        ("llama_yarn", {"rope_parameters": families.YARN | {"factor": 4.0}}),
    ],
)
def test_planted_fault_in_a_feature_exceeds_the_tolerance(name, changes, tmp_path):
    case = GOLDEN[name]
    got = logits_of(with_wrong_config(name, tmp_path, **changes), case["prompts"][-1])
    error = relative_error(got[-1, ::STRIDE], case["last_logits"][-1])
    assert error > 5 * TOLERANCE


def test_planted_fault_missing_sinks_exceed_the_tolerance(load, monkeypatch):
    case, model = GOLDEN["gpt_oss"], load("gpt_oss")
    options = Decoder.attention_options
    monkeypatch.setattr(
        Decoder, "attention_options", lambda *args: options(*args) | {"sinks": None}
    )
    tokens = jnp.asarray([case["prompts"][-1]])
    got = jax.jit(lambda model, tokens: model(tokens))(model, tokens)[0]
    error = relative_error(got[-1, ::STRIDE], case["last_logits"][-1])
    assert error > 5 * TOLERANCE
