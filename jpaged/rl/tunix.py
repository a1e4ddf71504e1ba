"""tunix: an LLM as the rollout engine of tunix's learners.

Pipeline: tunix's RLCluster -> [rl.tunix] -> LLM, and back. Needs the extra `tunix`.

    cluster_config = rl_cluster.ClusterConfig(
        rollout_engine=functools.partial(JPagedRollout, max_num_seqs=32), ...)

tunix repeats a prompt for each sample of a group, so the prefix cache is what shares
its blocks. Weights that arrive drop what was cached with older ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpaged.llm import LLM
from jpaged.models.decoder import Decoder
from jpaged.models.layers import causal_attention
from jpaged.params import SamplingParams
from jpaged.rl import tunix_models
from jpaged.serving.weights import named_leaves

try:
    from tunix.rl import common  # pyright: ignore[reportMissingImports]
    from tunix.rl.rollout import (  # pyright: ignore[reportMissingImports]
        base_rollout,
    )
except ImportError as cause:  # pragma: no cover
    raise ImportError(
        "jpaged.rl.tunix needs tunix: pip install 'jpaged[tunix]'"
    ) from cause

_LORA = ("_lora_a", "_lora_b")
# (parameters by name) -> the decoder's weights by name.
MapParams = Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]]


class TunixDecoder(nnx.Module):
    """A Decoder with the call of tunix's models, as actor and reference.

    Args:
      decoder: the decoder that is trained.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    @property
    def config(self) -> Any:
        """The decoder's config."""
        return self.decoder.config

    def __call__(
        self,
        input_tokens: jax.Array,
        positions: jax.Array,
        cache: None = None,
        attention_mask: jax.Array | None = None,
        **others: Any,
    ) -> tuple[jax.Array, None]:
        """Logits f32[B, T, V], and no cache.

        Args:
          input_tokens: i32[B, T].
          positions: i32[B, T].
          cache: None; the LLM generates.
          attention_mask: bool[B, T, T], what each token sees; None: causal.
          **others: `segment_ids` of tunix is part of the mask; others must be None.
        """
        wrong = [k for k, v in others.items() if v is not None and k != "segment_ids"]
        if cache is not None or wrong:
            raise ValueError(
                f"expected no cache, and only tokens, positions and attention_mask, "
                f"got {wrong or 'a cache'}"
            )
        batch, length = input_tokens.shape

        def attend(layer: int, q: jax.Array, k: jax.Array, v: Any) -> jax.Array:
            rows = jax.tree.map(
                lambda x: x.reshape(batch, length, *x.shape[1:]), (q, k, v)
            )
            options = self.decoder.attention_options(layer)
            out = causal_attention(*rows, mask=attention_mask, **options)
            return out.reshape(q.shape)

        hidden = self.decoder.trunk(
            input_tokens.reshape(-1), positions.reshape(-1), attend
        )
        return self.decoder.logits(hidden.reshape(batch, length, -1)), None


