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
        # When the model was last flattened: its modules, and of each leaf the index
        # among their variables. One tuple, because several threads replace it.
        self._known: tuple[list[_Module], list[int]] | None = None

    def leaves(self) -> list[Any]:
        """Return the present arrays."""
        if self._known is not None:
            modules, order = self._known
            if (found := _arrays(modules)) is not None:
                return [found[index] for index in order]
        leaves = jax.tree.leaves(self._model)
        modules = _modules(self._model)
        order = None if modules is None else _order(modules, leaves)
        self._known = None if modules is None or order is None else (modules, order)
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


def _modules(model: Decoder) -> list[_Module] | None:
    """Return the modules of a model; None if arrays can be outside of variables."""
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
    return modules


def _arrays(modules: list[_Module]) -> list[Any] | None:
    """Return the arrays of all variables; None if the model has changed otherwise."""
    found = []
    for module in modules:
        variables = module.variables_now()
        if variables is None:
            return None
        found += [variable.get_raw_value() for variable in variables]
    return found if all(isinstance(each, _ARRAYS) for each in found) else None


def _order(modules: list[_Module], leaves: list[Any]) -> list[int] | None:
    """Return of each leaf the index among the arrays; None if it is unclear."""
    found = _arrays(modules) or []
    index_of = {id(array): index for index, array in enumerate(found)}
    # Two variables may share an array.
    is_clear = len(index_of) == len(found) == len(leaves)
    if not is_clear or any(id(leaf) not in index_of for leaf in leaves):
        return None
    return [index_of[id(leaf)] for leaf in leaves]


_ARRAYS = (jax.Array, np.ndarray)
_OTHER = object  # what can contain arrays, and is neither a variable nor a module


@functools.cache  # `issubclass` takes microseconds here
def _kind(type_: type) -> type | None:
    """Return the kind of an attribute's value; None: it contains no arrays."""
    kinds = (nnx.Variable, nnx.Module)
    others = (*_ARRAYS, dict, list, tuple, set)
    found = next((kind for kind in kinds if issubclass(type_, kind)), None)
    return found or (_OTHER if issubclass(type_, others) else None)
