"""Paged attention: the front doors, their checks, and the plain reference.

Place on the road: models -> [attention] -> xla, cascade | pallas | triton.

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

from jpaged import cascade
from jpaged.implementations import IMPLEMENTATIONS as IMPLEMENTATIONS
from jpaged.implementations import choose, page_head_dim, scale_width, without_gradient
from jpaged.pallas import tpu
from jpaged.quantised_pages import check_scales, decode, encode, is_quantised
from jpaged.shared_prefix import SharedPrefix, find
from jpaged.triton import attention as triton_attention
from jpaged.triton import pages as triton_pages
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
      k_pages, v_pages: `[N, K, P, D]`, or `[L, N, K, P, D]` with `layer`. Their D may
        be that of q rounded up to a multiple of 128, with zeros behind, as TPUs want
        it (`implementations.page_head_dim`).
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
      shared_prefix: groups of rows whose blocks are read once, of `shared_prefix.find`;
        True finds them here. For rows with one query. "reference" reads each row alone
        all the same.
      return_lse: also give the natural-log float32 log-sum-exp of the scores
        (`-inf` where nothing is visible), for `merge_states`.
      implementation: None takes the best for the backend that serves the arguments. A
        name is never replaced: "mosaic_tpu" raises unless q is bfloat16 or float32,
        pages are that or quantised, P is a multiple of 16 and the pages' D one of 128,
        and `scale` and `logits_soft_cap` are Python numbers; of quantised pages P must
        be 16, 32, 64 or a multiple of 128, and K 1, 2, 4 or a multiple of 8;
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
    _check_pages(k_pages, v_pages, layer)
    chosen = choose(
        implementation,
        k_pages,
        q=q,
        block_tables=block_tables,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
    )
    k_scale, v_scale = _scales(k_pages, k_scale, v_scale)
    _check_attention(q, k_pages, block_tables, context_lens, query_start_loc, sinks)
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
    q = _padded(q, k_pages.shape[-1])
    shared = _groups(shared_prefix, block_tables, context_lens, k_pages)
    rows = (block_tables, context_lens, query_start_loc)
    if chosen in ("mosaic_tpu", "mosaic_gpu", "triton"):
        arrays = dict(sliding_window=sliding_window, sinks=sinks, layer=layer)
        if chosen != "mosaic_gpu":
            arrays |= dict(k_scale=k_scale, v_scale=v_scale)
        kernel = _kernel(chosen, return_lse=return_lse or shared is not None)
        static = dict(scale=options["scale"], logits_soft_cap=logits_soft_cap)

        def call(q, pages, rows, arrays, shared):
            def plain(q, *rows, **changed):
                return kernel(q, *pages, *rows, **(arrays | static | changed))

            if shared is None:
                return plain(q, *rows)
            return cascade.attend(
                plain,
                *(q, *rows),
                shared=shared,
                block_size=k_pages.shape[-2],
                num_kv_heads=k_pages.shape[-3],
                sliding_window=arrays["sliding_window"],
                # A GPU would wait for its host at every branch.
                skips=chosen == "mosaic_tpu",
            )

        args = (q, (k_pages, v_pages), rows, arrays, shared)
        out, lse = without_gradient(call, chosen)(*args)
    else:
        pools = Pools(k_pages, v_pages, k_scale, v_scale)
        args = (q, *_one_pool(pools, block_tables, layer), *rows[1:])
        if chosen == "reference":  # each row alone: what groups must give too
            out, lse = _reference(*args, **options)
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
      k_pages, v_pages: `[N, K, P, D]`, or `[L, N, K, P, D]` with `layer`; updated in
        place when the caller donates them.
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
    _check_pages(k_pages, v_pages, layer)
    chosen = choose(implementation, k_pages)
    *_, num_kv_heads, _, head_dim = k_pages.shape
    own_dim = k.shape[-1] if _is_padded(k.shape[-1], head_dim) else head_dim
    wanted = (*slot_mapping.shape[:1], num_kv_heads, own_dim)
    for name, value in (("k", k), ("v", v)):
        if value.shape != wanted:
            raise ValueError(
                f"{name}: expected shape {wanted} (slot_mapping {slot_mapping.shape}, "
                f"pages {k_pages.shape}), got {value.shape}"
            )
    _check_int("slot_mapping", slot_mapping, 1)
    pools, values = [k_pages, v_pages], [k, v]
    scales = _scales(k_pages, k_scale, v_scale, is_whole=True)
    if is_quantised(k_pages.dtype):
        pools += scales
        (k, new_k_scale), (v, new_v_scale) = (encode(x, k_pages.dtype) for x in (k, v))
        values = [k, v, new_k_scale, new_v_scale]
    values[:2] = (_padded(x.astype(k_pages.dtype), head_dim) for x in values[:2])
    if chosen == "mosaic_tpu":
        return tpu.write(k_pages, v_pages, *scales, tuple(values), slot_mapping, layer)
    if chosen == "triton":
        return triton_pages.write(pools, values, slot_mapping, layer)
    return tuple(
        xla_pages.write(pool, value, slot_mapping, layer, k_pages.shape[-2])
        for pool, value in zip(pools, values, strict=True)
    )


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
        stacked pool copies the block in every layer).
      src, dst: i32`[C]`, `NO_BLOCK` (-1) padding in either skips the pair; no block
        may be both a source and a destination.
      k_scale, v_scale: of quantised pages, as in `write_kv`; they follow their blocks.

    Returns:
      k_pages, v_pages, and of quantised pages k_scale, v_scale.

    Raises:
      ValueError: for shapes that do not fit together.
    """
    is_stacked = k_pages.ndim == 5 and layer is None
    _check_pages(k_pages, v_pages, 0 if is_stacked else layer)
    chosen = choose(implementation, k_pages)
    _check_int("src", src, 1)
    _check_int("dst", dst, 1)
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