class JPagedRollout(base_rollout.BaseRollout):
    """Rollouts with an LLM; see the module.

    Args:
      rollout_actor: the actor: a TunixDecoder, or a model of tunix (Llama 3, Qwen 2,
        Qwen 3, Gemma, Gemma 2, Gemma 3).
      tokenizer: tunix's tokenizer adapter.
      mesh: tunix's mesh. It is kept by the trainer; the LLM has its own, see
        `llm_mesh`.
      rollout_config: tunix's `RolloutConfig`.
      lora_alpha: alpha of qwix's adapters, if the actor has them.
      decoder: a decoder for other models of one's own, with `map_params`.
      map_params: maps the actor's parameters by name to the decoder's.
      llm_mesh: the LLM's mesh.
      check: compare logits of the actor and of the decoder on a few tokens.
      **llm_options: further options of `LLM`.

    Attributes:
      llm: the LLM.

    Raises:
      ValueError: the actor is unknown, or the decoder does not compute its logits.
    """

    def __init__(
        self,
        rollout_actor: Any,
        tokenizer: Any,
        mesh: Any = None,
        rollout_config: Any = None,
        *,
        lora_alpha: float | None = None,
        decoder: Decoder | None = None,
        map_params: MapParams | None = None,
        llm_mesh: Any = None,
        check: bool = True,
        **llm_options: Any,
    ):
        del mesh
        if (decoder is None) != (map_params is None):
            raise ValueError("decoder, map_params: expected both or neither")
        config = rollout_config or base_rollout.RolloutConfig()
        self._actor, self._tokenizer = rollout_actor, tokenizer
        self._lora_alpha, self._map_params = lora_alpha, map_params
        length = config.max_prompt_length + config.max_tokens_to_generate
        self._base = tunix_models.flat_params(rollout_actor)
        self._kind = ""
        with jax.transfer_guard("allow"):
            if decoder is None:
                decoder = self._decoder(rollout_actor, length)
            names = named_leaves(decoder)
            weights = self._weights(self._base, names)
            self._names = list(names)
            model = _filled(decoder, weights)
            if check:
                _check_logits(rollout_actor, model)
            options: dict[str, Any] = dict(
                max_model_len=length, logprobs_mode="processed"
            )
            self.llm = LLM(model, mesh=llm_mesh, **(options | llm_options))

    def _decoder(self, actor: Any, length: int) -> Decoder:
        if isinstance(actor, TunixDecoder):
            return actor.decoder
        self._kind = tunix_models.kind_of(actor)
        config = tunix_models.decoder_config(actor, length, [self.eos_id()])
        return tunix_models.empty_decoder(config)

    def _weights(
        self, params: Mapping[str, jax.Array], names: Any
    ) -> Mapping[str, jax.Array]:
        """Return the decoder's weights from the actor's, adapters added."""
        adapters = {k: v for k, v in params.items() if k.endswith(_LORA)}
        base = {k: v for k, v in params.items() if k not in adapters}
        if adapters:
            if self._lora_alpha is None:
                raise ValueError(
                    "lora_alpha: expected the alpha of the actor's adapters, got None; "
                    "pass functools.partial(JPagedRollout, lora_alpha=...)"
                )
            base = tunix_models.with_adapters(base, adapters, self._lora_alpha)
        if self._map_params is not None:
            return self._map_params(base)
        if isinstance(self._actor, TunixDecoder):
            return {name.removeprefix("decoder."): each for name, each in base.items()}
        return tunix_models.decoder_weights(self._kind, base, names)

    def generate(
        self, prompts: list[str], rollout_config: Any, **kwargs: Any
    ) -> base_rollout.RolloutOutput:
        """Generate one output for each prompt.

        Prompts longer than `max_prompt_length` keep their last tokens.
        """
        del kwargs
        config, most = rollout_config, rollout_config.max_prompt_length
        tokens = [self._encode(text)[-most:] for text in prompts]
        top_k = -1 if config.top_k is None else config.top_k
        seeds: list[int | None] = [None] * len(prompts)
        if config.seed is not None:
            seed = jnp.asarray(config.seed)
            if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
                seed = jax.random.key_data(seed)
            first = int(np.asarray(seed).ravel()[-1])
            seeds = [(first + i) % 2**32 for i in range(len(prompts))]
        params = [
            SamplingParams(
                max_tokens=config.max_tokens_to_generate,
                temperature=config.temperature,
                top_p=1.0 if config.top_p is None else config.top_p,
                top_k=top_k,
                stop_token_ids=config.eos_tokens or [self.eos_id()],
                ignore_eos=bool(config.eos_tokens),
                seed=seed,
            )
            for seed in seeds
        ]
        with jax.transfer_guard("allow"):
            outputs = self.llm.generate(tokens, params, progress=False)
        samples = [output.outputs[0] for output in outputs]
        padded = np.full((len(prompts), most), self.pad_id(), np.int32)
        for row, ids in zip(padded, tokens, strict=True):
            row[most - len(ids) :] = ids
        logprobs: Any = [sample.token_logprobs for sample in samples]
        no_logits: Any = None
        return base_rollout.RolloutOutput(
            text=[self._tokenizer.decode(list(each.token_ids)) for each in samples],
            logits=no_logits,
            tokens=[np.asarray(each.token_ids, np.int32) for each in samples],
            left_padded_prompt_tokens=padded,
            logprobs=logprobs if config.return_logprobs else None,
        )

    def get_per_token_logps(
        self, prompt_tokens: jax.Array, completion_tokens: jax.Array
    ) -> jax.Array:
        """Return log-probabilities f32[B, T] of completions, by the LLM's weights."""
        graph, state = nnx.split(TunixDecoder(self.llm.model))
        return common.compute_per_token_logps(
            graph,
            state,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            pad_id=self.pad_id(),
            eos_id=self.eos_id(),
            stop_gradient=True,
            return_logits=False,
        )

    def update_params(
        self, params: Any, filter_types: tuple[Any, ...] | None = None
    ) -> None:
        """Replace the LLM's weights by the trainer's: all, or adapters alone."""
        del filter_types
        # tunix forbids transfers meanwhile, and an LLM on a CPU copies by the host.
        with jax.transfer_guard("allow"):
            given = tunix_models.flat_params(params)
            if set(given) == set(self._names):  # of `model()`, when tunix moves it
                self.llm.update_weights(given, cast=True)
                return
            is_partial = all(name.endswith(_LORA) for name in given)
            merged = {**self._base, **given}
            if not is_partial:
                self._base = merged
            self.llm.update_weights(dict(self._weights(merged, self._names)), cast=True)

    def pad_id(self) -> int:
        """Return the tokenizer's padding token."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """Return the tokenizer's EOS token."""
        return self._tokenizer.eos_id()

    def _encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with one BOS, as tunix's samplers do."""
        bos, ids = self._tokenizer.bos_id(), list(self._tokenizer.encode(text))
        if not bos:
            return ids or [self.eos_id()]
        start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[start:]]

    def model(self) -> Any:
        """Return the LLM's model; tunix updates weights only if it is not the actor."""
        return self.llm.model


