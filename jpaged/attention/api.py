"""Paged attention and page updates: checks, the choice of a backend, and its call.

Pipeline: models, kv_cache -> [attention.api] -> attention.backends, attention.cascade.

Shape symbols as in `jpaged.attention`.

Source: Kwon et al. 2023, section 4.1. https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.attention import cascade
from jpaged.attention.backends import (
    BACKENDS,
    IMPLEMENTATIONS,
    Implementation,
    choose_backend,
)
from jpaged.kv.shared_prefix import SharedPrefix, find_shared_prefix
from jpaged.pages.backend import AttentionCall, Backend
from jpaged.pages.layout import LANE_ROWS
from jpaged.pages.operands import (
    AttentionOperands,
    NewTokens,
    Pools,
    check_attention,
    check_integers,
    check_pages,
    is_padded,
)
from jpaged.pages.packed import plain, plain_shape
from jpaged.pages.quantised import check_scales, quantise, stored
from jpaged.xla.online_softmax import merge_states

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "copy_blocks",
    "merge_states",
    "paged_attention",
    "write_kv",
]


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array | None,
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
    """Compute attention of every query token over the paged keys of its sequence.

    Args:
      q: `[S, H, D]`, one query per sequence (decode). With `query_start_loc`,
        `[T, H, D]`: prompt chunks and decode tokens of all sequences one after another,
        causal within each sequence.
      k_pages, v_pages: `[N, K, P, D]`, or `[L, N, K, P, D]` with `layer`. uint16 pages
        are read as the bits of bfloat16. Pages may also be stored as TPUs need them
        (`jpaged.pages.layout.LaneLayout`): for D of 16, 32 or 64 in bfloat16 or
        float32, `[..., P * D // 128, 128]` with the same numbers in the same order; for
        other D, `[..., P, D']` with D' the next multiple of 128 and zeros after D. On a
        TPU, a backend copies pages that are not in its own layout. v_pages None: the
        keys are the values too, as in multi-head latent attention, where the values
        are the first numbers of the keys: take those of the output.
      block_tables: i32`[S, M]`. Entries after a sequence's last block are not used,
        whatever they hold.
      context_lens: i32`[S]`, tokens visible to the row's last query, including the
        tokens that are written in this step. 0 gives zeros.
      query_start_loc: i32`[S + 1]`; sequence s owns queries
        `query_start_loc[s] : query_start_loc[s + 1]`. Rows of `q` after the last entry
        give zeros. Entries after the last sequence may also be 0.
      scale: factor of the scores; None: `head_dim ** -0.5`.
      sliding_window: a query sees itself and the `sliding_window - 1` tokens before it.
        A traced i32 scalar is not checked; with it, layers with and without windows can
        share one program.
      logits_soft_cap: replaces scores by `cap * tanh(scores / cap)`.
      sinks: f32`[H]`, a learned score per head that is part of the softmax's
        denominator and has no value.
      k_scale, v_scale: scales of quantised pages (int8, float8_e4m3fn or its bits as
        uint8), as `write_kv` returns them: a key or value is the page's number times
        its scale. Pages of float8_e5m2 may have scales too ("xla" and "reference").
        f32`[N, K, P]`, or `[L, N, K, P]` with `layer`, or an array that
        broadcasts to that shape. Their P may be rounded up to a multiple of 128.
      layer: index into stacked pools. The index goes into the kernel, so the pool is
        not sliced.
      shared_prefix: groups of rows whose shared blocks are read once, from
        `jpaged.kv.shared_prefix.find_shared_prefix`; True finds them here. Applies to
        rows with one
        query. "reference" reads every row separately.
      return_lse: also return the log-sum-exp of the scores, for `merge_states`.
      implementation: name of a backend. It is never replaced by another. None selects
        the preferred backend of the platform, or "xla" if that does not support the
        arguments. `docs/attention.md` lists what each backend supports.

    Gradients (once, in reverse mode) flow to q, to pages of floats and to sinks, with
    the "xla" and "reference" backends. A block that several rows share gets the sum.
    Slots that no query sees get zeros.

    Returns:
      `[S, H, D]` or `[T, H, D]` in the dtype of `q`. With `return_lse` also the natural
      log-sum-exp, f32`[S, H]` or f32`[T, H]`, `-inf` where no token is visible.

    Raises:
      ValueError: shapes or dtypes do not fit together, or the backend does not exist or
        does not support the arguments.
    """
    check_pages(k_pages, v_pages, layer)
    has_groups = shared_prefix is not None and shared_prefix is not False
    call = AttentionCall(
        q, block_tables, scale, logits_soft_cap, needs_lse=return_lse or has_groups
    )
    is_latent = v_pages is None
    backend = choose_backend(implementation, k_pages, call=call, is_latent=is_latent)
    head_dim = q.shape[-1]
    if not backend.accepts_stored_pages:
        k_pages = plain(k_pages, head_dim)
        v_pages = None if v_pages is None else plain(v_pages, head_dim)
    scales = _checked_scales(k_pages, k_scale, v_scale, has_values=not is_latent)
    operands = AttentionOperands(
        q,
        Pools(k_pages, v_pages, *scales),
        block_tables,
        context_lens,
        _without_padding(query_start_loc),
        scale=head_dim**-0.5 if scale is None else scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        layer=layer,
    )
    check_attention(operands)
    operands = operands._replace(shared_prefix=_groups(shared_prefix, operands))
    if not backend.accepts_stored_pages:
        operands = operands._replace(q=_pad_heads(q, k_pages.shape[-1]))
    out, lse = _attend(backend, operands, return_lse)
    out = out[..., :head_dim]
    return (out, lse) if return_lse else out


def write_kv(
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    k: jax.Array,
    v: jax.Array | None,
    slot_mapping: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """Write `k[t]` and `v[t]` to slot `slot_mapping[t]` of the pages.

    Args:
      k_pages, v_pages: `[N, K, P, D]`, or `[L, N, K, P, D]` with `layer`, stored as in
        `paged_attention`. They are updated in place if the caller donates them.
      k, v: `[T, K, D]`, cast to the pages' dtype, or quantised. v is None if v_pages
        is.
      slot_mapping: i32`[T]`, `block * block_size + offset`; slots below 0 are skipped.
      k_scale, v_scale: scales of quantised pages, f32`[N, K, P]`, or `[L, N, K, P]`
        with `layer`: each token and head gets its own scale. Their P may be rounded up
        to a multiple of 128; "mosaic_tpu" updates only such scales in place.
      layer: index into stacked pools.
      implementation: name of a backend, as in `paged_attention`.

    Returns:
      k_pages and v_pages, and for quantised pages k_scale and v_scale; those that are
      None are left out.

    Raises:
      ValueError: shapes do not fit together, or the backend does not exist or does not
        support the pages.
    """
    check_pages(k_pages, v_pages, layer)
    is_latent = v_pages is None
    if is_latent != (v is None):
        expected, got = ("None", "one") if is_latent else ("one", "None")
        raise ValueError(f"v: expected {expected} beside these v_pages, got {got}")
    head_dim = k.shape[-1]
    backend = choose_backend(
        implementation, k_pages, head_dim=head_dim, is_latent=is_latent
    )
    scales = _checked_scales(
        k_pages, k_scale, v_scale, is_whole=True, has_values=not is_latent
    )
    is_scaled = scales[0] is not None
    new = _new_tokens(k_pages, k, v, slot_mapping, is_scaled=is_scaled)
    pools = Pools(k_pages, v_pages, *scales)
    if not backend.accepts_stored_pages:
        page_dim = new.k.shape[-1]
        pools = pools._replace(
            k=plain(pools.k, page_dim),
            v=None if pools.v is None else plain(pools.v, page_dim),
        )
    written = backend.write(pools, new, slot_mapping, layer)
    shape = k_pages.shape
    return _without_none(
        written._replace(
            k=written.k.reshape(shape),
            v=None if written.v is None else written.v.reshape(shape),
        )
    )


def copy_blocks(
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    src: jax.Array,
    dst: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """Overwrite block `dst[i]` of the pages with the contents of block `src[i]`.

    Args:
      k_pages, v_pages: `[N, K, P, D]`, or `[L, N, K, P, D]`, stored as in
        `paged_attention`. Without `layer`, stacked pools copy the block in every layer.
      src, dst: i32`[C]`. A pair with `NO_BLOCK` (-1) in either is skipped. No block may
        be both a source and a destination.
      k_scale, v_scale: scales of quantised pages, as in `write_kv`; they are copied
        with their blocks.
      layer: index into stacked pools.
      implementation: name of a backend, as in `paged_attention`.

    Returns:
      k_pages and v_pages, and for quantised pages k_scale and v_scale; those that are
      None are left out.

    Raises:
      ValueError: shapes do not fit together, or the backend does not exist or does not
        support the pages.
    """
    copies_all_layers = k_pages.ndim == 5 and layer is None
    check_pages(k_pages, v_pages, 0 if copies_all_layers else layer)
    is_latent = v_pages is None
    backend = choose_backend(implementation, k_pages, is_latent=is_latent)
    check_integers("src", src, 1)
    check_integers("dst", dst, 1)
    if src.shape != dst.shape:
        raise ValueError(f"dst: expected shape {src.shape} like src, got {dst.shape}")
    scales = _checked_scales(
        k_pages, k_scale, v_scale, is_whole=True, has_values=not is_latent
    )
    pools = Pools(k_pages, v_pages, *scales)
    return _without_none(backend.copy(pools, src, dst, layer))


def _attend(
    backend: Backend, operands: AttentionOperands, return_lse: bool
) -> tuple[jax.Array, Any]:
    """Call the backend, through cascade attention if it needs that for prefixes."""
    if backend.is_differentiable and backend.add_gradient is None:
        return backend.attend(operands, return_lse=return_lse)

    def call(operands: AttentionOperands) -> tuple[jax.Array, Any]:
        if operands.shared_prefix is None or backend.cascade is None:
            return backend.attend(operands, return_lse=return_lse)
        return cascade.attend(backend.attend, operands, backend.cascade)

    if backend.add_gradient is not None:
        return backend.add_gradient(call)(operands)
    # Kernels compile these two in, so they are no operands of `custom_vjp`.
    numbers = dict(scale=operands.scale, logits_soft_cap=operands.logits_soft_cap)

    def call_with_numbers(arrays: AttentionOperands) -> tuple[jax.Array, Any]:
        return call(arrays._replace(**numbers))

    arrays = operands._replace(scale=None, logits_soft_cap=None)
    return _refuse_gradient(call_with_numbers, backend.name)(arrays)


def _refuse_gradient(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `function`, with an error for its gradient that names what to use."""

    def refuse(*args: Any) -> Any:
        names = [repr(one.name) for one in BACKENDS if one.is_differentiable]
        raise ValueError(
            f"implementation: {name!r} has no gradient ({' and '.join(names)} have); "
            "use implementation='xla' for what is differentiated"
        )

    called = jax.custom_vjp(function)
    called.defvjp(refuse, refuse)
    return called


