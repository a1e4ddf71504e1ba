"""Checkpoints: load and save folders in Hugging Face layout.

Pipeline: config.json, *.safetensors -> [models.loading] -> decoder.

Only safetensors are read. Pickle can run code, and so can Python files in a folder.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jpaged.models import shapes
from jpaged.models.config import DTYPES, QUANTIZATIONS, ModelConfig
from jpaged.models.decoder import Decoder, as_stored, init_model
from jpaged.models.families import FAMILIES
from jpaged.models.families.family import is_redundant
from jpaged.models.loading import placing, sources, stored, weights
from jpaged.models.loading.stored import Stored
from jpaged.models.loading.weights import Target

_STORED_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_MAX_LISTED = 8  # names in one error message


def load_config(path: str | pathlib.Path) -> ModelConfig:
    """ModelConfig of a checkpoint, with the checkpoint's dtype.

    Args:
      path: see `load_model`.

    Raises:
      FileNotFoundError: the folder does not exist or has no config.json.
      ValueError: see `ModelConfig.from_hf`; or a file is not valid JSON.
    """
    if sources.is_random(path):
        return shapes.random_config(path)
    folder = sources.find_folder(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no config.json; a checkpoint is a folder with config.json "
            "and model.safetensors (or its shards and their index)"
        )
    generation = folder / "generation_config.json"
    return ModelConfig.from_hf(
        _read_json(folder / "config.json"),
        _read_json(generation) if generation.is_file() else None,
    )


def load_model(
    path: str | pathlib.Path,
    dtype: str = "auto",
    *,
    quantization: str | None = None,
    check_finite: bool = False,
    mesh: Mesh | None = None,
) -> Decoder:
    """Load a decoder from a checkpoint.

    Tensors are read, cast and placed in pieces of a few MiB. Peak memory is the size of
    the model plus less than one large tensor.

    Args:
      path: folder with config.json and model.safetensors, or shards and an index; the
        name of a bundled model; a hub id, "org/name" or "hf://org/name"; or
        "random:NAME" for random weights in the shape NAME of `models.shapes`.
      dtype: "float32", "bfloat16", "float16", or "auto" for the dtype of the
        checkpoint, except float32 on a CPU.
      quantization: "int8" stores the weights of the products inside the layers in 8
        bits; None does not quantise.
      check_finite: raise if a weight is NaN or infinite.
      mesh: a mesh from `jpaged.make_mesh`; each device reads only its own part of each
        tensor, given by `jpaged.parallel.RULES`.

    Raises:
      FileNotFoundError: the folder, config.json, the weights or a shard do not exist,
        or the hub does not provide the model.
      ValueError: the config is not supported; a file is truncated or corrupt; tensors
        are missing, unknown or misshapen; or the model cannot be divided over the mesh.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype: expected 'auto' or one of {DTYPES}, got {dtype!r}")
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(
            f"quantization: expected None or one of {QUANTIZATIONS}, "
            f"got {quantization!r}"
        )
    config = load_config(path)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else config.dtype
    config = as_stored(config)
    config = dataclasses.replace(config, dtype=dtype, quantization=quantization)
    sharding_of = placing.placement(config, mesh)
    if sources.is_random(path):
        return init_model(config, mesh=mesh)
    folder = sources.find_folder(path)
    # The abstract model has shapes but no arrays: no random weights are computed.
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    files = [folder / name for name in _weight_files(folder)]
    where = _locate(files, weights.targets(model), config)
    weights.fill(model, where, sharding_of=sharding_of, check_finite=check_finite)
    return model


def save_model(
    model: Decoder, path: str | pathlib.Path, dtype: str | None = None
) -> None:
    """Save a decoder as config.json and model.safetensors, readable by transformers.

    Args:
      model: the decoder.
      path: folder; created if it does not exist. Existing files are replaced.
      dtype: dtype of the stored tensors; None keeps that of the parameters.

    Raises:
      ValueError: the dtype is unknown, or the model is quantised.
    """
    dtype = dtype or model.config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
    if model.config.quantization is not None:
        raise ValueError(
            "model: expected unquantised weights, got quantization="
            f"{model.config.quantization!r}; load it without quantization to save it"
        )
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(model.config, dtype=dtype)
    # Written to another name first, so that a crash leaves no partial checkpoint.
    partial = folder / "model.safetensors.partial"
    _write_safetensors(partial, weights.targets(model), dtype)
    partial.replace(folder / "model.safetensors")
    text = json.dumps(config.to_hf(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write_safetensors(file: pathlib.Path, targets: list[Target], dtype: str) -> None:
    """Write a file tensor by tensor, so that memory holds no second copy of the model.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    itemsize, end = jnp.dtype(dtype).itemsize, 0
    for target in targets:
        start, end = end, end + itemsize * math.prod(target.stored_shape)
        header[target.tensor.name] = {
            "dtype": _STORED_NAMES[dtype],
            "shape": list(target.stored_shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for target in targets:
            array = weights.stored_array(target, dtype)
            opened.write(array.view(np.uint8).data if array.ndim else array.tobytes())


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file}: expected a JSON object, got {contents!r:.40}")
    return contents


def _weight_files(folder: pathlib.Path) -> list[str]:
    """Names of the safetensors files in a folder: model.safetensors, or its shards."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not index.is_file():
        hint = ""
        for pattern, kind in (
            ("*.bin", "pickle"),
            ("*.pt*", "pickle"),
            ("*.gguf", "GGUF"),
        ):
            others = sorted(file.name for file in folder.glob(pattern))
            if others and not hint:
                hint = (
                    f"; {others[0]} is {kind}, which is not supported: convert it with "
                    "transformers, from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
                )
        raise FileNotFoundError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a 'weight_map' of tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{index}: expected plain file names, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file, but {index.name} names it"
            )
    return names


def _locate(
    files: list[pathlib.Path], targets: list[Target], config: ModelConfig
) -> dict[str, Stored]:
    """Location of each target's tensor.

    Raises:
      ValueError: tensors are missing, unknown, misshapen or of an unsupported dtype.
    """
    found = {each.name: each for file in files for each in stored.read_header(file)}
    expected = {target.tensor.name: target.stored_shape for target in targets}
    # Checkpoints of the bare model omit the prefix of the names.
    prefix = FAMILIES[config.architecture].prefix
    is_bare = not any(name.startswith(prefix) for name in found)
    where, problems = {}, []
    for stored_name, tensor in found.items():
        is_renamed = is_bare and stored_name not in expected
        name = prefix + stored_name if is_renamed else stored_name
        if name not in expected:
            if not is_redundant(name, is_tied=config.tie_word_embeddings):
                problems.append(f"unknown {stored_name}")
            continue
        where[name] = tensor
        if expected[name] != tensor.shape:
            problems.append(
                f"{stored_name}: expected shape {expected[name]}, got {tensor.shape}"
            )
        if tensor.dtype not in stored.DTYPES:
            problems.append(
                f"{stored_name}: expected one of {tuple(stored.DTYPES)}, "
                f"got {tensor.dtype}"
            )
    # Missing tensors are the most informative problem, so they are listed first.
    problems = [f"missing {name}" for name in expected if name not in where] + problems
    if problems:
        more = len(problems) - _MAX_LISTED
        listed = "; ".join(problems[:_MAX_LISTED])
        raise ValueError(
            f"the weights do not fit config.json ({config.architecture}): {listed}"
            + (f"; and {more} more" if more > 0 else "")
        )
    return where
