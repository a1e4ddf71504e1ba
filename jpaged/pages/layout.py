"""Page layouts: the shapes and dtypes with which a backend stores pages and scales.

Pipeline: kv_cache, attention -> [layout] -> packed, quantised.

A new layout is a subclass of `PageLayout` and the `layout` of a backend's record.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.arithmetic import cdiv
from jpaged.pages import packed
from jpaged.pages.packed import LANES
from jpaged.pages.quantised import BITS_OF_BFLOAT16, page_dtype


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Plain pages `[..., P, D]`; subclasses store them in other ways.

    Attributes:
      bfloat16_as_bits_on_cpu: store bfloat16 as uint16 on a CPU. The XLA of jax 0.10
        widens a whole pool of bfloat16 to gather from it or to write a token into it,
        and copies nothing of a pool of bits.
    """

    bfloat16_as_bits_on_cpu: bool = False

    def page_shape(self, block_size: int, head_dim: int, dtype: Any) -> tuple[int, int]:
        """Return the last two axes of stored pages; of plain pages `(P, D)`."""
        del dtype
        return block_size, head_dim

    def scale_width(self, block_size: int) -> int:
        """Return the last axis of the stored scales of quantised pages, at least P."""
        return block_size

    def stored_dtype(self, kv_dtype: str) -> str:
        """Return the dtype of stored pages.

        Args:
          kv_dtype: "int8", "fp8", or the name of a floating dtype.
        """
        dtype = page_dtype(kv_dtype)
        is_cpu = jax.default_backend() == "cpu"
        if dtype == "bfloat16" and self.bfloat16_as_bits_on_cpu and is_cpu:
            return BITS_OF_BFLOAT16
        return dtype

    def plain_shape(self, pages: Any, head_dim: int) -> tuple[int, ...]:
        """Return the shape `[..., P, D]` of pages in this layout or plain ones."""
        return packed.plain_shape(pages, head_dim)

    def is_native(self, pages: Any) -> bool:
        """Whether the backend reads and writes these pages without copying them."""
        del pages
        return True

    def store(self, pages: jax.Array) -> jax.Array:
        """Return plain pages `[..., P, D]` in this layout."""
        return pages


class LaneLayout(PageLayout):
    """Pages whose last axis is a multiple of 128, as TPUs store arrays.

    With a narrower last axis, XLA on a TPU puts another axis last, and a kernel's view
    of the pages is a copy of the pool. bfloat16 and float32 heads of 16, 32 or 64 are
    packed into rows of 128; other heads are padded with zeros. Small heads whose blocks
    do not fill packed rows stay plain, and the "xla" backend serves them.
    """

    def page_shape(self, block_size: int, head_dim: int, dtype: Any) -> tuple[int, int]:
        """Return (R, 128) for packed pages, (P, D') for padded and (P, D) for plain."""
        tokens_per_row = packed.per_row(head_dim, dtype)
        if tokens_per_row == 1:
            return block_size, cdiv(head_dim, LANES) * LANES
        if not packed.fits(block_size, tokens_per_row):
            return block_size, head_dim
        return block_size // tokens_per_row, LANES

    def scale_width(self, block_size: int) -> int:
        """Return P rounded up to a multiple of 128."""
        return cdiv(block_size, LANES) * LANES

    def is_native(self, pages: Any) -> bool:
        """Whether the last axis fills whole rows of 128."""
        return pages.shape[-1] % LANES == 0

    def store(self, pages: jax.Array) -> jax.Array:
        """Return plain pages packed, padded or as they are."""
        *first, block_size, head_dim = pages.shape
        rows, width = self.page_shape(block_size, head_dim, pages.dtype)
        if rows < block_size:
            return pages.reshape(*first, rows, width)
        return jnp.pad(pages, [(0, 0)] * (len(first) + 1) + [(0, width - head_dim)])


PLAIN = PageLayout()
PLAIN_OR_BITS = PageLayout(bfloat16_as_bits_on_cpu=True)
LANE_ROWS = LaneLayout()
