"""Several processes on one machine: joined, compared, and ended when one fails."""

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from jpaged import distributed

pytestmark = pytest.mark.long

JOIN = """
    import os, sys
    from jpaged import distributed
    number = int(os.environ["JPAGED_PROCESS_ID"])
"""
# A sum over the shards of both processes: 0 + 1 + 2 + 3.
SUM = """
    distributed.initialize({"seed": 3}, timeout_s=60)
    import jax, jax.numpy as jnp, jpaged
    from jax.sharding import NamedSharding, PartitionSpec
    mesh = jpaged.make_mesh(tensor=4)
    split = NamedSharding(mesh, PartitionSpec("tensor"))
    x = jax.jit(lambda: jnp.arange(4), out_shardings=split)()
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(x)
    print("sum", int(total), "of", jax.process_count(), jax.local_device_count())
"""
DIFFER = 'distributed.initialize({"seed": number}, timeout_s=60)'
DIES = """
    if number == 1:
        sys.exit(7)
    distributed.initialize(timeout_s=60)
"""
LATE = """
    if number == 1:
        import time; time.sleep(300)
    distributed.initialize(timeout_s=5)
"""


def launch(program: str, *flags: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of two processes of two devices."""
    code = textwrap.dedent(JOIN) + textwrap.dedent(program)
    command = [sys.executable, "-m", "experiments.launch", *flags, "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout, done.stderr


def test_two_processes_sum_what_lies_on_both():
    status, out, err = launch(SUM)
    assert status == 0, out + err
    for number in range(2):
        assert f"[{number}] sum 6 of 2 2" in out


def test_processes_with_other_options_are_named():
    status, out, _ = launch(DIFFER)
    assert status == 1
    assert "got others than process 0's in process 1" in out


def test_a_process_that_dies_is_named_and_ends_the_other():
    status, _, err = launch(DIES)
    assert status == 7
    assert "process 1 failed: exit status 7" in err


def test_a_process_that_never_arrives_is_named():
    status, out, err = launch(LATE)
    assert status == 128 + signal.SIGABRT
    assert "DEADLINE_EXCEEDED" in out
    assert "process 0 failed: SIGABRT; still running then: process 1" in err


def test_processes_that_are_not_done_in_time_are_named():
    status, _, err = launch("\nimport time; time.sleep(300 * number)", "--timeout=12")
    assert status == 124
    assert "process 1 not done after 12 s" in err


def test_a_port_in_use_is_said_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, out, err = launch(SUM, f"--port={port}")
    assert (status, out) == (1, "")
    assert f"port: wanted one that is free, got {port}" in err


def test_half_an_address_is_refused():
    with pytest.raises(ValueError, match="num_processes: wanted all of"):
        distributed.initialize(coordinator_address="127.0.0.1:1")
