"""The engine with the CPU kernels: what a request gets never depends on the others."""

import concurrent.futures
import dataclasses
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.cpu import library
from jpaged.llm import LLM
from jpaged.models import load_model, save_model
from jpaged.params import SamplingParams
from tests.support.cpu_kernels import needs_compiler
from tests.support.engine.configs import one_size
from tests.support.models.tiny_llama import tiny_llama
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.long,
    needs_compiler,
]
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
CONFIG = one_size(
    EngineConfig(
        num_blocks=64,
        block_size=4,
        max_num_seqs=4,
        max_model_len=48,
        max_num_batched_tokens=16,
        max_num_requests=8,
        num_logprobs=2,
        attention="cpu",
    )
)
SMALL = dataclasses.replace(CONFIG, num_blocks=13, max_num_batched_tokens=24)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def prompts_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 250, size=size).tolist() for size in (21, 5, 9, 17)[:count]]


def submitted(model, config, prompts):
    return engine.submit(engine.init(model, config), prompts, PARAMS)[0]


def results_of(state):
    results = sorted(engine.collect(state), key=lambda result: result.arrival)
    return [(each.token_ids, np.asarray(each.logprobs)) for each in results]


def run(model, config, prompts):
    state = engine.run(model, submitted(model, config, prompts), jnp.int32(1000))
    return results_of(state), state


def assert_same_bits(got, expected):
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(
        got, expected, strict=True
    ):
        assert tokens == other_tokens
        np.testing.assert_array_equal(logprobs, other_logprobs)


def test_log_probabilities_have_the_same_bits_alone_in_a_batch_and_after_preemption(
    model,
):
    prompts = prompts_of(4)
    together, _ = run(model, CONFIG, prompts)
    alone = [run(model, CONFIG, [prompt])[0][0] for prompt in prompts]
    assert_same_bits(alone, together)
    # Fewer blocks and other chunks: rows are preempted and computed again.
    tight, state = run(model, SMALL, prompts)
    assert int(state.counters.num_preemptions) > 0
    assert_same_bits(tight, together)


def check_tokens_are_those_of_xla(model, tolerance):
    prompts = prompts_of(4)
    ours, _ = run(model, CONFIG, prompts)
    theirs, _ = run(model, dataclasses.replace(CONFIG, attention="xla"), prompts)
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(
        ours, theirs, strict=True
    ):
        assert tokens == other_tokens
        np.testing.assert_allclose(
            logprobs, other_logprobs, rtol=tolerance, atol=tolerance
        )


def test_greedy_tokens_equal_those_of_xla(model):
    check_tokens_are_those_of_xla(model, 1e-4)


def test_greedy_tokens_of_int8_weights_equal_those_of_xla(model, tmp_path):
    save_model(model, tmp_path)
    narrow = load_model(tmp_path, quantization="int8")
    # Inputs of products have 15 bits of the largest of their block here.
    check_tokens_are_those_of_xla(narrow, 1e-3)


def test_the_engines_program_calls_all_kernels(model):
    state = submitted(model, CONFIG, prompts_of(1))
    text = engine.run.lower(model, state, jnp.int32(1)).as_text()
    for name in ("attention", "write_kv", "copy_blocks", "matmul"):
        assert library.target(name) in text
    assert "dot_general" not in text


def test_engines_in_several_threads_do_not_disturb_each_other(model):
    prompts = prompts_of(4)
    expected, _ = run(model, CONFIG, prompts)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(run, model, CONFIG, prompts) for _ in range(8)]
        for each in runs:
            assert_same_bits(each.result()[0], expected)


PROGRAM = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax
from jpaged.cpu import calls
x = jax.random.normal(jax.random.key(0), (9, 300))
weight = jax.random.normal(jax.random.key(1), (300, 4100))
for x_dtype, dtype in ("f4", "f4"), ("bfloat16", "bfloat16"), ("f4", "int8"):
    out = jax.jit(calls.matmul)(x.astype(x_dtype), (weight * 30).astype(dtype))
    print(out.__array__().tobytes().hex()[::97])
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_one_core_computes_the_same_bits():
    printed = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, cores],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        for cores in ("one", "all")
    }
    assert len(printed) == 1


def test_repr_stats_and_one_message_say_which_kernels_serve(model, caplog):
    sizes = dict(num_blocks=8, block_size=4, max_num_seqs=1, max_model_len=16)
    for attention, name in ((None, "cpu"), ("cpu", "cpu"), ("xla", "xla")):
        llm = LLM(model, attention=attention, **sizes)
        assert f"attention={name!r}" in repr(llm)
        assert llm.stats()["attention"] == name
    messages = [m for m in caplog.messages if m.startswith("LLM(")]
    assert [
        f"attention={name!r}" in m
        for m, name in zip(messages, ("cpu", "cpu", "xla"), strict=True)
    ] == [True] * 3
