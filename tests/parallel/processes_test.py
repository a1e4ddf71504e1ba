"""Several processes on one machine: connected, compared, and ended if one fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jpaged import LLM, SamplingParams
from jpaged.engine import snapshots
from jpaged.parallel import distributed
from tests.support.models import checkpoints
from tests.support.paths import ROOT

pytestmark = pytest.mark.long

NUMBER = """
    import os, sys
    number = int(os.environ["JPAGED_PROCESS_ID"])
"""
# Options that differ, and a sum over the shards of both processes: 0 + 1 + 2 + 3.
SUM = """
    from jpaged.parallel import distributed
    try:
        distributed.initialize({"seed": number}, timeout_s=60)
    except ValueError as error:
        print(error)
    import jax, jax.numpy as jnp, jpaged
    from jax.sharding import NamedSharding, PartitionSpec
    mesh = jpaged.make_mesh(tensor=4)
    split = NamedSharding(mesh, PartitionSpec("tensor"))
    x = jax.jit(lambda: jnp.arange(4), out_shardings=split)()
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(x)
    print("sum", int(total), "of", jax.process_count(), jax.local_device_count())
"""
# 2 KV heads over 4 devices: each head is stored twice.
GQA = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
SIZES = dict(block_size=4, max_num_seqs=4, max_model_len=48, max_num_batched_tokens=16)
PROMPTS = [[3, 5, 7, 9, 11, 2], [4, 6, 8], [3, 5, 7, 9, 11, 2, 8, 1]]
SERVE = """
    from jpaged.parallel import distributed
    distributed.initialize({"seed": 0}, timeout_s=60)
    import json, sys, jpaged
    from jpaged import LLM, SamplingParams
    from jpaged.engine import snapshots
    from tests.parallel.processes_test import PROMPTS, SIZES, params, tokens
    folder = sys.argv[1]
    mesh = jpaged.make_mesh(tensor=4)
    llm = LLM(folder, mesh=mesh, **SIZES)
    print(json.dumps(tokens(llm.generate(PROMPTS, params()))))
    snapshots.save(f"{folder}/saved", llm._host.runner.state)
    for call in (
        lambda: llm.generate([3 + number], params()[0]),
        lambda: LLM(folder, mesh=mesh, **SIZES | {"block_size": 4 + number}),
        lambda: number and LLM(folder, mesh=jpaged.make_mesh(tensor=2), **SIZES),
    ):
        try:
            call()
        except ValueError as error:
            print(error)
"""
DIES = """
    if number == 1:
        sys.exit(7)
    from jpaged.parallel import distributed
    distributed.initialize(timeout_s=60)
"""
LATE = """
    if number == 1:
        import time; time.sleep(300)
    from jpaged.parallel import distributed
    distributed.initialize(timeout_s=2)
"""


DIFFERENT = "expected the same in all processes, got values other than process 0's"


def params() -> list[SamplingParams]:
    greedy = SamplingParams(temperature=0.0, max_tokens=18, ignore_eos=True)
    two = SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=14, ignore_eos=True)
    return [greedy, two, SamplingParams(temperature=1.0, max_tokens=9)]


def tokens(outputs) -> list[list[list[int]]]:
    return [[list(one.token_ids) for one in each.outputs] for each in outputs]


def launch(program: str, *flags: str, argument: str = "") -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of two processes with two devices each."""
    code = textwrap.dedent(NUMBER) + textwrap.dedent(program)
    command = [sys.executable, "-m", "experiments.launch", *flags, "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code, argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout, done.stderr


def test_two_processes_compare_their_options_and_sum_over_all_devices():
    status, out, err = launch(SUM)
    assert status == 0, out + err
    for number in range(2):
        assert f"[{number}] sum 6 of 2 2" in out
        assert f"[{number}] seed: {DIFFERENT} in process 1; " in out
        assert f"this is process {number}, which has seed={number}" in out


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[str, str]:
    """A model folder, and the output of two processes that generated with it."""
    folder = str(checkpoints.write_tiny_llama(tmp_path_factory.mktemp("llama"), **GQA))
    status, out, err = launch(SERVE, argument=folder)
    assert status == 0, out + err
    return folder, out


def test_two_processes_give_the_tokens_of_one_which_continues_their_state(served):
    folder, out = served
    with LLM(folder, **SIZES) as llm:
        llm.warm_up(params())  # no step is limited to a compiled size
        expected = tokens(llm.generate(PROMPTS, params(), progress=False))
        assert [len(one) for each in expected for one in each] == [18, 14, 14, 9]
        for number in range(2):
            assert f"[{number}] {json.dumps(expected)}" in out
        one = llm._host.runner.state
        both = snapshots.load(f"{folder}/saved", llm.model, llm.config)
        for mine, theirs in (
            (one.blocks.block_tables, both.blocks.block_tables),
            (one.requests.tokens, both.requests.tokens),
        ):
            np.testing.assert_array_equal(mine, theirs)
        # Sums in another order. Values are about 1, so other heads would differ more.
        np.testing.assert_allclose(one.cache.k_pages, both.cache.k_pages, atol=1e-4)
        assert np.abs(one.cache.k_pages).max() > 0.1


def test_calls_that_differ_between_processes_raise_in_all_of_them(served):
    _, out = served
    for number in range(2):
        assert f"[{number}] prompts: {DIFFERENT}" in out
        assert f"[{number}] block_size: {DIFFERENT}" in out
        assert f"this is process {number}, which has block_size={4 + number}" in out
    # Process 1 cannot use a mesh of process 0's devices.
    assert "[1] mesh: expected devices of every process, or of this process" in out


def test_a_process_that_fails_is_named_and_ends_the_other():
    status, _, err = launch(DIES)
    assert status == 7
    assert "process 1 failed: exit status 7" in err


def test_a_process_that_never_connects_is_named():
    status, out, err = launch(LATE)
    assert status == 128 + signal.SIGABRT
    assert "DEADLINE_EXCEEDED" in out
    assert "process 0 failed: SIGABRT; still running then: process 1" in err


def test_processes_that_are_not_done_in_time_are_named():
    status, _, err = launch("\nimport time; time.sleep(300 * number)", "--timeout=3")
    assert status == 124
    assert "process 1 not done after 3 s" in err


def test_a_port_in_use_is_reported_before_processes_start():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, out, err = launch(SUM, f"--port={port}")
    assert (status, out) == (1, "")
    assert "port: " in err
    assert f"got {port}" in err


def test_an_address_without_process_numbers_raises():
    with pytest.raises(ValueError, match="num_processes: expected all of"):
        distributed.initialize(coordinator_address="127.0.0.1:1")
