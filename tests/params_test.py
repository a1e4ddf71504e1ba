"""Request parameters: accepted values, refused values and their error messages."""

import dataclasses
import math

import numpy as np
import pytest

from jpaged.outputs import CompletionOutput, Logprob, RequestOutput
from jpaged.params import (
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from tests.support.ids import stable_repr


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "n": 1,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
        "token_masks": False,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": (),
        "seed": None,
        "priority": 0,
        "structured_outputs": None,
        "logits_processors": (),
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "detokenize": True,
        "truncate_prompt_tokens": None,
        "output_kind": RequestOutputKind.CUMULATIVE,
        # Not vLLM's.
        "deadline_ms": None,
        "user": None,
        "retention": None,
    }


def test_values_are_converted_to_python_types():
    params = SamplingParams(
        n=np.int64(2),
        temperature=1,
        top_k=-1,
        top_p=np.float32(0.5),
        stop="END",
        stop_token_ids=[np.int32(3), 4],
        logit_bias={np.int32(5): -1},
        allowed_token_ids=range(2),
        bad_words=["no"],
        seed=-1,
    )
    assert params.n == 2
    assert type(params.n) is int
    assert type(params.temperature) is float
    assert params.top_k == 0
    assert params.top_p == 0.5
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {5: -1.0}
    assert params.allowed_token_ids == (0, 1)
    assert params.bad_words == ("no",)
    assert params.seed is None
    # dataclasses.replace keeps the converted values.
    assert dataclasses.replace(params, top_k=3).stop == ("END",)


NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, "1", None, [1.0]]
FLOATS = [
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
]
INTEGERS = ["n", "top_k", "max_tokens", "min_tokens", "priority"]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=stable_repr)
def test_a_value_that_is_not_a_finite_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a finite number.* got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [*INTEGERS, "seed", "logprobs", "prompt_logprobs"])
@pytest.mark.parametrize(
    "value", [1.0, math.nan, True, np.True_, "1", [1]], ids=stable_repr
)
def test_a_value_that_is_not_an_integer_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected an integer.* got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, r"n: expected an integer of at least 1, got 0 \(int\)"),
        (
            {"temperature": -0.1},
            "temperature: expected a finite number of at least 0, ",
        ),
        ({"top_k": -2}, "top_k: expected an integer of at least -1, got -2"),
        ({"top_p": 0}, "top_p: expected a finite number above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p: expected a finite number above 0 and at most 1, got"),
        ({"min_p": 1.1}, "min_p: expected a finite number of at least 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected .* above 0, got 0"),
        ({"presence_penalty": 2.1}, "presence_penalty: .* at least -2 and at most 2"),
        ({"frequency_penalty": -3}, "frequency_penalty: .* at least -2 and at most 2"),
        ({"max_tokens": 0}, "max_tokens: expected an integer of at least 1, got 0"),
        ({"min_tokens": -1}, "min_tokens: expected an integer of at least 0, got -1"),
        ({"min_tokens": 17}, r"min_tokens: expected at most max_tokens \(16\), got 17"),
        ({"stop": [""]}, r"stop\[0\]: expected a string that is not empty, got ''"),
        ({"stop": ["a", 1]}, r"stop\[1\]: expected a string that is not empty, got 1"),
        ({"stop": 3}, "stop: expected a string or a sequence of strings, got 3"),
        (
            {"stop_token_ids": [1, -1]},
            r"stop_token_ids\[1\]: expected an integer of at",
        ),
        ({"stop_token_ids": "12"}, "stop_token_ids: expected a sequence of token ids"),
        ({"stop_token_ids": 12}, "stop_token_ids: expected a sequence of token ids"),
        ({"ignore_eos": 1}, "ignore_eos: expected True or False, got 1"),
        ({"logprobs": -2}, "logprobs: expected an integer of at least -1, got -2"),
        ({"logit_bias": [1]}, "logit_bias: expected a dict of token id -> number"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias key: expected an integer of at least"),
        ({"logit_bias": {"1": 1, 1: 2}}, "logit_bias: expected each token id once"),
        ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\]: expected a finite number"),
        (
            {"allowed_token_ids": []},
            "allowed_token_ids: expected None, or at least one",
        ),
        ({"bad_words": ["x", ""]}, r"bad_words\[1\]: expected a string that is not"),
        (
            {"seed": 2**64},
            "seed: expected an integer of at least -1 and at most 18446744",
        ),
        ({"n": 2, "temperature": 0}, "n: expected 1 with greedy decoding .* above 0"),
    ],
    ids=str,
)
def test_an_invalid_value_raises_an_error_with_name_expected_and_got(
    arguments, message
):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(**arguments)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=0.5)
    with pytest.raises(TypeError, match="temperature"):
        BeamSearchParams(beam_width=2, max_tokens=4, temperatures=1.0)


