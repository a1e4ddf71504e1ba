"""Multi-head latent attention: keys and values of all heads from one vector per token.

Pipeline: decoder -> [models.latent] -> attention over latent pages.

A token's latent is a vector of `rank` numbers, from which each head's key and value are
linear maps, and behind it the rotated key that all heads share. Only the latent is
stored in pages. Keys and values are never computed: a head's query is mapped to the
latent's space before attention (q . (U c) = (U^T q) . c), and the mean of the latents
to the head's value after it. To attention, this is one key/value head whose values are
the first numbers of its keys.

Shape symbols: T tokens, H query heads, E hidden size, N, P and V sizes of a head's
query without and with rotation and of its value, R rank of the latent, D = R + P.

Source: DeepSeek-AI 2024, section 2.1 and appendix C, https://arxiv.org/abs/2405.04434.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jpaged.models import rotary
from jpaged.models.config import ModelConfig
from jpaged.models.invariant import settled
from jpaged.models.layers import Linear, RMSNorm, apply_all, random_param

# Of the norms inside attention, whatever `norm_eps` says, as in transformers.
_EPS = 1e-6


class LatentAttention(nnx.Module):
    """The projections around attention over latents; see the module's docstring."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        sizes = config.latent
        assert sizes is not None
        self.sizes, self.sinks = sizes, None
        hidden, num_heads = config.hidden_size, config.num_heads
        q_size = num_heads * (sizes.nope_dim + sizes.rope_dim)
        has_rank = sizes.query_rank is not None
        source = sizes.query_rank if sizes.query_rank is not None else hidden
        own = {"config": config, "rngs": rngs}
        down = {"use_bias": config.qkv_bias, **own}
        self.query_down = Linear(hidden, source, **down) if has_rank else None
        self.query_down_norm = RMSNorm(source, config, _EPS) if has_rank else None
        query = Linear(source, q_size, use_bias=False, **own)
        self.query, self.query_up = (None, query) if has_rank else (query, None)
        self.latent = Linear(hidden, sizes.rank + sizes.rope_dim, **down)
        self.latent_norm = RMSNorm(sizes.rank, config, _EPS)
        self.key_up = random_param((num_heads, sizes.nope_dim, sizes.rank), **own)
        self.value_up = random_param((num_heads, sizes.value_dim, sizes.rank), **own)
        self.out = Linear(
            num_heads * sizes.value_dim,
            hidden,
            use_bias=config.out_bias,
            part="attention.out",
            **own,
        )

    def project(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, None]:
        """q [T, H, D] and latents [T, 1, D] of x [T, E]; there are no values."""
        assert angles is not None
        sizes, num_tokens = self.sizes, x.shape[0]
        if self.query is not None:
            q, latent = apply_all([self.query, self.latent], x)
        else:
            assert self.query_down is not None
            assert self.query_down_norm is not None
            assert self.query_up is not None
            down, latent = apply_all([self.query_down, self.latent], x)
            q = self.query_up(self.query_down_norm(down))
        q = q.reshape(num_tokens, -1, sizes.nope_dim + sizes.rope_dim)
        latent = latent[:, None]

        def rotated(x: jax.Array) -> jax.Array:
            return rotary.rotate(x, *angles, is_interleaved=sizes.interleaved)

        mapped = _per_head("thn,hnr->thr", q[..., : sizes.nope_dim], self.key_up[...])
        q = jnp.concatenate([mapped, rotated(q[..., sizes.nope_dim :])], axis=-1)
        normed = self.latent_norm(latent[..., : sizes.rank])
        k = jnp.concatenate([normed, rotated(latent[..., sizes.rank :])], axis=-1)
        q, k = settled((q, k))
        return q, k, None

    def merge(self, attended: jax.Array) -> jax.Array:
        """Output [T, E] for the residual stream, from the heads' latents [T, H, D]."""
        latents = attended[..., : self.sizes.rank]
        values = _per_head("thr,hvr->thv", latents, self.value_up[...])
        return self.out(values.reshape(values.shape[0], -1))


def _per_head(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    is_full = weight.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if is_full else None
    return jnp.einsum(spec, x, weight, precision=precision)