def _groups(
    shared_prefix: SharedPrefix | bool | None, operands: AttentionOperands
) -> SharedPrefix | None:
    """Return the groups of rows to read together, or None."""
    if shared_prefix is None or shared_prefix is False:
        return None
    lens = operands.context_lens
    if shared_prefix is True:
        return find_shared_prefix(operands.block_tables, lens, operands.block_size)
    is_groups = isinstance(shared_prefix, SharedPrefix)
    if not is_groups or shared_prefix.leaders.shape != lens.shape:
        raise ValueError(
            "shared_prefix: expected True, or the result of shared_prefix.find for "
            f"these {lens.shape[0]} rows, got {shared_prefix!r:.200}"
        )
    return shared_prefix


def _new_tokens(
    k_pages: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    slot_mapping: jax.Array,
    *,
    is_scaled: bool,
) -> NewTokens:
    """Check new keys and values, and convert them to the dtype and D of the pages."""
    *_, num_kv_heads, _, page_dim = plain_shape(k_pages, k.shape[-1])
    head_dim = k.shape[-1] if is_padded(k.shape[-1], page_dim) else page_dim
    expected = (*slot_mapping.shape[:1], num_kv_heads, head_dim)
    for name, value in (("k", k), ("v", v)):
        if value is not None and value.shape != expected:
            raise ValueError(
                f"{name}: expected shape {expected} (slot_mapping "
                f"{slot_mapping.shape}, pages {k_pages.shape}), got {value.shape}"
            )
    check_integers("slot_mapping", slot_mapping, 1)

    def converted(values: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        scale = None
        if is_scaled:
            values, scale = quantise(values, k_pages.dtype)
        return _pad_heads(stored(values, k_pages.dtype), page_dim), scale

    k, k_scale = converted(k)
    v, v_scale = (None, None) if v is None else converted(v)
    return NewTokens(k, v, k_scale, v_scale)


def _pad_heads(heads: jax.Array, page_dim: int) -> jax.Array:
    """Return heads [T, H, D] with zeros after D, up to the pages' head_dim."""
    return jnp.pad(heads, ((0, 0), (0, 0), (0, page_dim - heads.shape[-1])))


def _checked_scales(
    k_pages: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    is_whole: bool = False,
    has_values: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Check scales as `check_scales`; every backend accepts those of the TPU layout."""
    return check_scales(
        k_pages,
        k_scale,
        v_scale,
        width=LANE_ROWS.scale_width(k_pages.shape[-2]),
        is_whole=is_whole,
        has_values=has_values,
    )


def _without_padding(query_start_loc: jax.Array | None) -> jax.Array | None:
    """Repeat the last entry in place of the zeros after it, which other kernels use."""
    if query_start_loc is None or query_start_loc.ndim != 1:
        return query_start_loc
    return lax.cummax(query_start_loc)


def _without_none(pools: Pools) -> tuple[jax.Array, ...]:
    return tuple(array for array in pools if array is not None)
