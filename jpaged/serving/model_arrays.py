"""Model arrays: the arrays of a module, found faster than by flattening it.

Pipeline: model -> [model arrays] -> stepping, weights. Host only.

`jax.tree.leaves` takes about a millisecond for a model of twelve layers, in each slice
of steps and for each request of a server.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

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
        self._known: _Structure | None = None

    def leaves(self) -> list[Any]:
        """Return the present arrays."""
        known = self._known  # one read, because several threads replace it
        if known is None or not known.is_current():
            leaves = jax.tree.leaves(self._model)
            self._known = _structure(self._model, leaves)
            return leaves
        return [variable.get_raw_value() for variable in known.variables]


class _Structure(NamedTuple):
    """What a model consisted of when it was last flattened."""

    variables: list[nnx.Variable[Any]]  # in the order of the leaves
    attributes: list[tuple[dict[str, Any], list[Any]]]  # of each module, and values

    def is_current(self) -> bool:
        """Whether no attribute of a module was added, removed or replaced."""
        return all(
            len(now) == len(seen) and all(map(operator.is_, now.values(), seen))
            for now, seen in self.attributes
        )


def _structure(model: Decoder, leaves: list[Any]) -> _Structure | None:
    """Return what a model consists of; None if its variables do not give its leaves."""
    variables: list[nnx.Variable[Any]] = []
    attributes = []
    modules: list[Any] = [model]
    while modules:
        now = vars(modules.pop())
        attributes.append((now, list(now.values())))
        for value in now.values():
            kind = _kind(type(value))
            if kind is nnx.Variable:
                variables.append(value)
            elif kind is nnx.Module:
                modules.append(value)
            elif kind is not None:
                return None  # an array that is no variable
    of_leaf = {id(variable.get_raw_value()): variable for variable in variables}
    is_clear = len(of_leaf) == len(variables) == len(leaves)
    if not is_clear or any(id(leaf) not in of_leaf for leaf in leaves):
        return None  # two variables share an array, or a container has arrays
    return _Structure([of_leaf[id(leaf)] for leaf in leaves], attributes)


@functools.cache  # `issubclass` takes microseconds here
def _kind(type_: type) -> type | None:
    kinds = (nnx.Variable, nnx.Module, jax.Array, np.ndarray)
    return next((kind for kind in kinds if issubclass(type_, kind)), None)
