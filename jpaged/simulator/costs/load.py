"""Load: what a step asks of the machine, and all that a cost model sees of it.

Place on the road: system -> [load] -> cost model -> clock.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """The work of one step.

    Rows are the engine's: one for each sequence, S in all, in any order.
    """

    query_lens: jax.Array  # i32[S], tokens that each row computes; 0: not in this step
    context_lens: jax.Array  # i32[S], tokens its last one attends to, itself too
    num_logits: jax.Array  # i32[], rows whose next token is decided
    num_copied_tokens: (
        jax.Array
    )  # i32[], whose keys and values are copied on the device
    num_swapped_tokens: jax.Array  # i32[], that go to the host's memory or come back
    num_swap_copies: jax.Array  # i32[], pieces in which they go


class CostModel(Protocol):
    """How long a step takes: a pytree that is called with its load.

    Pure, jittable, and `vmap` works over its leaves as over those of the load.
    """

    def __call__(self, load: Load) -> jax.Array:
        """f32[], seconds."""
        ...
