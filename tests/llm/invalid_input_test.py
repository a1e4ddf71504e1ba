"""LLM: invalid prompts, parameters and arguments, and their error messages."""

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.llm import LLM
from jpaged.params import BeamSearchParams, SamplingParams, StructuredOutputsParams
from tests.support.ids import stable_repr
from tests.support.tiny_llm import (
    GREEDY,
    SIZES,
    is_idle,
)

pytestmark = pytest.mark.long


@pytest.fixture
def llm(plain_llm):
    return plain_llm


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        (None, "prompts: expected text"),
        (3, "prompts: expected text"),
        ([[]], r"prompts\[0\]: prompt: expected at least one token"),
        ([[5], []], r"1 of 2 requests are invalid.*\n  prompts\[1\]"),
        ([[300]], "from 0 to 299 .* got 300"),
        ([[-1]], "from 0 to 299 .* got -1"),
        ([[1.5]], "text or a list of token ids"),
        ([[True]], "text or a list of token ids"),
        ([[5], 7.0], r"prompts\[1\]: prompt: expected text"),
        ([[5] * 64], r"fewer than max_model_len \(64\)"),
        ("\ud800", "surrogate"),
        ("", "at least one token"),
    ],
)
def test_an_invalid_prompt_is_reported_before_any_step_runs(llm, prompts, match):
    num_steps = llm.stats()["num_steps"]
    with pytest.raises(ValueError, match=match):
        llm.generate(prompts)
    with pytest.raises(ValueError, match=match):
        llm.stream(prompts)
    assert llm.stats()["num_steps"] == num_steps


@pytest.mark.parametrize(
    "value",
    [b"abc", [5.9], [True], bytearray(b"a"), {"prompt": 5}, [5, None]],
    ids=stable_repr,
)
def test_every_call_checks_its_prompts_alike(llm, value):
    with llm.pin([5, 6]) as prefix:
        for call in (
            llm.generate,
            llm.stream,
            llm.submit,
            llm.astream,
            llm.pin,
            llm.perplexity,
            prefix.prompt,
            lambda value: llm.score([value], ["a"]),
            lambda value: llm.score(["a"], [value]),
        ):
            with pytest.raises(ValueError, match=r"expected (text|a dict)"):
                call(value)
        for errors in (llm.check([value]), [llm.generate([value], on_error="return")]):
            assert "expected" in str(errors)
    assert is_idle(llm)


def test_usual_forms_of_arguments_are_accepted(folder, llm):
    usual = LLM(
        folder,
        **(SIZES | dict(block_size=np.int64(4), num_blocks=jnp.int32(32))),
        dtype=jnp.float32,
        kv_dtype=np.dtype("float32"),
        seed=None,
        memory_fraction=np.float32(0.5),
        enable_prefix_caching=np.True_,
        policy="weighted",
        policy_parameters=np.zeros(6),
        max_logprobs=-1,
    )
    assert 0 <= usual.seed < 2**32
    assert usual.model.config.dtype == "float32"
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    (output,) = usual.generate([[5, 6]], params)
    assert len(output.outputs[0].token_ids) == 62  # all that max_model_len allows
    (output,) = usual.generate({"prompt_token_ids": [5, 6]}, GREEDY)
    assert output.prompt_token_ids == [5, 6]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (BeamSearchParams(5, 4), r"beam_width: expected at most max_num_seqs \(4\)"),
        ("greedy", "params: expected one, or one for each of 2 prompts, got 6"),
        (3, "expected SamplingParams, BeamSearchParams or AlgorithmParams, got 3"),
        ([SamplingParams()], "one for each of 2 prompts, got 1"),
        (
            SamplingParams(logit_bias={300: 1.0}),
            r"logit_bias: expected token ids below",
        ),
        (SamplingParams(logit_bias={3: 1e30}), r"logit_bias\[3\]: expected -3e\+38 to"),
        (
            SamplingParams(allowed_token_ids=[300]),
            r"allowed_token_ids: expected token ids",
        ),
        (
            SamplingParams(repetition_penalty=1e30),
            r"repetition_penalty: expected 1e-09",
        ),
        (
            SamplingParams(allowed_token_ids=[3], bad_words=[[3]]),
            r"bad_words: expected at least one token of allowed_token_ids",
        ),
        (
            SamplingParams(allowed_token_ids=[40], min_tokens=2),
            r"min_tokens: expected 0, got 2",
        ),
        (SamplingParams(prompt_logprobs=21), "prompt_logprobs: expected at most max_"),
        (SamplingParams(prompt_logprobs=-1), r"max_logprobs \(20\), got 300"),
        (
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="(a")),
            "regex: ",
        ),
        (
            SamplingParams(
                max_tokens=3, structured_outputs=StructuredOutputsParams(regex="a{9}")
            ),
            r"max_tokens: expected at least 6",
        ),
        (
            SamplingParams(stop_token_ids=[300]),
            "stop_token_ids: expected ids from 0 to",
        ),
        (SamplingParams(stop_token_ids=range(2, 12)), "at most max_num_stop_ids"),
        (SamplingParams(n=99), r"n: expected at most max_num_requests \(48\), got 99"),
    ],
)
def test_invalid_params_are_reported_before_any_step_runs(llm, params, match):
    with pytest.raises(ValueError, match=match):
        llm.generate([[5], [6]], params)
    assert is_idle(llm)


