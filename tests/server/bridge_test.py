"""The bridge's threads, with an LLM that records when requests come."""

import asyncio
import threading

import pytest

pytest.importorskip("starlette", reason="needs the extra `server`")

from jpaged.params import SamplingParams
from jpaged.server import bridge as bridge_module
from jpaged.server.bridge import EngineBridge
from jpaged.server.errors import ApiError

PARAMS = SamplingParams()


class FakeRequest:
    """A request that ends in the slice after its submission."""

    def __init__(self, request_id):
        self.request_id = request_id
        self.finished = False

    def deltas(self):
        return []

    def abort(self):
        self.finished = True


class FakeLLM:
    """Ends all requests with each slice, once `num_requests` were submitted.

    Attributes:
      seen: number of open requests at each slice.
    """

    is_paused = False

    def __init__(self, num_requests=1):
        self.num_requests = num_requests
        self.open = []
        self.seen = []
        self.count = 0
        self.third_slice, self.all_sent = threading.Event(), threading.Event()
        self.found_third_slice = []

    def submit(self, prompt, params):
        if prompt == [0]:
            raise ValueError("prompt: expected other tokens")
        if prompt == [1]:  # a request whose submission takes long
            self.found_third_slice.append(self.third_slice.wait(30))
        if prompt == [2]:
            assert self.all_sent.wait(30)
        self.count += 1
        request = FakeRequest(self.count)
        self.open.append(request)
        return request

    def run_slice(self, seconds):
        self.seen.append(len(self.open))
        if len(self.seen) >= 3:
            self.third_slice.set()
        if self.count >= self.num_requests:
            while self.open:
                self.open.pop().finished = True
        return bool(self.open)


def run(llm, work):
    """Run a coroutine function on a bridge."""

    async def main():
        bridge = EngineBridge(llm, max_open_sequences=100)
        bridge.start()
        try:
            await work(bridge)
            await bridge.drain(30)
        finally:
            await bridge.stop()
        return bridge

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def waits_long(monkeypatch):
    """No test depends on time: a wait that should not be takes a minute."""
    monkeypatch.setattr(bridge_module, "_ENTRY_S", 60.0)


def test_requests_that_arrive_together_start_together():
    llm = FakeLLM()

    async def work(bridge):
        sent = [asyncio.create_task(bridge.submit([[2]], PARAMS, 1)) for _ in range(8)]
        await asyncio.sleep(0)  # until each waits for its submission
        llm.all_sent.set()
        await asyncio.gather(*sent)

    run(llm, work)
    assert llm.seen[0] == 8


def test_a_running_engine_does_not_wait_for_submissions():
    llm = FakeLLM(num_requests=2)

    async def work(bridge):
        await bridge.submit([[5]], PARAMS, 1)
        while not llm.seen:
            await asyncio.sleep(1e-3)
        await bridge.submit([[1]], PARAMS, 1)  # ends after the third slice

    run(llm, work)
    assert llm.found_third_slice == [True]


def test_a_refused_request_holds_up_nothing():
    llm = FakeLLM()

    async def work(bridge):
        with pytest.raises(ApiError, match="expected other tokens"):
            await bridge.submit([[5], [0]], PARAMS, 1)
        assert bridge._num_entering == 0
        await bridge.submit([[5]], PARAMS, 1)

    bridge = run(llm, work)
    assert bridge.num_open_sequences == 0
    assert llm.seen
