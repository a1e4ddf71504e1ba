"""Request attributes: what policies see of a request's parameters, for the queue.

Pipeline: params -> [request_attributes] -> submission. Host code.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from jpaged.config import EngineConfig
from jpaged.engine.limits import Params
from jpaged.policies import NO_DEADLINE, NO_USER
from jpaged.scheduler import Attributes


def encode(
    config: EngineConfig, params: Params, max_tokens: int, submitted_ms: int
) -> dict[str, Attributes]:
    """Return the column of the queue for a sequence; none if no policy reads it.

    Args:
      config: the engine's config.
      params: the request's parameters.
      max_tokens: most tokens that the sequence may generate.
      submitted_ms: when it was submitted, on the engine's clock.
    """
    if not config.has_attributes:
        return {}
    deadline = NO_DEADLINE if params.deadline_ms is None else params.deadline_ms
    columns: Any = dict(
        max_tokens=np.int32(max_tokens),
        submitted=np.int64(submitted_ms).astype(np.int32),  # wraps, as the clock does
        deadlines=np.int32(deadline),
        users=np.int32(user_number(params.user)),
        user_tokens=np.int32(0),
    )
    return {"attributes": Attributes(**columns)}


def user_number(user: str | int | None) -> int:
    """Return the number by which the engine knows a user, from 0 to 2**31 - 1.

    Numbers of names are hashes: two of a thousand users share one in one of 4,000 runs.
    """
    if user is None:
        return NO_USER
    if isinstance(user, int):
        return user
    digest = hashlib.blake2b(user.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
