"""An open-loop client: sends requests to an OpenAI-compatible server at given times.

Pipeline: a job as JSON on stdin -> HTTP server -> times as JSON on stdout.

It runs in a process of its own, so that it takes no time from the server's threads. It
parses only the last event of a stream, the usage: the tokens of an event are the
server's matter.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any, NamedTuple

_LIMIT = 1 << 24  # bytes of a line


class Timing(NamedTuple):
    """Times of one request in seconds since the first one was due."""

    due_s: float
    first_s: float  # the first event with a token
    end_s: float
    num_tokens: int  # generated
    num_events: int


def run_open_loop(
    url: str,
    prompts: Sequence[Sequence[int]],
    output_lens: Sequence[int],
    arrivals: Sequence[float],
    *,
    model: str | None = None,
    **fields: Any,
) -> list[Timing]:
    """Send requests at their times; return their timings.

    Args:
      url: the server, "http://host:port".
      prompts: token ids of each request.
      output_lens: tokens that each request generates.
      arrivals: seconds from now at which each is sent.
      model: name of the model in the requests; None leaves it out.
      **fields: further fields of all requests.

    Raises:
      ValueError: a request was refused; the message is the server's.
    """
    bodies = [
        {
            "prompt": [int(token) for token in prompt],
            "max_tokens": int(most),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if model is None else {"model": model}),
            **fields,
        }
        for prompt, most in zip(prompts, output_lens, strict=True)
    ]
    job = {"url": url, "bodies": bodies, "arrivals": [float(at) for at in arrivals]}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.lib.open_loop"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return [Timing(*each) for each in json.loads(done.stdout)]


async def _send(url: str, body: Any, due_s: float, begin: float) -> Timing:
    """Send one request and read its stream."""
    parts = urllib.parse.urlsplit(url)
    data = json.dumps(body).encode()
    head = (
        f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}"
        f"\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        "Connection: close\r\n\r\n"
    )
    await asyncio.sleep(begin + due_s - time.perf_counter())
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or 80, limit=_LIMIT
    )
    writer.write(head.encode() + data)
    first_s = end_s = 0.0
    num_events, last = 0, b"{}"
    status = (await reader.readline()).split()[1]
    if status != b"200":
        text = (await reader.read()).decode()
        raise ValueError(f"the server answered {status.decode()}: {text[-500:]}")
    async for line in reader:
        if line.startswith(b"data: {"):
            num_events += 1
            end_s = time.perf_counter() - begin
            first_s = first_s or end_s
            last = line[6:]
    writer.close()
    num_tokens = json.loads(last)["usage"]["completion_tokens"]
    return Timing(due_s, first_s, end_s, num_tokens, num_events)


async def _run(job: dict[str, Any]) -> list[Timing]:
    begin = time.perf_counter()
    pairs = zip(job["bodies"], job["arrivals"], strict=True)
    return await asyncio.gather(*(_send(job["url"], *pair, begin) for pair in pairs))


if __name__ == "__main__":
    try:
        json.dump(asyncio.run(_run(json.load(sys.stdin))), sys.stdout)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
