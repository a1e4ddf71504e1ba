"""Step load: the work of one step, the only input of a cost model.

Pipeline: system -> [load] -> cost model -> clock.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax

Number = jax.Array | float  # f32[], or a Python number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepLoad:
    """The work of one step.

    The S rows are those of the system, in any order; each is one sequence.
    """

    query_lens: jax.Array  # i32[S], tokens that the row computes; 0: not in this step
    context_lens: (
        jax.Array
    )  # i32[S], tokens that its last query attends to, with itself
    num_logits: jax.Array  # i32[], rows whose next token is sampled
    num_copied_tokens: jax.Array  # i32[], tokens of KV copied on the device
    num_swapped_tokens: jax.Array  # i32[], tokens of KV moved to the host or back
    num_swap_copies: jax.Array  # i32[], pieces in which they are moved


class CostModel(Protocol):
    """The duration of a step: a pytree that is called with a load.

    It is pure and works under `jit`. `vmap` works over its leaves and over loads.
    """

    def __call__(self, load: StepLoad) -> jax.Array:
        """Return f32[], seconds."""
        ...
