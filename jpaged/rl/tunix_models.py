"""Models of tunix as decoders: their configs, and the names of their parameters.

Pipeline: tunix model -> [tunix_models] -> Decoder, `LLM.update_weights`.

tunix's Llama 3, Qwen 2, Qwen 3, Gemma, Gemma 2 and Gemma 3 are read by the names and
shapes of their parameters, without importing tunix. A decoder has the same numbers as
matrices [in, out].

Shape symbols: D hidden size, N query heads, K kv heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder, as_stored

KINDS = ("Llama3", "Qwen2", "Qwen3", "Gemma", "Gemma3")
_LORA_A, _LORA_B = "_lora_a", "_lora_b"
_ARCHITECTURES = {
    "Llama3": "LlamaForCausalLM",
    "Qwen2": "Qwen2ForCausalLM",
    "Qwen3": "Qwen3ForCausalLM",
    "Gemma": "Gemma2ForCausalLM",
    "Gemma3": "Gemma3ForCausalLM",
}
Params = Mapping[str, jax.Array]


def flat_params(tree: Any) -> dict[str, jax.Array]:
    """Return the arrays of a module or a state by name, "layers.0.attn.q_proj.w"."""
    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    found = {}
    for path, leaf in leaves:
        name = ".".join(str(getattr(step, "key", step)) for step in path)
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        found[name.removesuffix(".value")] = value
    return found


def kind_of(model: Any) -> str:
    """Return which of `KINDS` a tunix model is.

    Raises:
      ValueError: none of them.
    """
    name = _class_of(model).__name__
    if name not in KINDS:
        raise ValueError(
            f"rollout_actor: expected a Decoder of jpaged, or a tunix model "
            f"{', '.join(KINDS)}, got {name}; pass decoder= and map_params= for others"
        )
    return name


def _class_of(model: Any) -> type:
    """Return tunix's class of a model; qwix makes subclasses of the same name."""
    own = [each for each in type(model).__mro__ if each.__module__.startswith("tunix.")]
    return own[0] if own else type(model)


def decoder_config(model: Any, max_length: int, eos_token_ids: Any) -> ModelConfig:
    """Return the config of the decoder that computes what a tunix model computes.

    Args:
      model: one of `KINDS`.
      max_length: tokens of the longest sequence.
      eos_token_ids: tokens that end an output.

    Raises:
      ValueError: the model has experts or images.
    """
    kind, config = kind_of(model), model.config
    params = flat_params(model)
    if getattr(config, "num_experts", None) or getattr(config, "vision_config", None):
        raise ValueError(
            "rollout_actor: expected a dense text model, got one with experts or images"
        )
    is_gemma = kind.startswith("Gemma")
    sizes: dict[str, Any] = dict(
        architecture=_ARCHITECTURES[kind],
        vocab_size=config.num_embed if is_gemma else config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.hidden_dim,
        max_position_embeddings=max_length,
        eos_token_ids=tuple(eos_token_ids),
        dtype=str(params["embedder.input_embedding"].dtype),
        tie_word_embeddings="lm_head.w" not in params,
    )
    for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
        sizes[name] = getattr(config, name)
    options = _gemma_options(kind, config) if is_gemma else _llama_options(model)
    return as_stored(ModelConfig(**sizes, **options))


def _llama_options(model: Any) -> dict[str, Any]:
    kind, config = kind_of(model), model.config
    theta = config.rope_theta
    if kind != "Qwen2":
        # These modules do not pass the config's value on; their function's default
        # counts. `JPagedRollout` compares the logits.
        rope = inspect.signature(sys.modules[_class_of(model).__module__].apply_rope)
        theta = rope.parameters["rope_theta"].default
    return dict(
        rope_theta=float(theta),
        norm_eps=config.norm_eps,
        qkv_bias=kind == "Qwen2",
        qk_norm=kind == "Qwen3",
    )


def _gemma_options(kind: str, config: Any) -> dict[str, Any]:
    options: dict[str, Any] = dict(
        activation="gelu_tanh",
        norm="rms_plus_one",
        norm_eps=1e-6,
        scaled_embedding=True,
    )
    if kind == "Gemma":
        kinds = [each.name for each in list(config.attention_types)]
        return options | dict(
            sublayer_norms=config.use_post_attn_norm,
            attention_soft_cap=config.attn_logits_soft_cap,
            logits_soft_cap=config.final_logit_softcap,
            **_windows(kinds[: config.num_layers], config.sliding_window_size),
        )
    kinds = ["LOCAL_SLIDING"] * 5 + ["GLOBAL"]
    kinds = [kinds[i % 6] for i in range(config.num_layers)]
    if (config.local_scale_factor, config.global_scale_factor) != (1.0, 1.0):
        raise ValueError(
            "rollout_actor: expected rotary scale factors of 1, got "
            f"{config.local_scale_factor} and {config.global_scale_factor}"
        )
    scale = config.query_pre_attn_norm.name
    per_head = config.embed_dim // config.num_heads
    return options | dict(
        sublayer_norms=True,
        qk_norm=True,
        rope_theta=float(config.global_base_frequency),
        local_rope_theta=float(config.local_base_frequency),
        attention_scale=per_head**-0.5 if "EMBED_DIM" in scale else None,
        **_windows(kinds, config.sliding_window_size),
    )


def _windows(kinds: list[str], window: int | None) -> dict[str, Any]:
    if window is None:
        return {}
    full = [i for i, kind in enumerate(kinds) if kind != "LOCAL_SLIDING"]
    if len(full) == len(kinds):
        return {}
    return dict(sliding_window=window, full_layers=tuple(full))


