"""Buckets: a cost model of an engine that computes padded shapes, and its fit.

Place on the road: loads and seconds -> [buckets] -> cost model and what it leaves over.

A compiled step has one of a few sizes, by rows where all decode and by tokens where
prompts are in it (`EngineConfig.row_buckets`, `token_buckets`), and its time is nearly
that of the size: a staircase, which no coefficient for a row or a token describes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from jpaged.config import EngineConfig
from jpaged.simulator.costs.fit import FitReport, report
from jpaged.simulator.costs.load import Load


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bucketed:
    """Seconds by the size that a step is padded to, and by what its rows attend to."""

    row_sizes: jax.Array  # i32[B], rising: rows of steps that decode only
    token_sizes: jax.Array  # i32[C], rising: tokens of steps with prompts
    row_seconds: jax.Array  # f32[B]
    token_seconds: jax.Array  # f32[C]
    context_seconds: jax.Array  # f32[], for a token that a row attends to

    def __call__(self, load: Load) -> jax.Array:
        """f32[], seconds; 0 for a step that computes nothing."""
        rows, tokens = _sizes(load)
        is_prompt = jnp.any(load.query_lens > 1)
        row = jnp.searchsorted(self.row_sizes, rows)
        token = jnp.searchsorted(self.token_sizes, tokens)
        seconds = jnp.where(
            is_prompt,
            self.token_seconds.at[token].get(mode="clip"),
            self.row_seconds.at[row].get(mode="clip"),
        )
        seconds = seconds + self.context_seconds * _contexts(load)
        return jnp.where(rows > 0, seconds, 0.0)


def _sizes(load: Load) -> tuple[jax.Array, jax.Array]:
    """Rows and tokens that are computed, i32[] each."""
    return jnp.sum(load.query_lens > 0), jnp.sum(load.query_lens)


def _contexts(load: Load) -> jax.Array:
    contexts = jnp.where(load.query_lens > 0, load.context_lens, 0)
    return jnp.sum(contexts.astype(jnp.float32))


def fit_buckets(
    config: EngineConfig, loads: Load, seconds: np.ndarray
) -> tuple[Bucketed, FitReport]:
    """The cost model with the least squared error whose seconds are at least 0.

    A size that no step had gets what lies between its neighbours.

    Args:
      config: of the measured engine, for its sizes.
      loads: with a leading axis of N measured steps, as of `loop.loads`.
      seconds: f[N], what each took.

    Raises:
      ValueError: other numbers of loads and seconds; no step that decodes only, or none
        with a prompt.
    """
    seconds = np.asarray(seconds, np.float64)
    is_prompt = np.asarray(jnp.any(loads.query_lens > 1, axis=1))
    if len(is_prompt) != len(seconds):
        raise ValueError(
            f"seconds: expected {len(is_prompt)} numbers, one a load, got "
            f"{len(seconds)}"
        )
    for kind, is_kind in (("decode only", ~is_prompt), ("have prompts", is_prompt)):
        if not is_kind.any():
            raise ValueError(f"loads: expected some steps that {kind}, got none")
    rows, tokens = map(np.asarray, jax.vmap(_sizes)(loads))
    contexts = np.asarray(jax.vmap(_contexts)(loads), np.float64)
    num_rows = len(config.row_buckets)
    size = np.where(
        is_prompt,
        num_rows + np.searchsorted(config.token_buckets, tokens),
        np.searchsorted(config.row_buckets, rows),
    )
    count = num_rows + len(config.token_buckets)
    matrix = np.concatenate(
        [size[:, None] == np.arange(count), contexts[:, None] / contexts.max()], axis=1
    ).astype(np.float64)
    solution, _ = nnls(matrix, seconds)
    per_context = solution[-1] / contexts.max()
    has = np.bincount(size, minlength=count) > 0
    row = _between(config.row_buckets, solution[:num_rows], has[:num_rows])
    token = _between(config.token_buckets, solution[num_rows:-1], has[num_rows:])
    names = [f"{n} rows" for n in config.row_buckets]
    names += [f"{n} tokens" for n in config.token_buckets]
    values = dict(zip(names, np.concatenate([row, token]).tolist(), strict=True))
    model = Bucketed(
        jnp.array(config.row_buckets, jnp.int32),
        jnp.array(config.token_buckets, jnp.int32),
        jnp.array(row, jnp.float32),
        jnp.array(token, jnp.float32),
        jnp.float32(per_context),
    )
    values["context"] = float(per_context)
    return model, report(values, seconds, matrix @ solution)


def _between(sizes, values: np.ndarray, has: np.ndarray) -> np.ndarray:
    known = np.flatnonzero(has)
    return np.interp(sizes, np.asarray(sizes)[known], values[known])
