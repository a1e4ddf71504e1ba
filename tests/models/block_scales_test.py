"""Checkpoints of float8 with a scale for each block of a matrix."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from jpaged import load_model
from jpaged.models.families.fields import read_block_size
from jpaged.models.loading import placing
from tests.models.families_test import write_case
from tests.support.models import checkpoints

BLOCK = (8, 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights in 8 bits with scales, and in float32; the first by name."""
    root = tmp_path_factory.mktemp("fp8")
    narrow, wide = (
        write_case(root / name, "deepseek_v3") for name in ("narrow", "wide")
    )
    tensors = checkpoints.read_tensors(narrow)
    stored, exact = dict(tensors), dict(tensors)
    for name, array in tensors.items():
        is_kept = "embed" in name or "lm_head" in name or "mlp.gate." in name
        if array.ndim != 2 or is_kept:
            continue
        numbers, scales = quantised(array)
        stored[name], stored[f"{name}_scale_inv"] = numbers, scales
        exact[name] = dequantised(numbers, scales)
    checkpoints.write_tensors(narrow, stored)
    checkpoints.write_tensors(wide, exact)
    config = json.loads((narrow / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    (narrow / "config.json").write_text(json.dumps(config), "utf-8")
    return narrow, wide, stored


def blocks(shape: tuple[int, int]):
    """Indices of the blocks of a matrix, and their slices."""
    for i in range(-(-shape[0] // BLOCK[0])):
        for j in range(-(-shape[1] // BLOCK[1])):
            rows = slice(i * BLOCK[0], (i + 1) * BLOCK[0])
            yield (i, j), (rows, slice(j * BLOCK[1], (j + 1) * BLOCK[1]))


def quantised(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    grid = [-(-size // block) for size, block in zip(array.shape, BLOCK, strict=True)]
    numbers = np.zeros(array.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros(grid, np.float32)
    for at, part in blocks(array.shape):
        scales[at] = np.abs(array[part]).max() / 448
        numbers[part] = (array[part] / scales[at]).astype(numbers.dtype)
    return numbers, scales


def dequantised(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    wide = numbers.astype(np.float32)
    for at, part in blocks(numbers.shape):
        wide[part] *= scales[at]
    return wide


def test_weights_are_the_stored_numbers_times_the_scales_of_their_blocks(
    folders, monkeypatch
):
    monkeypatch.setattr(placing, "PIECE", 100)  # pieces begin and end inside of blocks
    narrow, wide = (load_model(folder) for folder in folders[:2])
    for mine, exact in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(mine, exact)
    assert narrow.config == wide.config


def test_scales_that_do_not_fit_are_refused(folders, tmp_path):
    narrow, _, stored = folders
    tensors = dict(stored)
    config = json.loads((narrow / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    name = "model.layers.1.self_attn.o_proj.weight"
    for changes, message in (
        ({f"{name}_scale_inv": np.ones((2, 2), np.float32)}, "scales of shape"),
        ({name: tensors[name].astype(np.float32)}, "expected a matrix of F8_E4M3"),
    ):
        checkpoints.write_tensors(tmp_path, tensors | changes)
        with pytest.raises(ValueError, match=f"o_proj.weight: .*{message}"):
            load_model(tmp_path)
    del tensors[f"{name}_scale_inv"]
    checkpoints.write_tensors(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"o_proj.weight: .* got F8_E4M3"):
        load_model(tmp_path)


@pytest.mark.parametrize("size", [None, [128], [128, 0], "128"])
def test_other_kinds_of_float8_are_refused(size):
    hf = {"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    with pytest.raises(ValueError, match="got 'fp8' with weight_block_size"):
        read_block_size(hf)
