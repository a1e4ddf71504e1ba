"""Many short requests: constant memory, no leaked block, no lost request.

A few thousand requests here; `python -m tests.server.soak_test 1000000` runs a million
against the bundled model and prints the memory as it goes.
"""

import asyncio
import gc
import json
import pathlib
import random
import sys
import time

import pytest

from tests.server.conftest import Running

pytestmark = pytest.mark.long

NUM_CLIENTS = 16


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def body_of(rng: random.Random) -> dict:
    """One short request of a mix: sampled, greedy, streamed, stopped, refused."""
    body = {"prompt": [rng.randrange(2, 250) for _ in range(rng.randint(1, 6))]}
    body |= {"max_tokens": rng.randint(1, 3), "seed": rng.randrange(1 << 30)}
    kind = rng.randrange(8)
    if kind == 0:
        body |= {"stream": True}
    elif kind == 1:
        body |= {"n": 2, "stop": ["a"]}
    elif kind == 2:
        body |= {"temperature": 0}
    elif kind == 3:
        body |= {"nonsense": 1}
    return body


async def exchange(host: str, port: int, count: int, seed: int) -> dict[int, int]:
    """Send requests one after another on one connection; count the statuses.

    Now and then the connection is closed before the response.
    """
    rng = random.Random(seed)
    statuses: dict[int, int] = {}
    reader = writer = None
    for _ in range(count):
        if writer is None:
            reader, writer = await asyncio.open_connection(host, port)
        body = body_of(rng)
        data = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: "
            + f"{len(data)}\r\n\r\n".encode()
            + data
        )
        if rng.random() < 0.02:
            writer.close()
            writer = None
            continue
        status = int((await reader.readline()).split()[1])
        statuses[status] = statuses.get(status, 0) + 1
        await read_rest(reader)
    if writer is not None:
        writer.close()
    return statuses


async def read_rest(reader: asyncio.StreamReader) -> None:
    """Read the headers and the body of a response."""
    size = None
    while (line := await reader.readline()) not in (b"\r\n", b""):
        if line.lower().startswith(b"content-length:"):
            size = int(line.split(b":")[1])
    if size is not None:
        await reader.readexactly(size)
        return
    while size := int(await reader.readline(), 16):
        await reader.readexactly(size + 2)
    await reader.readline()


def run(served: Running, count: int, seed: int) -> dict[int, int]:
    """Send `count` requests through several connections; return the statuses."""
    host, port = served.url.removeprefix("http://").split(":")

    async def all_clients() -> list[dict[int, int]]:
        each = count // NUM_CLIENTS
        clients = [
            exchange(host, int(port), each, seed * NUM_CLIENTS + number)
            for number in range(NUM_CLIENTS)
        ]
        return await asyncio.gather(*clients)

    total: dict[int, int] = {}
    for statuses in asyncio.run(all_clients()):
        for status, number in statuses.items():
            total[status] = total.get(status, 0) + number
    return total


def test_memory_is_constant_and_no_block_leaks(served):
    served.wait_until_idle()
    run(served, 800, 1)
    gc.collect()
    before = resident_bytes()
    statuses = run(served, 1600, 2)
    served.wait_until_idle()
    gc.collect()
    assert set(statuses) <= {200, 400}
    assert statuses[200] > 1200
    assert statuses[400] > 100
    # A kilobyte per request would show; the allocator itself varies by a few MB.
    assert resident_bytes() - before < 1600 * 4096
    host = served.llm._host
    assert host.num_empty == served.llm.config.max_num_requests
    assert not served.bridge._open
    assert served.llm._batcher.num_open == 0


def main(count: int) -> None:
    """Run the soak with the bundled model; print memory and rate as it goes."""
    from jpaged.llm import LLM
    from jpaged.server.settings import ServerSettings

    llm = LLM("tiny-python", max_num_seqs=16, num_blocks=256, max_model_len=64)
    settings = ServerSettings(allow_admin=True, drain_s=5.0)
    served = Running(llm, settings)
    done, start, first = 0, time.monotonic(), None
    try:
        while done < count:
            part = min(20_000, count - done)
            statuses = run(served, part, done + 1)
            done += part
            served.wait_until_idle()
            gc.collect()
            memory = resident_bytes()
            first = first or memory
            rate = done / (time.monotonic() - start)
            print(
                f"{done} requests, {rate:.0f}/s, {memory / 2**20:.1f} MiB resident "
                f"({(memory - first) / 2**20:+.1f}), {statuses}",
                flush=True,
            )
    finally:
        served.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
