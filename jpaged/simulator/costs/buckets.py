"""Buckets: a cost model of an engine that computes padded shapes, and its fit.

Pipeline: step loads and seconds -> [buckets] -> cost model and residuals.

A compiled step has one of a few sizes: a number of rows if all rows decode, and a
number of tokens if the step has prompts (`EngineConfig.row_buckets`, `token_buckets`).
Its duration depends almost only on that size. This is a staircase, which coefficients
per row or per token cannot describe.

Shape symbols: B sizes in rows, C sizes in tokens, N measured steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from jpaged.config import EngineConfig
from jpaged.simulator.costs.fit import FitReport, fit_report
from jpaged.simulator.costs.load import StepLoad


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bucketed:
    """Seconds by the size to which a step is padded, and by the length of contexts."""

    row_sizes: jax.Array  # i32[B], ascending: rows of steps that only decode
    token_sizes: jax.Array  # i32[C], ascending: tokens of steps with prompts
    row_seconds: jax.Array  # f32[B]
    token_seconds: jax.Array  # f32[C]
    context_seconds: jax.Array  # f32[], per token that a row attends to

    def __call__(self, load: StepLoad) -> jax.Array:
        """Return f32[], seconds; 0 for a step that computes no tokens."""
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


def _sizes(load: StepLoad) -> tuple[jax.Array, jax.Array]:
    """Count the rows and the tokens that the step computes, i32[] each."""
    return jnp.sum(load.query_lens > 0), jnp.sum(load.query_lens)


def _contexts(load: StepLoad) -> jax.Array:
    """Sum the tokens that the rows of the step attend to, f32[]."""
    contexts = jnp.where(load.query_lens > 0, load.context_lens, 0)
    return jnp.sum(contexts.astype(jnp.float32))


def fit_buckets(
    config: EngineConfig, loads: StepLoad, seconds: np.ndarray
) -> tuple[Bucketed, FitReport]:
    """Fit the cost model with the least squared error and no negative seconds.

    Sizes without a measured step are interpolated between their neighbours.

    Args:
      config: of the measured engine, for its sizes.
      loads: loads of N measured steps, with a leading axis, as from `loop.loads`.
      seconds: f[N], duration of each step.

    Returns:
      The cost model, and the quality of the fit.

    Raises:
      ValueError: loads and seconds differ in number, no step only decodes, or no step
        has a prompt.
    """
    seconds = np.asarray(seconds, np.float64)
    is_prompt = np.asarray(jnp.any(loads.query_lens > 1, axis=1))
    if len(is_prompt) != len(seconds):
        raise ValueError(
            f"seconds: expected {len(is_prompt)} numbers, one per load, got "
            f"{len(seconds)}"
        )
    for kind, is_kind in (("only decode", ~is_prompt), ("have prompts", is_prompt)):
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
    return model, fit_report(values, seconds, matrix @ solution)


def _between(sizes: Sequence[int], values: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Interpolate the values of sizes without measurements."""
    known = np.flatnonzero(has)
    return np.interp(sizes, np.asarray(sizes)[known], values[known])
