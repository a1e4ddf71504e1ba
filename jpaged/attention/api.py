"""Paged attention: the front doors.

Place on the road: models -> [attention] -> xla, cascade | pallas | triton | reference.

Letters: S sequences, T query tokens of the step, N blocks, M blocks per sequence,
P tokens per block, H query heads, K key/value heads, G = H // K, D head_dim, L layers.

Source: Kwon et al. 2023, section 4.1. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpaged.attention import cascade, reference
from jpaged.attention.checks import check_attention, check_int, check_pages, is_padded
from jpaged.kv.shared_prefix import SharedPrefix, find_shared_prefix
from jpaged.pages.backends import IMPLEMENTATIONS as IMPLEMENTATIONS
from jpaged.pages.backends import choose, scale_width, without_gradient
from jpaged.pages.packed import plain, plain_shape
from jpaged.pages.quantised import check_scales, encode, is_quantised, stored
from jpaged.pallas.tpu import calls as tpu
from jpaged.triton import attention as triton_attention
from jpaged.triton import pages as triton_pages
from jpaged.triton.tiles import query_rows
from jpaged.xla import gradients
from jpaged.xla import pages as xla_pages
from jpaged.xla.gradients import Operands
from jpaged.xla.online_softmax import merge
from jpaged.xla.pages import Pools

Implementation = Literal["reference", "xla", "mosaic_tpu", "mosaic_gpu", "triton"]


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    *,
    query_start_loc: jax.Array | None = None,
    scale: float | None = None,
    sliding_window: int | jax.Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    shared_prefix: SharedPrefix | bool | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The attention output of every query token over its sequence's paged keys.

    Args:
      q: `[S, H, D]`, one query per sequence (decode); or with `query_start_loc`
        `[T, H, D]`, prompt chunks and decode tokens of all sequences one after
        another, causal within each sequence.
      k_pages, v_pages: `[N, K, P, D]`, or `[L, N, K, P, D]` with `layer`; uint16 is
        taken as the bits of bfloat16 (`implementations.stored_dtype`). Their last two
        axes may be as TPUs want them (`implementations.page_shape`): of D 16, 32 or
        64, bfloat16 or float32, `[P * D // 128, 128]`, the same numbers in the same
        order; of other D `[P, D']`, D' the next multiple of 128, with zeros behind. On
        a TPU all but "mosaic_tpu" copy the former, and "mosaic_tpu" plain ones.
      block_tables: i32`[S, M]`. Entries past a sequence's length are never used,
        whatever they hold.
      context_lens: i32`[S]`, tokens visible to the row's last query, those that are
        written in this step included. 0 gives zeros.
      query_start_loc: i32`[S + 1]`; sequence s owns queries
        `query_start_loc[s] : query_start_loc[s + 1]`. Rows of `q` past the last
        entry give zeros.
      scale: multiplies the scores; `head_dim ** -0.5` if None.
      sliding_window: a query sees itself and the `sliding_window - 1` tokens before.
        May be a traced i32 scalar, so that layers with and without windows share one
        program; it is not checked then.
      logits_soft_cap: scores become `cap * tanh(scores / cap)`.
      sinks: f32`[H]`, a learned score per head that takes part in the softmax's
        denominator and has no value.
      k_scale, v_scale: of quantised pages (int8, float8_e4m3fn or its bits as uint8):
        a key or value is the page's number times its scale. f32`[N, K, P]`, or `[L, N,
        K, P]` with `layer`, or what broadcasts to that. `write_kv` makes them. Their P
        may be rounded up to a multiple of 128, as TPUs want it
        (`implementations.scale_width`): "mosaic_tpu" copies others to be so.
      layer: which layer of a stacked pool; an index, so that the pool is not sliced.
      shared_prefix: groups of rows whose blocks are read once, of `find_shared_prefix`;
        True finds them here. For rows with one query. "reference" reads each row alone
        all the same.
      return_lse: also give the natural-log float32 log-sum-exp of the scores
        (`-inf` where nothing is visible), for `merge_states`.
      implementation: None takes the best for the backend that serves the arguments. A
        name is never replaced: "mosaic_tpu" raises unless q is bfloat16 or float32,
        pages are that or quantised, P is a multiple of 16 (of D 32 16 or one of 32, of
        D 16 16, 32 or one of 64) and D 16, 32, 64 or the pages' D a multiple of 128,
        and `scale` and `logits_soft_cap` are Python numbers; of quantised pages P must
        be 16, 32, 64 or a multiple of 128, their D one of 128, and K 1, 2, 4 or a
        multiple of 8;
        "mosaic_gpu" (a Hopper GPU) unless pages are bfloat16 or float16, P is 16, 32 or
        a multiple of 64, D 64, 128 or 256, and those are numbers; "triton" (an NVIDIA
        GPU; quantised pages too) needs a pages' D of 16, 32, 64, 128 or 256, and
        numbers too; "reference" and "xla" serve everything, and alone have gradients.

    Gradients (reverse mode, once) flow to q, to pages of floats and to sinks; where
    rows share a block, it gets the sum. Slots that nobody sees get zeros.

    Returns:
      `[S, H, D]` or `[T, H, D]` in the dtype of `q`; with `return_lse` also
      f32`[S, H]` or f32`[T, H]`.

    Raises:
      ValueError: for shapes or dtypes that do not fit together, or an implementation
        that does not exist or cannot serve the arguments.
    """
    check_pages(k_pages, v_pages, layer)
    chosen = choose(
        implementation,
        k_pages,
        q=q,
        block_tables=block_tables,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
    )
    block_size = plain_shape(k_pages, q.shape[-1])[-2]
    if chosen != "mosaic_tpu":
        k_pages, v_pages = (plain(pages, q.shape[-1]) for pages in (k_pages, v_pages))
    k_scale, v_scale = _scales(k_pages, k_scale, v_scale)
    check_attention(q, k_pages, block_tables, context_lens, query_start_loc, sinks)
    if isinstance(sliding_window, int) and sliding_window < 1:
        raise ValueError(f"sliding_window: expected at least 1, got {sliding_window}")
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap: expected above 0, got {logits_soft_cap}")
    head_dim = q.shape[-1]
    options = dict(
        scale=head_dim**-0.5 if scale is None else scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
    )
    if chosen != "mosaic_tpu":  # which does that itself
        q = _padded(q, k_pages.shape[-1])
    shared = _groups(shared_prefix, block_tables, context_lens, block_size)
    rows = (block_tables, context_lens, query_start_loc)
    if chosen in ("mosaic_tpu", "mosaic_gpu", "triton"):
        arrays = dict(sliding_window=sliding_window, sinks=sinks, layer=layer)
        if chosen != "mosaic_gpu":
            arrays |= dict(k_scale=k_scale, v_scale=v_scale)
        kernel = _kernel(chosen, return_lse=return_lse or shared is not None)
        static = dict(scale=options["scale"], logits_soft_cap=logits_soft_cap)

        def call(q, pages, rows, arrays, shared):
            def alone(q, *rows, **changed):
                return kernel(q, *pages, *rows, **(arrays | static | changed))

            if shared is None:
                return alone(q, *rows)
            return cascade.attend(
                alone,
                *(q, *rows),
                shared=shared,
                block_size=block_size,
                num_kv_heads=k_pages.shape[-3],
                sliding_window=arrays["sliding_window"],
                # A GPU would wait for its host at every branch.
                skips=chosen == "mosaic_tpu",
                rows=query_rows(q.dtype.itemsize) if chosen == "triton" else None,
            )

        args = (q, (k_pages, v_pages), rows, arrays, shared)
        out, lse = without_gradient(call, chosen)(*args)
    else:
        pools = Pools(k_pages, v_pages, k_scale, v_scale)
        args = (q, *_one_pool(pools, block_tables, layer), *rows[1:])
        if chosen == "reference":  # each row alone: what groups must give too
            out, lse = reference.attend(*args, **options)
        else:
            out, lse = gradients.attend(Operands(*args, shared, **options))
    out = out[..., :head_dim]
    return (out, lse) if return_lse else out


