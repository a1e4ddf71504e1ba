"""Streams: responses that notice when their client goes away.

Pipeline: completions, chat -> [streams] -> HTTP response. Host only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jpaged.server.errors import ApiError, bug
from jpaged.server.live_requests import LiveRequest

LOGGER = logging.getLogger("jpaged.server")
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed its connection before it had its response."""


def event(content: Any) -> bytes:
    """Return one server-sent event with JSON.

    >>> event({"a": 1})
    b'data: {"a":1}\\n\\n'
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode("ascii") + b"\n\n"


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for `work`; cancel it if the client goes away first.

    Raises:
      ClientGone: the client went away.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watcher):
            if not each.done():
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await each


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(
    request: Request, lives: Sequence[LiveRequest], work: Awaitable[Response]
) -> Response:
    """Return what `work` returns; abort the requests if their client goes away."""
    try:
        return await while_connected(request.receive, work)
    except ClientGone:
        return Response(status_code=499)  # no one gets it; it is counted
    finally:
        abandon(lives)


def abandon(lives: Sequence[LiveRequest]) -> None:
    """Abort those requests that still run."""
    for live in lives:
        live.abandon()


class EventStream(Response):
    """A stream of server-sent events; it ends its requests when its client goes away.

    Args:
      lives: the requests whose updates are sent.
      events: yields the bytes to send; called when the response starts.
      write_timeout_s: time for the client to accept a part.
      headers: further headers.
    """

    def __init__(
        self,
        lives: Sequence[LiveRequest],
        events: Callable[[], AsyncIterator[bytes]],
        write_timeout_s: float,
    ):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # proxies must not collect events
        self._lives = lives
        self._events = events
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await while_connected(receive, self._send_all(send))
        except (ClientGone, TimeoutError, OSError):
            pass  # a client that reads nothing counts as gone
        finally:
            abandon(self._lives)

    async def _send_all(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        try:
            async for part in self._events():
                await self._send(send, part, more=True)
        except ApiError as error:
            await self._send(send, event(error.body()), more=True)
        except Exception:
            LOGGER.exception("a stream failed")
            await self._send(send, event(bug().body()), more=True)
        await self._send(send, DONE, more=False)

    async def _send(self, send: Send, part: bytes, *, more: bool) -> None:
        message = {"type": "http.response.body", "body": part, "more_body": more}
        async with asyncio.timeout(self._write_timeout_s):
            await send(message)


async def merged(
    lives: Sequence[LiveRequest],
) -> AsyncIterator[tuple[int, list[Any]]]:
    """Yield (index of the request, deltas) of several requests, as they come.

    Raises:
      ApiError: the engine lost a request.
    """
    if len(lives) == 1:
        async for deltas in lives[0].updates():
            yield 0, deltas
        return
    iterators = [live.updates() for live in lives]
    waiting: dict[asyncio.Future[Any], int] = {
        asyncio.ensure_future(anext(iterator, None)): index
        for index, iterator in enumerate(iterators)
    }
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(future)
                deltas = future.result()
                if deltas is None:
                    continue
                yield index, deltas
                again = asyncio.ensure_future(anext(iterators[index], None))
                waiting[again] = index
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
