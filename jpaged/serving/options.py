"""Options: the arguments of `LLM`, checked before anything is loaded.

Pipeline: user -> [options] -> construction. Unsupported values raise ValueError; they
are never replaced by something else.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jpaged import parallel
from jpaged.attention import backends
from jpaged.config import PREEMPTIONS
from jpaged.cpu import library
from jpaged.models.config import DTYPES
from jpaged.models.decoder import Decoder
from jpaged.pages.quantised import PAGE_DTYPES
from jpaged.parallel import distributed
from jpaged.policies import Policy
from jpaged.text.tokenizer import Tokenizer
from jpaged.validation import error, flag, integer, number, one_of


@dataclasses.dataclass(frozen=True)
class LLMOptions:
    """The arguments of `LLM`, see there.

    Raises:
      ValueError: an argument is invalid or unsupported.
    """

    model: str | os.PathLike[str] | Decoder
    dtype: str
    kv_dtype: str
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
    seed: int
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

    def __post_init__(self) -> None:
        """Check the arguments that neither the model nor `EngineConfig` checks."""
        for name in ("block_size", "max_num_seqs"):
            integer(name, getattr(self, name), low=1)
        for name in ("num_blocks", "max_model_len"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), low=1)
        integer("seed", self.seed, low=0)
        one_of("kv_dtype", self.kv_dtype, ("auto", *DTYPES, *PAGE_DTYPES))
        flag("enable_prefix_caching", self.enable_prefix_caching)
        flag("cascade", self.cascade)
        self._check_preemption()
        _check_attention(self.attention)
        if self.mesh is not None:
            parallel.check_is_mesh(self.mesh)
        number("memory_fraction", self.memory_fraction, above=0, high=1)
        self._check_processes()

    def _check_preemption(self) -> None:
        """Raise ValueError for an unknown kind of preemption or a wrong host pool."""
        one_of("preemption", self.preemption, PREEMPTIONS)
        count, with_kind = self.num_swap_blocks, f"with preemption={self.preemption!r}"
        least = 1 if self.preemption == "swap" else 0
        is_integer = isinstance(count, int) and not isinstance(count, bool)
        if not is_integer or count < least:
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
