"""Files: the tensors of a checkpoint's folder, by name.

Pipeline: *.safetensors, index -> [models.loading.files] -> weights -> parameters.

Each stored tensor is loaded, is known to repeat config.json, or is refused by name.
"""

import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from jpaged.models.config import ModelConfig
from jpaged.models.families import FAMILIES
from jpaged.models.loading import placing, stored
from jpaged.models.loading.stored import SafetensorsTensor, Stored
from jpaged.models.loading.weights import Target

Found = Mapping[str, Stored]  # by the name in the files
_INDEX = "model.safetensors.index.json"
_OUTPUT = "lm_head.weight"
_MAX_LISTED = 8  # names in one error message


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file does not contain one.
    """
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file}: expected a JSON object, got {contents!r:.40}")
    return contents


def read_headers(folder: pathlib.Path) -> dict[str, SafetensorsTensor]:
    """All tensors in model.safetensors, or in the shards that its index names.

    Raises:
      FileNotFoundError: there are no such files.
      ValueError: a file is corrupt, or the index and the shards contradict each other.
    """
    if (folder / "model.safetensors").is_file():
        tensors = stored.read_header(folder / "model.safetensors")
        return {each.name: each for each in tensors}
    index = folder / _INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder}: no model.safetensors and no {_INDEX}{_other_weights(folder)}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a 'weight_map' of tensors to files")
    found: dict[str, SafetensorsTensor] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{index}: expected plain file names, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file, but {index.name} names it"
            )
        for tensor in stored.read_header(folder / name):
            if weight_map.get(tensor.name) == name:
                found[tensor.name] = tensor  # also where another shard has it too
            elif tensor.name not in weight_map:
                other = found.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise ValueError(
                        f"{index}: expected the file of {tensor.name}, got none, but "
                        f"{other.file.name} and {name} both store it"
                    )
    absent = [name for name in weight_map if name not in found]
    absent = [name for name in absent if not _is_ignored(name) and name != _OUTPUT]
    if absent:
        raise ValueError(
            f"{index}: expected {absent[0]} in {weight_map[absent[0]]}, got a file "
            f"without it ({len(absent)} such tensors); download the checkpoint again"
        )
    return found


def _is_ignored(name: str) -> bool:
    return any(name.endswith(family.ignored) for family in FAMILIES.values())


def _other_weights(folder: pathlib.Path) -> str:
    """What to do with the weights of another format that a folder has."""
    for pattern, kind in (
        ("adapter_model.*", "an adapter (LoRA)"),
        ("*.safetensors", "safetensors under another name"),
        ("*.bin", "pickle"),
        ("*.pt*", "pickle"),
    ):
        others = sorted(file.name for file in folder.glob(pattern))
        if others:
            return (
                f"; {others[0]} is {kind}, which is not supported: convert it with "
                "transformers, from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
    return ""


def _by_full_name(found: Found, config: ModelConfig) -> dict[str, Stored]:
    """Tensors by their names in the whole model.

    Checkpoints of the bare model omit the prefix of the names.
    """
    prefix = FAMILIES[config.architecture].prefix
    if any(name.startswith(prefix) for name in found):
        return dict(found)
    return {
        name if name == _OUTPUT else prefix + name: each for name, each in found.items()
    }


def has_equal_output(found: Found, config: ModelConfig) -> bool:
    """Whether the output weights are those of the embedding, or only one is stored."""
    tensors = _by_full_name(found, config)
    embedding = tensors.get(FAMILIES[config.architecture].embedding)
    output = tensors.get(_OUTPUT)
    if embedding is None or output is None:
        return True
    if embedding.shape != output.shape or embedding.problem or output.problem:
        return False
    width = max(1, embedding.shape[-1])
    step = max(1, placing.PIECE // width)
    for start in range(0, embedding.shape[0], step):
        index = (slice(start, start + step),)
        ours, theirs = embedding.view(index), output.view(index)
        if not np.array_equal(ours.astype(np.float32), theirs.astype(np.float32)):
            return False
    return True


def _extra_layers(names: Collection[str], config: ModelConfig) -> tuple[str, ...]:
    """Prefixes of the layers after the model's last that predict further tokens.

    They are those with a projection of a hidden state and an embedding.
    """
    family, mark = FAMILIES[config.architecture], ".eh_proj.weight"
    if not family.has_extra_layers:
        return ()
    layers = tuple(f"{family.layer_prefix}{i}." for i in range(config.num_layers))
    found = (name.removesuffix(mark) + "." for name in names if name.endswith(mark))
    return tuple(prefix for prefix in found if prefix not in layers)


def locate(
    found: Found,
    targets: list[Target],
    config: ModelConfig,
    *,
    where_config: str,
    name_in_file: Callable[[str], str],
) -> dict[str, Stored]:
    """Location of each target's tensor.

    Args:
      found: the tensors of the checkpoint.
      targets: the tensors that the decoder needs.
      config: of the decoder.
      where_config: where the config was read, for errors.
      name_in_file: name in transformers -> name in the file, for errors.

    Raises:
      ValueError: tensors are missing, unknown, misshapen or of an unsupported dtype.
    """
    family = FAMILIES[config.architecture]
    expected = {target.tensor.name: target.stored_shape for target in targets}
    tensors = _by_full_name(found, config)
    if config.tie_word_embeddings and _OUTPUT in tensors:
        # Equal to the embedding, or stored in its place.
        tensors.setdefault(family.embedding, tensors.pop(_OUTPUT))
    where, problems = {}, []
    extra = _extra_layers(tensors, config)
    for name, tensor in tensors.items():
        if name not in expected:
            is_extra = name.startswith(extra)
            if not name.endswith(family.ignored) and not is_extra:
                problems.append(f"unknown {tensor.name}")
            continue
        where[name] = tensor
        if expected[name] != tensor.shape:
            problems.append(
                f"{tensor.name}: expected shape {expected[name]}, got {tensor.shape}"
            )
        if tensor.problem is not None:
            problems.append(f"{tensor.name}: {tensor.problem}")
    # Missing tensors are the most informative problem, so they are listed first.
    missing = [name_in_file(name) for name in expected if name not in where]
    problems = [f"missing {name}" for name in missing] + problems
    if problems:
        more = len(problems) - _MAX_LISTED
        listed = "; ".join(problems[:_MAX_LISTED])
        raise ValueError(
            f"the weights do not fit {where_config} ({config.architecture}): {listed}"
            + (f"; and {more} more" if more > 0 else "")
        )
    return where
