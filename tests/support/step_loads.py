"""Loads of steps for tests of cost models, and paths of shared measurements."""

import pathlib

import jax.numpy as jnp
import pytest

from jpaged.simulator.costs.load import StepLoad
from tests.support.paths import ROOT


def step_load(
    *rows: tuple[int, int],
    num_logits: int | None = None,
    copied: int = 0,
    swapped: int = 0,
    pieces: int = 0,
    size: int = 8,
) -> StepLoad:
    """Return the load of rows (computed tokens, context), padded to `size` rows.

    By default, every row has logits.
    """
    padded = [*rows, *[(0, 0)] * (size - len(rows))]
    query_lens, context_lens = (
        jnp.array(column, jnp.int32) for column in zip(*padded, strict=True)
    )
    return StepLoad(
        query_lens,
        context_lens,
        jnp.int32(len(rows) if num_logits is None else num_logits),
        jnp.int32(copied),
        jnp.int32(swapped),
        jnp.int32(pieces),
    )


def shared_data() -> pathlib.Path:
    """Return the folder of shared data beside the checkout; it may not exist."""
    folders = [folder / "shared" / "data" for folder in ROOT.parents]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def shared_profile(name: str) -> pathlib.Path:
    """Return the path of a measured profile; skip the test if it does not exist."""
    path = shared_data() / "profiles" / name
    if path.is_file():
        return path
    return pytest.skip(f"the measured profile {name} does not exist")