def write_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """The pages with `k[t]`, `v[t]` written to slot `slot_mapping[t]`.

    Args:
      k_pages, v_pages: `[N, K, P, D]`, or `[L, N, K, P, D]` with `layer`, stored as in
        `paged_attention`; updated in place when the caller donates them.
      k, v: `[T, K, D]`, cast to the pages' dtype, or quantised.
      slot_mapping: i32`[T]`, `block * block_size + offset`; below 0 is skipped.
      k_scale, v_scale: of quantised pages, f32`[N, K, P]`, or `[L, N, K, P]` with
        `layer`: each token and head gets a scale of its own. Their P may be rounded up
        as in `paged_attention`; "mosaic_tpu" updates only such in place.

    Returns:
      k_pages, v_pages, and of quantised pages k_scale, v_scale.

    Raises:
      ValueError: for shapes that do not fit together.
    """
    check_pages(k_pages, v_pages, layer)
    chosen = choose(implementation, k_pages, k.shape[-1])
    shape = k_pages.shape
    *_, num_kv_heads, block_size, head_dim = plain_shape(k_pages, k.shape[-1])
    own_dim = k.shape[-1] if is_padded(k.shape[-1], head_dim) else head_dim
    wanted = (*slot_mapping.shape[:1], num_kv_heads, own_dim)
    for name, value in (("k", k), ("v", v)):
        if value.shape != wanted:
            raise ValueError(
                f"{name}: expected shape {wanted} (slot_mapping {slot_mapping.shape}, "
                f"pages {k_pages.shape}), got {value.shape}"
            )
    check_int("slot_mapping", slot_mapping, 1)
    pools, values = [k_pages, v_pages], [k, v]
    scales = _scales(k_pages, k_scale, v_scale, is_whole=True)
    if is_quantised(k_pages.dtype):
        pools += scales
        (k, new_k_scale), (v, new_v_scale) = (encode(x, k_pages.dtype) for x in (k, v))
        values = [k, v, new_k_scale, new_v_scale]
    values[:2] = (_padded(stored(x, k_pages.dtype), head_dim) for x in values[:2])
    if chosen == "mosaic_tpu":
        return tpu.write(k_pages, v_pages, *scales, tuple(values), slot_mapping, layer)
    pools[:2] = (plain(pages, head_dim) for pages in pools[:2])
    if chosen == "triton":
        written = triton_pages.write(pools, values, slot_mapping, layer)
    else:
        written = tuple(
            xla_pages.write(pool, value, slot_mapping, layer, block_size)
            for pool, value in zip(pools, values, strict=True)
        )
    return (*(pages.reshape(shape) for pages in written[:2]), *written[2:])


