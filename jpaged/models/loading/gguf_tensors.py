"""GGUF tensors: stored quantised, read piece by piece in the layout of transformers.

Pipeline: *.gguf -> [models.loading.gguf_tensors] -> weights -> parameters.
"""

import functools
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jpaged.gguf_file import GGUFFile, TensorEntry, block_size, import_gguf
from jpaged.models.config import ModelConfig
from jpaged.models.families import FAMILIES, gguf_config, gguf_names
from jpaged.models.families.gguf_names import Change, Names
from jpaged.models.loading.stored import Stored


class GGUFTensor(NamedTuple):
    """One tensor of a GGUF file as a checkpoint of transformers would store it.

    See `stored.Stored`.
    """

    entry: TensorEntry
    change: Change  # what llama.cpp did to it

    @property
    def file(self) -> pathlib.Path:
        """The file that stores it."""
        return self.entry.file

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in transformers."""
        shape = self.entry.shape
        if self.change.expert is not None:
            shape = shape[1:]
        return shape[::-1] if self.change.transposed else shape

    @property
    def problem(self) -> str | None:
        """Why it cannot be read, if it cannot."""
        return _problem(self.entry.kind)

    def view(self, index: tuple[slice, ...]) -> np.ndarray:
        """Values f32 at an index; only the blocks that contain them are converted."""
        index = index + (slice(None),) * (len(self.shape) - len(index))
        index = index[::-1] if self.change.transposed else index
        shape = self.shape[::-1] if self.change.transposed else self.shape
        *outer, last = (
            range(size)[part] for size, part in zip(shape, index, strict=True)
        )
        if outer:
            rows = self._stored_rows(outer[0])
            values = self._dequantized(rows, last, shape[-1])
        else:  # a bias or a norm
            whole = self._dequantized(range(1), range(shape[0]), shape[0])[0]
            values = whole[np.asarray(self._stored_rows(last))]
        values = values + np.float32(self.change.offset)
        return values.T if self.change.transposed else values

    def _stored_rows(self, rows: range) -> range | np.ndarray:
        """Rows of the file that hold these rows of transformers' tensor.

        llama.cpp rotates neighbouring pairs of dimensions, transformers each half of a
        head with the other: within a head of D rows, row s * D/2 + j of transformers is
        row 2 * j + s of the file.
        """
        size = self.change.pairs_of
        if not size:
            return rows
        head, row = np.divmod(np.asarray(rows), size)
        half, pair = np.divmod(row, size // 2)
        return head * size + 2 * pair + half

    def _dequantized(
        self, rows: range | np.ndarray, columns: range, width: int
    ) -> np.ndarray:
        """Values f32[rows, columns] of rows with `width` values."""
        gguf = import_gguf()
        block = block_size(self.entry.kind)
        assert block is not None
        values, size = block
        row_bytes = width // values * size
        start, expert = self.entry.start, self.change.expert
        num_rows = math.prod(self.entry.shape[:-1])
        if expert is not None:
            num_rows //= self.entry.shape[0]
            start += expert * num_rows * row_bytes
        # Mapped again for each piece, as in `stored.SafetensorsTensor.view`.
        mapped = np.memmap(self.entry.file, np.uint8, "r", start, (num_rows, row_bytes))
        first, stop = columns.start // values, -(-columns.stop // values)
        wanted = (
            slice(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows
        )
        packed = mapped[wanted, first * size : stop * size]
        kind = gguf.GGMLQuantizationType(self.entry.kind)
        plain = gguf.dequantize(np.ascontiguousarray(packed), kind)
        before = first * values
        part = plain[:, columns.start - before : columns.stop - before : columns.step]
        return np.asarray(part, np.float32)


class GGUFHeads(NamedTuple):
    """A matrix whose keys and values of each head a file stores as two tensors.

    See `stored.Stored`.
    """

    keys: TensorEntry  # [heads, in, rows of a key]
    values: TensorEntry  # [heads, rows of a value, in]

    @property
    def file(self) -> pathlib.Path:
        """The file that stores it."""
        return self.keys.file

    @property
    def name(self) -> str:
        """Its names in the file."""
        return f"{self.keys.name}, {self.values.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in transformers: keys and values, head after head."""
        heads, size, rows = self.keys.shape
        return heads * (rows + self.values.shape[1]), size

    @property
    def problem(self) -> str | None:
        """Why it cannot be read, if it cannot."""
        ranks = len(self.keys.shape), len(self.values.shape)
        heads, size, _ = self.keys.shape if ranks[0] == 3 else (0, 0, 0)
        if ranks != (3, 3) or (heads, size) != self.values.shape[::2]:
            return (
                "expected [heads, in, key] and [heads, value, in], got "
                f"{self.keys.shape} and {self.values.shape}"
            )
        return _problem(self.keys.kind) or _problem(self.values.kind)

    def view(self, index: tuple[slice, ...]) -> np.ndarray:
        """Values f32 at an index, whose rows are those of whole heads."""
        rows, columns = index
        size = self.shape[0] // self.keys.shape[0]
        assert rows.start % size == rows.stop % size == 0, rows
        parts = []
        for head in range(rows.start // size, rows.stop // size):
            for entry, transposed in ((self.keys, True), (self.values, False)):
                change = Change(transposed=transposed, expert=head)
                parts.append(GGUFTensor(entry, change).view((slice(None), columns)))
        return np.concatenate(parts)


@functools.cache
def _problem(kind: int) -> str | None:
    """Why tensors of a quantisation cannot be read: one block of zeros is converted."""
    gguf = import_gguf()
    block, name = block_size(kind), f"quantisation number {kind}"
    if block is not None:
        known = gguf.GGMLQuantizationType(kind)
        try:
            gguf.dequantize(np.zeros((1, block[1]), np.uint8), known)
            return None
        except NotImplementedError:
            name = known.name
    return (
        f"expected a quantisation that the package gguf can convert, got {name}; "
        "pip install -U gguf, or quantise the model again, for example to Q8_0"
    )


def read_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json that the metadata of a file stands for.

    Raises:
      ValueError: see `families.gguf_config.read_config`.
    """

    def factors(name: str) -> list[float]:
        tensor = GGUFTensor(file.tensors[name], Change())
        if tensor.problem is not None:
            raise ValueError(f"{tensor.file}: {name}: {tensor.problem}")
        return tensor.view((slice(None),)).tolist()

    return gguf_config.read_config(file, factors) | {"torch_dtype": _dtype(file)}


def _dtype(file: GGUFFile) -> str:
    """Dtype of the weights if they are not quantised, otherwise bfloat16."""
    kinds = {entry.kind for entry in file.tensors.values() if len(entry.shape) > 1}
    gguf = import_gguf()
    for kind, name in (("F32", "float32"), ("F16", "float16")):
        plain = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType[kind]}
        if kinds <= plain:
            return name
    return "bfloat16"


def read_names(file: GGUFFile, config: ModelConfig) -> Names:
    """The names of the tensors of a file."""
    architecture = gguf_config.architecture_of(file)
    return Names(
        FAMILIES[config.architecture],
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        pairs_of=config.head_dim if architecture.has_pairs else 0,
        norm_offset=architecture.norm_offset,
    )


def read_tensors(file: GGUFFile, names: Names) -> dict[str, Stored]:
    """The tensors of a file by their names in transformers."""
    found: dict[str, Stored] = {
        theirs: GGUFTensor(entry, change)
        for name, entry in file.tensors.items()
        if name not in gguf_names.OF_CONFIG
        for theirs, change in names.translate(name, len(entry.shape))
    }
    for name in file.tensors:
        other = name.removesuffix(gguf_names.KEYS) + gguf_names.VALUES
        if name.endswith("." + gguf_names.KEYS) and other in file.tensors:
            both = name.removesuffix(gguf_names.KEYS) + gguf_names.KEYS_AND_VALUES
            ((theirs, _),) = names.translate(both, 2)
            found[theirs] = GGUFHeads(file.tensors[name], file.tensors[other])
            del found[name], found[other]
    return found
