"""Block scales: weights stored as float8 with a scale for each block of a matrix.

Pipeline: *.safetensors -> [models.loading.block_scales] -> weights -> parameters.

A weight is the stored number times the scale of its block. It is dequantised piece by
piece while it is read, as DeepSeek-V3 and Qwen3 are published ("quant_method": "fp8").
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.models.loading.stored import SafetensorsTensor, Stored

_SCALE = "_scale_inv"  # at the end of the name of a weight's scales


class ScaledTensor(NamedTuple):
    """A matrix of float8 and its scales."""

    weight: SafetensorsTensor
    scale: SafetensorsTensor
    block: tuple[int, int]  # rows and columns that share a scale

    @property
    def file(self) -> pathlib.Path:
        """The file that stores the numbers."""
        return self.weight.file

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in transformers."""
        return self.weight.shape

    @property
    def problem(self) -> str | None:
        """Why its values cannot be read, if they cannot."""
        if self.weight.dtype != "F8_E4M3" or len(self.shape) != 2:
            return f"expected a matrix of F8_E4M3 beside {self.scale.name}, got " + (
                f"{self.weight.dtype}{list(self.shape)}"
            )
        rows, columns = self.shape
        expected = cdiv(rows, self.block[0]), cdiv(columns, self.block[1])
        if self.scale.shape != expected:
            return f"expected scales of shape {expected}, got {self.scale.shape}"
        return self.scale.problem

    def view(self, index: tuple[slice, ...]) -> np.ndarray:
        """Values at an index, f32, read and multiplied now."""
        rows, columns = (
            np.arange(size)[part] // block
            for size, part, block in zip(
                self.shape,
                (*index, slice(None))[:2],
                self.block,
                strict=True,
            )
        )
        scales = self.scale.view((slice(None), slice(None))).astype(np.float32)
        values = self.weight.view(index).astype(np.float32)
        return values * scales[rows[:, None], columns[None, :]]


def with_scales(
    found: Mapping[str, SafetensorsTensor], block: tuple[int, int] | None
) -> dict[str, Stored]:
    """The tensors of a checkpoint, with those of 8 bits joined to their scales."""
    tensors: dict[str, Stored] = dict(found)
    if block is None:
        return tensors
    for name, scale in found.items():
        weight = name.removesuffix(_SCALE)
        if name.endswith(_SCALE) and weight in found:
            tensors[weight] = ScaledTensor(found[weight], scale, block)
            del tensors[name]
    return tensors
