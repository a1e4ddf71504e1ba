"""Transfers: the time of copies on the device, and of swapping to the host and back.

Pipeline: features -> [transfers] -> cost models, which add it to their seconds.
"""

from __future__ import annotations

import dataclasses

import jax

from jpaged.simulator.costs.chips import Chip
from jpaged.simulator.costs.features import Features
from jpaged.simulator.costs.load import Number
from jpaged.simulator.costs.served_models import ServedModel, kv_bytes_on_chip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Transfers:
    """Seconds to move keys and values; each field is a leaf."""

    copy_s: Number  # per token copied on the device
    swap_s: Number  # per token moved to the host or back
    piece_s: Number  # per swapped piece, of any size

    def __call__(self, work: Features) -> jax.Array:
        """Return f32[], seconds; transfers overlap with nothing else."""
        return (
            work.copied_tokens * self.copy_s
            + work.swapped_tokens * self.swap_s
            + work.swap_copies * self.piece_s
        )

    @classmethod
    def none(cls) -> Transfers:
        """Return transfers without time, for systems that neither copy nor swap."""
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
        """Compute seconds from the bandwidths of the chip's memory and host link.

        Args:
          model: for the size of a token's keys and values.
          chip: each chip has its own host link, and all move data at the same time.
          num_chips: tensor parallelism.
          copies_per_piece: copies between host and device per piece, each of which
            takes `chip.host_copy_s` in addition to the time of its bytes. None: two per
            layer, for keys and values, as in the paper's system. 1: a block moves in
            one copy.

        Raises:
          ValueError: copies_per_piece is below 1.

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
            # A copy reads and writes, at the efficiency of reading weights.
            copy_s=2
            * token_bytes
            / (chip.memory_bytes_per_s * chip.efficiency.read_share),
            swap_s=token_bytes / chip.host_bytes_per_s,
            piece_s=copies_per_piece * chip.host_copy_s,
        )
