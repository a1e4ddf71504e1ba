"""Stored tensors: locations in files, from which pieces can be read.

Pipeline: *.safetensors -> [models.loading.stored] -> weights -> parameters.
"""

import json
import pathlib
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Only with scales, see `block_scales`.
_SCALED_DTYPES = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}


class Stored(Protocol):
    """One tensor of a checkpoint; its values have not been read."""

    @property
    def file(self) -> pathlib.Path:
        """The file that stores it."""
        ...

    @property
    def name(self) -> str:
        """Its name in the file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in transformers."""
        ...

    @property
    def problem(self) -> str | None:
        """Why its values cannot be read, if they cannot."""
        ...

    def view(self, index: tuple[slice, ...]) -> np.ndarray:
        """Values at an index."""
        ...


class SafetensorsTensor(NamedTuple):
    """One tensor of a safetensors file; its values have not been read."""

    file: pathlib.Path
    name: str
    dtype: str  # name in safetensors; only `DTYPES` can be read
    shape: tuple[int, ...]
    start: int  # offset of its first byte in the file

    @property
    def problem(self) -> str | None:
        """Why its values cannot be read, if they cannot."""
        if self.dtype in DTYPES:
            return None
        return f"expected one of {tuple(DTYPES)}, got {self.dtype}"

    def view(self, index: tuple[slice, ...]) -> np.ndarray:
        """Values at an index, read from the file when they are used.

        Each call maps the file again: pages that were read count as memory of the
        process for as long as they are mapped.
        """
        dtype = (DTYPES | _SCALED_DTYPES)[self.dtype]
        mapped = np.memmap(self.file, dtype, "r", self.start, self.shape)
        return np.asarray(mapped)[index]


def read_header(file: pathlib.Path) -> list[SafetensorsTensor]:
    """All tensors of a safetensors file.

    Raises:
      ValueError: the file is truncated or corrupt.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    try:
        # The library checks the header and that the tensors fill the file exactly.
        with safetensors.safe_open(file, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file}: truncated or corrupt safetensors ({error}); download it again"
        ) from error
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return [
        SafetensorsTensor(
            file,
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + size + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]
