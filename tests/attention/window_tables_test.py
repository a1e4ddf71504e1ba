"""Attention with -1 in front of a sliding window: those entries are never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.attention import invariant, paged_attention
from tests.support.attention import oracle
from tests.support.attention.oracle import make_case, relative_errors, without_front
from tests.support.cpu_kernels import needs_compiler

IMPLEMENTATIONS = [
    "reference",
    "xla",
    "invariant",
    pytest.param("cpu", marks=needs_compiler),
]
CONTEXTS, QUERIES = [0, 3, 16, 17, 70, 150, 101], [0, 1, 4, 1, 33, 1, 16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [None, QUERIES])
@pytest.mark.parametrize("window", [1, 9, 32, 40])
def test_released_blocks_are_not_read(implementation, queries, window):
    case = without_front(make_case(CONTEXTS, queries), window)
    assert (case.block_tables[5, : (150 - window) // 16] == -1).all()
    arguments = jax.tree.map(jnp.asarray, oracle.arrays(case))
    if implementation == "invariant":
        out = invariant.paged_attention(
            **{"query_start_loc": None, **arguments},
            layer=None,
            implementation="xla",
            sliding_window=window,
        )
    else:
        out = paged_attention(
            **arguments, implementation=implementation, sliding_window=window
        )
    expected, _ = oracle.attention(case, sliding_window=window)
    assert relative_errors(out, expected).max() < 1e-5
    # A window that is one token too wide reads a released block.
    wide, _ = oracle.attention(case, sliding_window=(150 - window) % 16 + window + 1)
    assert np.isnan(wide).any()
