"""Shapes: the sizes of common models, for random weights in benchmarks and tests.

Pipeline: "random:NAME" -> [models.shapes] -> ModelConfig -> decoder.

The sizes are those of the published config.json files. They are part of each family's
record in `models.families`. The tests compare the parameter counts with the published
ones.
"""

import os
from collections.abc import Mapping
from typing import Any

from jpaged.models.config import ModelConfig
from jpaged.models.families import FAMILIES
from jpaged.models.loading.sources import RANDOM

# Name -> config.json, for all families.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    name: {"model_type": family.model_type, **sizes}
    for family in FAMILIES.values()
    for name, sizes in family.sizes.items()
}


def random_config(name: str | os.PathLike[str]) -> ModelConfig:
    """ModelConfig of "random:NAME" or NAME, with dtype bfloat16.

    Raises:
      ValueError: no shape has this name.
    """
    shape = os.fspath(name).removeprefix(RANDOM).lower()
    if shape not in SHAPES:
        raise ValueError(
            f"model: expected '{RANDOM}' and one of {', '.join(SHAPES)}, got {name!r}"
        )
    return ModelConfig.from_hf({"torch_dtype": "bfloat16", **SHAPES[shape]})
