"""Checkpoints: load folders in Hugging Face layout and GGUF files, and save folders.

Pipeline: config.json, *.safetensors, *.gguf -> [models.loading] -> decoder.

Only safetensors and GGUF are read. Pickle can run code, and so can Python files in a
folder.
"""

import dataclasses
import json
import math
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jpaged import gguf_file
from jpaged.models import shapes
from jpaged.models.config import DTYPES, QUANTIZATIONS, ModelConfig
from jpaged.models.decoder import Decoder, as_stored, init_model
from jpaged.models.families.fields import read_block_size
from jpaged.models.loading import files, gguf_tensors, placing, sources, weights
from jpaged.models.loading.block_scales import with_scales
from jpaged.models.loading.weights import Target

_STORED_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def load_config(path: str | pathlib.Path) -> ModelConfig:
    """ModelConfig of a checkpoint, with the checkpoint's dtype.

    Args:
      path: see `load_model`.

    Raises:
      FileNotFoundError: the folder does not exist or has no config.json, or a GGUF
        file needs the package gguf, which is not installed.
      ValueError: see `ModelConfig.from_hf`; or a file is not valid.
    """
    if sources.is_random(path):
        return shapes.random_config(path)
    folder = sources.find_checkpoint(path)
    if folder.is_file():
        return ModelConfig.from_hf(gguf_tensors.read_config(gguf_file.load(folder)))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no config.json; a checkpoint is a folder with config.json "
            "and model.safetensors (or its shards and their index), or a GGUF file"
        )
    generation = folder / "generation_config.json"
    return ModelConfig.from_hf(
        files.read_json(folder / "config.json"),
        files.read_json(generation) if generation.is_file() else None,
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
      path: folder with config.json and model.safetensors, or shards and an index; a
        GGUF file, or a folder that contains only one; the name of a bundled or packaged
        model; a hub id, "org/name" or "hf://org/name"; or "random:NAME" for random
        weights in the shape NAME of `models.shapes`.
      dtype: "float32", "bfloat16", "float16", or "auto" for the dtype of the
        checkpoint, except float32 on a CPU.
      quantization: "int8" stores the weights of the products inside the layers, and of
        the output and an embedding tied to it, in 8 bits; None does not quantise.
      check_finite: raise if a weight is NaN or infinite.
      mesh: a mesh from `jpaged.make_mesh`; each device reads only its own part of each
        tensor, given by `jpaged.parallel.RULES`.

    Raises:
      FileNotFoundError: the folder, config.json, the weights or a shard do not exist,
        the hub does not provide the model, or a GGUF file needs the package gguf, which
        is not installed.
      ValueError: the config is not supported; a file is truncated or corrupt; tensors
        are missing, unknown, misshapen or stored twice; or the model cannot be divided
        over the mesh.
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
    folder = sources.find_checkpoint(path)
    if folder.is_file():
        file = gguf_file.load(folder)
        names = gguf_tensors.read_names(file, config)
        found = gguf_tensors.read_tensors(file, names)
        where_config, name_in_file = f"the metadata of {folder}", names.in_file
    else:
        size = read_block_size(files.read_json(folder / "config.json"))
        found = with_scales(files.read_headers(folder), size)
        where_config, name_in_file = "config.json", str
        config = _as_tied(config, found)
    # The abstract model has shapes but no arrays: no random weights are computed.
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    where = files.locate(
        found,
        weights.targets(model),
        config,
        where_config=where_config,
        name_in_file=name_in_file,
    )
    weights.fill(model, where, sharding_of=sharding_of, check_finite=check_finite)
    return model


def _as_tied(config: ModelConfig, found: files.Found) -> ModelConfig:
    """The config, untied if the checkpoint stores other output weights.

    config.json may claim tied embeddings although training has changed both. The stored
    weights decide, as in transformers 5.
    """
    if not config.tie_word_embeddings or files.has_equal_output(found, config):
        return config
    warnings.warn(
        "tie_word_embeddings: config.json has true, but lm_head.weight differs from "
        "the embedding; both are loaded and the model is not tied. Set it to false in "
        "config.json",
        stacklevel=3,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


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
    dtypes = [
        (each, _stored_dtype(each, model, dtype)) for each in weights.targets(model)
    ]
    _write_safetensors(partial, dtypes)
    partial.replace(folder / "model.safetensors")
    text = json.dumps(config.to_hf(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _stored_dtype(target: Target, model: Decoder, dtype: str) -> str:
    """Dtype of a stored tensor: wider parameters (of some routers) stay float32."""
    is_wide = {param.dtype for param in target.params} == {jnp.dtype("float32")}
    return "float32" if is_wide and model.config.dtype != "float32" else dtype


def _write_safetensors(file: pathlib.Path, targets: list[tuple[Target, str]]) -> None:
    """Write a file tensor by tensor, so that memory holds no second copy of the model.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for target, dtype in targets:
        size = jnp.dtype(dtype).itemsize * math.prod(target.stored_shape)
        start, end = end, end + size
        header[target.tensor.name] = {
            "dtype": _STORED_NAMES[dtype],
            "shape": list(target.stored_shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for target, dtype in targets:
            array = weights.stored_array(target, dtype)
            opened.write(array.view(np.uint8).data if array.ndim else array.tobytes())
