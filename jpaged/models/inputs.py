"""StepInputs: everything that the decoder knows about a step.

Pipeline: scheduler, block manager -> [models.inputs] -> decoder.

The decoder never sees a request, and the scheduler never sees an activation.
Shape symbols: T tokens of the step, S batch rows, M blocks per sequence, G cache
groups (`kv.cache_groups`).
"""

from __future__ import annotations

import dataclasses

import jax

from jpaged.kv.shared_prefix import SharedPrefix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """The tokens of one step, concatenated over the batch rows that take part in it.

    Attributes:
      tokens: i32[T].
      positions: i32[T], position of each token in its sequence.
      slot_mapping: i32[T], slot to which each token's keys and values are written;
        negative for padding. With G > 1 cache groups, i32[G, T].
      block_tables: i32[S, M], NO_BLOCK after the last used entry, and in front of a
        sliding window. With G > 1 cache groups, i32[G, S, M].
      context_lens: i32[S], including the tokens of this step; 0 for padding.
      query_start_loc: i32[S + 1], where each row's tokens start in `tokens`. None in a
        decode step, where row s has exactly token s.
      shared_prefix: prefixes that several rows share and read once; None for none.
    """

    tokens: jax.Array
    positions: jax.Array
    slot_mapping: jax.Array
    block_tables: jax.Array
    context_lens: jax.Array
    query_start_loc: jax.Array | None
    shared_prefix: SharedPrefix | None = None