def _filled(decoder: Decoder, weights: Mapping[str, jax.Array]) -> Decoder:
    """Return a decoder with copies of these weights."""
    own = named_leaves(decoder)
    leaves = [jnp.array(weights[name], own[name].dtype) for name in own]
    for leaf, (name, like) in zip(leaves, own.items(), strict=True):
        if leaf.shape != like.shape:
            raise ValueError(
                f"params: expected shape {like.shape} for {name}, got {leaf.shape}"
            )
    return jax.tree.unflatten(jax.tree.structure(decoder), leaves)


def _check_logits(actor: Any, decoder: Decoder) -> None:
    """Raise ValueError if the decoder does not compute the actor's logits."""
    length = min(16, decoder.config.max_position_embeddings)
    tokens = (
        jnp.arange(2, 2 + length, dtype=jnp.int32)[None] % decoder.config.vocab_size
    )
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    mask = jnp.tril(jnp.ones((1, length, length), jnp.bool_))
    expected, _ = actor(tokens, positions, None, mask)
    got = decoder(tokens)
    scale = float(jnp.max(jnp.abs(expected))) + 1.0
    gap = float(jnp.max(jnp.abs(expected.astype(jnp.float32) - got)))
    most = 2e-3 if decoder.config.dtype == "float32" else 5e-2
    if not gap <= most * scale:
        raise ValueError(
            f"rollout_actor: expected a decoder with the actor's logits, got a "
            f"difference of {gap:.2g} (largest logit {scale - 1:.2g}); this version of "
            "tunix may compute another model than its config says. check=False skips "
            "this check"
        )
