"""The arrays of a model, compared with `jax.tree.leaves`."""

import operator

import jax
import jax.numpy as jnp
from flax import nnx

from jpaged import load_model
from jpaged.serving.model_arrays import ModelArrays


def test_leaves_are_those_of_the_tree_after_every_kind_of_replacement():
    model = load_model("tiny-python")
    arrays = ModelArrays(model)

    def check():
        for _ in range(2):  # the second time by the known order
            found, expected = arrays.leaves(), jax.tree.leaves(model)
            assert len(found) == len(expected)
            assert all(map(operator.is_, found, expected))

    check()
    before = arrays.leaves()
    first = model.layers[0].mlp
    nnx.update(model, jax.tree.map(lambda array: array + 1, nnx.state(model)))
    check()
    assert not any(map(operator.is_, before, arrays.leaves()))
    for value in vars(first).values():  # linear layers
        if isinstance(value, nnx.Module):
            for name, variable in list(vars(value).items()):
                if isinstance(variable, nnx.Variable):
                    setattr(value, name, nnx.Param(variable[...] + 1))
    check()
    model.layers[1], model.layers[0] = model.layers[0], model.layers[1]
    check()


def test_shared_variables_and_bare_arrays_are_found():
    class Pair(nnx.Module):
        def __init__(self):
            self.one = nnx.Param(jnp.ones(2))
            self.other = self.one
            self.bare = nnx.data(jnp.zeros(3))

    pair = Pair()
    arrays = ModelArrays(pair)
    for _ in range(2):
        found, expected = arrays.leaves(), jax.tree.leaves(pair)
        assert [id(each) for each in found] == [id(each) for each in expected]
        pair.bare = pair.bare + 1
