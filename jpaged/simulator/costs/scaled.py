"""Scaled: any cost model, so many times as slow.

Place on the road: cost model -> [scaled] -> cost model.
"""

from __future__ import annotations

import dataclasses

import jax

from jpaged.simulator.costs.load import CostModel, Load


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """`factor` times what another model says; the factor is a leaf."""

    model: CostModel
    factor: jax.Array | float

    def __call__(self, load: Load) -> jax.Array:
        """f32[], seconds."""
        return self.model(load) * self.factor


def scale(model: CostModel, factor: float) -> Scaled:
    """The cost model with all its times multiplied.

    Raises:
      ValueError: factor is not above 0.
    """
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor: expected more than 0, got {factor}")
    return Scaled(model, float(factor))
