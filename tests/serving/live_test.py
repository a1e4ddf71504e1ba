"""Live requests and coroutines, against the outputs of `generate`."""

import asyncio
import contextlib
import dataclasses
import itertools
import threading

import hypothesis
import hypothesis.strategies as st
import pytest

from jpaged.llm import LLM
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.serving import batcher, stepping
from tests.support.tiny_llm import (
    GREEDY,
    SIZES,
    is_idle,
    random_prompts,
    tokens_of,
)

pytestmark = pytest.mark.long

LONG = dataclasses.replace(GREEDY, max_tokens=40)
# With four batch rows and 32 blocks of 4 tokens, the long ones preempt each other.
REQUESTS = [
    ([5, 6], GREEDY),
    ([7], LONG),
    ([8, 9, 10, 11, 12], SamplingParams(n=2, seed=3, max_tokens=20, ignore_eos=True)),
    ("hello", SamplingParams(seed=4, max_tokens=20, stop=["e", "zz", "q?"])),
    (random_prompts(1, seed=2)[0], LONG),
    ([40, 41, 42], SamplingParams(n=3, seed=5, max_tokens=30)),
]


@pytest.fixture(scope="module")
def expected(plain_llm):
    """The output of `generate` for each of REQUESTS alone."""
    return [plain_llm.generate([prompt], params)[0] for prompt, params in REQUESTS]


@pytest.fixture
def llm(plain_llm, monkeypatch):
    """An LLM with one step per slice, to have many moments between slices."""
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    yield plain_llm
    assert is_idle(plain_llm)


def concatenated(deltas):
    """(token ids, text, reasons) of each sample."""
    samples = {}
    for delta in deltas:
        token_ids, text, _ = samples.get(delta.sample, ([], "", None))
        reasons = delta.finish_reason, delta.stop_reason
        samples[delta.sample] = token_ids + delta.token_ids, text + delta.text, reasons
    return [samples[number] for number in sorted(samples)]


def summary(output):
    return [
        (list(one.token_ids), one.text, (one.finish_reason, one.stop_reason))
        for one in output.outputs
    ]


# Submitting, iterating, aborting


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "next", "next", "next", "abort", "generate"]),
        st.integers(0, len(REQUESTS) - 1),
    ),
    min_size=5,
    max_size=40,
)


@hypothesis.settings(max_examples=30)
@hypothesis.given(actions=ACTIONS)
def test_each_request_has_the_output_of_generate_in_any_order_of_actions(
    plain_llm, expected, actions
):
    live = {}  # by number: the handle and the deltas so far
    aborted = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batcher, "STREAM_S", 0.0)
        for action, number in actions:
            if action == "generate":
                prompt, params = REQUESTS[number]
                (output,) = plain_llm.generate([prompt], params)
                assert summary(output) == summary(expected[number])
            elif action == "submit" and number not in live:
                live[number] = (plain_llm.submit(*REQUESTS[number]), [])
            elif action == "next" and number in live:
                request, deltas = live[number]
                deltas += itertools.islice(request, 1)
            elif action == "abort" and number in live:
                live[number][0].abort()
                aborted.add(number)
        for number, (request, deltas) in live.items():
            output = request.output()
            deltas += request
            assert concatenated(deltas) == summary(output)
            for got, right in zip(
                summary(output), summary(expected[number]), strict=True
            ):
                if got[2][0] == "abort":
                    assert number in aborted
                    assert got[0] == right[0][: len(got[0])]
                    # An abort returns text that was held back for a stop string.
                    assert right[1].startswith(got[1]) or REQUESTS[number][1].stop
                else:
                    assert got == right
    assert is_idle(plain_llm)


def test_requests_run_in_one_batch_while_one_is_read(llm, expected):
    first, second = llm.submit(*REQUESTS[0]), llm.submit(*REQUESTS[1])
    before = llm.stats()["num_steps"]
    deltas = list(first)
    assert concatenated(deltas) == summary(expected[0])
    assert {delta.request for delta in deltas} == {first.request_id}
    assert llm.stats()["num_steps"] - before == GREEDY.max_tokens
    assert (first.finished, second.finished) == (True, False)
    assert concatenated(second) == summary(expected[1])
    # Both requests started together.
    assert llm.stats()["num_steps"] - before == LONG.max_tokens


def test_more_requests_than_entries_wait(llm, expected):
    requests = [llm.submit(*REQUESTS[0]) for _ in range(50)]
    assert len(requests) > llm.config.max_num_requests
    for request in requests:
        assert summary(request.output()) == summary(expected[0])


def test_each_delta_is_yielded_once_and_a_second_loop_continues(llm, expected):
    request = llm.submit(*REQUESTS[0])
    deltas = list(itertools.islice(request, 3))
    assert sum(len(delta.token_ids) for delta in deltas) < GREEDY.max_tokens
    output = request.output()
    assert request.output() == output
    deltas += request
    assert concatenated(deltas) == summary(expected[0]) == summary(output)
    assert list(request) == []
    assert repr(request) == f"Request({request.request_id}, finished)"


