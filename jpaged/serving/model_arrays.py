"""Model arrays: the arrays of a module, found faster than by flattening it.

Pipeline: model -> [model arrays] -> stepping, weights. Host only.

`jax.tree.leaves` takes about a millisecond for a model of twelve layers, in each slice
of steps and for each request of a server.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import numpy as np
from flax import nnx

from jpaged.models.decoder import Decoder


class ModelArrays:
    """The arrays of a model, in the order of `jax.tree.leaves`.

    Arrays, variables and modules that are replaced in place are noticed.
    """

    def __init__(self, model: Decoder):
        self._model = model
        # The variables when the leaves were last flattened, and the index of each
        # leaf's variable. One tuple, because several threads read it.
        self._known: tuple[list[nnx.Variable[Any]], list[int]] | None = None

    def leaves(self) -> list[Any]:
        """Return the present arrays."""
        variables = _variables(self._model)
        known = self._known
        if known is not None and variables is not None:
            seen, order = known
            if len(seen) == len(variables) and all(map(operator.is_, seen, variables)):
                return [variables[index].get_raw_value() for index in order]
        leaves = jax.tree.leaves(self._model)
        self._known = None if variables is None else _ordered(variables, leaves)
        return leaves


def _ordered(
    variables: list[nnx.Variable[Any]], leaves: list[Any]
) -> tuple[list[nnx.Variable[Any]], list[int]] | None:
    """Return the variables and the index of each leaf's; None if these are unclear."""
    index_of = {
        id(variable.get_raw_value()): index for index, variable in enumerate(variables)
    }
    is_clear = len(index_of) == len(variables) == len(leaves)
    if not is_clear or any(id(leaf) not in index_of for leaf in leaves):
        return None  # two variables share an array
    return variables, [index_of[id(leaf)] for leaf in leaves]


def _variables(module: nnx.Module) -> list[nnx.Variable[Any]] | None:
    """Return the variables of a module and of those in it, in a fixed order.

    None: it has arrays that are no variables.
    """
    found: list[nnx.Variable[Any]] = []
    modules: list[Any] = [module]
    while modules:
        for value in vars(modules.pop()).values():
            kind = _kind(type(value))
            if kind is nnx.Variable:
                found.append(value)
            elif kind is nnx.Module:
                modules.append(value)
            elif kind is not None:
                return None
    return found


@functools.cache  # `issubclass` takes microseconds here
def _kind(type_: type) -> type | None:
    kinds = (nnx.Variable, nnx.Module, jax.Array, np.ndarray)
    return next((kind for kind in kinds if issubclass(type_, kind)), None)
