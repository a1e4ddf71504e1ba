"""Configuration of the engine: one frozen dataclass; invalid values raise at once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jpaged import policies
from jpaged.arithmetic import cdiv

PREEMPTIONS = ("recompute", "swap")
_MAY_BE_ZERO = (
    "num_logprobs",
    "max_num_prefixes",
    "max_beam_width",
    "num_swap_blocks",
    "num_recorded_events",
    "num_recorded_steps",
)


DRAFT_METHODS = ("prompt_lookup", "model")


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How the engine guesses tokens ahead of the model (`jpaged.speculation`).

    Attributes:
      method: "prompt_lookup": from the sequence's own text; "model": by a smaller one.
      num_tokens: drafts of a row and step, at most.
      min_ngram, max_ngram: last tokens that prompt lookup looks for.

    Raises:
      ValueError: a value is none of these.
    """

    method: str = "prompt_lookup"
    num_tokens: int = 4
    min_ngram: int = 1
    max_ngram: int = 3

    def __post_init__(self) -> None:
        if self.method not in DRAFT_METHODS:
            raise ValueError(
                f"method: expected one of {DRAFT_METHODS}, got {self.method!r}"
            )
        for name in ("num_tokens", "min_ngram", "max_ngram"):
            _check_integer(name, getattr(self, name), least=1)
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                f"min_ngram: expected at most max_ngram ({self.max_ngram}), got "
                f"{self.min_ngram}"
            )


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name}: expected an integer of at least {least}, got {value!r}"
        )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The sizes that fix the engine's shapes, and the scheduler's choices.

    Attributes:
      num_blocks: physical KV blocks in the pool.
      block_size: tokens per block.
      max_num_seqs: rows, the sequences that can run at the same time.
      max_model_len: tokens of the longest sequence, prompt and output together.
      max_num_batched_tokens: tokens of one step, prompt chunks and decode tokens.
      max_num_requests: places in the request table, waiting and running together.
      max_num_stop_ids: token ids that can end one request, EOS included.
      num_logprobs: most likely tokens kept with each generated token; 0 keeps only
        the generated token's own log-probability.
      prompt_logprobs: requests may ask for the log-probabilities of their prompts.
      max_prompt_chunk: tokens of one prompt in one step, at most; None has no limit but
        the step's own.
      policy: who is admitted first: a name of `policies.POLICIES`, or a function.
        Requests' priorities count only under "priority", "weighted" and functions.
      policy_parameters: numbers that the policy reads (`policies.Waiting.parameters`).
      watermark: share of the blocks that admission leaves free while others run.
      preemption: what happens to the blocks of sequences that must give them back:
        "recompute" forgets them, "swap" keeps them in the host's memory.
      num_swap_blocks: blocks of the host's pool, with preemption="swap". Sequences for
        which it has no room are computed again.
      enable_prefix_caching: keep the blocks of ended sequences while there is room,
        for others that begin alike (`prefix_cache`).
      attention: implementation of paged attention; None is the backend's best.
      cascade: rows that begin with the same blocks read them together, where that pays
        (`jpaged.shared_prefix`).
      max_num_prefixes: pinned prefixes at the same time; each takes a row beside
        `max_num_seqs`, and its blocks.
      max_beam_width: rows of the widest beam search; 0 compiles none.
      rules: room for the logits rules of requests (penalties, biases, ...), a
        RuleSizes; None compiles none.
      automata: room for what structured output compiles to, an AutomataSizes; None
        compiles none.
      speculation: how tokens are guessed ahead; None does not.
      algorithms: further decoding algorithms, each with its number of rows: pairs
        (DecodingAlgorithm, num_rows). Compiled into the step.
      num_recorded_events, num_recorded_steps: the last events and steps that the state
        keeps for whoever looks (`jpaged.timeline`); 0 keeps none.

    Raises:
      ValueError: a size is too small for another, or the policy is unknown.
    """

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 64
    max_model_len: int = 2048
    max_num_batched_tokens: int = 512
    max_num_requests: int = 256
    max_num_stop_ids: int = 8
    num_logprobs: int = 0
    prompt_logprobs: bool = False
    max_prompt_chunk: int | None = None
    policy: str | policies.Policy = "fcfs"
    policy_parameters: tuple[float, ...] = ()
    watermark: float = 0.01
    preemption: str = "recompute"
    num_swap_blocks: int = 0
    enable_prefix_caching: bool = False
    attention: str | None = None
    cascade: bool = False
    max_num_prefixes: int = 0
    max_beam_width: int = 0
    rules: Any = None
    automata: Any = None
    speculation: Speculation | None = None
    algorithms: tuple[tuple[Any, int], ...] = ()
    num_recorded_events: int = 0
    num_recorded_steps: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_ZERO else 1
            if field.type != "int":
                continue
            _check_integer(field.name, value, least)
        self._check_parameters()
        if self.max_prompt_chunk is not None:
            _check_integer("max_prompt_chunk", self.max_prompt_chunk, least=1)
        if not 0 <= self.watermark < 1:
            raise ValueError(
                f"watermark: expected a share from 0 to below 1, got {self.watermark!r}"
            )
        self._check_preemption()
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens: expected at least max_num_seqs "
                f"({self.max_num_seqs}), for every running sequence decodes one token "
                f"a step, got {self.max_num_batched_tokens}; raise it, or lower "
                "max_num_seqs"
            )
        if self.max_num_requests < self.num_rows:
            raise ValueError(
                f"max_num_requests: expected at least max_num_seqs and "
                f"max_num_prefixes together ({self.num_rows}), got "
                f"{self.max_num_requests}"
            )
        if self.max_beam_width > self.max_num_seqs:
            raise ValueError(
                f"max_beam_width: expected at most max_num_seqs ({self.max_num_seqs}), "
                f"for all beams run in one batch, got {self.max_beam_width}"
            )
        for algorithm, num_rows in self.algorithms:
            if not 1 <= num_rows <= self.max_num_seqs:
                raise ValueError(
                    f"algorithms: expected from 1 to max_num_seqs "
                    f"({self.max_num_seqs}) rows, got {num_rows} for {algorithm!r}"
                )

    def _check_parameters(self) -> None:
        given = self.policy_parameters
        if not isinstance(given, tuple) or not all(
            isinstance(one, int | float) and math.isfinite(one) for one in given
        ):
            raise ValueError(
                f"policy_parameters: expected a tuple of finite numbers, got {given!r}"
            )
        policies.check(self.policy, given)

    def _check_preemption(self) -> None:
        if self.preemption not in PREEMPTIONS:
            raise ValueError(
                f"preemption: expected one of {PREEMPTIONS}, got {self.preemption!r}"
            )
        if self.swaps and not self.num_swap_blocks:
            raise ValueError(
                "num_swap_blocks: expected at least 1 with preemption='swap', got 0; "
                "give the host's pool blocks, or take preemption='recompute'"
            )
        if self.num_swap_blocks and not self.swaps:
            raise ValueError(
                "num_swap_blocks: expected 0 with preemption='recompute', got "
                f"{self.num_swap_blocks}; take preemption='swap' to use them"
            )

    @property
    def swaps(self) -> bool:
        """Whether preempted sequences keep their blocks in the host's memory."""
        return self.preemption == "swap"

    def limits(self, num_seqs: int, num_tokens: int) -> tuple[int, int]:
        """Lower (max_num_seqs, max_num_batched_tokens) that serve a small load as well.

        A few classes, so that a program is compiled for each at most once: 1, 8 or all
        rows; and at most 64 tokens a step where all prompts together have no more.
        Never fewer rows than a beam search or an algorithm of the config takes.
        """
        widest = max((rows for _, rows in self.algorithms), default=0)
        num_seqs = max(num_seqs, widest, self.max_beam_width)
        seqs = next((n for n in (1, 8) if num_seqs <= n), self.max_num_seqs)
        seqs = min(seqs, self.max_num_seqs)
        tokens = self.max_num_batched_tokens
        return seqs, min(64, tokens) if max(num_tokens, seqs) <= 64 else tokens

    @property
    def num_rows(self) -> int:
        """Rows of the block tables: of running sequences, and of pinned prefixes."""
        return self.max_num_seqs + self.max_num_prefixes

    @property
    def max_blocks_per_seq(self) -> int:
        """Width of the block tables."""
        return cdiv(self.max_model_len, self.block_size)

    @property
    def largest_chunk(self) -> int:
        """Tokens of one prompt in one step, at most."""
        return min(
            self.max_prompt_chunk or self.max_num_batched_tokens,
            self.max_num_batched_tokens,
        )

    @property
    def uses_priorities(self) -> bool:
        """Whether requests' priorities count."""
        return callable(self.policy) or self.policy in ("priority", "weighted")

    @property
    def num_watermark_blocks(self) -> int:
        """Blocks that admission leaves free while others run."""
        return int(self.watermark * self.num_blocks)

    @property
    def scheduler_params(self) -> policies.SchedulerParams:
        """The scheduler's numbers as arrays."""
        return policies.SchedulerParams(
            parameters=jnp.array(self.policy_parameters, jnp.float32),
            num_watermark_blocks=jnp.int32(self.num_watermark_blocks),
            max_num_seqs=jnp.int32(self.max_num_seqs),
            max_num_batched_tokens=jnp.int32(self.max_num_batched_tokens),
            max_prompt_chunk=jnp.int32(self.largest_chunk),
        )

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Numbers of rows for which a decode step is compiled, rising.

        Powers of two, with one step between from 16 on, where a row costs time; one
        size for up to four rows, which cost hardly more than one, and compile sooner.
        """
        if self.max_num_seqs <= 4:
            return (self.max_num_seqs,)
        return _buckets((1, 4, 8, 16, 24, 32, 48, 64), self.max_num_seqs)

    @property
    def num_drafts(self) -> int:
        """Drafts of a row and step, at most."""
        return 0 if self.speculation is None else self.speculation.num_tokens

    @property
    def max_num_logits(self) -> int:
        """Rows of logits of a step: one for each row, and one for each draft."""
        return self.max_num_seqs * (1 + self.num_drafts)

    @property
    def logit_buckets(self) -> tuple[int, ...]:
        """Numbers of rows of logits that are compiled."""
        more = _buckets((64, 128, 256), self.max_num_logits)
        rows = self.row_buckets
        return (*rows, *(size for size in more if size > rows[-1]))

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """Numbers of tokens for which a step with prompt chunks is compiled.

        A step with drafts is such a step too, with few tokens.
        """
        few = (1 + self.num_drafts, 2 * (1 + self.num_drafts), 16)
        few = tuple(sorted({size for size in few if size < 32 and self.num_drafts}))
        return _buckets((*few, 32, 64, 128, 256, 512), self.max_num_batched_tokens)


def _buckets(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """The sizes below `largest`, doubled where they do not reach it, and `largest`."""
    buckets = [size for size in sizes if size < largest]
    while buckets and buckets[-1] * 2 < largest:
        buckets.append(buckets[-1] * 2)
    return (*buckets, largest)
