"""Options: the arguments of `LLM`, checked, and the model that they name.

Place on the road: user -> [options] -> llm. What does not exist is refused, never
replaced by something else.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jpaged import parallel
from jpaged.attention import backends
from jpaged.config import PREEMPTIONS, Speculation
from jpaged.engine import replicas
from jpaged.models.config import DTYPES
from jpaged.models.decoder import Decoder
from jpaged.models.loading import sources
from jpaged.models.loading.checkpoint import load_model
from jpaged.pages.quantised import PAGE_DTYPES
from jpaged.parallel import distributed
from jpaged.text.tokenizer import Tokenizer


def check_sizes(seed: Any, **sizes: Any) -> None:
    """Raises ValueError for sizes that are no integers above 0, or a wrong seed."""
    for name, value in sizes.items():
        is_open = value is None and name in ("num_blocks", "max_model_len")
        if not is_open and not _is_integer(value, least=1):
            raise ValueError(f"{name}: wanted an integer of at least 1, got {value!r}")
    if not _is_integer(seed, least=0):
        raise ValueError(f"seed: wanted an integer of at least 0, got {seed!r}")


def _is_integer(value: Any, least: int) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and value >= least


def check_choices(
    *,
    kv_dtype: Any,
    enable_prefix_caching: Any,
    preemption: Any,
    num_swap_blocks: Any,
    attention: Any,
    cascade: Any,
    mesh: Any,
    memory_fraction: Any,
) -> None:
    """Raises ValueError for what does not exist, or not yet."""
    kv_dtypes = ("auto", *DTYPES, *PAGE_DTYPES)
    if kv_dtype not in kv_dtypes:
        raise ValueError(f"kv_dtype: wanted one of {kv_dtypes}, got {kv_dtype!r}")
    if not isinstance(enable_prefix_caching, bool):
        raise ValueError(
            f"enable_prefix_caching: wanted True or False, got "
            f"{enable_prefix_caching!r}"
        )
    if preemption not in PREEMPTIONS:
        raise ValueError(f"preemption: wanted one of {PREEMPTIONS}, got {preemption!r}")
    least = 1 if preemption == "swap" else 0
    if not _is_integer(num_swap_blocks, least=0) or num_swap_blocks < least:
        raise ValueError(
            f"num_swap_blocks: wanted an integer of at least {least} with "
            f"preemption={preemption!r}, got {num_swap_blocks!r}"
        )
    if num_swap_blocks and preemption != "swap":
        raise ValueError(
            f"num_swap_blocks: wanted 0 with preemption={preemption!r}, got "
            f"{num_swap_blocks}; take preemption='swap' to use them"
        )
    _check_attention(attention)
    if not isinstance(cascade, bool):
        raise ValueError(f"cascade: wanted True or False, got {cascade!r}")
    if mesh is not None:
        parallel.check_is_mesh(mesh)
    is_number = isinstance(memory_fraction, int | float)
    if not is_number or not 0 < memory_fraction <= 1:
        raise ValueError(
            f"memory_fraction: wanted a share above 0 and up to 1, got "
            f"{memory_fraction!r}"
        )


def _check_attention(name: Any) -> None:
    """Raises ValueError for a backend that does not exist or needs another device."""
    if name is None:
        return
    if name not in backends.IMPLEMENTATIONS:
        raise ValueError(
            f"attention: expected None or one of {backends.IMPLEMENTATIONS}, "
            f"got {name!r}"
        )
    backend = backends.find_backend(name)
    if backend.platform not in (None, jax.default_backend()):
        raise ValueError(
            f"attention: {name!r} needs a {backend.device}, and this process's backend "
            f"is {jax.default_backend()!r}; use None for the best one here"
        )


def check_alike(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError where processes that share the mesh have other arguments.

    A folder may lie elsewhere on another host, but its name is the same.
    """
    if not distributed.is_shared(arguments["mesh"]):
        return
    model = arguments["model"]
    is_decoder = isinstance(model, Decoder)
    name = model.config if is_decoder else pathlib.PurePath(str(model)).name
    alike = {"self": None, "tokenizer": None, "model": name}
    distributed.check_alike({**arguments, **alike})


