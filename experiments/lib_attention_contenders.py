"""Contenders: decode attention of one layer, by jpaged and by what else is installed.

Beside the road: each is built from the same numbers, is compared with float64 before it
is timed, and runs in a process of its own (`experiments.bench_attention`).

Letters: S rows, H query heads, K kv heads, D head_dim, C tokens of context, N blocks,
P tokens per block.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged import attention, implementations

# Relative L2 against float64 on the stored values: docs/decisions/attention.md.
TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
_CHECKED_ROWS = 2  # of each shape, for float64 on the host is slow


@dataclasses.dataclass(frozen=True)
class Shape:
    """One line of the benchmark."""

    rows: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that a step has to read."""
        heads = self.rows * self.context * self.num_kv_heads * self.head_dim
        return 2 * heads * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape's numbers, float32 numpy, already rounded to its dtype."""

    shape: Shape
    q: np.ndarray  # [S, H, D]
    keys: np.ndarray  # [S, C, K, D]
    values: np.ndarray
    block_tables: np.ndarray  # i32[S, ceil(C / P)], shuffled

    def pages(self, contiguous: np.ndarray) -> np.ndarray:
        """[N, K, P, D] of [S, C, K, D], where the tables say."""
        shape, size = self.shape, self.shape.block_size
        rows, width = self.block_tables.shape
        padded = np.zeros((rows, width * size, *contiguous.shape[2:]), np.float32)
        padded[:, : shape.context] = contiguous
        blocks = padded.reshape(rows * width, size, *contiguous.shape[2:])
        pages = np.empty_like(blocks)
        pages[self.block_tables.reshape(-1)] = blocks
        return pages.transpose(0, 2, 1, 3)


