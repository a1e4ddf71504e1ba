"""Cases of attention over quantised pages, and their dequantised values.

Numpy computes the values from the numbers and the scales independently for each format.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.pages.quantised import quantise
from tests.support.attention import oracle
from tests.support.attention.cases import resolve
from tests.support.attention.oracle import make_case

# The numbers are exact in float32. With float16 and bfloat16 queries a kernel rounds a
# weight times a value's scale to bfloat16, by 2**-9, even for a single token, and then
# rounds the output.
KERNEL_TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-3}


def dequantised(numbers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return float64 values; uint8 is read by the definition of e4m3fn."""
    if numbers.dtype == np.uint8:
        bits = numbers.astype(np.int64)
        exponent, mantissa = (bits >> 3) & 15, bits & 7
        normal = 2.0 ** (exponent - 7) * (1 + mantissa / 8)
        values = np.where(exponent == 0, 2.0**-6 * mantissa / 8, normal)
        values = np.where(exponent * 8 + mantissa == 127, np.nan, values)
        values = np.where(bits >> 7 == 1, -values, values)
    else:
        values = numbers.astype(np.float64)
    with np.errstate(invalid="ignore"):  # scales of values that were not finite
        return values * scale.astype(np.float64)[..., None]


def numpy_of(array: jax.Array) -> np.ndarray:
    return np.asarray(array)


def quantised_case(context_lens, query_lens=None, *, dtype, q_dtype="float32", **sizes):
    """Return arguments of `paged_attention`, and the case of the dequantised values.

    Slots that no row owns have NaN as scale, and a number that is not used otherwise.
    """
    case = make_case(context_lens, query_lens, **sizes)
    rng = np.random.default_rng(1)
    arguments, exact = {}, {}
    for name in ("k", "v"):
        pages = getattr(case, f"{name}_pages")
        # Tokens of very different size: one scale for all would lose the small ones.
        sizes_of = 10.0 ** rng.uniform(-3, 1, pages.shape[:-1])
        values = pages * sizes_of[..., None].astype(np.float32)
        if name == "k":
            values = pages
        numbers, scale = map(numpy_of, quantise(jnp.nan_to_num(values), dtype))
        is_unused = np.isnan(pages[..., 0])
        scale = np.where(is_unused, np.nan, scale)
        unused = np.full((), 127, np.uint8).view(numbers.dtype)  # of fp8, NaN
        numbers = np.where(is_unused[..., None], unused, numbers)
        arguments |= {f"{name}_pages": numbers, f"{name}_scale": scale}
        exact[f"{name}_pages"] = dequantised(numbers, scale)
    q = case.q.astype(oracle.DTYPES[q_dtype])
    case = dataclasses.replace(case, q=q, **exact)
    arguments |= {"q": q, "block_tables": case.block_tables}
    arguments |= {"context_lens": case.context_lens}
    if query_lens is not None:
        arguments["query_start_loc"] = case.query_start_loc
    return {name: jnp.asarray(value) for name, value in arguments.items()}, case


def case_of(
    shape: tuple, contexts: list[int], queries: list[int] | None = None, **more: Any
) -> tuple[dict[str, jax.Array], oracle.Case, dict[str, Any]]:
    """Return the same for a shape like those of `cases.SHAPES`, and its options."""
    heads, head_dim, block_size, q_dtype, options = shape
    sizes = dict(heads=heads, head_dim=head_dim, block_size=block_size)
    arguments, case = quantised_case(
        contexts, queries, q_dtype=q_dtype, **sizes, **more
    )
    return arguments, case, resolve(options, heads[0])
