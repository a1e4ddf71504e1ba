"""Programs of an LLM: tokens, compilations and waiting while the load changes."""

import dataclasses
import gc
import os
import pathlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine
from jpaged.llm import LLM
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.serving import batcher
from jpaged.serving.compiled import CompiledPrograms
from tests.support.engine.configs import QUICKLY, one_size
from tests.support.engine.oracle import FOREVER
from tests.support.tiny_llm import EOS, GREEDY, SIZES, VOCAB_SIZE, is_idle

pytestmark = pytest.mark.long

LONG = dataclasses.replace(GREEDY, max_tokens=40)


def random_params(rng, seed):
    """Parameters of a random kind."""
    kind, count = rng.integers(6), int(rng.integers(1, 20))
    if kind == 0:
        return dataclasses.replace(GREEDY, max_tokens=count)
    if kind == 1:
        return BeamSearchParams(2, min(count, 8))
    more = [
        {},
        dict(n=3, top_p=0.8),
        dict(logprobs=int(rng.integers(4))),
        dict(frequency_penalty=0.7, min_tokens=2),
    ][kind - 2]
    return SamplingParams(seed=seed, max_tokens=max(count, 2), **more)


def in_one_program(llm, requests):
    """The tokens of `engine.run` for each request alone, in one program."""
    config = one_size(llm.config)

    @jax.jit
    def run(model, state):
        return engine.run.__wrapped__(model, state, jnp.int32(FOREVER))

    run = run.lower(llm.model, engine.init(llm.model, config)).compile(QUICKLY)
    found = []
    for prompt, params in requests:
        state, _ = engine.submit(
            engine.init(llm.model, config),
            [prompt],
            params,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=EOS,
        )
        results = engine.collect(run(llm.model, state))
        found.append([list(result.token_ids) for result in results])
    return found


def test_tokens_are_those_of_one_program_while_the_load_changes(decoder, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    llm, rng = LLM(decoder, **SIZES), np.random.default_rng(3)
    requests, live, aborted = [], [], set()
    for moment in range(60):
        if moment < 40 and rng.random() < 0.5:
            for _ in range(rng.integers(1, 5)):
                prompt = rng.integers(2, VOCAB_SIZE, rng.integers(1, 24)).tolist()
                requests.append((prompt, random_params(rng, len(requests))))
                live.append(llm.submit(*requests[-1]))
        for number in rng.permutation(len(live))[:2]:
            next(live[number], None)
        if live and rng.random() < 0.1:
            number = int(rng.integers(len(live)))
            if not live[number].finished:
                live[number].abort()
                aborted.add(number)
    found = [
        [list(sample.token_ids) for sample in request.output().outputs]
        for request in live
    ]
    assert is_idle(llm)
    assert len(requests) - len(aborted) > 20
    expected = in_one_program(llm, requests)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if number in aborted:
            pairs = zip(ours, theirs, strict=True)
            assert all(a == b[: len(a)] for a, b in pairs), requests[number]
        else:
            assert ours == theirs, requests[number]


def test_a_new_feature_stops_no_running_request_and_counts_in_no_latency(
    decoder, naive, monkeypatch
):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    llm = LLM(decoder, **SIZES)
    llm.warm_up(GREEDY)
    compile_program, slow_s = CompiledPrograms._compile, 2.0
    may_compile = threading.Event()

    def slowly(self, program):
        may_compile.wait()
        time.sleep(slow_s)
        return compile_program(self, program)

    monkeypatch.setattr(CompiledPrograms, "_compile", slowly)
    first = llm.submit([5, 6], LONG)
    tokens = list(next(first).token_ids)
    second = llm.submit([7], dataclasses.replace(GREEDY, logprobs=2))
    for delta in first:  # it ends although nothing can be compiled
        tokens += delta.token_ids
    assert tokens == naive([5, 6], 40)
    assert not second.finished
    may_compile.set()
    output = second.output()
    assert output.outputs[0].token_ids == naive([7], 12)
    assert len(output.outputs[0].logprobs) == 12
    # A request that finds the engine idle waits for the compiler, and its clock stands.
    start = time.perf_counter()
    (third,) = llm.generate([[8]], dataclasses.replace(GREEDY, min_tokens=3))
    others_s = time.perf_counter() - start - slow_s
    assert others_s > 0
    assert third.outputs[0].token_ids == naive([8], 12)
    assert third.metrics["queue_s"] < others_s
    assert third.metrics["first_token_s"] < others_s


def test_running_requests_go_on_when_the_state_grows(decoder, naive, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    llm = LLM(decoder, **SIZES)
    first = llm.submit([5, 6], dataclasses.replace(GREEDY, max_tokens=60))
    tokens = list(next(first).token_ids)
    later = dataclasses.replace(GREEDY, max_tokens=3, logprobs=1)
    llm.warm_up(later)  # grows the state while the first request runs
    second = llm.submit([7], later)
    assert second.output().outputs[0].token_ids == naive([7], 3)
    assert not first.finished
    for delta in first:
        tokens += delta.token_ids
    assert tokens == naive([5, 6], 60)
    assert is_idle(llm)


def used_and_closed(decoder):
    with LLM(decoder, **SIZES) as llm:
        llm.generate([[5, 6], [7]], GREEDY)
        llm.generate([[5]], SamplingParams(seed=1, max_tokens=4))
        llm.generate([[5]], BeamSearchParams(2, 4))
    gc.collect()


def resident_bytes() -> int:
    """Return the main memory that this process uses."""
    pages = int(pathlib.Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def num_maps():
    return len(pathlib.Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/maps").exists(), reason="needs Linux's /proc"
)
@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_closed_llms_leave_no_programs_behind(decoder, count):
    used_and_closed(decoder)
    used_and_closed(decoder)
    maps, resident = num_maps(), resident_bytes()
    programs = len(jax.devices()[0].client.live_executables())
    for _ in range(count):
        used_and_closed(decoder)
    assert num_maps() - maps < 200
    assert resident_bytes() - resident < 300e6
    assert len(jax.devices()[0].client.live_executables()) - programs < 10
