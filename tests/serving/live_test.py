"""Live requests, their events and metrics.

The references are `generate`, an engine that runs single steps, and numbers by hand.
"""

import asyncio
import contextlib
import csv
import dataclasses
import io
import itertools
import threading
import time
import weakref

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.engine import events as timeline
from jpaged.llm import LLM
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.scheduler import FINISHED, RUNNING, SWAPPED
from jpaged.serving import batcher, engine_host, metrics
from jpaged.serving.metrics import Event, StepRecord
from tests.support.tiny_llm import (
    GREEDY,
    SIZES,
    is_idle,
    lose_state,
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


# Interrupts, prefixes, closing


def test_live_requests_raise_after_an_interrupt_lost_the_engines_state(
    decoder, monkeypatch
):
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
    behind = llm.submit([8], GREEDY)
    with llm.pin([3] * 40), llm.pin([4] * 40):  # 20 of 32 blocks
        assert len(small.output().outputs[0].token_ids) == GREEDY.max_tokens
        with pytest.raises(ValueError, match="blocks"):
            large.output()
        assert len(behind.output().outputs[0].token_ids) == GREEDY.max_tokens
    assert is_idle(llm)


def test_close_aborts_open_requests_and_ends_all_use(folder):
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


# Coroutines


def test_coroutines_share_one_engine_and_one_thread_uses_it(llm, expected, monkeypatch):
    order, threads, run = [], set(), engine.run

    def watched(*arguments, **limits):
        threads.add(threading.get_ident())
        return run(*arguments, **limits)

    watched._cache_size = run._cache_size
    monkeypatch.setattr(engine, "run", watched)

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


# Events and steps


SMALL = EngineConfig(
    num_blocks=14,
    block_size=4,
    max_num_seqs=4,
    max_model_len=64,
    max_num_batched_tokens=16,
    max_num_requests=8,
    max_num_stop_ids=2,
    num_recorded_events=256,
    num_recorded_steps=256,
)
WORKLOAD = [
    ([5] * 11, SamplingParams(n=2, seed=1, max_tokens=20)),
    ([6] * 7, SamplingParams(seed=2, max_tokens=25)),
    ([7] * 3, SamplingParams(seed=3, max_tokens=30)),
    ([8] * 30, SamplingParams(seed=4, max_tokens=2)),
    ([9], SamplingParams(seed=5, max_tokens=1)),
]


def submitted(decoder, config):
    prompts, params = zip(*WORKLOAD, strict=True)
    state, _ = engine.submit(engine.init(decoder, config), prompts, params)
    return state


@pytest.fixture(scope="module")
def slow_steps(decoder):
    """The tables before and after each step, from an engine that runs single steps."""
    state, found = submitted(decoder, SMALL), []
    after = _on_host(state.requests)
    while bool(engine.has_work(state)):
        before = after
        state = engine.run(decoder, state, jnp.int32(1))
        after = _on_host(state.requests)
        found.append((before, after, _on_host(state.blocks), _on_host(state.counters)))
    return found


def _on_host(tree):
    """Copies, because the next step overwrites the state's arrays."""
    return jax.tree.map(np.array, tree)


def slow_events(slow_steps):
    """(step, name, sequence index), from the changes of status and tokens per step."""
    events = []
    for step, (before, after, _, _) in enumerate(slow_steps):
        found = {name: [] for name in timeline.EVENTS}
        for seq_index, status in enumerate(before.queue.status):
            now = after.queue.status[seq_index]
            gained = (
                after.queue.num_tokens[seq_index] - before.queue.num_tokens[seq_index]
            )
            was_first = before.queue.num_tokens[seq_index] == WORKLOAD_LENS[seq_index]
            if status == RUNNING and now == SWAPPED:
                found["swapped"].append(seq_index)
            elif status == RUNNING and now not in (RUNNING, FINISHED):
                found["preempted"].append(seq_index)
            if status != RUNNING and (now == RUNNING or gained):
                found["scheduled"].append(seq_index)
            if gained and was_first:
                found["first_token"].append(seq_index)
            if status != FINISHED and now == FINISHED:
                found["finished"].append(seq_index)
        events += [
            (step, name, seq_index) for name in found for seq_index in found[name]
        ]
    return events


RECORD = jax.jit(timeline.record)
WORKLOAD_LENS = [
    len(prompt) for prompt, params in WORKLOAD for _ in range(params.n)
] + [0] * 2


def recorded(rings, num_steps):
    """(step, name, sequence index) of the events, and the rows of the steps."""
    events, rows = timeline.in_order(rings, jnp.int32(num_steps))
    events = [
        (step, timeline.EVENTS[kind], seq_index)
        for step, kind, seq_index in events.tolist()
        if step >= 0
    ]
    return events, [timeline.StepRow(*row) for row in rows.tolist() if row[0] >= 0]


def test_the_engine_records_the_events_of_single_steps(decoder, slow_steps):
    state = engine.run(decoder, submitted(decoder, SMALL), jnp.int32(1000))
    events, rows = recorded(state.timeline, state.counters.num_steps)
    right = slow_events(slow_steps)
    names = [name for _, name, _ in right]
    assert names.count("preempted") >= 2
    assert names.count("scheduled") == names.count("preempted") + 6
    assert names.count("first_token") == names.count("finished") == 6
    assert events == right
    assert int(state.timeline.num_events) == len(right)
    assert len(rows) == len(slow_steps)
    totals = dict(num_tokens=0, num_generated=0)
    for step, (row, (_, after, blocks, counters)) in enumerate(
        zip(rows, slow_steps, strict=True)
    ):
        assert row.step == step
        for name in totals:
            assert getattr(row, name) == getattr(counters, name) - totals[name]
            totals[name] = int(getattr(counters, name))
        if (after.queue.status == FINISHED).sum() == sum(
            name == "finished" and at < step for at, name, _ in right
        ):
            # No sequence ended in this step, so its blocks are still in use.
            slots = {
                (blocks.block_tables[s, t // 4], t % 4)
                for s, length in enumerate(blocks.context_lens)
                for t in range(length)
            }
            used = int((blocks.ref_counts > 0).sum())
            entries = int((blocks.block_tables >= 0).sum())
            assert row.num_used_blocks == used
            assert row.num_saved_blocks == entries - used
            assert row.num_token_states == len(slots)
            assert row.num_running == (after.queue.status == RUNNING).sum()
            assert row.num_waiting == (after.queue.status == 1).sum()
    assert sum(row.num_saved_blocks for row in rows) > 0
    assert sum(row.num_waiting for row in rows) > 0


@pytest.mark.parametrize("size", [0, 2])
def test_small_rings_keep_the_last_entries_and_count_all(size, slow_steps):
    config = dataclasses.replace(
        SMALL, num_recorded_events=size, num_recorded_steps=size
    )
    rings = [timeline.init_timeline(config), timeline.init_timeline(SMALL)]
    most = 0
    for number, (before, after, blocks, _) in enumerate(slow_steps):
        step, count = jnp.int32(number), jnp.int32(7)
        tables = before, after, after, blocks
        rings = [
            RECORD(ring, step, *tables, num_tokens=count, num_generated=count)
            for ring in rings
        ]
        (events, rows), (all_events, all_rows) = (
            recorded(ring, number + 1) for ring in rings
        )
        most = max(most, sum(at == number for at, _, _ in all_events))
        assert events == all_events[max(len(all_events) - size, 0) :]
        assert rows == all_rows[max(len(all_rows) - size, 0) :]
        assert int(rings[0].num_events) == len(all_events) * (size > 0)
    assert most > 2  # a step has more events than the smallest ring has entries


def test_events_of_requests_are_in_order_and_match_the_metrics(folder):
    llm = LLM(folder, **SIZES)
    begin = time.perf_counter()
    prompts = random_prompts(6, seed=5, longest=12)
    params = [LONG] * 5 + [SamplingParams(n=3, seed=1, max_tokens=15)]
    outputs = llm.generate(prompts, params)
    end = time.perf_counter()
    num_preempted = 0
    for output in outputs:
        names = [event.name for event in output.events]
        times = [event.time_s for event in output.events]
        steps = [event.step for event in output.events]
        assert names[:2] == ["queued", "scheduled"]
        assert names[-1] == "finished"
        assert names.count("first_token") == names.count("finished") == 1
        assert names.count("scheduled") >= 1 + (names.count("preempted") > 0)
        num_preempted += names.count("preempted")
        assert times == sorted(times)
        assert steps == sorted(steps)
        assert begin < times[0] < times[-1] < end
        found = output.metrics
        assert steps[names.index("first_token")] == found["first_step"]
        assert steps[-1] == found["last_step"]
        assert found["total_s"] == times[-1] - times[0]
        assert found["queue_s"] == times[1] - times[0]
        first = times[names.index("first_token")] - times[0]
        assert found["first_token_s"] == first
        assert found["num_cached_tokens"] == 0
        assert 0 < found["queue_s"] < first < found["total_s"]
    assert num_preempted > 0
    stats = llm.stats()
    assert stats["num_lost_events"] == 0
    assert stats["num_finished_requests"] == 6
    for name in metrics.LATENCIES:
        mean = np.mean([output.metrics[name] for output in outputs])
        np.testing.assert_allclose(stats[f"mean_{name}"], mean)
    rows = llm.timeline()
    assert [row.step for row in rows] == list(range(stats["num_steps"]))
    times = [row.time_s for row in rows]
    assert [begin, *times, end] == sorted([begin, *times, end])
    assert sum(row.num_generated for row in rows) == stats["generated_tokens"]
    assert max(row.num_used_blocks for row in rows) == stats["max_used_blocks"]
    shares = [
        row.num_token_states / (row.num_token_states + row.num_reserved_slots)
        for row in rows
    ]
    np.testing.assert_allclose(np.mean(shares), stats["kv_token_share"], rtol=1e-5)
    table = io.StringIO()
    csv.writer(table).writerows([StepRecord._fields, *rows])
    assert len(table.getvalue().splitlines()) == len(rows) + 1


def test_times_on_a_clock_on_which_each_step_takes_a_second(folder, monkeypatch):
    llm = LLM(folder, **SIZES)
    runner, run = llm._host.runner, llm._host.runner._run
    now = [100.0]
    runner.clock = lambda: now[0]

    def run_by_the_second(max_steps, limits):
        before = runner.counters["num_steps"]
        progress = run(max_steps, limits)
        now[0] += runner.counters["num_steps"] - before
        return progress

    monkeypatch.setattr(runner, "_run", run_by_the_second)
    first, second = llm.submit([5] * 40, GREEDY), llm.submit([6], GREEDY)
    now[0] += 10
    # 40 prompt tokens need three steps of 16; the last of them generates a token. Only
    # that step has tokens of its budget left for the second request.
    assert first.output().events == [
        Event("queued", 100.0, 0),
        Event("scheduled", 110.0, 0),
        Event("first_token", 113.0, 2),
        Event("finished", 124.0, 13),
    ]
    found = first.output().metrics
    assert {name: found[name] for name in metrics.LATENCIES} == dict(
        queue_s=10.0,
        first_token_s=13.0,
        time_per_output_token_s=1.0,
        total_s=24.0,
        normalized_latency_s=2.0,
    )
    assert second.output().events == [
        Event("queued", 100.0, 0),
        Event("scheduled", 112.0, 2),
        Event("first_token", 113.0, 2),
        Event("finished", 124.0, 13),
    ]
    assert [row.time_s for row in llm.timeline()] == list(range(111, 125))
    stats = llm.stats()
    assert stats["mean_queue_s"] == 11.0
    assert stats["mean_normalized_latency_s"] == 2.0
    # The event of an abort has the time of the abort.
    third = llm.submit([7], LONG)
    next(third)
    now[0] += 5
    third.abort()
    assert third.output().events[-1] == Event("finished", 130.0, 15)


def test_latencies_by_hand():
    queued = Event("queued", 10.0, 4)
    events = [
        queued,
        Event("scheduled", 12.0, 5),
        Event("preempted", 12.5, 6),
        Event("scheduled", 13.0, 8),
        Event("first_token", 14.0, 9),
        Event("finished", 20.0, 13),
    ]
    assert metrics.latencies(events, 4) == dict(
        queue_s=2.0,
        first_token_s=4.0,
        time_per_output_token_s=2.0,  # 6 seconds for the 3 tokens after the first
        total_s=10.0,
        normalized_latency_s=2.5,
    )
    assert metrics.latencies(events, 1)["time_per_output_token_s"] is None
    assert metrics.latencies(events[:-1], 4)["total_s"] is None
    assert set(metrics.latencies([queued], 0).values()) == {None}
    # The events of a request follow from those of its sequences.
    more = [*events[:5], Event("first_token", 14.0, 9), Event("first_token", 15.0, 10)]
    more += [Event("finished", 16.0, 11), events[-1]]
    assert metrics.request_events(more) == events