def test_a_request_that_can_never_fit_into_the_pool_is_refused(decoder):
    llm = LLM(decoder, **(SIZES | dict(num_blocks=3)))
    with pytest.raises(ValueError, match="need 4 blocks of 4, the pool has 3"):
        llm.generate([5] * 8, SamplingParams(max_tokens=8))


def test_invalid_requests_return_their_error_while_the_others_run(llm, naive):
    seen = {}
    outputs = llm.generate(
        [[5, 6], [], [7]], GREEDY, on_error="return", on_output=seen.__setitem__
    )
    assert [output.error is None for output in outputs] == [True, False, True]
    assert "at least one token" in outputs[1].error
    assert outputs[1].outputs == []
    assert all(output.finished for output in outputs)
    assert outputs[2].outputs[0].token_ids == naive([7], 12)
    assert seen == dict(enumerate(outputs))
    assert [bool(error) for error in llm.check([[5, 6], [], [7]])] == [0, 1, 0]
    with pytest.raises(ValueError, match="on_error"):
        llm.generate([5], on_error="ignore")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            dict(preemption="swap"),
            "num_swap_blocks: expected an integer of at least 1 with preemption='swap'",
        ),
        (dict(preemption="drop"), "preemption: expected one of"),
        (
            dict(num_swap_blocks=4),
            "num_swap_blocks: expected 0 with preemption='recompute', got 4",
        ),
        (dict(mesh=object()), r"mesh: expected one of jpaged\.make_mesh"),
        (dict(kv_dtype="int4"), "kv_dtype: expected one of"),
        (dict(dtype="float8"), "dtype: expected 'auto' or one of"),
        (dict(attention="cuda"), "attention: expected None or one of"),
        (dict(policy="random"), "policy: expected one of"),
        (
            dict(enable_prefix_caching=1),
            "enable_prefix_caching: expected True or False",
        ),
        (
            dict(memory_fraction=1.5),
            "memory_fraction: .* above 0 and at most 1, got 1.5",
        ),
        (dict(max_model_len=257), r"max_position_embeddings \(256\), got 257"),
        (dict(block_size=0), "block_size: expected an integer of at least 1"),
        (dict(num_blocks=2.5), "num_blocks: expected an integer of at least 1"),
        (dict(dtype=None), "dtype: expected the name of a dtype, or a dtype, got None"),
        (dict(dtype=float), "dtype: expected 'auto' or one of .* got 'float64'"),
        (
            dict(policy_parameters=3),
            "policy_parameters: expected a sequence of numbers",
        ),
        (dict(max_logprobs=-2), "max_logprobs: expected an integer of at least -1"),
        (dict(seed=-1), "seed: expected an integer of at least 0"),
        (dict(max_num_batched_tokens=2), "max_num_batched_tokens: expected at least"),
        (dict(max_num_requests=2), "max_num_requests: expected at least"),
    ],
)
def test_an_invalid_argument_is_refused(folder, arguments, match):
    with pytest.raises(ValueError, match=match):
        LLM(folder, **(SIZES | arguments))


def test_a_tokenizer_that_is_missing_is_refused(decoder, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^tokenizer: nowhere: no such folder"):
        LLM(folder, tokenizer="nowhere")
    with pytest.raises(ValueError, match=r"^tokenizer: .* without it"):
        LLM(decoder, tokenizer=tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer: expected a folder"):
        LLM(decoder, tokenizer=object())


def test_an_unknown_model_is_refused_with_the_sources_of_models(decoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download"):
        LLM("meta-llama/Llama-3.2-1B")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        LLM(tmp_path)
    with pytest.raises(ValueError, match="model: expected a folder"):
        LLM(3)
    with pytest.raises(ValueError, match=r"the Decoder's own \('float32'\)"):
        LLM(decoder, dtype="bfloat16")
    with pytest.raises(ValueError, match="model: expected a folder or a name"):
        LLM("")
    with pytest.raises(TypeError, match="num_gpus"):
        LLM(decoder, num_gpus=2)
