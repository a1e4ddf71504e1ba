"""Construction: creates the model, engine and batcher of an LLM from its options.

Pipeline: options -> [construction] -> llm. Host only.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jpaged.attention import backends
from jpaged.config import EngineConfig, Speculation
from jpaged.engine import replicas
from jpaged.engine.limits import Params
from jpaged.kv import cache_groups
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.models.loading import checkpoint, sources
from jpaged.models.loading.checkpoint import load_model
from jpaged.pages.quantised import page_dtype
from jpaged.parallel import distributed
from jpaged.policies import KINDS
from jpaged.serving import memory
from jpaged.serving.batcher import Batcher
from jpaged.serving.engine_host import EngineHost
from jpaged.serving.intake import grown_config
from jpaged.serving.options import LLMOptions
from jpaged.text.tokenizer import Tokenizer
from jpaged.validation import error

# Entries of the engine's timeline: its last events and steps, which the host reads
# after each slice.
NUM_RECORDED_EVENTS = 4096
NUM_RECORDED_STEPS = 1024
_SPECULATIVE_KEYS = (
    "method",
    "model",
    "num_speculative_tokens",
    "prompt_lookup_min",
    "prompt_lookup_max",
)


@dataclasses.dataclass(frozen=True)
class LLMParts:
    """The parts of an LLM."""

    model: Decoder
    tokenizer: Tokenizer | None
    name: str  # of the model, for `repr`
    kv_dtype: str
    host: EngineHost
    batcher: Batcher


def build_parts(options: LLMOptions) -> LLMParts:
    """Load the model and create the engine.

    Raises:
      ValueError: an option does not fit the model or the memory.
      FileNotFoundError: the model's folder does not exist or is not a checkpoint.
    """
    if options.attention is not None and isinstance(options.model, str | os.PathLike):
        config = checkpoint.load_config(os.fspath(options.model))
        _check_attention(config, options)
    model, tokenizer, name = load_decoder(
        options.model,
        options.dtype,
        options.tokenizer,
        options.quantization,
        options.mesh,
    )
    kv_dtype = options.kv_dtype
    if kv_dtype == "auto":
        kv_dtype = model.config.dtype
    speculation, draft = load_speculation(
        options.speculative_config, model, options.mesh
    )
    # Retention drops blocks of all layers.
    is_grouped = options.cache_groups and options.retention is None
    chunk = options.max_num_batched_tokens
    chunk = min(options.max_prompt_chunk or chunk, chunk)
    num_drafts = 0 if speculation is None else speculation.num_tokens
    num_blocks, max_model_len = memory.choose_sizes(
        model,
        draft,
        is_grouped=is_grouped,
        chunk=max(chunk, 1 + num_drafts),
        block_size=options.block_size,
        kv_dtype=kv_dtype,
        num_blocks=options.num_blocks,
        memory_fraction=options.memory_fraction,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        attention=options.attention,
        mesh=options.mesh,
        retention=options.retention,
    )
    for each in (model, draft):
        if each is not None:
            _check_attention(each.config, options)
    if options.batch_invariant:
        _check_invariant(model, options.mesh)
    groups = cache_groups.choose_groups(
        model.config.windows,
        max_model_len,
        is_grouped,
        () if draft is None else draft.config.windows,
    )
    config = _engine_config(
        options, num_blocks, max_model_len, speculation, groups.windows
    )
    host = EngineHost(
        model,
        config,
        draft=draft,
        kv_dtype=kv_dtype,
        mesh=options.mesh,
        seed=options.seed,
        check_invariants=options.check_invariants,
    )
    vocab_size, max_num_requests = model.config.vocab_size, options.max_num_requests

    # The function must not refer to the LLM: the LLM's memory is freed as soon as its
    # last user releases it.
    def grow(config: EngineConfig, params: Sequence[Params]) -> EngineConfig:
        return _with_table_size(
            grown_config(config, params, vocab_size), max_num_requests
        )

    return LLMParts(model, tokenizer, name, kv_dtype, host, Batcher(host, grow))


def _check_attention(config: ModelConfig, options: LLMOptions) -> None:
    """Raise ValueError if a chosen backend has no kernel for the model's pages.

    Before the weights are loaded. What depends on sizes is checked with the pages.
    """
    if options.attention is None or config.latent is None:
        return
    dtype = config.dtype if options.kv_dtype == "auto" else options.kv_dtype
    shape = (1, 1, 1, options.block_size, config.head_dim)
    pages = jax.ShapeDtypeStruct(shape, page_dtype(dtype))
    backend = backends.find_backend(options.attention)
    if reason := backend.problem(pages, None, is_latent=True):
        raise ValueError(
            f"attention: expected None or a backend that serves {config.architecture}, "
            f"got {options.attention!r}: {reason}"
        )


def _check_invariant(model: Decoder, mesh: Mesh | None) -> None:
    """Raise ValueError if `batch_invariant` does not support the model or the mesh."""
    if model.config.latent is not None:
        raise ValueError(
            "batch_invariant: expected False for a model with latent attention, whose "
            "products of heads depend on the batch, got True"
        )
    if model.config.num_experts:
        raise ValueError(
            "batch_invariant: expected False for a model with experts, whose groups of "
            "tokens depend on the batch, got True"
        )
    if mesh is not None and mesh.shape["tensor"] > 1:
        raise ValueError(
            "batch_invariant: expected False on a mesh with tensor="
            f"{mesh.shape['tensor']}, because sums over devices have an order of their "
            "own, got True"
        )


def _engine_config(
    options: LLMOptions,
    num_blocks: int,
    max_model_len: int,
    speculation: Speculation | None,
    group_windows: cache_groups.Windows,
) -> EngineConfig:
    """Return the engine's config, without the features that requests add to it."""
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_requests=options.max_num_requests
        or options.max_num_seqs + options.max_num_prefixes,
        max_num_prefixes=options.max_num_prefixes,
        max_num_stop_ids=options.max_num_stop_ids,
        **_policies(options),
        preemption=options.preemption,
        num_swap_blocks=options.num_swap_blocks * len(group_windows),
        group_windows=group_windows,
        max_prompt_chunk=options.max_prompt_chunk,
        watermark=options.watermark,
        enable_prefix_caching=options.enable_prefix_caching,
        attention=options.attention,
        cascade=options.cascade,
        logprobs_mode=options.logprobs_mode,
        batch_invariant=options.batch_invariant,
        speculation=speculation,
        num_recorded_events=NUM_RECORDED_EVENTS,
        num_recorded_steps=NUM_RECORDED_STEPS,
        retention=options.retention,
    )
    if config.reads_clock and distributed.is_shared(options.mesh):
        raise ValueError(
            "policy: expected policies that do not read ages or times_left, because "
            "processes that share the mesh have different clocks, got "
            f"{_policies(options)}"
        )
    return _with_table_size(config, options.max_num_requests)


