"""Checkpoints: Hugging Face folders in and out, tensor by tensor.

Place on the road: config.json, *.safetensors -> [models.checkpoint] -> decoder.

Only safetensors are read: pickle runs code, and so does remote code in a folder.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from jpaged.models import families
from jpaged.models.config import DTYPES, ModelConfig
from jpaged.models.decoder import Decoder

_STORED_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_LISTED = 8  # names in one error message


def load_config(path: str | pathlib.Path) -> ModelConfig:
    """ModelConfig of a Hugging Face folder, dtype as the checkpoint's.

    Raises:
      FileNotFoundError: no such folder, or no config.json in it.
      ValueError: see `ModelConfig.from_hf`; also where a file is not JSON.
    """
    folder = _folder(path)
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


def load_model(path: str | pathlib.Path, dtype: str = "auto") -> Decoder:
    """Decoder with the weights of a Hugging Face folder.

    Tensors are read and cast one by one, so that memory peaks at the model's size
    plus one tensor.

    Args:
      path: folder with config.json and model.safetensors, or shards and an index.
      dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own, but
        float32 on CPU.

    Raises:
      FileNotFoundError: folder, config.json, weights or a shard not there.
      ValueError: config not supported; file truncated or corrupt; tensors missing,
        unknown, or of another shape than the config says.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype: expected 'auto' or one of {DTYPES}, got {dtype!r}")
    config = load_config(path)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else config.dtype
    config = dataclasses.replace(config, dtype=dtype)
    folder = _folder(path)
    # The abstract model has shapes and no arrays: random weights are never drawn.
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    params = {name: (param, t) for name, param, t in _params(model)}
    files = [folder / name for name in _weight_files(folder)]
    where = _locate(files, params, config)
    for name, (param, transposed) in params.items():
        file, stored = where[name]
        # Opened for each tensor: pages of a file that stays mapped count as memory.
        with _open(file) as opened:
            array = opened.get_tensor(stored)
        array = array.T if transposed else array
        # A copy, always: on CPU a JAX array may otherwise borrow numpy's memory.
        param.set_value(jnp.array(array.astype(jnp.dtype(dtype), copy=False)))
    return model


def save_model(
    model: Decoder, path: str | pathlib.Path, dtype: str | None = None
) -> None:
    """Writes config.json and model.safetensors, as transformers reads them.

    Args:
      model: the decoder.
      path: folder; made where it is not there, files of the same name replaced.
      dtype: what to store; None keeps the parameters' own.
    """
    dtype = dtype or model.config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}")
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, param, transposed in _params(model):
        array = np.asarray(param[...].astype(dtype))
        arrays[name] = np.ascontiguousarray(array.T if transposed else array)
    config = dataclasses.replace(model.config, dtype=dtype)
    # Renamed into place, so that a crash leaves no half a checkpoint behind.
    partial = folder / "model.safetensors.partial"
    safetensors.numpy.save_file(arrays, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes it readable by its owner alone
    partial.replace(folder / "model.safetensors")
    text = json.dumps(config.to_hf(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _params(model: Decoder) -> list[tuple[str, nnx.Param, bool]]:
    """(name in a checkpoint, parameter, stored transposed), for all parameters."""
    found = []
    tensors = families.tensors(
        model.config.architecture,
        num_layers=model.config.num_layers,
        is_tied=model.config.tie_word_embeddings,
    )
    for path, tensor in tensors:
        node: Any = model
        for step in path:
            node = node[step] if isinstance(step, int) else getattr(node, step, None)
        if node is not None:
            found.append((tensor.name, node, tensor.transposed))
    assert len(found) == len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    return found


def _folder(path: str | pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder. A model is a folder in Hugging Face layout; "
            "a hub id has to be downloaded first: hf download ID --local-dir FOLDER"
        )
    return folder


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file}: expected a JSON object, got {contents!r:.40}")
    return contents


def _weight_files(folder: pathlib.Path) -> list[str]:
    """Names of the safetensors files in a folder, the index's where there is one."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not index.is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = (
            f"; {pickled[0]} is pickle, which is never read: convert it with "
            "transformers, from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            if pickled
            else ""
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
                f"{folder / name}: named in {index.name}, not there"
            )
    return names


def _open(file: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file}: truncated or corrupt safetensors ({error}); download it again"
        ) from error


def _locate(
    files: list[pathlib.Path],
    params: Mapping[str, tuple[nnx.Param, bool]],
    config: ModelConfig,
) -> dict[str, tuple[pathlib.Path, str]]:
    """File and stored name of every parameter, once all names and shapes agree."""
    stored = {}  # name -> (file, shape, dtype)
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():
                tensor = opened.get_slice(name)
                shape = tuple(tensor.get_shape())
                stored[name] = (file, shape, tensor.get_dtype())
    # Checkpoints of the bare model lack the first part of the names.
    is_bare = not any(name.startswith("model.") for name in stored)
    where, problems = {}, []
    for stored_name, (file, got, stored_dtype) in stored.items():
        is_renamed = is_bare and stored_name not in params
        name = f"model.{stored_name}" if is_renamed else stored_name
        if name not in params:
            if not families.is_harmless(name, is_tied=config.tie_word_embeddings):
                problems.append(f"unknown {stored_name}")
            continue
        where[name] = (file, stored_name)
        param, transposed = params[name]
        wanted = tuple(param.shape)[::-1] if transposed else tuple(param.shape)
        if wanted != got:
            problems.append(f"{stored_name}: expected shape {wanted}, got {got}")
        if stored_dtype not in _STORED_DTYPES:
            problems.append(
                f"{stored_name}: expected one of {_STORED_DTYPES}, got {stored_dtype}"
            )
    # What is missing says more than what is unknown, so it comes first.
    problems = [f"missing {name}" for name in params if name not in where] + problems
    if problems:
        more = len(problems) - _MAX_LISTED
        listed = "; ".join(problems[:_MAX_LISTED])
        raise ValueError(
            f"the weights do not fit config.json ({config.architecture}): {listed}"
            + (f"; and {more} more" if more > 0 else "")
        )
    return where
