"""Routing: which replica gets a request.

Pipeline: batcher -> [routing] -> engine host. Host only.

If a replica's prefix cache has the first tokens of a prompt, they need not be computed.
But if all such requests go to one replica, the others are idle. So the longest cached
prefix decides while loads are similar, and the load decides otherwise.

Source: the cache-aware load balancer of SGLang.
https://lmsys.org/blog/2024-12-04-sglang-v0-4/

SGLang estimates the contents of its servers' caches from the requests that it sent to
them, and routes by load if the longest queue exceeds the shortest by a number and by a
factor. Here the actual caches are searched, and the loads of the candidates are
compared.
"""

from __future__ import annotations

import numpy as np

# Loads are similar if they differ by at most this share of a pool's slots.
LOAD_MARGIN = 0.25


def choose_replica(
    cached_lens: np.ndarray, loads: np.ndarray, has_capacity: np.ndarray, margin: float
) -> int | None:
    """Return the replica that gets a request, or None if none has capacity.

    Only replicas with capacity are considered. The first choice is the replica with the
    longest cached prefix; ties go to the lowest load, then to the lowest index. If its
    load exceeds the lowest load by more than `margin`, the replica with the lowest load
    is chosen instead; ties go to the longest cached prefix, then to the lowest index.

    Args:
      cached_lens: i[D], leading tokens of the prompt that each replica has cached.
      loads: i[D], tokens of the sequences that run or wait in each replica.
      has_capacity: bool[D], whether each replica can accept the request now.
      margin: number of tokens.

    >>> cached, every = np.array([0, 64, 32]), np.ones(3, bool)
    >>> choose_replica(cached, np.array([10, 50, 20]), every, margin=40)
    1
    >>> choose_replica(cached, np.array([10, 51, 20]), every, margin=40)
    0
    >>> last = np.array([False, False, True])
    >>> choose_replica(cached, np.array([10, 50, 20]), last, margin=40)
    2
    """
    candidates = np.flatnonzero(has_capacity)
    if not candidates.size:
        return None
    cached_lens, loads = cached_lens[candidates], loads[candidates]
    # np.lexsort sorts by its last key first.
    best = np.lexsort((loads, -cached_lens))[0]
    lightest = np.lexsort((-cached_lens, loads))[0]
    is_similar = loads[best] - loads[lightest] <= margin
    return int(candidates[best if is_similar else lightest])
