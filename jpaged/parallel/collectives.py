"""Operations between devices, for code that runs inside the engine's `shard_map`.

Pipeline: sharding -> [collectives] -> decoder.

Outside the `shard_map`, as in the plain forward pass, these functions return their
input unchanged, or index 0.

Shape symbols: T tokens, E hidden size, V vocabulary, N rows of logits, K KV heads, D
head size.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType

from jpaged.parallel.mesh import AXES
from jpaged.parallel.sharding import (
    LOGITS,
    PARTIAL_SUMS,
    axis_size,
    split_axis_names,
    stored_kv_heads,
)


def _manual_mesh() -> AbstractMesh | None:
    """Return the mesh of the surrounding `shard_map`, or None outside."""
    mesh = jax.sharding.get_abstract_mesh()
    is_ours = mesh.axis_names[: len(AXES)] == AXES
    return mesh if is_ours and AxisType.Manual in mesh.axis_types else None


def sum_partials(x: jax.Array, part: str) -> jax.Array:
    """Sum a partial result, an entry of `PARTIAL_SUMS`, over the devices with parts."""
    mesh = _manual_mesh()
    if mesh is None:
        return x
    names = [
        name
        for axis in PARTIAL_SUMS[part]
        for name in split_axis_names(mesh, axis)
        if mesh.shape[name] > 1
    ]
    return lax.psum(x, tuple(names)) if names else x


def device_index(axis: str) -> jax.Array | int:
    """Return this device's index along an axis of `AXES`."""
    mesh = _manual_mesh()
    return 0 if mesh is None else lax.axis_index(split_axis_names(mesh, axis))


def embed_tokens(
    table: jax.Array | tuple[jax.Array, jax.Array], tokens: jax.Array, vocab_size: int
) -> jax.Array:
    """Look up rows [T, E] of an embedding [V, E] that may be split over the devices.

    Args:
      table: the embedding; or int8[V, E] and the scales of its rows f32[V], which give
        rows of float32.
      tokens: i32[T].
      vocab_size: V on all devices together.
    """

    def look_up(index: jax.Array) -> jax.Array:
        if not isinstance(table, tuple):
            return table[index]
        weights, scale = table
        return weights[index].astype(scale.dtype) * scale[index][:, None]

    num_rows = jax.tree.leaves(table)[0].shape[0]
    if num_rows == vocab_size:
        return look_up(tokens)
    own = tokens - device_index("tensor") * num_rows
    is_mine = (own >= 0) & (own < num_rows)
    rows = look_up(jnp.where(is_mine, own, 0))
    rows = jnp.where(is_mine[:, None], rows, jnp.zeros_like(rows))
    return sum_partials(rows, "embedding")


def gather_logits(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Gather logits [N, V] from the devices' parts of the vocabulary."""
    mesh = _manual_mesh()
    if mesh is None or logits.shape[-1] == vocab_size:
        return logits
    names = split_axis_names(mesh, LOGITS[-1])
    return lax.all_gather(logits, names, axis=logits.ndim - 1, tiled=True)


def select_kv_heads(heads: jax.Array, num_kv_heads: int) -> jax.Array:
    """Select the heads that this device stores: [T, K, D] -> [T, stored / tensor, D].

    If `tensor` divides the KV heads, these are all heads of the device. If not, its
    query heads may read one KV head more often than another, so a head may be stored
    twice.
    """
    mesh = _manual_mesh()
    if mesh is None:
        return heads
    tensor = axis_size(mesh, split_axis_names(mesh, "tensor"))
    stored = stored_kv_heads(num_kv_heads, tensor)
    number, copies = stored // tensor, stored // num_kv_heads
    num_own = heads.shape[1]
    if num_own == number and 1 in (number, copies):
        return heads
    device = device_index("tensor")
    first = device // (tensor * num_own // num_kv_heads) * num_own
    selected = (device * number + jnp.arange(number, dtype=jnp.int32)) // copies
    return heads[:, selected - first]