def _reference(
    q,
    pools,
    block_tables,
    context_lens,
    query_start_loc,
    *,
    scale,
    sliding_window,
    logits_soft_cap,
    sinks,
):
    """Plain attention: gather each query's whole table, mask, softmax in float32."""
    num_queries, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_size, _ = pools.k.shape
    num_seqs, max_blocks = block_tables.shape
    if query_start_loc is None:
        query_start_loc = jnp.arange(num_seqs + 1, dtype=jnp.int32)
    query = jnp.arange(num_queries, dtype=jnp.int32)
    row = jnp.searchsorted(query_start_loc[1:], query, side="right")
    row = jnp.minimum(row, num_seqs - 1).astype(jnp.int32)
    # The last query of a row sees context_lens tokens, the one before it one less.
    visible = context_lens[row] - (query_start_loc[row + 1] - 1 - query)
    visible = jnp.where(query < query_start_loc[-1], visible, 0)

    blocks = jnp.clip(block_tables, 0, num_blocks - 1)[row]  # [T, M]
    position = jnp.arange(max_blocks * block_size, dtype=jnp.int32)
    position, visible = position[None, :], visible[:, None]
    mask = position < visible
    if sliding_window is not None:
        mask &= position >= visible - sliding_window
    mask = mask[:, None, None, :]

    def gathered(pages, scale):  # [T, K, M * P, D]
        rows = decode(pages[blocks]).astype(jnp.float32)
        if scale is not None:
            rows *= scale[blocks][..., :block_size, None]
        rows = rows.transpose(0, 2, 1, 3, 4)
        rows = rows.reshape(num_queries, num_kv_heads, -1, head_dim)
        return jnp.where(mask[:, 0, 0, :][:, None, :, None], rows, 0.0)

    q_TKGD = q.astype(jnp.float32).reshape(num_queries, num_kv_heads, -1, head_dim)
    keys = gathered(pools.k, pools.k_scale)
    # Not TF32, which GPUs would take for float32.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = product("tkgd,tkcd->tkgc", q_TKGD, keys) * scale
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    scores = jnp.where(mask, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)  # [T, K, G]
    if sinks is not None:
        sink_KG = sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1)
        # A row that sees nothing stays empty, sink or not.
        lse = jnp.where(visible[:, None] > 0, jnp.logaddexp(lse, sink_KG), lse)
    base = jnp.where(jnp.isneginf(lse), 0.0, lse)
    weights = jnp.where(mask, jnp.exp(scores - base[..., None]), 0.0)
    values = gathered(pools.v, pools.v_scale)
    out = product("tkgc,tkcd->tkgd", weights, values)
    shape = (num_queries, num_heads)
    return out.reshape(*shape, head_dim).astype(q.dtype), lse.reshape(shape)