def test_an_abort_frees_blocks_and_entries_and_does_not_affect_others(llm, expected):
    other, request = llm.submit(*REQUESTS[1]), llm.submit(*REQUESTS[2])
    for _ in range(12):
        next(request)
    stats = llm.stats()
    request.abort()
    assert llm.stats()["num_free_blocks"] > stats["num_free_blocks"]
    assert llm._host.num_empty == llm.config.max_num_requests - 1
    output = request.output()
    for got, right in zip(output.outputs, expected[2].outputs, strict=True):
        assert got.finish_reason == "abort"
        assert 0 < len(got.token_ids) < len(right.token_ids)
        assert got.token_ids == right.token_ids[: len(got.token_ids)]
        assert right.text.startswith(got.text)
    assert [event.name for event in output.events][-1] == "finished"
    request.abort()  # has no effect
    assert request.output() == output
    assert concatenated(other) == summary(expected[1])
    # Means are over the requests that ended by themselves.
    ended = llm.stats()["num_finished_requests"] - stats["num_finished_requests"]
    assert ended == 1


def test_a_waiting_request_can_be_aborted_and_has_no_tokens(llm):
    first = [llm.submit(*REQUESTS[1]) for _ in range(40)]
    last = llm.submit(*REQUESTS[2])
    next(first[0])
    last.abort()
    output = last.output()
    assert tokens_of([output]) == [[[], []]]
    assert [one.finish_reason for one in output.outputs] == ["abort"] * 2
    assert [event.name for event in output.events] == ["queued", "finished"]
    waited = output.metrics
    assert waited["total_s"] > 0
    assert waited["queue_s"] is waited["first_token_s"] is None
    assert waited["normalized_latency_s"] is waited["time_per_output_token_s"] is None
    for request in first:
        llm.abort(request.request_id)


def test_an_abort_does_not_change_samples_that_have_ended(llm, expected):
    lengths = [len(sample.token_ids) for sample in expected[5].outputs]
    assert min(lengths) < max(lengths)
    request = llm.submit(*REQUESTS[5])
    for delta in request:
        if delta.finish_reason is not None:
            break
    request.abort()
    reasons = [sample.finish_reason for sample in request.output().outputs]
    assert reasons.count("abort") in (1, 2)
    for got, right in zip(request.output().outputs, expected[5].outputs, strict=True):
        if got.finish_reason != "abort":
            assert got == right


def test_requests_of_any_call_can_be_aborted_by_number(llm, expected):
    kept = llm.submit(*REQUESTS[0])
    number = kept.request_id

    def abort_the_next(index, output):
        if index == 0:
            llm.abort(number + 2)

    outputs = llm.generate(
        [[5, 6], [7]], [GREEDY, LONG], progress=False, on_output=abort_the_next
    )
    assert summary(outputs[0]) == summary(expected[0])
    assert outputs[1].request_id == number + 2
    assert outputs[1].outputs[0].finish_reason == "abort"
    assert summary(kept.output()) == summary(expected[0])


def test_an_unknown_or_ended_request_cannot_be_aborted(llm, expected):
    request = llm.submit(*REQUESTS[0])
    for unknown in (10**6, -1, "0", None):
        with pytest.raises(ValueError, match="request: expected an open request"):
            llm.abort(unknown)
    assert summary(request.output()) == summary(expected[0])
    for ended in (request, request.request_id):
        with pytest.raises(ValueError, match="which has ended or never existed"):
            llm.abort(ended)


def test_an_invalid_request_is_refused_and_does_not_affect_others(llm, expected):
    request = llm.submit(*REQUESTS[0])
    next(request)
    for prompt, params, match in [
        ([], None, "at least one token"),
        ([5], "greedy", "params: expected SamplingParams"),
        ([[5]], GREEDY, "prompt: expected text"),
        ([5] * 64, GREEDY, "max_model_len"),
        ([10**6], GREEDY, "vocabulary"),
    ]:
        with pytest.raises(ValueError, match=match):
            llm.submit(prompt, params)
        with pytest.raises(ValueError, match=match):
            llm.astream(prompt, params)
    other = llm.submit([5, 6])
    assert other.request_id == request.request_id + 1
    assert len(other.output().outputs[0].token_ids) <= 16
    assert summary(request.output()) == summary(expected[0])


