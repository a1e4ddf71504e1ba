"""The arrays of a model, compared with `jax.tree.leaves`."""

import gc
import operator
import weakref

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
        assert arrays._known is not None  # not by flattening

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
    replaced = weakref.ref(model.layers[0])
    model.layers[0] = model.layers[1]
    gc.collect()
    assert replaced() is None  # its arrays are not kept


def test_arrays_in_containers_are_found():
    class Boxed(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(2))
            self.box = nnx.data({})

    model = Boxed()
    arrays = ModelArrays(model)
    assert len(arrays.leaves()) == 1
    model.box["more"] = nnx.Param(jnp.zeros(3))
    assert len(arrays.leaves()) == 2
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    arrays = ModelArrays(model)
    assert len(arrays.leaves()) == 2
    model.kernel.set_raw_value({"values": jnp.ones((2, 3)), "scale": jnp.ones(3)})
    assert len(arrays.leaves()) == len(jax.tree.leaves(model)) == 3


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
