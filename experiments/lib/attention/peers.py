"""Peers of the attention benchmark: attention of other installed libraries.

Only the process that measures a peer imports its library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.attention.cases import AttentionCase, BuiltContender, jax_loop


def jax_contiguous(case: AttentionCase) -> BuiltContender:
    """jax.nn.dot_product_attention on contiguous memory; cuDNN on a GPU."""
    kind = case.shape.dtype
    is_gpu = jax.default_backend() == "gpu"
    is_cudnn = is_gpu and kind in ("float16", "bfloat16")

    def attend(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q[:, None], keys, values, implementation="cudnn" if is_cudnn else "xla"
        )[:, 0]

    return jax_loop(attend, *(jnp.asarray(x, kind) for x in _contiguous(case)))


def jax_deprecated(case: AttentionCase) -> BuiltContender:
    """The paged attention for GPUs that is part of jax, deprecated since jax 0.12."""
    from jax.experimental.pallas.ops.gpu import paged_attention as ops

    kind = case.shape.dtype
    pools = (
        jnp.asarray(case.pages(x).transpose(1, 0, 2, 3), kind)
        for x in (case.keys, case.values)
    )
    lens = jnp.full(case.shape.rows, case.shape.context, jnp.int32)

    def attend(
        q: jax.Array,
        k_pages: jax.Array,
        v_pages: jax.Array,
        tables: jax.Array,
        lens: jax.Array,
    ) -> jax.Array:
        scaled = q * case.shape.head_dim**-0.5
        return ops.paged_attention(scaled, k_pages, v_pages, tables, lens)

    q = jnp.asarray(case.q, kind)
    return jax_loop(attend, q, *pools, jnp.asarray(case.block_tables), lens)


def _contiguous(case: AttentionCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return case.q, case.keys, case.values


def _torch_tensors(case: AttentionCase, *arrays: np.ndarray) -> list[Any]:
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, case.shape.dtype)
    # torch does not accept numpy's bfloat16, so the conversion goes through float32.
    wide = (np.ascontiguousarray(x, np.float32) for x in arrays)
    return [torch.from_numpy(x).to(device, kind) for x in wide]


def _torch_loop(attend: Callable[[Any], Any], q: Any) -> BuiltContender:
    import torch  # pyright: ignore[reportMissingImports]

    def run(loops: int) -> None:
        x = q
        for _ in range(loops):
            x = q + 1e-3 * attend(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return attend(q).float().cpu().numpy(), run


def torch_sdpa(case: AttentionCase) -> BuiltContender:
    """torch's scaled_dot_product_attention on contiguous memory."""
    import torch  # pyright: ignore[reportMissingImports]

    heads_first = (x.transpose(0, 2, 1, 3) for x in (case.keys, case.values))
    q, keys, values = _torch_tensors(case, case.q, *heads_first)

    def attend(x: Any) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(
            x[:, :, None], keys, values, enable_gqa=True
        )
        return out[:, :, 0]

    return _torch_loop(attend, q)


def torch_flex(case: AttentionCase) -> BuiltContender:
    """torch's flex_attention on contiguous memory, compiled on GPUs only.

    On CPUs, compilation takes a minute per shape.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import flex_attention  # pyright: ignore[reportMissingImports]

    heads_first = (x.transpose(0, 2, 1, 3) for x in (case.keys, case.values))
    q, keys, values = _torch_tensors(case, case.q, *heads_first)
    call = flex_attention.flex_attention
    if q.is_cuda:
        call = torch.compile(call, dynamic=False)

    def attend(x: Any) -> Any:
        return call(x[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    return _torch_loop(attend, q)


def transformers_paged(case: AttentionCase) -> BuiltContender:
    """transformers' continuous batching by `sdpa`.

    It gathers the keys and values of all rows into one sequence, and a mask assigns
    them to the rows.
    """
    import types

    import torch  # pyright: ignore[reportMissingImports]
    from transformers.integrations import sdpa_attention  # pyright: ignore[reportMissingImports]

    shape = case.shape
    # The cache of transformers is [slots, K, D].
    pools = (case.pages(x).transpose(0, 2, 1, 3) for x in (case.keys, case.values))
    pools = (x.reshape(-1, *x.shape[2:]) for x in pools)
    q, keys, values = _torch_tensors(case, case.q, *pools)
    slots = case.block_tables[..., None] * shape.block_size
    slots = (slots + np.arange(shape.block_size)).reshape(shape.rows, -1)
    index = torch.from_numpy(slots[:, : shape.context].reshape(-1)).to(q.device)
    row = torch.arange(shape.rows, device=q.device)
    mask = row[:, None] == row.repeat_interleave(shape.context)[None, :]
    groups = shape.num_heads // shape.num_kv_heads
    module: Any = types.SimpleNamespace(num_key_value_groups=groups)

    def attend(x: Any) -> Any:
        gathered = (pool[index].transpose(0, 1)[None] for pool in (keys, values))
        out, _ = sdpa_attention.sdpa_attention_forward(
            module, x.transpose(0, 1)[None], *gathered, mask[None, None]
        )
        return out[0]

    return _torch_loop(attend, q)


def ejkernel(case: AttentionCase) -> BuiltContender:
    """EasyDeL's port of vLLM's Triton kernel for paged memory to JAX.

    As in vLLM, fewer than 128 / K rows are split into 16 segments.
    """
    from ejkernel.kernels._triton import unified_attention  # pyright: ignore[reportMissingImports]

    shape, kind = case.shape, case.shape.dtype
    pools = (
        jnp.asarray(case.pages(x).transpose(0, 2, 1, 3), kind)
        for x in (case.keys, case.values)
    )
    lens = jnp.full(shape.rows, shape.context, jnp.int32)
    starts = jnp.arange(shape.rows + 1, dtype=jnp.int32)

    def attend(
        q: jax.Array,
        k_pages: jax.Array,
        v_pages: jax.Array,
        tables: jax.Array,
        lens: jax.Array,
        starts: jax.Array,
    ) -> jax.Array:
        return unified_attention(
            q,
            k_pages,
            v_pages,
            lens,
            tables,
            starts,
            seq_threshold_3d=128 // shape.num_kv_heads,
            num_par_softmax_segments=16,
        )

    q = jnp.asarray(case.q, kind)
    return jax_loop(attend, q, *pools, jnp.asarray(case.block_tables), lens, starts)


def flashinfer(case: AttentionCase) -> BuiltContender:
    """FlashInfer's batch decode on paged memory."""
    import torch  # pyright: ignore[reportMissingImports]
    from flashinfer import decode  # pyright: ignore[reportMissingImports]

    shape = case.shape
    pages = np.stack([case.pages(x) for x in (case.keys, case.values)], axis=1)
    q, pages = _torch_tensors(case, case.q, pages)
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(
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
