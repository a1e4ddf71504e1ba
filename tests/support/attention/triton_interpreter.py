"""`triton.launch.launch` on a CPU: Triton's interpreter in a JAX callback.

Outputs are initialised with NaN, or with the aliased inputs, so that everything that a
kernel does not write shows.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import jax
import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from jpaged.triton import kernels

_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_values(self, a, b, *rest):
    """Replace the interpreter's dot, which reads the bits of bfloat16 as integers."""

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        values = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    return _dot(self, widened(a), widened(b), *rest)


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_to_nearest(self, x, kind):
    """Replace the interpreter's cast to bfloat16.

    The interpreter truncates where GPUs round to nearest, and reads integers as bits.
    """
    if kind.scalar != tl.bfloat16 or x.dtype.scalar not in (tl.float32, tl.int8):
        return _cast(self, x, kind)
    values = x.data.astype(ml_dtypes.bfloat16).view(np.uint16)
    return interpreter.TensorHandle(values, tl.bfloat16)


interpreter.InterpreterBuilder.create_dot = _dot_of_values
interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest


def _tensor(array) -> torch.Tensor:
    """Return a copy as a torch tensor; bfloat16 by its bits."""
    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: torch.Tensor, dtype) -> np.ndarray:
    if np.dtype(dtype).name == "bfloat16":
        return tensor.view(torch.int16).numpy().view(dtype)
    return tensor.numpy()


def launch(
    name, grid, arrays, out_shapes, *, aliases=None, num_warps=4, num_stages=3, **static
):
    del num_warps, num_stages
    sources = {output: number for number, output in (aliases or {}).items()}

    def run(*arrays):
        inputs = [_tensor(array) for array in arrays]
        outputs = [
            inputs[sources[i]]
            if i in sources
            else _tensor(np.full(s.shape, np.nan, s.dtype))
            for i, s in enumerate(out_shapes)
        ]
        # On a GPU, sums and products that are not finite are no error.
        with np.errstate(invalid="ignore"):
            getattr(kernels, name)[grid](*inputs, *outputs, **static)
        return [_array(o, s.dtype) for o, s in zip(outputs, out_shapes, strict=True)]

    return jax.pure_callback(run, list(out_shapes), *arrays)