def _policies(options: LLMOptions) -> dict[str, Any]:
    """Return the policies and their parameters, as fields of the engine's config."""
    names = [name for kind in KINDS for name in (kind.argument, kind.parameters)]
    return {name: getattr(options, name) for name in names}


def _with_table_size(
    config: EngineConfig, max_num_requests: int | None
) -> EngineConfig:
    """Return `config` with the default size of the request table if none is set."""
    if max_num_requests is not None:
        return config
    size = memory.max_table_size(
        config.num_rows,
        config.max_model_len,
        config.num_logprobs,
        config.num_mask_words,
    )
    return dataclasses.replace(config, max_num_requests=size)


def load_decoder(
    model: Any,
    dtype: str,
    tokenizer: Any,
    quantization: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Decoder, Tokenizer | None, str]:
    """Return the Decoder, on the mesh if there is one, its tokenizer and its name.

    Args:
      model: as for `LLM`.
      dtype: as for `LLM`.
      tokenizer: see `read_tokenizer`; None is the model folder's.
      quantization: as for `LLM`.
      mesh: as for `LLM`.

    Raises:
      ValueError: an argument does not fit the model.
      FileNotFoundError: the folder does not exist or is not a checkpoint.
    """
    given = read_tokenizer(tokenizer)
    if isinstance(model, Decoder):
        decoder, name = _placed_decoder(model, dtype, quantization, mesh)
    elif isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        if not name:
            raise error("model", "a folder or a name", name)
        folder = name if sources.is_random(name) else sources.find_checkpoint(name)
        decoder = load_model(folder, dtype, quantization=quantization, mesh=mesh)
        if given is None and not sources.is_random(name):
            return decoder, Tokenizer.from_folder(folder), name
    else:
        raise ValueError(
            "model: expected a folder, a hub id, the name of a bundled model, "
            "'random:' and the name of a shape, or a Decoder, got "
            f"{model!r:.80} ({type(model).__name__})"
        )
    return decoder, given, name


