"""Weights: notices when the arrays of a model are replaced.

Pipeline: llm -> [weights] -> prefix cache. Host only.

Keys and values in the prefix cache belong to the weights that computed them. Training
code replaces a model's arrays in place (`flax.nnx.update`), without a call of the LLM.
`weight_update` replaces them on request.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import jax

from jpaged.models.decoder import Decoder
from jpaged.validation import error


class WeightsWatch:
    """Compares a model's arrays, by identity, with those that were last seen.

    The arrays are referred to weakly, so that old weights are freed.
    """

    def __init__(self, model: Decoder):
        self._shapes = _shapes(model)
        self._seen: list[weakref.ref[Any]] = []
        self.remember(model)

    def remember(self, model: Decoder) -> None:
        """Note the arrays of `model` as seen."""
        self._seen = [weakref.ref(leaf) for leaf in jax.tree.leaves(model)]

    def have_changed(self, model: Decoder, leaves: Sequence[Any]) -> bool:
        """Whether arrays of the model were replaced since the last call.

        Args:
          model: the model.
          leaves: its present arrays.

        Raises:
          ValueError: an array has another shape or dtype than before.
          RuntimeError: an array was deleted, because a function donated it.
        """
        if any(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array)):
            raise RuntimeError(
                f"model: {_first_deleted(model)} was deleted; {_DONATED}"
            )
        is_same = len(leaves) == len(self._seen) and all(
            ref() is leaf for ref, leaf in zip(self._seen, leaves, strict=True)
        )
        if not is_same:
            check_same_shapes(self._shapes, model)
            self.remember(model)
        return not is_same


_DONATED = (
    "a jitted function had it as a donated argument. Assign new weights with "
    "update_weights, whose default copy=True makes copies that no caller donates"
)


def _first_deleted(model: Decoder) -> str:
    leaves = named_leaves(model)
    return next(name for name, leaf in leaves.items() if leaf.is_deleted())


def check_replacement(old: Decoder, new: Any, num_open: int) -> None:
    """Raise ValueError unless `new` can replace the model `old`.

    Args:
      old: the model.
      new: what replaces it.
      num_open: number of requests that have not ended.
    """
    if not isinstance(new, Decoder):
        raise error("model", "a Decoder", new)
    if new.config != old.config:
        raise ValueError(
            f"model: expected a Decoder with the config of this LLM ({old.config}), "
            f"got one with {new.config}; create another LLM"
        )
    check_same_shapes(_shapes(old), new)
    if num_open:
        raise ValueError(
            f"model: expected no open requests, got {num_open}, which would continue "
            "with keys and values of the old weights; wait for them, abort them, or "
            "use update_weights"
        )


def check_same_shapes(shapes: list[Any], model: Decoder) -> None:
    """Raise ValueError if a weight of `model` has another shape or dtype."""
    found = _shapes(model)
    if found != shapes:
        wrong = [pair for pair in zip(shapes, found, strict=False) if len({*pair}) > 1]
        detail = "another number of arrays"
        if wrong:
            (name, *before), (_, *after) = wrong[0]
            detail = f"{name} of {_shown(after)} in place of {_shown(before)}"
        raise ValueError(
            f"model: expected weights of the same shapes and dtypes, got {detail}"
        )


def named_leaves(model: Decoder) -> dict[str, Any]:
    """Return the arrays of a model by name, as "layers.0.mlp.up.weight"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {leaf_name(path[:-1]): leaf for path, leaf in leaves}


def leaf_name(path: Any) -> str:
    """Return the name of the path of a leaf, without the step into its variable."""
    return ".".join(str(part) for step in path for part in _parts(step))


def _parts(step: Any) -> tuple[Any, ...]:
    for name in ("key", "idx", "name"):
        if hasattr(step, name):
            part = getattr(step, name)
            return part if isinstance(part, tuple) else (part,)
    return (step,)


def _shown(shape: list[Any]) -> str:
    return f"{shape[1]}{list(shape[0])}"


def _shapes(model: Decoder) -> list[Any]:
    """Return the name, the shape and the dtype of each array."""
    return [
        (name, leaf.shape, str(leaf.dtype))
        for name, leaf in named_leaves(model).items()
    ]
