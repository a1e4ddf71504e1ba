"""Waiting requests: those that are open but not in the request table, in order.

Pipeline: batcher -> [waiting] -> request table. Host only.

The policy that orders the request table orders this queue too, so that a call with more
prompts than the table has entries is served as if they were all in it. A request that
is in the table keeps its entry.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from jpaged import policies
from jpaged.serving.request_state import RequestState

_Key = tuple[float, int]
# Built-in policies that need no array: the score of one request. Integers are exact.
_SCORES: dict[str, Callable[[RequestState], int]] = {
    "fcfs": lambda request: 0,
    "priority": lambda request: request.params.priority,
    "shortest_prompt": lambda request: len(request.prompt_token_ids),
}
CachedLens = Callable[[Sequence[RequestState]], np.ndarray]


class WaitingQueue:
    """Waiting requests in the order of a policy, then of arrival.

    Args:
      policy: a name of `policies.POLICIES` or a function.
      parameters: numbers that the policy reads.
      cached_lens: returns the cached tokens of requests' prompts in each replica,
        i32[n, D]. The policy gets those of the replica that has most.
    """

    def __init__(
        self,
        policy: str | policies.Policy,
        parameters: Sequence[float],
        cached_lens: CachedLens,
    ):
        self._policy = policies.find_policy(policy)
        self._score = None if callable(policy) else _SCORES.get(policy)
        self._parameters = jnp.asarray(np.asarray(parameters, np.float32))
        self._reads_cache = self._score is None and policies.reads_cached_lens(
            policy, tuple(parameters)
        )
        self._cached_lens = cached_lens
        self._heap: list[tuple[_Key, RequestState]] = []
        self._added: list[RequestState] = []  # not in the heap yet

    def __len__(self) -> int:
        """Number of waiting requests."""
        return len(self._heap) + len(self._added)

    def __iter__(self) -> Iterator[RequestState]:
        """All waiting requests, in no particular order."""
        yield from (request for _, request in self._heap)
        yield from self._added

    def push(self, request: RequestState) -> None:
        """Add a request."""
        self._added.append(request)

    def order(self) -> None:
        """Give all requests their place, before the first ones are admitted.

        Scores that depend on the cache or on a user's function are computed again for
        all requests, because they change while requests run.

        Raises:
          Exception: what a user's function raises.
        """
        if self._score is not None:
            for request in self._added:
                key = (self._score(request), request.arrival)
                heapq.heappush(self._heap, (key, request))
            self._added.clear()
        elif len(self):
            requests = sorted(self, key=lambda request: request.arrival)
            scores = self._scores(requests)
            self._heap = [
                ((score, request.arrival), request)
                for score, request in zip(scores, requests, strict=True)
            ]
            heapq.heapify(self._heap)
            self._added.clear()

    def peek(self) -> RequestState:
        """Return the first request of the last `order`."""
        return self._heap[0][1]

    def pop(self) -> RequestState:
        """Remove and return the first request of the last `order`."""
        return heapq.heappop(self._heap)[1]

    @property
    def is_ordered(self) -> bool:
        """Whether there is a request that `peek` returns."""
        return bool(self._heap)

    def first(self, number: int) -> list[RequestState]:
        """Return the first requests of the last `order`, at most `number`."""
        return [request for _, request in heapq.nsmallest(number, self._heap)]

    def _scores(self, requests: Sequence[RequestState]) -> list[float]:
        """Return the policy's score of each request, in a padded call of few shapes."""
        number = len(requests)
        size = 1 << (number - 1).bit_length()
        prompt_lens = [len(request.prompt_token_ids) for request in requests]
        cached = np.zeros(number, np.int32)
        if self._reads_cache:
            cached = self._cached_lens(requests).max(axis=1)
        columns = dict(
            arrivals=[request.arrival for request in requests],
            priorities=[request.params.priority for request in requests],
            prompt_lens=prompt_lens,
            num_tokens=prompt_lens,
            cached_lens=cached,
            num_preemptions=np.zeros(number, np.int32),
        )
        padded = {
            name: jnp.asarray(np.resize(np.asarray(values, np.int32), size))
            for name, values in columns.items()
        }
        scores = self._policy(policies.Waiting(**padded, parameters=self._parameters))
        # As in the table, a score that is not a number comes last.
        found = np.asarray(scores, np.float64)[:number]
        return np.where(np.isnan(found), np.inf, found).tolist()
