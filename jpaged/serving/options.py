"""Options: the arguments of `LLM`, checked before anything is loaded.

Pipeline: user -> [options] -> construction. Unsupported values raise ValueError; they
are never replaced by something else.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jpaged import parallel, retention
from jpaged.attention import backends
from jpaged.config import LOGPROBS_MODES, PREEMPTIONS
from jpaged.cpu import library
from jpaged.models.config import DTYPES
from jpaged.models.decoder import Decoder
from jpaged.pages.quantised import PAGE_DTYPES
from jpaged.parallel import distributed
from jpaged.param_checks import MAX_SEED
from jpaged.policies import KINDS, BudgetPolicy, EvictionPolicy, Policy
from jpaged.text.tokenizer import Tokenizer
from jpaged.validation import error, flag, integer, number, one_of


@dataclasses.dataclass(frozen=True)
class LLMOptions:
    """The arguments of `LLM`, see there.

    Raises:
      ValueError: an argument is invalid or unsupported.
    """

    model: str | os.PathLike[str] | Decoder
    dtype: Any
    kv_dtype: Any
    block_size: int
    num_blocks: int | None
    memory_fraction: float
    max_num_seqs: int
    max_model_len: int | None
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    preemption: str
    num_swap_blocks: int
    policy: str | Policy
    policy_parameters: Sequence[float]
    attention: str | None
    mesh: Mesh | None
    seed: Any
    speculative_config: Mapping[str, Any] | None
    tokenizer: str | os.PathLike[str] | Tokenizer | None
    max_num_requests: int | None
    max_num_stop_ids: int
    max_logprobs: int
    max_num_prefixes: int
    max_prompt_chunk: int | None
    watermark: float
    check_invariants: bool
    quantization: str | None
    cascade: bool
    logprobs_mode: str
    batch_invariant: bool
    preemption_policy: str | Policy
    preemption_parameters: Sequence[float]
    eviction_policy: str | EvictionPolicy
    eviction_parameters: Sequence[float]
    budget_policy: str | BudgetPolicy
    budget_parameters: Sequence[float]
    cache_groups: bool
    retention: Any

    def __post_init__(self) -> None:
        """Check the arguments that neither the model nor `EngineConfig` checks."""
        for name, low in _INTEGERS.items():
            self._set(name, integer(name, getattr(self, name), low=low))
        for name in _OPTIONAL_INTEGERS:
            if getattr(self, name) is not None:
                self._set(name, integer(name, getattr(self, name), low=1))
        for name in (
            "enable_prefix_caching",
            "cascade",
            "check_invariants",
            "batch_invariant",
            "cache_groups",
        ):
            self._set(name, flag(name, getattr(self, name)))
        self._set("seed", _seed(self.seed, self.mesh))
        self._set("dtype", _dtype_name("dtype", self.dtype))
        self._set("kv_dtype", _dtype_name("kv_dtype", self.kv_dtype))
        if self.dtype not in ("auto", *DTYPES):
            raise error("dtype", f"'auto' or one of {DTYPES}", self.dtype)
        one_of("kv_dtype", self.kv_dtype, ("auto", *DTYPES, *PAGE_DTYPES))
        self._set("watermark", number("watermark", self.watermark, low=0, high=1))
        for name in (kind.parameters for kind in KINDS):
            self._set(name, _policy_parameters(name, getattr(self, name)))
        # vLLM's names end in "_logprobs".
        mode = str(self.logprobs_mode).removesuffix("_logprobs")
        self._set("logprobs_mode", one_of("logprobs_mode", mode, LOGPROBS_MODES))
        if self.batch_invariant and self.kv_dtype in PAGE_DTYPES:
            raise error(
                "kv_dtype", "a dtype of floats with batch_invariant=True", self.kv_dtype
            )
        if self.retention is not None:
            self._set("retention", retention.find(self.retention))
        self._check_preemption()
        _check_attention(self.attention)
        if self.mesh is not None:
            parallel.check_is_mesh(self.mesh)
        share = number("memory_fraction", self.memory_fraction, above=0, high=1)
        self._set("memory_fraction", share)
        self._check_processes()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_preemption(self) -> None:
        """Raise ValueError for an unknown kind of preemption or a wrong host pool."""
        one_of("preemption", self.preemption, PREEMPTIONS)
        count, with_kind = self.num_swap_blocks, f"with preemption={self.preemption!r}"
        least = 1 if self.preemption == "swap" else 0
        if count < least:
            raise error(
                "num_swap_blocks", f"an integer of at least {least} {with_kind}", count
            )
        if count and self.preemption != "swap":
            raise ValueError(
                f"num_swap_blocks: expected 0 {with_kind}, got {count}; set "
                "preemption='swap' to use them"
            )

    def _check_processes(self) -> None:
        """Raise ValueError if processes that share the mesh have other arguments.

        The folder of the model may differ between hosts, but not its name.
        """
        if not distributed.is_shared(self.mesh):
            return
        if isinstance(self.model, Decoder):
            name = self.model.config
        else:
            name = pathlib.PurePath(str(self.model)).name
        own = {field.name: getattr(self, field.name) for field in _FIELDS}
        distributed.check_same_options({**own, "tokenizer": None, "model": name})


_FIELDS = dataclasses.fields(LLMOptions)
# The integers, with the smallest values.
_INTEGERS = {
    "block_size": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "num_swap_blocks": 0,
    "max_num_stop_ids": 1,
    "max_logprobs": -1,
    "max_num_prefixes": 0,
}
_OPTIONAL_INTEGERS = (
    "num_blocks",
    "max_model_len",
    "max_num_requests",
    "max_prompt_chunk",
)
_DTYPE_ALIASES = {
    "half": "float16",
    "float": "float32",
    "float8_e4m3fn": "fp8",
    "fp8_e4m3": "fp8",
}


def _seed(value: Any, mesh: Mesh | None) -> int:
    """Return a seed; None is a random one."""
    if value is not None:
        return integer("seed", value, low=0, high=MAX_SEED)
    if distributed.is_shared(mesh):
        raise ValueError(
            "seed: expected an integer, because processes that share the mesh need the "
            "same seed, got None"
        )
    return secrets.randbits(32)


def _dtype_name(name: str, value: Any) -> str:
    """Return the name of a dtype: a string, a dtype of NumPy, JAX or torch."""
    if isinstance(value, str):
        return _DTYPE_ALIASES.get(value, value)
    text = str(value)
    if not text.startswith("torch."):
        try:
            if value is None:
                raise TypeError
            text = jnp.dtype(value).name
        except TypeError:
            raise error(name, "the name of a dtype, or a dtype", value) from None
    text = text.removeprefix("torch.")
    return _DTYPE_ALIASES.get(text, text)


def _policy_parameters(name: str, value: Any) -> tuple[float, ...]:
    """Return a policy's numbers, which are float32 on the device."""
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise error(name, "a sequence of numbers", value)
    most = float(jnp.finfo(jnp.float32).max)
    return tuple(
        number(f"{name}[{i}]", one, low=-most, high=most) for i, one in enumerate(value)
    )


def _check_attention(name: str | None) -> None:
    """Raise ValueError for an attention backend that is unknown or cannot run here."""
    if name is None:
        return
    if name not in backends.IMPLEMENTATIONS:
        raise error("attention", f"None or one of {backends.IMPLEMENTATIONS}", name)
    backend = backends.find_backend(name)
    here = jax.default_backend()
    if backend.platform not in (None, here):
        raise ValueError(
            f"attention: expected a backend that runs on {here!r}, got {name!r}, "
            f"which needs a {backend.device}; None chooses the best one"
        )
    if name == "cpu" and (reason := library.problem()):
        raise ValueError(f"attention: 'cpu' is not available: {reason}")
