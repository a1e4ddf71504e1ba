"""What stands for an argument of attention that is None, as kernels take it.

Place on the road: pallas, triton -> [defaults].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# A window that no context reaches; half of what i32 holds, so that sums stay inside.
EVERYTHING = 2**30


def window(sliding_window: jax.Array | int | None) -> jax.Array:
    """Tokens that a query sees, i32[], at most EVERYTHING."""
    tokens = EVERYTHING if sliding_window is None else sliding_window
    return jnp.minimum(jnp.asarray(tokens, jnp.int32), EVERYTHING)


def starts(query_start_loc: jax.Array | None, num_rows: int) -> jax.Array:
    """The first query of each row and the number of all, i32[S + 1]."""
    if query_start_loc is None:  # one query to a row
        return jnp.arange(num_rows + 1, dtype=jnp.int32)
    return query_start_loc.astype(jnp.int32)


def layer(number: jax.Array | int | None) -> jax.Array:
    """Of a stacked pool, i32[]."""
    return jnp.asarray(0 if number is None else number, jnp.int32)
