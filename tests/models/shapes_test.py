"""Built-in shapes against the published numbers of parameters."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jpaged import LLM, load_model
from jpaged.models import Decoder
from jpaged.models.loading.checkpoint import load_config
from jpaged.models.shapes import SHAPES, random_config

# Counted in the published safetensors; tied weights count once.
PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini-4k": 3_821_079_552,
    "gpt-oss-20b": 20_914_757_184,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
}
# Numbers for the other shapes, in billions, mostly from their names.
NAMED = {
    "opt-1.3b": 1.3,
    "opt-2.7b": 2.7,
    "opt-6.7b": 6.7,
    "opt-13b": 13,
    "opt-30b": 30,
    "opt-66b": 66,
    "opt-175b": 175,
    "gpt2-medium": 0.355,
    "gpt2-large": 0.774,
    "llama-7b": 6.7,
    "llama-13b": 13,
    "llama-33b": 32.5,
    "llama-65b": 65.2,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "mixtral-8x22b": 140.6,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-14b": 14.7,
    "qwen2.5-32b": 32.5,
    "qwen2.5-72b": 72.7,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "gemma-7b": 8.54,
    "gemma-2-27b": 27.2,
    "gpt-oss-120b": 116.8,
    "deepseek-v3": 671.0,
}


def num_params(name: str) -> int:
    """Extrapolated from two shallow models: all layers after dense ones are equal."""
    config = random_config(name)
    first = len(config.dense_layers) + 1
    few, more = (
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shallow(name, n)))
        for n in (first, first + 1)
    )
    return few + (config.num_layers - first) * (more - few)


def shallow(name: str, num_layers: int) -> Decoder:
    config = dataclasses.replace(
        random_config(name), num_layers=num_layers, full_layers=()
    )
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def test_every_shape_has_a_published_number():
    assert PUBLISHED.keys() | NAMED.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name):
    assert num_params(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMED)
def test_a_shape_has_about_the_number_of_parameters_in_its_name(name):
    assert num_params(name) == pytest.approx(NAMED[name] * 1e9, rel=0.035)


def test_a_random_model_is_created_by_name(monkeypatch):
    small = dict(SHAPES["llama-3.2-1b"]) | {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 512,
        "eos_token_id": 2,
        "intermediate_size": 96,
    }
    monkeypatch.setitem(SHAPES, "small", small)
    with LLM("random:small", max_num_seqs=1, max_model_len=32) as llm:
        assert llm.tokenizer is None
        assert llm.model.config.rope_scaling.kind == "llama3"
        (score,) = llm.score([[1, 2, 3]], [[4, 5]])
        # Weights of standard deviation 0.02 predict nearly uniformly.
        assert score.perplexity == pytest.approx(512, rel=0.1)
    narrow = load_model("random:SMALL", dtype="bfloat16")
    assert narrow.config.dtype == "bfloat16"
    assert load_config("random:small").hidden_size == 64


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"expected 'random:' and one of opt-125m, .*"):
        LLM("random:llama-9")
