"""Adjusted cost models: another cost model, with its seconds changed.

Pipeline: cost model -> [adjusted] -> cost model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.simulator.costs.load import CostModel, Number, StepLoad


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """The seconds of another model, multiplied by `factor`; the factor is a leaf."""

    model: CostModel
    factor: Number

    def __call__(self, load: StepLoad) -> jax.Array:
        """Return f32[], seconds."""
        return self.model(load) * self.factor


def scale(model: CostModel, factor: float) -> Scaled:
    """Multiply all seconds of a cost model.

    Raises:
      ValueError: the factor is not a finite number above 0.
    """
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor: expected a finite number above 0, got {factor}")
    return Scaled(model, float(factor))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SeparatePrompts:
    """A cost model of an engine that computes prompts in steps of their own.

    A step with prompts and decode rows takes as long as two steps: weights are read
    twice, and the host works twice. vLLM's releases of 2023 never mixed both in one
    step, although section 4.3 of their paper does.
    """

    model: CostModel

    def __call__(self, load: StepLoad) -> jax.Array:
        """Return f32[], seconds."""
        prompts, decodes = split_load(load)
        return self.model(prompts) + self.model(decodes)


def split_load(load: StepLoad) -> tuple[StepLoad, StepLoad]:
    """Split a load into rows that compute several tokens, and all other rows.

    Copied and swapped tokens count for the other rows, if there are any. Each of the
    other rows has one of the logits; the prompts have the rest.

    Returns:
      The load of the prompts, and the load of the other rows.
    """
    decodes = load.query_lens == 1
    num_decodes = jnp.sum(decodes, dtype=jnp.int32)
    prompts = load.query_lens > 1
    logits = jnp.maximum(load.num_logits - num_decodes, 0)
    logits = jnp.where(jnp.any(prompts), logits, 0)
    has_only_prompts = jnp.any(prompts) & (num_decodes == 0)

    def part(rows: jax.Array, logits: jax.Array, has_moves: jax.Array) -> StepLoad:
        def moved(number: jax.Array) -> jax.Array:
            return jnp.where(has_moves, number, 0)

        return StepLoad(
            query_lens=jnp.where(rows, load.query_lens, 0),
            context_lens=load.context_lens,
            num_logits=logits,
            num_copied_tokens=moved(load.num_copied_tokens),
            num_swapped_tokens=moved(load.num_swapped_tokens),
            num_swap_copies=moved(load.num_swap_copies),
        )

    return (
        part(prompts, logits, has_only_prompts),
        part(decodes, load.num_logits - logits, ~has_only_prompts),
    )
