"""Loads of steps for tests of cost models, and where shared measurements lie."""

import jax.numpy as jnp
import pytest

from jpaged.simulator.costs.load import StepLoad
from tests.support.paths import ROOT


def step_load(*rows, num_logits=None, copied=0, swapped=0, pieces=0, size=8):
    """A load of rows (tokens computed, tokens attended to); each decides by default."""
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


def shared_profile(name):
    """The path of a measured profile; skips where it is not there."""
    for folder in ROOT.parents:
        path = folder / "shared" / "data" / "profiles" / name
        if path.is_file():
            return path
    return pytest.skip(f"the measured profile {name} is not there")
