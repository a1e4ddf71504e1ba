"""Stored tensors: where the numbers of a safetensors file lie, read piece by piece.

Place on the road: *.safetensors -> [models.stored] -> weights -> parameters.
"""

import json
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Stored(NamedTuple):
    """One tensor of a safetensors file, none of it read yet."""

    file: pathlib.Path
    name: str
    dtype: str  # as safetensors calls it; only `DTYPES` can be read
    shape: tuple[int, ...]
    start: int  # of its first byte in the file

    def view(self, index: tuple[slice, ...]) -> np.ndarray:
        """Its numbers at an index, read from the file as they are used.

        Mapped anew at each call: pages that were read count as memory of the process
        for as long as they are mapped.
        """
        mapped = np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape)
        return np.asarray(mapped)[index]


def tensors(file: pathlib.Path) -> list[Stored]:
    """The tensors of a safetensors file.

    Raises:
      ValueError: truncated or corrupt.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    try:
        # The library checks the header, and that its tensors fill the file exactly.
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
        Stored(
            file,
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + size + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]
