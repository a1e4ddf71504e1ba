"""Routing: which replica gets a request.

Place on the road: batch -> [routing] -> serving. Host only.

Where a replica's prefix cache holds the beginning of a prompt, nobody has to compute
it; where many wait for it, others are idle meanwhile. So the longest beginning decides
as long as loads are alike, and the load where they are not.

Source: the cache-aware load balancer of SGLang, which guesses what its servers' caches
hold from what it sent them, and goes by load where the longest queue exceeds the
shortest by a number and by a factor. https://lmsys.org/blog/2024-12-04-sglang-v0-4/
Here caches are looked up, and each candidate's load is compared.
"""

from __future__ import annotations

import numpy as np

# Share of a pool's slots by which loads may differ and still be alike.
MARGIN = 0.25


def choose(
    hits: np.ndarray, loads: np.ndarray, has_room: np.ndarray, margin: float
) -> int | None:
    """The replica that gets a request, or None where none has room.

    Of those with room it is the one with the longest hit, of these the lightest, of
    these the first; unless its load exceeds that of the lightest with room by more than
    `margin`. Then it is the lightest, of these the one with the longest hit.

    Args:
      hits: i[D], tokens of the prompt's beginning that each replica's cache holds.
      loads: i[D], tokens of the sequences that run or wait in each.
      has_room: bool[D], which of them can take the request now.
      margin: tokens.

    >>> hits, all_ = np.array([0, 64, 32]), np.ones(3, bool)
    >>> choose(hits, np.array([10, 50, 20]), all_, margin=40)
    1
    >>> choose(hits, np.array([10, 51, 20]), all_, margin=40)
    0
    >>> choose(hits, np.array([10, 50, 20]), np.array([False, False, True]), margin=40)
    2
    """
    with_room = np.flatnonzero(has_room)
    if not with_room.size:
        return None
    hits, loads = hits[with_room], loads[with_room]
    # The last key is the first to decide.
    best = np.lexsort((loads, -hits))[0]
    lightest = np.lexsort((-hits, loads))[0]
    is_alike = loads[best] - loads[lightest] <= margin
    return int(with_room[best if is_alike else lightest])