def _kernel(name: str, *, return_lse: bool) -> Callable[..., Any]:
    """Plain attention of a kernel."""
    if name == "mosaic_tpu":
        return functools.partial(tpu.attend, return_lse=return_lse)
    if name == "triton":
        return triton_attention.attend
    # Here, for the import takes a second and most processes have no such GPU.
    from jpaged.pallas import gpu

    return gpu.attend


def _groups(shared_prefix, block_tables, context_lens, k_pages) -> SharedPrefix | None:
    if shared_prefix is None or shared_prefix is False:
        return None
    if shared_prefix is True:
        return find(block_tables, context_lens, k_pages.shape[-2])
    shape = context_lens.shape
    if not isinstance(shared_prefix, SharedPrefix) or shape != (
        *shared_prefix.leaders.shape,
    ):
        raise ValueError(
            "shared_prefix: expected True, or what shared_prefix.find gives for these "
            f"{shape[0]} rows, got {shared_prefix!r:.200}"
        )
    return shared_prefix


def _is_padded(head_dim: int, page_dim: int) -> bool:
    """Whether pages of `page_dim` are those of `head_dim` as TPUs want them stored."""
    return page_dim == page_head_dim(head_dim, "mosaic_tpu")


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


def _check_pages(k_pages, v_pages, layer) -> None:
    rank, shape = (4, "[N, K, P, D]") if layer is None else (5, "[L, N, K, P, D]")
    if k_pages.ndim != rank:
        hint = "without layer=" if layer is None else "with layer="
        raise ValueError(
            f"k_pages: expected rank {rank} {shape} {hint}, got shape {k_pages.shape}"
        )
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages: expected {k_pages.dtype}{list(k_pages.shape)} like k_pages, "
            f"got {v_pages.dtype}{list(v_pages.shape)}"
        )


def _check_int(name: str, value: jax.Array, rank: int) -> None:
    if value.ndim != rank or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"{name}: expected integers of rank {rank}, "
            f"got {value.dtype}{list(value.shape)}"
        )


def _check_attention(q, k_pages, block_tables, context_lens, query_start_loc, sinks):
    if q.ndim != 3 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q: expected floating [S, H, D] or [T, H, D], got {q.dtype}{list(q.shape)}"
        )
    _check_int("block_tables", block_tables, 2)
    _check_int("context_lens", context_lens, 1)
    num_queries, num_heads, head_dim = q.shape
    num_seqs = block_tables.shape[0]
    *_, num_kv_heads, _, page_dim = k_pages.shape
    if head_dim != page_dim and not _is_padded(head_dim, page_dim):
        raise ValueError(
            f"q: expected head_dim {page_dim} as in k_pages, got {head_dim}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"q: expected a number of heads that is a multiple of the pages' "
            f"{num_kv_heads} key/value heads, got {num_heads}"
        )
    if context_lens.shape != (num_seqs,):
        raise ValueError(
            f"context_lens: expected shape ({num_seqs},) as block_tables has rows, "
            f"got {context_lens.shape}"
        )
    if query_start_loc is None and num_queries != num_seqs:
        raise ValueError(
            f"q: expected one query for each of the {num_seqs} rows of block_tables, "
            f"got {num_queries}; pass query_start_loc for prompt chunks"
        )
    if query_start_loc is not None:
        _check_int("query_start_loc", query_start_loc, 1)
        if query_start_loc.shape != (num_seqs + 1,):
            raise ValueError(
                f"query_start_loc: expected shape ({num_seqs + 1},), "
                f"got {query_start_loc.shape}"
            )
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks: expected shape ({num_heads},), got {sinks.shape}")