def read_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """Return the tokenizer that a user asks for; None if he asks for none.

    Args:
      tokenizer: a Tokenizer, or a folder, a file or a name, as of a model.

    Raises:
      ValueError: it is none of these, or there is no tokenizer.json.
      FileNotFoundError: there is no such folder.
    """
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not isinstance(tokenizer, str | os.PathLike):
        expected = "a folder with tokenizer.json, or a jpaged.text.tokenizer.Tokenizer"
        raise error("tokenizer", expected, tokenizer)
    folder = pathlib.Path(tokenizer).expanduser()
    try:
        found = folder if folder.is_dir() else sources.find_checkpoint(tokenizer)
    except FileNotFoundError as cause:
        text = str(cause).removeprefix("model: ")
        raise FileNotFoundError(f"tokenizer: {text}") from cause
    read = Tokenizer.from_folder(found)
    if read is None:
        raise ValueError(
            f"tokenizer: expected a folder with tokenizer.json, got {found} without it"
        )
    return read


def _placed_decoder(
    model: Decoder, dtype: str, quantization: str | None, mesh: Mesh | None
) -> tuple[Decoder, str]:
    """Return a user's Decoder, on the mesh if there is one, and its name."""
    config = model.config
    for argument, value, own in (
        ("dtype", None if dtype == "auto" else dtype, config.dtype),
        ("quantization", quantization, config.quantization),
    ):
        if value not in (None, own):
            raise ValueError(
                f"{argument}: expected the Decoder's own ({own!r}), got {value!r}; "
                f"pass {argument} to load_model instead"
            )
    devices = {d for leaf in jax.tree.leaves(model) for d in leaf.devices()}
    if mesh is None and len(devices) > 1:
        raise ValueError(
            f"mesh: expected the mesh of the Decoder, which is on {len(devices)} "
            "devices, got None"
        )
    decoder = model if mesh is None else replicas.shard_model(model, mesh)
    return decoder, config.architecture


def load_speculation(
    config: Mapping[str, Any] | None, target: Decoder, mesh: Mesh | None = None
) -> tuple[Speculation | None, Decoder | None]:
    """Return the speculation that `LLM(speculative_config=...)` asks for.

    Args:
      config: a dict with keys among `_SPECULATIVE_KEYS`; None is no speculation.
      target: the model whose tokens are guessed.
      mesh: devices for the draft model.

    Returns:
      The speculation, and its draft model if `config` names one.

    Raises:
      ValueError: a key is unknown or contradicts another, or the draft model has
        another vocabulary.
    """
    if config is None:
        return None, None
    name = "speculative_config"
    if not isinstance(config, Mapping) or set(config) - set(_SPECULATIVE_KEYS):
        raise error(name, f"a dict with keys among {_SPECULATIVE_KEYS}", config)
    model = config.get("model")
    method = config.get("method", "ngram" if model is None else "draft_model")
    if method not in ("ngram", "draft_model"):
        raise error(f"{name}['method']", "'ngram' or 'draft_model'", method)
    if (model is None) != (method == "ngram"):
        raise ValueError(
            f"{name}['model']: expected a model with method 'draft_model' and none "
            f"with 'ngram', got {model!r:.80} with {method!r}"
        )
    lookup = {
        ours: config[key]
        for ours, key in (
            ("min_ngram", "prompt_lookup_min"),
            ("max_ngram", "prompt_lookup_max"),
        )
        if key in config
    }
    if lookup and model is not None:
        raise ValueError(
            f"{name}: expected no prompt_lookup_* with a draft model, got "
            f"{dict(config)!r:.200}"
        )
    num_tokens = config.get("num_speculative_tokens", 4)
    if model is None:
        return Speculation("prompt_lookup", num_tokens, **lookup), None
    draft, _, draft_name = load_decoder(model, target.config.dtype, None, mesh=mesh)
    own, expected = draft.config.vocab_size, target.config.vocab_size
    if own != expected:
        raise ValueError(
            f"{name}['model']: expected the target model's vocabulary of {expected} "
            f"tokens, got {own} ({draft_name}); use a smaller model of the same family"
        )
    return Speculation("model", num_tokens), draft
