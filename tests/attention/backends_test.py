"""The records of attention backends: names, defaults, and page layouts."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import attention
from jpaged.attention import backends
from jpaged.attention.backends import XLA
from jpaged.cpu import library
from jpaged.pages.backend import AttentionCall


def test_backends_have_the_names_that_the_type_lists():
    assert typing.get_args(backends.Implementation) == attention.IMPLEMENTATIONS


def test_the_default_is_the_first_available_backend_that_supports_the_call(monkeypatch):
    plain = jax.ShapeDtypeStruct((3, 2, 16, 64), jnp.float32)
    expected = "xla" if library.problem() else "cpu"
    assert backends.choose_backend(None, plain).name == expected
    no_lse = dataclasses.replace(XLA, name="no_lse", returns_lse=False)
    elsewhere = dataclasses.replace(XLA, name="elsewhere", platform="tpu")
    monkeypatch.setattr(backends, "BACKENDS", (elsewhere, no_lse, XLA))
    names = ("elsewhere", "no_lse", "xla")
    monkeypatch.setitem(backends.PREFERRED, "cpu", names)
    q = jax.ShapeDtypeStruct((1, 2, 64), jnp.float32)
    for needs_lse, name in ((False, "no_lse"), (True, "xla")):
        call = AttentionCall(q, needs_lse=needs_lse)
        assert backends.choose_backend(None, plain, call=call).name == name
    with pytest.raises(ValueError, match=r"'no_lse' cannot serve .* return_lse: "):
        backends.choose_backend("no_lse", plain, call=call)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype"),
    [(64, 16, "bfloat16"), (80, 16, "float32"), (32, 48, "float32"), (64, 16, "int8")],
)
def test_layouts_store_pages_in_their_own_shape(head_dim, block_size, dtype):
    shape = (3, 2, block_size, head_dim)
    pages = jnp.arange(np.prod(shape)).reshape(shape).astype(dtype)
    for name in ("xla", "mosaic_tpu"):
        layout = backends.layout(name)
        stored = layout.store(pages)
        assert stored.shape[-2:] == layout.page_shape(block_size, head_dim, dtype)
        back = stored.reshape(layout.plain_shape(stored, head_dim))[..., :head_dim]
        np.testing.assert_array_equal(back, pages)
