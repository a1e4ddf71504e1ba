"""`jpaged.triton.launch.launch` on a CPU: Triton's interpreter in a JAX callback.

Outputs start as NaN, or as the aliased inputs, so that a test sees every element
that a kernel does not write.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import jax
import ml_dtypes
import numpy as np
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

    The interpreter truncates where GPUs round to nearest, and it reads integers as the
    bits of bfloat16.
    """
    if kind.scalar != tl.bfloat16 or x.dtype.scalar not in (tl.float32, tl.int8):
        return _cast(self, x, kind)
    values = x.data.astype(ml_dtypes.bfloat16).view(np.uint16)
    return interpreter.TensorHandle(values, tl.bfloat16)


_binary = interpreter.InterpreterBuilder.binary_op


def _binary_of_booleans(self, lhs, rhs, op):
    """Replace the interpreter's operators, whose comparisons claim to be integers.

    Once broadcast, such a mask has the wrong dtype (triton 3.9).
    """
    result = _binary(self, lhs, rhs, op)
    if result.data.dtype != np.bool_:
        return result
    return interpreter.TensorHandle(result.data, tl.int1)


interpreter.InterpreterBuilder.binary_op = _binary_of_booleans
interpreter.InterpreterBuilder.create_dot = _dot_of_values
interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest


class _Tensor:
    """A numpy array as the interpreter expects it: a tensor of torch in host memory.

    The interpreter copies tensors to the host and back; here both are one memory.
    """

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return _Tensor(self.array)

    def set_(self, *_):
        pass

    def copy_(self, _):
        pass

    size = stride = storage_offset = lambda _: None


def launch(
    name, grid, arrays, out_shapes, *, aliases=None, num_warps=4, num_stages=3, **static
):
    del num_warps, num_stages
    sources = {output: number for number, output in (aliases or {}).items()}

    def run(*arrays):
        inputs = [np.array(array) for array in arrays]
        outputs = [
            inputs[sources[i]] if i in sources else np.full(s.shape, np.nan, s.dtype)
            for i, s in enumerate(out_shapes)
        ]
        tensors = map(_Tensor, (*inputs, *outputs))
        # A GPU reports no error for sums and products that are not finite.
        with np.errstate(invalid="ignore"):
            getattr(kernels, name)[grid](*tensors, **static)
        return outputs

    return jax.pure_callback(run, list(out_shapes), *arrays)