def copy_blocks(
    k_pages: jax.Array,
    v_pages: jax.Array,
    src: jax.Array,
    dst: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """The pages with block `dst[i]` overwritten by what block `src[i]` held.

    Args:
      k_pages, v_pages: `[N, K, P, D]`, or `[L, N, K, P, D]` with `layer` (without it a
        stacked pool copies the block in every layer), stored as in `paged_attention`.
      src, dst: i32`[C]`, `NO_BLOCK` (-1) padding in either skips the pair; no block
        may be both a source and a destination.
      k_scale, v_scale: of quantised pages, as in `write_kv`; they follow their blocks.

    Returns:
      k_pages, v_pages, and of quantised pages k_scale, v_scale.

    Raises:
      ValueError: for shapes that do not fit together.
    """
    is_stacked = k_pages.ndim == 5 and layer is None
    check_pages(k_pages, v_pages, 0 if is_stacked else layer)
    chosen = choose(implementation, k_pages)
    check_int("src", src, 1)
    check_int("dst", dst, 1)
    if src.shape != dst.shape:
        raise ValueError(f"dst: expected shape {src.shape} like src, got {dst.shape}")
    scales = _scales(k_pages, k_scale, v_scale, is_whole=True)
    if chosen == "mosaic_tpu":
        return tpu.copy(k_pages, v_pages, *scales, src, dst, layer)
    pools = (k_pages, v_pages, *(scale for scale in scales if scale is not None))
    if chosen == "triton":
        return triton_pages.copy(pools, src, dst, layer)
    return xla_pages.copy(pools, src, dst, layer, is_stacked=k_pages.ndim == 5)


def merge_states(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of two disjoint sets of keys, from that over each.

    Args:
      out_a, out_b: `[..., H, D]` attention outputs.
      lse_a, lse_b: f32`[..., H]` log-sum-exps; `-inf` marks an empty set.

    Returns:
      The merged output in the dtype of `out_a`, and its log-sum-exp.
    """
    return merge(out_a, lse_a, out_b, lse_b)


def _kernel(name: str, *, return_lse: bool) -> Callable[..., Any]:
    """Plain attention of a kernel."""
    if name == "mosaic_tpu":
        return functools.partial(tpu.attend, return_lse=return_lse)
    if name == "triton":
        return triton_attention.attend
    # Here, for the import takes a second and most processes have no such GPU.
    from jpaged.pallas.gpu import calls as gpu

    return gpu.attend


def _groups(
    shared_prefix, block_tables, context_lens, block_size
) -> SharedPrefix | None:
    if shared_prefix is None or shared_prefix is False:
        return None
    if shared_prefix is True:
        return find_shared_prefix(block_tables, context_lens, block_size)
    shape = context_lens.shape
    if not isinstance(shared_prefix, SharedPrefix) or shape != (
        *shared_prefix.leaders.shape,
    ):
        raise ValueError(
            "shared_prefix: expected True, or what shared_prefix.find gives for these "
            f"{shape[0]} rows, got {shared_prefix!r:.200}"
        )
    return shared_prefix


def _padded(heads: jax.Array, page_dim: int) -> jax.Array:
    """`heads` [T, H, D] with zeros behind, up to the pages' head_dim."""
    return jnp.pad(heads, ((0, 0), (0, 0), (0, page_dim - heads.shape[-1])))


def _one_pool(pools, block_tables, layer) -> tuple[Pools, jax.Array]:
    """Views a stacked pool as one pool of L * N blocks: no slice, so no copy."""
    if layer is None:
        return pools, block_tables
    num_layers, num_blocks = pools.k.shape[:2]

    def flat(pages):
        return pages.reshape(num_layers * num_blocks, *pages.shape[2:])

    inside = (block_tables >= 0) & (block_tables < num_blocks)
    offset = jnp.asarray(layer, jnp.int32) * num_blocks
    tables = jnp.where(inside, block_tables + offset, 0)
    return jax.tree.map(flat, pools), tables


def _scales(k_pages, k_scale, v_scale, *, is_whole=False):
    """Checked by `check_scales`; they may be as wide as TPUs want them."""
    width = scale_width(k_pages.shape[-2], "mosaic_tpu")
    return check_scales(k_pages, k_scale, v_scale, width=width, is_whole=is_whole)
