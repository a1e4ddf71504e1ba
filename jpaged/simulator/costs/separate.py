"""Separate: any cost model, of an engine whose prompts have steps of their own.

Place on the road: cost model -> [separate] -> cost model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.simulator.costs.load import CostModel, Load


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Separate:
    """A step of prompts and of rows that decode takes what two steps take.

    So weights are read twice, and the host works twice. vLLM's releases of 2023 never
    put both into one step, though section 4.3 of their paper does.
    """

    model: CostModel

    def __call__(self, load: Load) -> jax.Array:
        """f32[], seconds."""
        prompts, decodes = split(load)
        return self.model(prompts) + self.model(decodes)


def split(load: Load) -> tuple[Load, Load]:
    """The load of the rows that compute several tokens, and that of all others.

    What is copied and swapped belongs to the others, if there are any. Logits belong to
    them too, one for each row, and what is left to the prompts.
    """
    decodes = load.query_lens == 1
    num_decodes = jnp.sum(decodes, dtype=jnp.int32)
    prompts = load.query_lens > 1
    logits = jnp.maximum(load.num_logits - num_decodes, 0)
    logits = jnp.where(jnp.any(prompts), logits, 0)
    is_prompts = jnp.any(prompts) & (num_decodes == 0)

    def part(rows: jax.Array, logits: jax.Array, moves: jax.Array) -> Load:
        def moved(number: jax.Array) -> jax.Array:
            return jnp.where(moves, number, 0)

        return Load(
            query_lens=jnp.where(rows, load.query_lens, 0),
            context_lens=load.context_lens,
            num_logits=logits,
            num_copied_tokens=moved(load.num_copied_tokens),
            num_swapped_tokens=moved(load.num_swapped_tokens),
            num_swap_copies=moved(load.num_swap_copies),
        )

    return (
        part(prompts, logits, is_prompts),
        part(decodes, load.num_logits - logits, ~is_prompts),
    )
