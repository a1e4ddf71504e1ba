"""Mixture of experts: each token is processed by the few experts its router selects.

Pipeline: hidden states -> [models.moe] -> hidden states.

Tokens are sorted by expert, so that each expert multiplies consecutive rows. No expert
processes a token that was not routed to it.

Shape symbols: T tokens, E hidden size, X experts, C selected experts per token.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Gale et al. 2022 for
products without padding to a capacity, https://arxiv.org/abs/2211.15841.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jpaged import parallel
from jpaged.arithmetic import cdiv
from jpaged.models import layer_kernels
from jpaged.models.config import ModelConfig, Routing
from jpaged.models.layers import Linear, Mlp, random_weight


class ExpertLinear(nnx.Module):
    """x [T, in], sorted by expert -> [T, out], with a bias if `config.expert_bias`.

    `is_part` says that the product on one device is a part of a sum over devices.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        config: ModelConfig,
        rngs: nnx.Rngs,
        is_part: bool = False,
    ) -> None:
        shape = (config.num_experts, in_size, out_size)
        self.weight, self.scale = random_weight(shape, config, rngs)
        self.bias = (
            nnx.Param(jnp.zeros((config.num_experts, out_size), config.dtype))
            if config.expert_bias
            else None
        )
        self.is_part = is_part

    def __call__(
        self, x: jax.Array, counts: jax.Array, experts: jax.Array
    ) -> jax.Array:
        """Multiply each row by the weight of its expert.

        Args:
          x: [T, in], sorted by expert.
          counts: i32[X], number of rows of each expert.
          experts: i32[T], expert of each row.

        Returns:
          [T, out].
        """
        weight = self.weight[...]
        scale = None if self.scale is None else self.scale[...]
        out = layer_kernels.grouped_matmul(x, weight, scale, counts)
        if out is None:
            out = grouped_matmul(x, weight, counts)
            if scale is not None:
                out = (out * scale[experts]).astype(x.dtype)
        if self.bias is None:
            return out
        bias = self.bias[...][experts]
        if self.is_part:  # only one device adds the bias to the sum
            bias = jnp.where(parallel.device_index("tensor") == 0, bias, 0)
        return out + bias


