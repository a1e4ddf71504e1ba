"""Repeated algorithms: several runs of one algorithm as one, for `n` outputs.

Pipeline: algorithm -> [repeated] -> algorithm with more rows.

Run c of n has the rows c, n + c, 2 * n + c and so on: the last rows of all runs are the
last rows together, as companions must be.

Shape symbols: S rows and Q sequences of one run, n runs, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.decoding.base import Decision, DecodingAlgorithm

_OF_ROWS = ("prompt_lens", "num_tokens", "limits", "tokens", "hidden", "draft")


def repeated_params(params: Any) -> Any:
    """Return parameters with n = 1 that run the algorithm of `params` n times.

    Args:
      params: an AlgorithmParams.

    Returns:
      The new parameters; `params` itself if its n is 1.
    """
    n = params.n
    if n == 1:
        return params
    count = params.num_return
    return dataclasses.replace(
        params,
        algorithm=repeated(params.algorithm, n),
        num_rows=n * params.num_rows,
        n=1,
        companions=[prompt for prompt in params.companions for _ in range(n)],
        num_return=None if count is None else n * count,
    )


@functools.lru_cache(maxsize=64)
def repeated(algorithm: Any, n: int) -> DecodingAlgorithm:
    """Return the algorithm of n runs; equal arguments give equal algorithms.

    Args:
      algorithm: the algorithm of one run.
      n: number of runs.
    """

    def init(num_rows: int) -> Any:
        state = jax.tree.map(jnp.asarray, algorithm.init(num_rows // n))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), state)

    def split(array: jax.Array, axis: int = 0) -> jax.Array:
        """[.., S * n, ..] -> [n, .., S, ..]."""
        shape = array.shape
        parts = array.reshape(*shape[:axis], -1, n, *shape[axis + 1 :])
        return jnp.moveaxis(parts, axis + 1, 0)

    def step(
        keys: jax.Array, logits: jax.Array, state: Any, *context: Any
    ) -> tuple[Any, Decision]:
        parts: list[Any] = []
        axes: list[Any] = []
        for one in context:
            own = {
                name: split(getattr(one, name))
                for name in _OF_ROWS
                if getattr(one, name) is not None
            }
            if one.layers is not None:
                own["layers"] = split(one.layers, 1)
            parts.append(one._replace(**own))
            empty = type(one)(*[None] * len(one))
            axes.append(empty._replace(**dict.fromkeys(own, 0)))
        state, decision = jax.vmap(algorithm.step, in_axes=(0, 0, 0, *axes))(
            split(keys), split(logits), state, *parts
        )
        run = jnp.arange(n, dtype=jnp.int32)[:, None]
        decision = dataclasses.replace(decision, parents=decision.parents * n + run)
        return state, jax.tree.map(lambda x: x.T.reshape(-1), decision)

    count = getattr(algorithm, "num_companions", None)
    return DecodingAlgorithm(
        init,
        step,
        needs=getattr(algorithm, "needs", ()),
        parameters=getattr(algorithm, "parameters", {}),
        ranges=getattr(algorithm, "ranges", {}),
        layers=getattr(algorithm, "layers", ()),
        hidden_size=getattr(algorithm, "hidden_size", 0),
        keeps_rows=getattr(algorithm, "keeps_rows", False),
        num_companions=None if count is None else n * count,
    )