def load(
    model: Any,
    dtype: str,
    tokenizer: Any,
    quantization: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Decoder, Tokenizer | None, str]:
    """Decoder, on the mesh if there is one, tokenizer and a name to show."""
    if isinstance(model, Decoder):
        config = model.config
        for argument, value, own in (
            ("dtype", None if dtype == "auto" else dtype, config.dtype),
            ("quantization", quantization, config.quantization),
        ):
            if value not in (None, own):
                raise ValueError(
                    f"{argument}: wanted the Decoder's own ({own!r}), got {value!r}; "
                    f"load_model takes a {argument}"
                )
        devices = {d for leaf in jax.tree.leaves(model) for d in leaf.devices()}
        if mesh is None and len(devices) > 1:
            raise ValueError(
                "mesh: wanted the one that the Decoder lies on, which has "
                f"{len(devices)} devices, got None"
            )
        decoder, name = model, config.architecture
        if mesh is not None:
            decoder = replicas.spread(model, mesh)
    elif isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        if sources.is_random(name):
            decoder = load_model(name, dtype, quantization=quantization, mesh=mesh)
        else:
            folder = sources.find(name)
            decoder = load_model(folder, dtype, quantization=quantization, mesh=mesh)
            tokenizer = folder if tokenizer is None else tokenizer
    else:
        raise ValueError(
            "model: wanted a folder, a hub id, the name of a bundled model, 'random:' "
            f"and a shape, or a Decoder, got {model!r:.80} ({type(model).__name__})"
        )
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_folder(tokenizer)
    if tokenizer is not None:
        tokenizer.check_fits(decoder.config.vocab_size)
    return decoder, tokenizer, name


_SPECULATIVE_KEYS = (
    "method",
    "model",
    "num_speculative_tokens",
    "prompt_lookup_min",
    "prompt_lookup_max",
)


def speculation(
    params: Mapping[str, Any] | None, target: Decoder, mesh: Mesh | None = None
) -> tuple[Speculation | None, Decoder | None]:
    """What `LLM(speculative_config=...)` asks for, and the draft model if it names one.

    Raises:
      ValueError: an unknown or contradictory key, or another vocabulary.
    """
    if params is None:
        return None, None
    if not isinstance(params, Mapping) or set(params) - set(_SPECULATIVE_KEYS):
        raise ValueError(
            f"speculative_config: wanted a dict with keys among {_SPECULATIVE_KEYS}, "
            f"got {params!r:.200}"
        )
    model = params.get("model")
    method = params.get("method", "ngram" if model is None else "draft_model")
    if method not in ("ngram", "draft_model"):
        raise ValueError(
            "speculative_config['method']: wanted 'ngram' or 'draft_model', got "
            f"{method!r}"
        )
    if (model is None) != (method == "ngram"):
        raise ValueError(
            "speculative_config['model']: wanted a model with method 'draft_model' "
            f"and none with 'ngram', got {model!r:.80} with {method!r}"
        )
    lookup = {
        ours: params[name]
        for ours, name in (
            ("min_ngram", "prompt_lookup_min"),
            ("max_ngram", "prompt_lookup_max"),
        )
        if name in params
    }
    if lookup and model is not None:
        raise ValueError(
            "speculative_config: wanted no prompt_lookup_* with a draft model, got "
            f"{dict(params)!r:.200}"
        )
    number = params.get("num_speculative_tokens", 4)
    if model is None:
        return Speculation("prompt_lookup", number, **lookup), None
    draft, _, name = load(model, target.config.dtype, None, mesh=mesh)
    sizes = (draft.config.vocab_size, target.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"speculative_config['model']: wanted the model's vocabulary of {sizes[1]} "
            f"tokens, got {sizes[0]} ({name}); take a smaller model of the same family"
        )
    return Speculation("model", number), draft
