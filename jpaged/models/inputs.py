"""StepInputs: all that the decoder learns about a step.

Place on the road: scheduler, block manager -> [step_inputs] -> decoder.

The decoder never sees a request, and the scheduler never sees an activation.
"""

from __future__ import annotations

import dataclasses

import jax

from jpaged.kv.shared_prefix import SharedPrefix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """The tokens of one step, of the rows that take part in it, rows side by side.

    A decode step has one token for each row, and `query_start_loc` None; a step with
    prompt chunks says with `query_start_loc` which tokens are whose.
    """

    tokens: jax.Array  # i32[T]
    positions: jax.Array  # i32[T], of the tokens in their sequences
    slot_mapping: jax.Array  # i32[T], slot to write; below 0: padding
    block_tables: jax.Array  # i32[S, M], NO_BLOCK after the last used entry
    context_lens: jax.Array  # i32[S], this step's tokens included; 0: padding
    query_start_loc: jax.Array | None  # i32[S + 1], or None: row s has token s
    shared_prefix: SharedPrefix | None = (
        None  # rows that read their beginnings together
    )
