"""Live requests after interrupts, beside pinned prefixes, and when the LLM closes."""

import asyncio
import weakref

import pytest

from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged.serving import batcher, engine_host
from tests.support.tiny_llm import (
    GREEDY,
    SIZES,
    is_idle,
    lose_state,
)

pytestmark = pytest.mark.long


def test_live_requests_raise_after_an_interrupt_lost_the_engines_state(
    decoder, monkeypatch
):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)  # a step per slice
    llm = LLM(decoder, **SIZES)
    running = llm.submit([5, 6], GREEDY)
    next(running)
    lose_state(llm, monkeypatch)
    later = llm.submit([5, 6], GREEDY)
    for wait in (running.output, lambda: list(running)):
        with pytest.raises(RuntimeError, match="state was lost"):
            wait()
    assert running.finished
    assert len(later.output().outputs[0].token_ids) == GREEDY.max_tokens
    assert is_idle(llm)


def test_requests_raise_after_an_interrupt_of_their_submission(decoder, monkeypatch):
    llm = LLM(decoder, **SIZES)
    submit = engine_host.EngineHost.submit

    def interrupted(self, requests):
        submit(self, requests)
        raise KeyboardInterrupt

    request = llm.submit([5, 6], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(engine_host.EngineHost, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([9], GREEDY)
    with pytest.raises(RuntimeError, match="send them again"):
        request.output()
    assert len(llm.generate([[9]], GREEDY)) == 1
    assert is_idle(llm)


def test_a_request_that_no_longer_fits_beside_pinned_prefixes_raises(folder):
    llm = LLM(folder, **SIZES)
    small = llm.submit([5, 6], GREEDY)
    large = llm.submit([7] * 40, SamplingParams(max_tokens=20, seed=1))
    third = llm.submit([8], GREEDY)
    with llm.pin([3] * 40), llm.pin([4] * 40):  # 20 of 32 blocks
        assert len(small.output().outputs[0].token_ids) == GREEDY.max_tokens
        with pytest.raises(ValueError, match="blocks"):
            large.output()
        assert len(third.output().outputs[0].token_ids) == GREEDY.max_tokens
    assert is_idle(llm)


def test_close_aborts_open_requests_and_ends_all_use(folder, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    llm = LLM(folder, **SIZES)
    request, waiting = llm.submit([5, 6], GREEDY), llm.submit([7], GREEDY)
    stream, late = llm.stream([5, 6], GREEDY), llm.astream([5, 6])
    got = next(request)
    llm.close()
    output = request.output()
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].token_ids[: len(got.token_ids)] == got.token_ids
    assert waiting.output().outputs[0].finish_reason == "abort"
    request.abort()
    assert [delta.finish_reason for delta in waiting][-1] == "abort"
    assert list(waiting) == []
    for use in (
        lambda: llm.submit([5]),
        lambda: llm.abort(request),
        lambda: next(stream),
        lambda: asyncio.run(anext(late)),
        llm.timeline,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_an_unreferenced_llm_is_freed_at_once(decoder):
    llm = LLM(decoder, **SIZES)
    llm.generate([[5]], GREEDY, progress=False)
    request = llm.submit([5, 6], GREEDY)
    next(request)
    known = weakref.ref(llm)
    del llm
    assert known() is None
    assert len(request.output().outputs[0].token_ids) == GREEDY.max_tokens