def test_beams_wait_until_the_engine_can_be_compiled_for_them(folder, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    llm = LLM(folder, **SIZES)
    first = llm.submit(*REQUESTS[0])
    assert next(first).request == first.request_id
    beams = llm.submit([7, 8], BeamSearchParams(2, 6, ignore_eos=True))
    aborted = llm.submit([7, 8], BeamSearchParams(2, 30, ignore_eos=True, num_return=1))
    before = llm.config
    (delta, other) = beams
    assert before.max_beam_width < llm.config.max_beam_width
    aborted.abort()
    (nothing,) = aborted.output().outputs
    assert (nothing.token_ids, nothing.finish_reason) == ([], "abort")
    (output,) = llm.generate([[7, 8]], BeamSearchParams(2, 6, ignore_eos=True))
    assert summary(beams.output()) == summary(output)
    assert delta.token_ids == output.outputs[0].token_ids
    assert other.sample == 1
    assert len(first.output().outputs[0].token_ids) == GREEDY.max_tokens
    assert is_idle(llm)


# Coroutines


def test_coroutines_share_one_engine_and_one_thread_uses_it(llm, expected, monkeypatch):
    order, threads, run = [], set(), stepping.Stepper.run

    def watched(*arguments, **limits):
        threads.add(threading.get_ident())
        return run(*arguments, **limits)

    monkeypatch.setattr(stepping.Stepper, "run", watched)

    async def read(number, start):
        for _ in range(start):
            await asyncio.sleep(0.01)
        deltas = []
        async for delta in llm.astream(*REQUESTS[number]):
            order.append(number)
            deltas.append(delta)
        return concatenated(deltas)

    async def wait():
        return summary(await llm.submit(*REQUESTS[4]))

    async def all_together():
        tasks = [read(number, start) for number, start in [(0, 0), (1, 0), (2, 1)]]
        return await asyncio.gather(*tasks, wait())

    found = asyncio.run(all_together())
    assert found == [summary(expected[number]) for number in (0, 1, 2, 4)]
    # They alternate, and the last one joined while the others ran.
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > 20
    assert threading.get_ident() not in threads
    assert len(threads) == 1
    # Another event loop works as well.
    assert asyncio.run(read(0, 0)) == summary(expected[0])


def test_an_async_iteration_that_ends_early_aborts_its_request(llm, expected):
    async def leave():
        async with contextlib.aclosing(llm.astream(*REQUESTS[1])) as deltas:
            async for _ in deltas:
                break

    async def cancelled():
        reader = asyncio.create_task(drain(llm.astream(*REQUESTS[1])))
        other = asyncio.create_task(drain(llm.astream(*REQUESTS[0])))
        await asyncio.sleep(0.05)
        reader.cancel()
        deltas = await other
        with pytest.raises(asyncio.CancelledError):
            await reader
        return deltas

    async def drain(deltas):
        return [delta async for delta in deltas]

    asyncio.run(leave())
    assert is_idle(llm)
    assert concatenated(asyncio.run(cancelled())) == summary(expected[0])
    assert is_idle(llm)
    llm.astream([5, 6])  # never iterated


def test_a_synchronous_call_also_runs_the_requests_of_coroutines(llm, expected):
    async def both():
        request = llm.submit(*REQUESTS[1])
        await anext(request)
        (output,) = llm.generate(*map(lambda x: [x], REQUESTS[0]))
        assert llm.stats()["num_steps"] > 0
        return summary(output), summary(await request)

    assert asyncio.run(both()) == (summary(expected[0]), summary(expected[1]))


@pytest.mark.parametrize(
    ("calm_s", "step_s", "stop", "longest"),
    [
        (1e9, 0.03, None, 4e-3),  # while requests arrive: at most 4 * STREAM_S
        (1e9, 6e-4, None, 2.4e-3),  # 4 steps
        (-1.0, 0.03, None, 6e-3),
        (-1.0, 6e-4, None, 4.8e-3),  # 8 steps
        (-1.0, 0.03, "~~", 2e-3),  # STOP_S
    ],
)
def test_slices_of_streams_grow_with_slow_steps_once_all_have_a_token(
    plain_llm, monkeypatch, calm_s, step_s, stop, longest
):
    lengths = []
    host = plain_llm._batcher.host
    run = host.run

    def recorded(used, seconds, least_steps=1):
        lengths.append(seconds)
        return run(used, seconds, least_steps)

    monkeypatch.setattr(host, "run", recorded)
    monkeypatch.setattr(batcher, "STREAM_S", 1e-3)  # so that many slices run
    monkeypatch.setattr(batcher, "STOP_S", 2e-3)
    monkeypatch.setattr(batcher, "CALM_S", calm_s)
    params = dataclasses.replace(LONG, stop=stop)
    request = plain_llm.submit([5, 6], params)
    while plain_llm.run_slice():
        host.runner.seconds_per_step = step_s  # as of a slow model
        request.deltas()
    assert lengths[0] == 1e-3
    assert set(lengths[1:]) == {longest}


def test_slices_are_short_while_a_request_waits(plain_llm, monkeypatch):
    own = plain_llm._batcher
    monkeypatch.setattr(own.host.runner, "seconds_per_step", 0.03)
    monkeypatch.setattr(batcher, "CALM_S", -1.0)
    first = plain_llm.submit([5, 6], LONG)
    while not first.deltas():
        plain_llm.run_slice(0.0)
    own.host.runner.seconds_per_step = 0.03
    assert own._slice_length(None)[0] == pytest.approx(0.24)
    second = plain_llm.submit([5, 7], LONG)
    assert own._slice_length(None)[0] == batcher.STREAM_S
    for request in (first, second):
        request.abort()