class Experts(nnx.Module):
    """x [..., E] -> [..., E]: sum of the selected experts, weighted by the router.

    The output of the shared experts, one MLP that processes every token, is added.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        hidden, inner = config.hidden_size, config.expert_size
        self.routing = routing = config.routing
        wide = dataclasses.replace(config, dtype="float32")
        self.router = Linear(
            hidden,
            config.num_experts,
            use_bias=config.expert_bias,
            config=config if routing is None else wide,
            rngs=rngs,
            may_be_quantized=False,
        )
        self.gate = ExpertLinear(hidden, inner, config, rngs)
        self.up = ExpertLinear(hidden, inner, config, rngs)
        self.down = ExpertLinear(inner, hidden, config, rngs, is_part=True)
        has_correction = routing is not None and routing.has_correction
        self.correction = (
            nnx.Param(jnp.zeros(config.num_experts, jnp.float32))
            if has_correction
            else None
        )
        shared = config.shared_expert_size
        self.shared = Mlp(config, rngs, shared) if shared else None
        self.num_selected = config.num_experts_per_token
        self.is_normalized = config.normalized_routing
        self.activation = config.activation
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha

    def __call__(self, x: jax.Array) -> jax.Array:
        """Output [..., E] for the residual stream."""
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self._route(flat)
        # On a mesh, each device has some of the experts, and the outputs of all devices
        # are summed. Rows of other devices' experts are sorted to the end.
        num_own = self.gate.weight[...].shape[0]
        experts = experts - parallel.device_index("expert") * num_own
        is_own = (experts >= 0) & (experts < num_own)
        experts = jnp.where(is_own, experts, num_own).reshape(-1)
        order = jnp.argsort(experts, stable=True)
        sorted_experts = experts[order]
        counts = jnp.bincount(sorted_experts, length=num_own + 1)[:num_own]
        counts = counts.astype(jnp.int32)
        rows = flat[order // self.num_selected]
        gate = self.gate(rows, counts, sorted_experts)
        up = self.up(rows, counts, sorted_experts)
        out = self.down(self._gated(gate, up), counts, sorted_experts)
        # Restore the order of the tokens, then sum over the experts of each token.
        out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
        out = out.reshape(-1, self.num_selected, out.shape[-1])
        out = jnp.where(is_own[..., None], out * weights[..., None], 0)
        out = parallel.sum_partials(jnp.sum(out, axis=1), "experts.down")
        return out.reshape(x.shape) + (0 if self.shared is None else self.shared(x))

    def _route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights [T, C] in x's dtype and experts i32[T, C] of tokens x [T, E]."""
        if self.routing is not None:
            return self._route_as(self.routing, x)
        scores = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        weights, experts = lax.top_k(scores, self.num_selected)
        if self.is_normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights.astype(x.dtype), experts.astype(jnp.int32)

    def _route_as(self, routing: Routing, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = self.router(x.astype(jnp.float32))
        is_softmax = routing.scores == "softmax"
        scores = jax.nn.softmax(logits) if is_softmax else jax.nn.sigmoid(logits)
        choice = scores
        if self.correction is not None:
            choice = scores + self.correction[...][None]
        if routing.num_selected_groups < routing.num_groups:
            choice = _keep_best_groups(choice, routing)
        _, experts = lax.top_k(choice, self.num_selected)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.is_normalized:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        weights = weights * routing.scale
        return weights.astype(x.dtype), experts.astype(jnp.int32)

    def _gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        if self.limit is None:
            return layer_kernels.gated(gate, up, self.activation)
        gate = jnp.minimum(gate, jnp.asarray(self.limit, gate.dtype))
        limit = jnp.asarray(self.limit, up.dtype)
        up = jnp.clip(up, -limit, limit)
        alpha = jnp.asarray(self.alpha, gate.dtype)
        return (up + jnp.ones((), up.dtype)) * (gate * jax.nn.sigmoid(gate * alpha))


def _keep_best_groups(choice: jax.Array, routing: Routing) -> jax.Array:
    """Scores f32[T, X] with -inf for all experts outside of the selected groups."""
    groups = choice.reshape(len(choice), routing.num_groups, -1)
    number = 1 if routing.group_scores == "max" else 2
    best = jnp.sum(lax.top_k(groups, number)[0], axis=-1)
    _, selected = lax.top_k(best, routing.num_selected_groups)
    is_kept = jnp.zeros(best.shape, bool)
    is_kept = jnp.put_along_axis(is_kept, selected, True, axis=-1, inplace=False)
    return jnp.where(is_kept[..., None], groups, -jnp.inf).reshape(choice.shape)


@jax.custom_vjp
def grouped_matmul(x: jax.Array, weight: jax.Array, counts: jax.Array) -> jax.Array:
    """Multiply consecutive groups of rows, each by its own matrix.

    This is `jax.lax.ragged_dot`, except on CPUs: there XLA expands it to a product with
    every expert (docs/decisions/models.md), so a loop multiplies tiles of rows of one
    expert. Differentiable with respect to `x` and, unless it is int8, `weight`.

    Args:
      x: [T, in]; the first counts[0] rows are multiplied by weight[0], the next
        counts[1] rows by weight[1], and so on.
      weight: [X, in, out].
      counts: i32[X] with sum T.

    Returns:
      [T, out] in the dtype of x, or float32 if the weight is int8.
    """
    return lax.platform_dependent(
        x, weight, counts, cpu=_tiled_matmul, default=_ragged_dot
    )


def _ragged_dot(x: jax.Array, weight: jax.Array, counts: jax.Array) -> jax.Array:
    return lax.ragged_dot(
        x,
        weight.astype(x.dtype),
        counts,
        precision=_precision(x),
        preferred_element_type=_out_dtype(x, weight),
    )


def _tiled_matmul(x: jax.Array, weight: jax.Array, counts: jax.Array) -> jax.Array:
    """`grouped_matmul` as a loop over tiles of rows of one expert."""
    num_rows, in_size = x.shape
    num_experts, _, out_size = weight.shape
    size = 1
    while size < 32 and size * num_experts < num_rows:
        size *= 2
    tiles = cdiv(counts, size)
    tile_ends, row_ends = jnp.cumsum(tiles), jnp.cumsum(counts)
    # A tile may extend past its expert's rows; later tiles overwrite those rows.
    padded = jnp.pad(x, ((0, size), (0, 0)))
    out = jnp.zeros((num_rows + size, out_size), _out_dtype(x, weight))

    def tile(index: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(tile_ends, index, side="right").astype(jnp.int32)
        nth = index - (tile_ends[expert] - tiles[expert])
        start = row_ends[expert] - counts[expert] + nth * size
        product = jnp.matmul(
            lax.dynamic_slice(padded, (start, 0), (size, in_size)),
            weight[expert].astype(x.dtype),
            precision=_precision(x),
            preferred_element_type=out.dtype,
        )
        return lax.dynamic_update_slice(out, product, (start, 0))

    return lax.fori_loop(0, tile_ends[-1], tile, out)[:num_rows]


def _forward(x: jax.Array, weight: jax.Array, counts: jax.Array) -> tuple[Any, Any]:
    return grouped_matmul(x, weight, counts), (x, weight, counts)


def _backward(saved: Any, cotangent: jax.Array) -> tuple[Any, Any, Any]:
    x, weight, counts = saved
    # The trip count of the tiled loop is traced, so JAX cannot transpose the loop.
    no_counts = np.zeros(counts.shape, jax.dtypes.float0)
    if jnp.issubdtype(weight.dtype, jnp.integer):
        _, vjp = jax.vjp(lambda x: _ragged_dot(x, weight, counts), x)
        return *vjp(cotangent), np.zeros(weight.shape, jax.dtypes.float0), no_counts
    _, vjp = jax.vjp(lambda x, weight: _ragged_dot(x, weight, counts), x, weight)
    return *vjp(cotangent), no_counts


grouped_matmul.defvjp(_forward, _backward)


def _out_dtype(x: jax.Array, weight: jax.Array) -> jnp.dtype:
    is_integer = jnp.issubdtype(weight.dtype, jnp.integer)
    return jnp.dtype(jnp.float32) if is_integer else x.dtype


def _precision(x: jax.Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
