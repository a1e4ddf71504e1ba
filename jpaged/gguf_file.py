"""GGUF files: their metadata, and the locations of their tensors.

Pipeline: *.gguf -> [gguf_file] -> models.loading and text. Host only.

The header is parsed here. The reader of the library `gguf` keeps a NumPy view of each
element of each array: for SmolLM2's 49,152 tokens it takes 4.7 s and 160 MB, instead of
0.2 s and 12 MB. Sizes of blocks and the conversion to numbers are the library's.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import functools
import math
import mmap
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 8  # of arrays in one another
# Scalar types of metadata by number, as characters of `struct` and NumPy.
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f"},
    **{7: "?", 10: "Q", 11: "q", 12: "d"},
}
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class TensorEntry(NamedTuple):
    """One tensor of a GGUF file; its values have not been read."""

    file: pathlib.Path
    name: str
    kind: int  # number of its quantisation, `gguf.GGMLQuantizationType`
    shape: tuple[int, ...]  # the axis that is contiguous in memory is last
    start: int  # offset of its first byte in the file


class GGUFFile(NamedTuple):
    """The contents of a GGUF file, or of all parts of a split one."""

    path: pathlib.Path  # the only file, or the first part
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata, or the default if there is none.

        Raises:
          ValueError: the value is not of this type.
        """
        value = self.metadata.get(key, default)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        is_other_bool = isinstance(value, bool) and bool not in kinds
        if value is default or (isinstance(value, kinds) and not is_other_bool):
            return value
        names = " or ".join(each.__name__ for each in kinds)
        raise ValueError(f"{self.path}: {key}: expected {names}, got {value!r:.60}")

    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A value of the metadata that must be there.

        Raises:
          ValueError: there is none, or it is not of this type.
        """
        if key not in self.metadata:
            raise ValueError(
                f"{self.path}: {key}: expected a value in the metadata, got none; "
                "convert the model again with llama.cpp's convert_hf_to_gguf.py"
            )
        return self.get(key, kind)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a GGUF file: by its name, or by its first bytes."""
    path = pathlib.Path(path)
    if not path.is_file():
        return False
    if path.suffix == SUFFIX:
        return True
    with path.open("rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC


def first_parts(folder: pathlib.Path) -> list[pathlib.Path]:
    """The GGUF files of a folder: of a split file only the first part."""
    found = []
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        part = _PART.fullmatch(file.name)
        if part is None or int(part[2]) == 1:
            found.append(file)
    return found


def load(path: str | os.PathLike[str]) -> GGUFFile:
    """Read the header of a GGUF file, and of its other parts if it is split.

    Args:
      path: the file, or any part of a split one.

    Raises:
      FileNotFoundError: a part does not exist.
      ValueError: a file is not in GGUF format, is truncated or corrupt, or the parts do
        not fit together.
    """
    states = [(file, file.stat()) for file in _parts(pathlib.Path(path))]
    return _load(tuple((file, s.st_mtime_ns, s.st_size) for file, s in states))


@functools.lru_cache(maxsize=1)
def _load(parts: tuple[tuple[pathlib.Path, int, int], ...]) -> GGUFFile:
    """Read all parts; config, weights, tokenizer and chat template each call `load`.

    Args:
      parts: each file, the time of its last change, which is only a key of the cache,
        and the number of its bytes.
    """
    files = [file for file, _, _ in parts]
    first, *others = (_read_part(file, size) for file, _, size in parts)
    count = first.get("split.count", int, 1)
    if count != len(files) and (len(files) > 1 or count > 1):
        raise ValueError(
            f"{files[0]}: split.count: expected {len(files)}, as the file's name says, "
            f"got {count}; name the parts NAME-00001-of-{count:05d}.gguf and so on"
        )
    tensors = dict(first.tensors)
    for part in others:
        for name, entry in part.tensors.items():
            if name in tensors:
                raise ValueError(
                    f"{part.path}: {name}: {tensors[name].file.name} has it too"
                )
            tensors[name] = entry
    total = first.get("split.tensors.count", int, len(tensors))
    if total != len(tensors):
        raise ValueError(
            f"{files[0]}: expected {total} tensors in {len(files)} parts, got "
            f"{len(tensors)}; download the parts again"
        )
    return first._replace(tensors=tensors)


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    """All parts of a split file, or the file itself."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    prefix, _, count = part.groups()
    files = [
        path.with_name(f"{prefix}-{number:05d}-of-{count}{SUFFIX}")
        for number in range(1, int(count) + 1)
    ]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file, but {path.name} is one of {len(files)} parts; "
                "download all parts into one folder"
            )
    return files


def _read_part(path: pathlib.Path, size: int) -> GGUFFile:
    """Read the header of one file of `size` bytes."""
    if size < len(_MAGIC):
        raise ValueError(f"{path}: expected a GGUF file, got {size} bytes")
    with path.open("rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).read()


class _Header:
    """Reads a header from its first byte to its last."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0
        self._what = "the header"  # that is being read, for errors

    def read(self) -> GGUFFile:
        magic = self._bytes(len(_MAGIC))
        if magic != _MAGIC:
            advice = "download it again"
            if self._data[:8] == b"version ":
                advice = "this is a pointer of Git LFS: git lfs pull"
            raise ValueError(
                f"{self._path}: expected a GGUF file, got one that starts with "
                f"{magic!r}; {advice}"
            )
        version = self._scalar("I")
        if version not in _VERSIONS:
            is_swapped = version & 0xFFFF == 0
            raise ValueError(
                f"{self._path}: expected GGUF version 2 or 3, got "
                + ("a big-endian file" if is_swapped else f"{version}")
                + "; convert the model again with llama.cpp's convert_hf_to_gguf.py"
            )
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            self._what = "the name of a key"
            key = self._string()
            self._what = key
            if key in metadata:
                raise ValueError(f"{self._path}: {key}: expected once, got twice")
            metadata[key] = self._value(self._scalar("I"))
        entries = [self._entry() for _ in range(num_tensors)]
        return GGUFFile(self._path, metadata, self._located(entries, metadata))

    def _entry(self) -> TensorEntry:
        self._what = "the name of a tensor"
        name = self._string()
        self._what = name
        rank = self._scalar("I")
        if rank > 4:
            raise ValueError(f"{self._path}: {name}: expected 1 to 4 axes, got {rank}")
        shape = tuple(self._scalar("Q") for _ in range(rank))[::-1]
        kind, start = self._scalar("I"), self._scalar("Q")
        return TensorEntry(self._path, name, kind, shape, start)

    def _located(
        self, entries: list[TensorEntry], metadata: Mapping[str, Any]
    ) -> dict[str, TensorEntry]:
        """Entries by name, with offsets from the start of the file."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(
                f"{self._path}: general.alignment: expected an integer above 0, got "
                f"{alignment!r:.40}"
            )
        first = -(-self._at // alignment) * alignment
        found: dict[str, TensorEntry] = {}
        for entry in entries:
            entry = entry._replace(start=entry.start + first)
            if entry.name in found:
                raise ValueError(
                    f"{self._path}: {entry.name}: expected once, got twice"
                )
            end = entry.start + (num_bytes(entry) or 0)
            if end > len(self._data):
                raise ValueError(
                    f"{self._path}: {entry.name}: truncated: expected {end} bytes in "
                    f"the file, got {len(self._data)}; download it again"
                )
            found[entry.name] = entry
        return found

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            raise ValueError(
                f"{self._path}: {self._what}: expected a known type of value, got "
                f"number {kind}; download it again"
            )
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind])
            return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()
        self._check(count)  # an element has at least one byte
        return [self._value(kind, depth + 1) for _ in range(count)]

    def _string(self) -> str:
        raw = self._bytes(self._scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._path}: {self._what}: expected UTF-8, got {raw!r:.60}"
            ) from error

    def _scalar(self, kind: str) -> Any:
        size = struct.calcsize("<" + kind)
        self._check(size)
        (value,) = struct.unpack_from("<" + kind, self._data, self._at)
        self._at += size
        return value

    def _bytes(self, size: int) -> bytes:
        self._check(size)
        self._at += size
        return self._data[self._at - size : self._at]

    def _check(self, size: int) -> None:
        if self._at + size > len(self._data):
            raise ValueError(
                f"{self._path}: {self._what}: truncated: expected {size} bytes at "
                f"{self._at}, but the file has {len(self._data)}; download it again"
            )


def import_gguf() -> Any:
    """The library `gguf`.

    Raises:
      FileNotFoundError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise FileNotFoundError(
            "GGUF files need the package gguf: pip install 'jpaged[gguf]'"
        ) from error
    return gguf


@functools.cache
def block_size(kind: int) -> tuple[int, int] | None:
    """Values and bytes of one block of a quantisation; None if it is unknown."""
    gguf = import_gguf()
    try:
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return None
    return values, size


def num_bytes(entry: TensorEntry) -> int | None:
    """Bytes of a tensor; None if its quantisation is unknown."""
    block = block_size(entry.kind)
    if block is None:
        return None
    return math.prod(entry.shape) // block[0] * block[1]
