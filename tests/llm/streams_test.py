"""LLM: streams, interrupts and faults of the engine."""

import dataclasses

import jax.numpy as jnp
import pytest

from jpaged.llm import LLM
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.serving import batcher, engine_host
from jpaged.serving.compiled import CompiledPrograms
from jpaged.serving.stepping import Stepper
from jpaged.text.tokenizer import Tokenizer
from tests.support.tiny_llm import (
    GREEDY,
    SIZES,
    ascii_tokenizer,
    byte_tokenizer,
    is_idle,
    lose_state,
    random_prompts,
    tokens_of,
)

pytestmark = pytest.mark.long


@pytest.fixture
def llm(plain_llm):
    return plain_llm


@pytest.mark.parametrize("kind", ["ascii", "bytes"])
def test_the_deltas_of_a_stream_equal_the_outputs_of_generate(
    decoder, kind, monkeypatch
):
    # One step per slice, on any machine.
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    backend = {"ascii": ascii_tokenizer, "bytes": byte_tokenizer}[kind]()
    llm = LLM(decoder, tokenizer=Tokenizer(backend), **SIZES)
    prompts = ["hello", [5, 6, 7], "日本"]
    prompts = prompts[: 2 if kind == "ascii" else 3]
    params = [
        SamplingParams(n=3, seed=4, max_tokens=20, stop=["e", "zz", "q?"]),
        SamplingParams(temperature=0, max_tokens=10),
        SamplingParams(seed=2, temperature=0.3, max_tokens=20, ignore_eos=True),
    ][: len(prompts)]
    expected = llm.generate(prompts, params)
    text, token_ids, ends, num_deltas = {}, {}, {}, 0
    for delta in llm.stream(prompts, params):
        key = (delta.request, delta.sample)
        assert key not in ends
        num_deltas += 1
        text[key] = text.get(key, "") + delta.text
        token_ids[key] = token_ids.get(key, []) + delta.token_ids
        if delta.finish_reason is not None:
            ends[key] = (delta.finish_reason, delta.stop_reason)
    assert num_deltas > 15
    for i, output in enumerate(expected):
        for sample in output.outputs:
            key = (i, sample.index)
            assert text[key] == sample.text
            assert token_ids[key] == sample.token_ids
            assert ends[key] == (sample.finish_reason, sample.stop_reason)
    assert is_idle(llm)


def test_a_stream_that_ends_early_leaves_the_engine_idle(llm, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    stream = llm.stream([[5, 6]] * 3, dataclasses.replace(GREEDY, max_tokens=50))
    next(stream)
    assert llm._batcher.num_open == 3
    stream.close()
    assert is_idle(llm)
    llm.stream([5, 6], GREEDY)  # never iterated
    assert is_idle(llm)


def test_a_call_can_run_while_a_stream_is_open(llm, naive, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    stream = llm.stream([5, 6], dataclasses.replace(GREEDY, max_tokens=20))
    token_ids = list(next(stream).token_ids)
    assert len(token_ids) < 20
    (output,) = llm.generate([8], GREEDY)
    assert output.outputs[0].token_ids == naive([8], 12)
    for delta in stream:
        token_ids += delta.token_ids
    assert token_ids == naive([5, 6], 20)


def test_a_call_runs_although_unread_streams_fill_the_request_table(
    llm, naive, monkeypatch
):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    streams = [
        llm.stream([[5]] * 24, dataclasses.replace(GREEDY, max_tokens=30))
        for _ in range(2)
    ]
    first = [next(stream) for stream in streams]
    assert tokens_of(llm.generate([8], GREEDY)) == [[naive([8], 12)]]
    token_ids = [
        token
        for delta in (first[1], *streams[1])
        if delta.request == 23
        for token in delta.token_ids
    ]
    assert token_ids == naive([5], 30)
    streams[0].close()
    assert is_idle(llm)


# Interrupts and faults


@pytest.fixture(scope="module")
def interrupted_llm(decoder):
    """An LLM that compiles nothing, so that each call runs the same programs."""
    llm = LLM(decoder, **SIZES)
    llm.warm_up(GREEDY)
    llm.generate([5, 6], GREEDY)
    return llm


@pytest.mark.parametrize("name", ["schedule", "trunk", "decode", "loop", "settle"])
@pytest.mark.parametrize("moment", ["before the call", "after the state was donated"])
def test_the_llm_is_usable_after_an_interrupt(
    interrupted_llm, naive, monkeypatch, moment, name
):
    llm = interrupted_llm
    call, calls = CompiledPrograms.call, []

    def interrupted(self, key, *arguments):
        calls.append(key.name)
        if key.name == name and calls.count(name) == 3:
            if moment != "before the call":
                call(self, key, *arguments)
            raise KeyboardInterrupt
        return call(self, key, *arguments)

    monkeypatch.setattr(CompiledPrograms, "call", interrupted)
    monkeypatch.setattr(batcher, "QUIET_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(random_prompts(9), GREEDY)
    assert calls.count(name) == 3
    assert is_idle(llm)
    steps = llm.stats()["num_steps"]
    outputs = llm.generate([[5, 6], [9]], GREEDY)
    assert tokens_of(outputs) == [[naive([5, 6], 12)], [naive([9], 12)]]
    assert llm.stats()["num_steps"] > steps > 0


def test_the_llm_is_usable_after_an_interrupt_of_a_submission(
    decoder, naive, monkeypatch
):
    llm = LLM(decoder, **SIZES)
    submit = engine_host.EngineHost.submit

    def interrupted(self, requests):
        submit(self, requests)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine_host.EngineHost, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5]] * 3, GREEDY)
    # The next call replaces the request table, because it needs another config.
    beams = BeamSearchParams(2, 12, ignore_eos=True)
    after = llm.generate([[9], [5, 6]], [beams, GREEDY])
    assert llm.config.max_beam_width >= 2
    assert tokens_of(after[1:]) == [[naive([5, 6], 12)]]
    assert is_idle(llm)
    assert tokens_of(after) == tokens_of(
        LLM(decoder, **SIZES).generate([[9], [5, 6]], [beams, GREEDY])
    )


def test_a_stream_raises_when_another_call_lost_the_engines_state(
    decoder, naive, monkeypatch
):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    llm = LLM(decoder, **SIZES)
    stream = llm.stream([5, 6], dataclasses.replace(GREEDY, max_tokens=20))
    next(stream)
    lose_state(llm, monkeypatch)
    with pytest.raises(RuntimeError, match="state was lost"):
        list(stream)
    assert is_idle(llm)
    assert tokens_of(llm.generate([9], GREEDY)) == [[naive([9], 12)]]


def test_an_engine_that_stalls_raises_and_can_be_used_again(
    decoder, naive, monkeypatch
):
    llm = LLM(decoder, **SIZES)
    llm.generate([9], GREEDY)
    run = Stepper.run

    def stalled(self, state, used, **limits):
        state = run(self, state, used, **limits)
        counters = dataclasses.replace(state.counters, is_stalled=jnp.array(True))
        return dataclasses.replace(state, counters=counters)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "run", stalled)
        with pytest.raises(RuntimeError, match="report it with the prompts' lengths"):
            llm.generate([9], GREEDY)
    assert is_idle(llm)
    assert tokens_of(llm.generate([9], GREEDY)) == [[naive([9], 12)]]