def test_tiny_temperatures_become_greedy_or_are_raised_with_a_warning():
    assert SamplingParams(temperature=9e-6).is_greedy
    assert SamplingParams(temperature=9e-6).temperature == 0.0
    assert not SamplingParams(temperature=0.01).is_greedy
    with pytest.warns(UserWarning, match=r"temperature 0\.001 is raised to 0\.01"):
        params = SamplingParams(temperature=0.001)
    assert params.temperature == 0.01
    assert not params.is_greedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam_width": 0}, "beam_width: expected an integer of at least 1, got 0"),
        (
            {"beam_width": True},
            "beam_width: expected an integer of at least 1, got True",
        ),
        ({"max_tokens": 2.0}, "max_tokens: expected an integer of at least 1, got 2.0"),
        ({"length_penalty": math.inf}, "length_penalty: expected a finite number, got"),
        ({"early_stopping": "no"}, "early_stopping: expected False, True or 'never'"),
        ({"early_stopping": 1}, "early_stopping: expected False, True or 'never'"),
        ({"ignore_eos": None}, "ignore_eos: expected True or False, got None"),
        ({"stop_token_ids": [0.5]}, r"stop_token_ids\[0\]: expected an integer"),
        ({"num_return": 5}, r"num_return: expected at most beam_width \(4\), got 5"),
        ({"num_return": 0}, "num_return: expected an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_an_invalid_beam_search_value_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        BeamSearchParams(**({"beam_width": 4, "max_tokens": 8} | arguments))


def test_valid_beam_search_values_are_kept():
    params = BeamSearchParams(4, 8, early_stopping="never", stop_token_ids=[2])
    assert params.stop_token_ids == (2,)
    assert params.length_penalty == 1.0
    assert params.num_return is None


def test_a_dict_is_a_constraint():
    params = SamplingParams(structured_outputs={"regex": "[a-z]+"})
    assert params.structured_outputs == StructuredOutputsParams(regex="[a-z]+")
    params = BeamSearchParams(2, None, structured_outputs={"choice": ["a"]})
    assert params.structured_outputs == StructuredOutputsParams(choice=["a"])
    assert params.max_tokens is None
    for wrong, message in [
        ({"pattern": "a"}, "structured_outputs: expected a dict with one of regex"),
        ({}, "structured_outputs: expected exactly one of"),
        ({"regex": 5}, "regex: expected a string"),
        ("[a-z]+", "structured_outputs: expected StructuredOutputsParams, a dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            SamplingParams(structured_outputs=wrong)
    for name in ("regex", "choice", "json"):
        for value in (2**31, 0.5, b"a", 10**4400, [], np.array(2)):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                StructuredOutputsParams(**{name: value})


def test_keys_of_logit_bias_can_be_text_as_in_json():
    assert SamplingParams(logit_bias={"50": -100}).logit_bias == {50: -100.0}


def test_repr_of_outputs_is_one_line_without_fields_that_are_none():
    output = CompletionOutput(0, list(range(30)), "some text", -1.25, score=-0.5)
    assert repr(output) == (
        "CompletionOutput(index=0, token_ids=[0, 1, 2, 3, 4, 5, 6, 7, ... 30 in all], "
        "text='some text', cumulative_logprob=-1.25, score=-0.5)"
    )
    request = RequestOutput(7, None, [1, 2], [output])
    assert repr(request).startswith(
        "RequestOutput(request_id=7, prompt_token_ids=[1, 2], outputs=[CompletionOutput"
    )
    assert not request.finished
    ended = dataclasses.replace(output, finish_reason="stop")
    assert dataclasses.replace(request, outputs=[ended]).finished
    assert dataclasses.replace(request, outputs=[], error="no memory").finished
    assert Logprob(-0.5).rank is None
