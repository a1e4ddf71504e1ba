"""Waiting requests: those that are open but not in the request table, in order.

Pipeline: batcher -> [waiting] -> request table. Host only.

The policy that orders the request table orders this queue too, so that a call with more
prompts than the table has entries is served as if they were all in it. A request that
is in the table keeps its entry.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from jpaged import policies
from jpaged.config import EngineConfig
from jpaged.engine import limits, request_attributes
from jpaged.policies import NO_DEADLINE, Requests
from jpaged.serving.request_state import RequestState

_Key = tuple[float, int]
# Built-in policies that need no array: the score of one request. Integers are exact.
_SCORES: dict[str, Callable[[RequestState], int]] = {
    "fcfs": lambda request: 0,
    "priority": lambda request: request.params.priority,
    "shortest_prompt": lambda request: len(request.prompt_token_ids),
}


class Host(Protocol):
    """What the queue asks the engine; see `EngineHost`."""

    def cached_lens(self, requests: Sequence[RequestState]) -> np.ndarray:
        """Return the cached tokens of each prompt in each replica; i32[n, D]."""
        ...

    def user_tokens(self) -> dict[int, int]:
        """Return the tokens of users in the request table."""
        ...

    def time_s(self) -> float:
        """Return the host's clock in seconds."""
        ...


class WaitingQueue:
    """Waiting requests in the order of a policy, then of arrival.

    Args:
      config: has the policy.
      host: the engine. Of the replicas' cached tokens the policy gets the most.
    """

    def __init__(self, config: EngineConfig, host: Host):
        policy, parameters = config.policy, config.policy_parameters
        self._config, self._host = config, host
        self._policy = policies.find(policies.ADMISSION, policy)
        self._score = None if callable(policy) else _SCORES.get(policy)
        self._reads: frozenset[str] = frozenset()
        if self._score is None:
            self._reads = policies.columns_read(policies.ADMISSION, policy, parameters)
        self._parameters = np.asarray(parameters, np.float32)
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

        Scores that depend on the cache, the time or a user's function are computed
        again for all requests, because they change while requests run.

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
        is_real = jnp.arange(size) < number
        columns = {
            name: jnp.asarray(np.resize(np.asarray(values, np.int32), size))
            for name, values in self._columns(requests).items()
        }
        view = Requests(
            **columns,
            leaders=jnp.arange(size, dtype=jnp.int32),
            is_waiting=is_real,
            is_running=jnp.zeros_like(is_real),
            parameters=jnp.asarray(self._parameters),
        )
        # As in the table, a score that is not a number comes last.
        found = np.asarray(self._policy(view), np.float64)[:number]
        return np.where(np.isnan(found), np.inf, found).tolist()

    def _columns(self, requests: Sequence[RequestState]) -> dict[str, object]:
        """Return the columns of `Requests` that are integers."""
        prompt_lens = [len(request.prompt_token_ids) for request in requests]
        none = [0] * len(requests)
        found: dict[str, object] = dict(
            arrivals=[request.arrival for request in requests],
            priorities=[request.params.priority for request in requests],
            prompt_lens=prompt_lens,
            num_tokens=prompt_lens,
            cached_lens=none,
            num_preemptions=none,
            **dict.fromkeys(policies.ATTRIBUTES, none),
        )
        if "cached_lens" in self._reads:
            found["cached_lens"] = self._host.cached_lens(requests).max(axis=1)
        if self._reads.isdisjoint(policies.ATTRIBUTES):
            return found
        params = [request.params for request in requests]
        most = [
            limits.token_limit(self._config, length, one) - length
            for length, one in zip(prompt_lens, params, strict=True)
        ]
        now = self._host.time_s()
        ages = [int((now - request.submitted_s) * 1000) for request in requests]
        times_left = [
            NO_DEADLINE if one.deadline_ms is None else one.deadline_ms - age
            for one, age in zip(params, ages, strict=True)
        ]
        users = [request_attributes.user_number(one.user) for one in params]
        tokens = self._host.user_tokens()
        return found | dict(
            max_tokens=most,
            ages=ages,
            times_left=times_left,
            users=users,
            user_tokens=[tokens.get(user, 0) for user in users],
        )
