"""Events, metrics and the timeline of steps.

The references are an engine that runs single steps, and numbers by hand.
"""

import csv
import dataclasses
import io
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.engine import events as timeline
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged.scheduler import FINISHED, RUNNING, SWAPPED
from jpaged.serving import metrics
from jpaged.serving.metrics import Event, StepRecord
from tests.support.tiny_llm import (
    GREEDY,
    SIZES,
    random_prompts,
)

pytestmark = pytest.mark.long

LONG = dataclasses.replace(GREEDY, max_tokens=40)


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


@jax.jit
def record(ring, step, before, after, blocks, count):
    """Record a step as the engine does, from the tables before and after it."""
    was, now = before.queue, after.queue
    has_finished = (was.status != FINISHED) & (now.status == FINISHED)
    # After scheduling, these still ran.
    scheduled = dataclasses.replace(
        now, status=jnp.where(has_finished, RUNNING, now.status)
    )
    ring = timeline.record_scheduling(ring, step, was, scheduled)
    ring = timeline.record_step(
        ring,
        step,
        scheduled,
        timeline.occupancy(blocks),
        num_tokens=count,
        num_generated=count,
    )
    has_first = (before.first_steps < 0) & (after.first_steps >= 0)
    return timeline.record_decoding(
        ring, step, after.first_steps, has_first, has_finished
    )


WORKLOAD_LENS = [
    len(prompt) for prompt, params in WORKLOAD for _ in range(params.n)
] + [0] * 2


def recorded(rings, num_steps):
    """(step, name, sequence index) of the events, and the rows of the steps."""
    events, rows = timeline.in_order(rings, num_steps)
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
        rings = [record(ring, step, before, after, blocks, count) for ring in rings]
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
    llm.warm_up(GREEDY)
    runner, run = llm._host.runner, llm._host.runner._stepper.run
    now = [100.0]
    runner.clock = lambda: now[0]

    def run_by_the_second(state, used, **limits):
        before = int(state.counters.num_steps)
        # Slices of a second, after the first one.
        limits |= dict(least_steps=1, max_steps=1 if before else 4)
        state = run(state, used, **limits)
        now[0] += int(state.counters.num_steps) - before
        return state

    monkeypatch.setattr(runner._stepper, "run", run_by_the_second)
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