def make_case(shape: Shape) -> Case:
    """Numbers that are the same in every process."""
    rng = np.random.default_rng(0)
    kind = jnp.dtype(shape.dtype)

    def drawn(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes, np.float32).astype(kind).astype(np.float32)

    sizes = (shape.rows, shape.context, shape.num_kv_heads, shape.head_dim)
    width = -(-shape.context // shape.block_size)
    order = rng.permutation(shape.rows * width).astype(np.int32)
    return Case(
        shape,
        drawn(shape.rows, shape.num_heads, shape.head_dim),
        drawn(*sizes),
        drawn(*sizes),
        order.reshape(shape.rows, width),
    )


def expected(case: Case) -> np.ndarray:
    """float64[min(S, 2), H, D], softmax(q . k / sqrt(D)) . v of the first rows."""
    group = case.shape.num_heads // case.shape.num_kv_heads
    q, keys, values = (
        x[:_CHECKED_ROWS].astype(np.float64) for x in (case.q, case.keys, case.values)
    )
    keys, values = (np.repeat(x, group, axis=2) for x in (keys, values))
    scores = np.einsum("shd,schd->shc", q, keys) / np.sqrt(case.shape.head_dim)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("shc,schd->shd", weights, values)


def relative_error(case: Case, out: np.ndarray) -> float:
    """Relative L2 of an output [S, H, D] against float64."""
    wanted = expected(case)
    found = np.asarray(out[:_CHECKED_ROWS], np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# A contender: the output [S, H, D], and a function that attends `loops` times.
Built = tuple[np.ndarray, Callable[[int], Any]]


def _jax_loop(attend: Callable[..., jax.Array], q: jax.Array, *arrays: Any) -> Built:
    @jax.jit
    def run(loops, q, *arrays):
        def again(_, x):
            return q + 1e-3 * attend(x, *arrays).astype(q.dtype)

        return lax.fori_loop(0, loops, again, q)

    out = np.asarray(jax.jit(attend)(q, *arrays).astype(jnp.float32))
    return out, lambda loops: jax.block_until_ready(run(loops, q, *arrays))


def _paged(implementation: str) -> Callable[[Case], Built]:
    def build(case: Case) -> Built:
        kind = case.shape.dtype
        dim = implementations.page_head_dim(case.shape.head_dim, implementation)
        room = ((0, 0), (0, 0), (0, 0), (0, dim - case.shape.head_dim))
        pools = (
            jnp.asarray(np.pad(case.pages(x), room), kind)
            for x in (case.keys, case.values)
        )
        lens = jnp.full(case.shape.rows, case.shape.context, jnp.int32)

        def attend(q, k_pages, v_pages, tables, lens):
            return attention.paged_attention(
                q, k_pages, v_pages, tables, lens, implementation=implementation
            )

        q = jnp.asarray(case.q, kind)
        return _jax_loop(attend, q, *pools, jnp.asarray(case.block_tables), lens)

    return build


def _jax_contiguous(case: Case) -> Built:
    """jax.nn.dot_product_attention on contiguous memory; cuDNN's on a GPU."""
    kind = case.shape.dtype
    is_gpu = jax.default_backend() == "gpu"
    is_cudnn = is_gpu and kind in ("float16", "bfloat16")

    def attend(q, keys, values):
        return jax.nn.dot_product_attention(
            q[:, None], keys, values, implementation="cudnn" if is_cudnn else "xla"
        )[:, 0]

    return _jax_loop(attend, *(jnp.asarray(x, kind) for x in _contiguous(case)))


def _jax_deprecated(case: Case) -> Built:
    """The paged attention that jax ships for GPUs, deprecated since 0.12."""
    from jax.experimental.pallas.ops.gpu import paged_attention as ops

    kind = case.shape.dtype
    pools = (
        jnp.asarray(case.pages(x).transpose(1, 0, 2, 3), kind)
        for x in (case.keys, case.values)
    )
    lens = jnp.full(case.shape.rows, case.shape.context, jnp.int32)

    def attend(q, k_pages, v_pages, tables, lens):
        scaled = q * case.shape.head_dim**-0.5
        return ops.paged_attention(scaled, k_pages, v_pages, tables, lens)

    q = jnp.asarray(case.q, kind)
    return _jax_loop(attend, q, *pools, jnp.asarray(case.block_tables), lens)


def _contiguous(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return case.q, case.keys, case.values


def _torch_tensors(case: Case, *arrays: np.ndarray) -> list[Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, case.shape.dtype)
    return [torch.from_numpy(np.ascontiguousarray(x)).to(device, kind) for x in arrays]


def _torch_loop(attend: Callable[[Any], Any], q: Any) -> Built:
    import torch

    def run(loops: int) -> None:
        x = q
        for _ in range(loops):
            x = q + 1e-3 * attend(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return attend(q).float().cpu().numpy(), run


def _torch_sdpa(case: Case) -> Built:
    """torch's scaled_dot_product_attention on contiguous memory."""
    import torch

    heads_first = (x.transpose(0, 2, 1, 3) for x in (case.keys, case.values))
    q, keys, values = _torch_tensors(case, case.q, *heads_first)

    def attend(x):
        out = torch.nn.functional.scaled_dot_product_attention(
            x[:, :, None], keys, values, enable_gqa=True
        )
        return out[:, :, 0]

    return _torch_loop(attend, q)


def _flashinfer(case: Case) -> Built:
    """FlashInfer's batch decode on paged memory."""
    import flashinfer
    import torch

    shape = case.shape
    pages = np.stack([case.pages(x) for x in (case.keys, case.values)], axis=1)
    q, pages = _torch_tensors(case, case.q, pages)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=q.device), "HND"
    )
    width = case.block_tables.shape[1]
    last = shape.context - (width - 1) * shape.block_size

    def ints(values: np.ndarray) -> Any:
        return torch.from_numpy(values.astype(np.int32)).to(q.device)

    wrapper.plan(
        ints(np.arange(shape.rows + 1) * width),
        ints(case.block_tables.reshape(-1)),
        ints(np.full(shape.rows, last)),
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.block_size,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return _torch_loop(lambda x: wrapper.run(x, pages), q)


def _has(*modules: str) -> str | None:
    missing = [one for one in modules if importlib.util.find_spec(one) is None]
    return f"{', '.join(missing)} is not installed" if missing else None


def _needs_backend(backend: str, *modules: str) -> str | None:
    if jax.default_backend() != backend:
        return f"needs a {backend.upper()}"
    return _has(*modules)


# Of each: how it is built, and what keeps it from this machine.
CONTENDERS: dict[str, tuple[Callable[[Case], Built], Callable[[], str | None]]] = {
    "reference": (_paged("reference"), lambda: None),
    "xla": (_paged("xla"), lambda: None),
    "mosaic_tpu": (_paged("mosaic_tpu"), lambda: _needs_backend("tpu")),
    "mosaic_gpu": (_paged("mosaic_gpu"), lambda: _needs_backend("gpu")),
    "triton": (_paged("triton"), lambda: _needs_backend("gpu", "jax_triton")),
    "jax_contiguous": (_jax_contiguous, lambda: None),
    "jax_deprecated": (_jax_deprecated, lambda: _needs_backend("gpu")),
    "torch_sdpa": (_torch_sdpa, lambda: _has("torch")),
    "flashinfer": (_flashinfer, lambda: _needs_backend("gpu", "flashinfer", "torch")),
}


def measure(name: str, shape: Shape, repeats: int, least_s: float) -> dict[str, Any]:
    """Seconds of one call, median over `repeats` rounds of at least `least_s` each.

    Raises:
      ValueError: it cannot serve the shape, or its numbers are wrong.
    """
    case = make_case(shape)
    out, run = CONTENDERS[name][0](case)
    error = relative_error(case, out)
    if not error <= TOLERANCES[shape.dtype]:
        raise ValueError(
            f"wrong numbers: relative error {error:.1e}, wanted at most "
            f"{TOLERANCES[shape.dtype]:.0e}; not timed"
        )
    run(2)
    begin = time.perf_counter()
    run(2)
    once = max((time.perf_counter() - begin) / 2, 1e-7)
    loops = max(2, round(least_s / once))
    run(loops)
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run(loops)
        taken.append((time.perf_counter() - begin) / loops)
    return {"seconds": float(np.median(taken)), "error": error, "loops": loops}