# ---- parameters


def _matrix(array: jax.Array, num_inputs: int) -> jax.Array:
    """Join the first `num_inputs` axes, and the others: [in, out]."""
    shape = array.shape
    rows = 1
    for size in shape[:num_inputs]:
        rows *= size
    return array.reshape(rows, -1)


def _heads_first(array: jax.Array) -> jax.Array:
    """[N, D, H] -> [D, N * H]."""
    return _matrix(jnp.swapaxes(array, 0, 1), 1)


Source = tuple[str, Callable[[jax.Array], jax.Array]]


def _same(array: jax.Array) -> jax.Array:
    return array


_LLAMA: dict[str, Source] = {
    "attention_norm.weight": ("input_layernorm.w", _same),
    "mlp_norm.weight": ("post_attention_layernorm.w", _same),
    "attention.query.weight": ("attn.q_proj.w", lambda x: _matrix(x, 1)),
    "attention.key.weight": ("attn.k_proj.w", lambda x: _matrix(x, 1)),
    "attention.value.weight": ("attn.v_proj.w", lambda x: _matrix(x, 1)),
    "attention.query.bias": ("attn.q_bias", jnp.ravel),
    "attention.key.bias": ("attn.k_bias", jnp.ravel),
    "attention.value.bias": ("attn.v_bias", jnp.ravel),
    "attention.out.weight": ("attn.o_proj.w", lambda x: _matrix(x, 2)),
    "attention.query_norm.weight": ("attn.q_norm.w", _same),
    "attention.key_norm.weight": ("attn.k_norm.w", _same),
}
_MLP: dict[str, Source] = {
    f"mlp.{name}.weight": (f"mlp.{name}_proj.kernel", _same)
    for name in ("gate", "up", "down")
}
_GEMMA: dict[str, Source] = {
    "attention_norm.weight": ("pre_attention_norm.scale", _same),
    "mlp_norm.weight": ("pre_ffw_norm.scale", _same),
    "attention_out_norm.weight": ("post_attention_norm.scale", _same),
    "mlp_out_norm.weight": ("post_ffw_norm.scale", _same),
    "attention.query.weight": ("attn.q_einsum.w", _heads_first),
    "attention.key.weight": ("attn.kv_einsum.w", lambda x: _heads_first(x[0])),
    "attention.value.weight": ("attn.kv_einsum.w", lambda x: _heads_first(x[1])),
    "attention.out.weight": ("attn.attn_vec_einsum.w", lambda x: _matrix(x, 2)),
    "attention.query_norm.weight": ("attn._query_norm.scale", _same),
    "attention.key_norm.weight": ("attn._key_norm.scale", _same),
}
_GEMMA_FUSED: dict[str, Source] = {
    f"attention.{name}.weight": ("attn.qkv_einsum.w", lambda x, i=i: _heads_first(x[i]))
    for i, name in enumerate(("query", "key", "value"))
}


def decoder_weights(kind: str, params: Params, names: Any) -> dict[str, jax.Array]:
    """Return a tunix model's parameters as those of its decoder, by name.

    Args:
      kind: of `KINDS`.
      params: from `flat_params`.
      names: names of the decoder's parameters.

    Raises:
      ValueError: a parameter is missing.
    """
    table = (_GEMMA if kind.startswith("Gemma") else _LLAMA) | _MLP
    if kind.startswith("Gemma"):
        if "layers.0.attn.qkv_einsum.w" in params:
            table = table | _GEMMA_FUSED
        if "layers.0.post_attn_norm.scale" in params:
            table["attention_out_norm.weight"] = ("post_attn_norm.scale", _same)
    final = "final_norm.scale" if kind.startswith("Gemma") else "final_norm.w"
    tied = "lm_head.w" not in params
    top: dict[str, Source] = {
        "final_norm.weight": (final, _same),
        "embedding": ("embedder.input_embedding", _same),
        "output.weight": ("embedder.input_embedding", jnp.transpose)
        if tied
        else ("lm_head.w", _same),
        "output.rows": ("embedder.input_embedding", _same)
        if tied
        else ("lm_head.w", jnp.transpose),
    }
    found = {}
    for name in names:
        source, convert = top.get(name, ("", _same))
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            source, convert = table.get(rest, ("", _same))
            source = f"layers.{layer}.{source}"
        if source not in params:
            raise ValueError(
                f"params: expected {source!r} for the decoder's {name!r}, got none "
                f"among {len(params)} parameters of a {kind}"
            )
        found[name] = convert(params[source])
    return found


def with_adapters(base: Params, adapters: Params, alpha: float) -> dict[str, jax.Array]:
    """Return parameters with qwix's adapters added: alpha / rank * a @ b.

    Raises:
      ValueError: an adapter does not fit its parameter.
    """
    result = dict(base)
    for name, a in adapters.items():
        if not name.endswith(_LORA_A):
            continue
        weight = name.removesuffix(_LORA_A)
        b = adapters.get(weight + _LORA_B)
        if weight not in base or b is None:
            raise ValueError(f"params: {name}: expected a weight and both adapters")
        product = jnp.tensordot(
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            axes=1,
            precision=jax.lax.Precision.HIGHEST,
        )
        if product.shape != base[weight].shape:
            raise ValueError(
                f"params: {name}: expected adapters whose product has shape "
                f"{base[weight].shape}, got {product.shape}"
            )
        added = base[weight].astype(jnp.float32) + alpha / a.shape[-1] * product
        result[weight] = added.astype(base[weight].dtype)
    return result


def empty_decoder(config: ModelConfig) -> Decoder:
    """Return a decoder with shapes and without arrays."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
