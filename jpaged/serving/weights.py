"""Weights: notices when the arrays of a model are replaced.

Pipeline: llm -> [weights] -> prefix cache. Host only.

Keys and values in the prefix cache belong to the weights that computed them. Training
code replaces a model's arrays in place (`flax.nnx.update`), without a call of the LLM.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
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
        # Open requests that have keys and values of older weights. They can add these
        # to the prefix cache until they end.
        self._mixed: set[int] = set()
        self.remember(model)

    def remember(self, model: Decoder) -> None:
        """Note the arrays of `model` as seen."""
        self._seen = [weakref.ref(leaf) for leaf in jax.tree.leaves(model)]

    def must_reset(self, model: Decoder, open_requests: Iterable[int]) -> bool:
        """Whether the prefix cache can have keys and values of other weights.

        Args:
          model: the model.
          open_requests: numbers of the requests that have not ended.

        Raises:
          ValueError: an array has another shape or dtype than before.
        """
        leaves = jax.tree.leaves(model)
        is_same = len(leaves) == len(self._seen) and all(
            ref() is leaf for ref, leaf in zip(self._seen, leaves, strict=True)
        )
        must_reset = bool(self._mixed)
        self._mixed &= set(open_requests) if self._mixed else set()
        if not is_same:
            check_same_shapes(self._shapes, model)
            self.remember(model)
            self._mixed |= set(open_requests)
            must_reset = True
        return must_reset


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
            "with keys and values of the old weights; wait for them or abort them"
        )


def check_same_shapes(shapes: list[Any], model: Decoder) -> None:
    """Raise ValueError if a weight of `model` has another shape or dtype."""
    found = _shapes(model)
    if found != shapes:
        wrong = [pair for pair in zip(shapes, found, strict=False) if len({*pair}) > 1]
        detail = "another number of arrays"
        if wrong:
            (path, *before), (_, *after) = wrong[0]
            detail = f"{path} of {_shown(after)} in place of {_shown(before)}"
        raise ValueError(
            f"model: expected weights of the same shapes and dtypes, got {detail}"
        )


def _shown(shape: list[Any]) -> str:
    return f"{shape[1]}{list(shape[0])}"


def _shapes(model: Decoder) -> list[Any]:
    """Return the path, the shape and the dtype of each array."""
    return [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    ]
