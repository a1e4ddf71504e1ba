"""Extreme values in every field of every kind of parameters.

Each request runs or is refused by the name of its field, when it is submitted. A live
request that is open meanwhile, and the requests beside it, are not affected.
"""

import dataclasses
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding.repeated import repeated_params
from jpaged.params import AlgorithmParams, BeamSearchParams, SamplingParams
from tests.engine.algorithms_test import race
from tests.support.engine import full_llm as full
from tests.support.tiny_llm import GREEDY, is_idle

pytestmark = pytest.mark.long

PROMPT = [7, 30, 111, 222, 9]
NUMBERS = [
    *(sign * 2**power for power in (15, 31, 32, 63, 64, 200) for sign in (1, -1)),
    *(2**31 - 1, -(2**31) + 1, 10**4400, sys.maxsize, 0, 1, -1, 3),
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-320, 1e-45, 1e-38, 1e-30),
    *(1e30, 1e38, 3.5e38, 1e300, -1e300, 0.5, 1.0, 1 - 1e-12, 2.0, -2.0),
    *(np.int8(3), np.int64(2**40), np.uint64(2**64 - 1), np.float16(0.5)),
    *(np.float64(1e300), np.array(2), np.array([2]), jnp.int32(2), jnp.float32(0.25)),
    *(jnp.bfloat16(0.5), np.bool_(True), True, None, "3", b"3", [], [1], {}, 1j),
]
WRAPPED = {
    "stop_token_ids": lambda value: [value],
    "allowed_token_ids": lambda value: [5, value],
    "bad_words": lambda value: [[5, value]],
    "logit_bias": lambda value: {5: value},
}
KINDS = {
    SamplingParams: dict(max_tokens=2),
    BeamSearchParams: dict(beam_width=2, max_tokens=2),
    AlgorithmParams: dict(algorithm=race, num_rows=4, max_tokens=2),
}
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]


def variants(kind, name):
    """The arguments with an extreme value in one field, plain or inside of it."""
    for value in NUMBERS:
        yield KINDS[kind] | {name: value}
        if name in WRAPPED:
            yield KINDS[kind] | {name: WRAPPED[name](value)}
        if name == "logit_bias":
            yield KINDS[kind] | {name: {value: 1.0} if value.__hash__ else value}
        if name == "min_tokens":
            yield KINDS[kind] | {name: value, "max_tokens": value}
            yield KINDS[kind] | {name: value, "max_tokens": None}
        if name == "length_penalty":
            yield KINDS[kind] | {name: value, "max_tokens": None}


@pytest.mark.filterwarnings("ignore:temperature:UserWarning")
@pytest.mark.parametrize(
    ("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS]
)
def test_an_extreme_value_is_refused_by_name_or_runs(full_llm, kind, name):
    llm = full_llm
    config, epoch = llm.config, llm._host.epoch
    live = llm.submit(PROMPT, dataclasses.replace(GREEDY, max_tokens=50))
    next(live)
    valid = []
    for arguments in variants(kind, name):
        params, refusal = None, None
        try:
            params = kind(**arguments)
        except ValueError as error:
            refusal = str(error)
        if params is not None:
            (refusal,) = llm.check([PROMPT], params)
        if refusal is None:
            valid.append(params)
            continue
        names = (name, "prompt: ", "params: ")
        if name in ("min_tokens", "length_penalty"):
            names += ("max_tokens: ",)
        assert refusal.startswith(names), refusal
    run = repeated_params if kind is AlgorithmParams else lambda params: params
    valid = [p for p in valid if llm._batcher._grow(config, [run(p)]) == config]
    outputs = llm.generate([PROMPT] * len(valid), valid, on_error="return")
    for params, output in zip(valid, outputs, strict=True):
        assert output.error is None, (params, output.error)
        assert output.finished
        for sample in output.outputs:
            assert not math.isnan(sample.cumulative_logprob), params
    assert live.output().outputs[0].finish_reason in ("length", "stop")
    assert llm._host.epoch == epoch
    assert llm.config == config
    assert is_idle(llm)


def test_a_request_that_fails_while_it_is_encoded_ends_alone(full_llm, monkeypatch):
    from jpaged.engine import submission

    encode = submission.encode_requests

    def failing(table, config, prompts, *args, **kwargs):
        if any(list(prompt) == [9, 9, 9] for prompt in prompts):
            raise OverflowError("planted")
        return encode(table, config, prompts, *args, **kwargs)

    llm = full_llm
    live = llm.submit(PROMPT, GREEDY)
    (expected,) = llm.generate([PROMPT], GREEDY)
    monkeypatch.setattr(submission, "encode_requests", failing)
    second = llm.submit(PROMPT, GREEDY)
    broken = llm.submit([9, 9, 9], GREEDY)
    third = llm.submit(PROMPT, GREEDY)
    with pytest.raises(OverflowError, match="planted"):
        broken.output()
    for request in (live, second, third):
        found = request.output().outputs[0].token_ids
        assert found == expected.outputs[0].token_ids
    assert full.is_idle(llm)


def test_long_seeds_give_different_tokens_and_the_same_each_time(full_llm):
    seeds = [5, 5 + 2**32, 5 + 2**40, 2**64 - 1]
    params = [
        SamplingParams(seed=seed, max_tokens=12, ignore_eos=True) for seed in seeds
    ]
    first = full_llm.generate([PROMPT] * 4, params)
    again = full_llm.generate([PROMPT] * 4, params[::-1])[::-1]
    tokens = [tuple(output.outputs[0].token_ids) for output in first]
    assert tokens == [tuple(output.outputs[0].token_ids) for output in again]
    assert len(set(tokens)) == 4


def test_top_k_of_the_vocabulary_or_more_keeps_all(full_llm):
    params = [
        SamplingParams(seed=3, max_tokens=12, top_k=top_k)
        for top_k in (0, -1, full.VOCAB_SIZE, 2**31, sys.maxsize)
    ]
    outputs = full_llm.generate([PROMPT] * 5, params)
    tokens = {tuple(output.outputs[0].token_ids) for output in outputs}
    assert len(tokens) == 1


def test_parameters_that_change_after_the_submission_have_no_effect(full_llm):
    bias = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={5: 100.0})
    live = full_llm.submit(PROMPT, bias)
    bias.logit_bias.clear()
    bias.logit_bias[2**40] = 1.0
    assert live.output().outputs[0].token_ids == [5, 5, 5, 5]
