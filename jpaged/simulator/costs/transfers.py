"""Transfers: the time of copies on the device, and of swapping to the host and back.

Place on the road: features -> [transfers] -> cost models, which add it to the rest.
"""

from __future__ import annotations

import dataclasses

import jax

from jpaged.simulator.costs.chips import Chip
from jpaged.simulator.costs.features import Features
from jpaged.simulator.costs.served_models import ServedModel, kv_bytes_on_chip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Transfers:
    """Seconds that moving keys and values takes: f32[] or float, each a leaf."""

    copy_s: jax.Array | float  # a token, copied on the device
    swap_s: jax.Array | float  # a token, to the host or back
    piece_s: jax.Array | float  # a piece of what is swapped, however small

    def __call__(self, work: Features) -> jax.Array:
        """f32[], seconds; transfers wait for each other and for the step."""
        return (
            work.copied_tokens * self.copy_s
            + work.swapped_tokens * self.swap_s
            + work.swap_copies * self.piece_s
        )

    @classmethod
    def none(cls) -> Transfers:
        """Copies and swapping cost nothing: for systems that do neither."""
        return cls(0.0, 0.0, 0.0)

    @classmethod
    def of(
        cls,
        model: ServedModel,
        chip: Chip,
        num_chips: int = 1,
        *,
        copies_per_piece: int | None = None,
    ) -> Transfers:
        """By the chip's data sheet: its memory for copies, its host link for swapping.

        Args:
          model: keys and values of a token.
          chip: each of them has its own link, all move at once.
          num_chips: tensor parallelism.
          copies_per_piece: copies between host and device that a piece takes, each
            `chip.host_copy_s` beside its bytes. None: two a layer, keys and values,
            as the paper's system moves a block; 1 where a block moves in one.

        Source: paper section 7.3 and figure 19, where small blocks swap slowly.
        """
        if copies_per_piece is None:
            copies_per_piece = 2 * model.num_layers
        if copies_per_piece < 1:
            raise ValueError(
                f"copies_per_piece: expected at least 1 or None, got {copies_per_piece}"
            )
        token_bytes = kv_bytes_on_chip(model, num_chips)
        return cls(
            # Read and written, at the share that reads of weights reach.
            copy_s=2 * token_bytes / (chip.memory_bytes_per_s * chip.reach.read_share),
            swap_s=token_bytes / chip.host_bytes_per_s,
            piece_s=copies_per_piece * chip.host_copy_s,
        )
