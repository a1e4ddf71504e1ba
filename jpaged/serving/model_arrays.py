"""Model arrays: the arrays of a module, found faster than by flattening it.

Pipeline: model -> [model arrays] -> stepping, weights. Host only.

`jax.tree.leaves` takes about a millisecond for a model of twelve layers, in each slice
of steps and for each request of a server.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jpaged.models.decoder import Decoder


class ModelArrays:
    """The arrays of a model, in the order of `jax.tree.leaves`.

    Notices arrays, variables and submodules that were replaced in place.
    """

    def __init__(self, model: Decoder):
        self._model = model
        self._known: _Structure | None = None

    def leaves(self) -> list[Any]:
        """Return the present arrays."""
        known = self._known  # one read, because several threads replace it
        if known is not None and (leaves := known.leaves()) is not None:
            return leaves
        leaves = jax.tree.leaves(self._model)
        self._known = _structure(self._model, leaves)
        return leaves


class _Module(NamedTuple):
    """A module as it was when the model was last flattened.

    The reference is weak, so that a module that was replaced is freed.
    """

    module: weakref.ref[Any]
    names: list[str]  # of its attributes, and the types of their values
    types: list[type]
    variables: list[str]
    modules: list[tuple[str, weakref.ref[Any]]]

    def variables_now(self) -> list[nnx.Variable[Any]] | None:
        """Return its variables; None if another kind of attribute has changed."""
        module = self.module()
        if module is None:
            return None
        now = dict(vars(module))
        if list(now) != self.names or list(map(type, now.values())) != self.types:
            return None
        if any(now[name] is not known() for name, known in self.modules):
            return None
        return [now[name] for name in self.variables]


class _Structure(NamedTuple):
    """What a model consisted of when it was last flattened."""

    modules: list[_Module]
    order: list[int]  # of each leaf, the index among the variables of all modules

    def leaves(self) -> list[Any] | None:
        """Return the present arrays; None if the model has changed otherwise."""
        found = []
        for module in self.modules:
            variables = module.variables_now()
            if variables is None:
                return None
            found += [variable.get_raw_value() for variable in variables]
        if not all(isinstance(each, _ARRAYS) for each in found):
            return None
        return [found[index] for index in self.order]


def _structure(model: Decoder, leaves: list[Any]) -> _Structure | None:
    """Return what a model consists of; None if its variables do not give its leaves."""
    modules: list[_Module] = []
    left: list[Any] = [model]
    while left:
        module = left.pop()
        now = dict(vars(module))
        kinds = {name: _kind(type(value)) for name, value in now.items()}
        if _OTHER in kinds.values():
            return None
        parts = [name for name, kind in kinds.items() if kind is nnx.Module]
        variables = [name for name, kind in kinds.items() if kind is nnx.Variable]
        references = [(name, weakref.ref(now[name])) for name in parts]
        types = list(map(type, now.values()))
        reference = weakref.ref(module)
        modules.append(_Module(reference, list(now), types, variables, references))
        left += [now[name] for name in parts]
    unordered = _Structure(modules, list(range(len(leaves))))
    found = unordered.leaves() if _count(modules) == len(leaves) else None
    index_of = {id(array): index for index, array in enumerate(found or ())}
    if len(index_of) != len(leaves) or any(id(leaf) not in index_of for leaf in leaves):
        return None  # two variables share an array
    return _Structure(modules, [index_of[id(leaf)] for leaf in leaves])


def _count(modules: list[_Module]) -> int:
    return sum(len(module.variables) for module in modules)


_ARRAYS = (jax.Array, np.ndarray)
_OTHER = object  # what can contain arrays, and is neither a variable nor a module


@functools.cache  # `issubclass` takes microseconds here
def _kind(type_: type) -> type | None:
    """Return the kind of an attribute's value; None: it contains no arrays."""
    kinds = (nnx.Variable, nnx.Module)
    others = (*_ARRAYS, dict, list, tuple, set)
    found = next((kind for kind in kinds if issubclass(type_, kind)), None)
    return found or (_OTHER if issubclass(type_, others) else None)
