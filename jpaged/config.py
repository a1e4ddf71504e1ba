"""Configuration of the engine: frozen dataclasses; invalid values raise ValueError."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from jpaged import policies
from jpaged.arithmetic import cdiv
from jpaged.retention import Retention

if TYPE_CHECKING:  # `decoding` imports nothing from here; not needed at run time
    from jpaged.decoding.base import DecodingAlgorithm
    from jpaged.decoding.constraints import AutomataSizes
    from jpaged.decoding.processors import Chain
    from jpaged.decoding.rule_arrays import RuleSizes

PREEMPTIONS = ("recompute", "swap")
# How much sampling a program includes; each includes those before it.
SAMPLING = ("greedy", "random", "filtered")
LOGPROBS_MODES = ("raw", "processed")
_MAY_BE_ZERO = (
    "num_logprobs",
    "num_mask_words",
    "max_num_prefixes",
    "max_beam_width",
    "num_swap_blocks",
    "num_recorded_events",
    "num_recorded_steps",
)
DRAFT_METHODS = ("prompt_lookup", "model")


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Speculative decoding: how draft tokens are proposed (`engine.speculation`).

    Attributes:
      method: "prompt_lookup" copies drafts from the sequence's own tokens; "model"
        samples them from a smaller model.
      num_tokens: largest number of drafts per row and step.
      min_ngram, max_ngram: how many of the last tokens prompt lookup searches for.

    Raises:
      ValueError: an unknown method, or a number that is out of range.
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
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name}: expected an integer of at least {least}, got {value!r}"
        )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The engine's sizes, which fix array shapes, and the scheduler's settings.

    Attributes:
      num_blocks: physical KV blocks in the pool.
      block_size: tokens per block.
      max_num_seqs: batch rows: sequences that can run at the same time.
      max_model_len: tokens of the longest sequence, prompt and output together.
      max_num_batched_tokens: tokens of one step, prompt chunks and decode tokens.
      max_num_requests: sequences in the request table, waiting and running together.
      max_num_stop_ids: token ids that can end one request, EOS included.
      num_logprobs: number of most likely tokens returned with each generated token; 0
        returns only the generated token's own log-probability.
      num_mask_words: 32-bit words of a mask over the vocabulary; requests may then ask
        which tokens could be sampled at each position. 0: they may not.
      prompt_logprobs: requests may ask for the log-probabilities of their prompts.
      max_prompt_chunk: largest number of tokens of one prompt in one step; None: only
        `max_num_batched_tokens` limits it.
      policy: which request is admitted first: a name of `policies.POLICIES`, or a
        function (`jpaged.policies`). Priorities of requests are used only by
        "priority", "weighted" and functions.
      preemption_policy: which running request gives back its blocks first: a name or a
        function.
      eviction_policy: which block of the prefix cache is evicted first.
      budget_policy: how many tokens each row computes in a step.
      policy_parameters, preemption_parameters, eviction_parameters, budget_parameters:
        numbers that these policies read (`parameters`).
      watermark: share of the blocks that admission leaves free while others run.
      preemption: what happens to the blocks of preempted sequences: "recompute" frees
        them, "swap" copies them to the host's memory.
      num_swap_blocks: blocks of the host pool, with preemption="swap". Sequences that
        do not fit into it are recomputed.
      enable_prefix_caching: keep the blocks of finished sequences, while there is
        space, for sequences with the same prefix (`prefix_cache`).
      attention: backend of paged attention; None: the best for the platform.
      cascade: rows that share a prefix read its blocks together, where that is faster
        (`shared_prefix`).
      group_windows: tokens that a query sees in each cache group, None: all
        (`kv.cache_groups`). The default is one table for all layers.
      max_num_prefixes: pinned prefixes at the same time; each uses a row in addition to
        `max_num_seqs`, and its blocks.
      max_beam_width: rows of the widest beam search; 0 compiles none.
      rules: capacities for the logits rules of requests (penalties, biases, ...); None
        compiles none.
      automata: capacities for compiled structured output; None compiles none.
      speculation: how draft tokens are proposed; None: no speculation.
      sampling: how requests may sample: "greedy"; "random", also with temperatures; or
        "filtered", also with top_k, top_p and min_p. Less compiles faster.
      logprobs_mode: which distribution log-probabilities are of: "raw", the model's; or
        "processed", the one that tokens are sampled from.
      batch_invariant: the bits of a token's logits depend on its sequence alone
        (`models.invariant`, `attention.invariant`).
      algorithms: further decoding algorithms, each with its number of rows. They are
        compiled into the step.
      seen_hidden, seen_layers, seen_draft: hidden states, layers of which logits, and
        whether logits of the draft model, that the algorithms need
        (`engine.algorithms.with_needs` sets them).
      processors: chains of logits processors that requests may use, without the values
        of their parameters (`decoding.processors`). They are compiled into the step.
      num_recorded_events, num_recorded_steps: how many of the last events and steps the
        state records (`engine.events`); 0 records none.
      retention: which blocks of a sequence stay (`jpaged.retention`); None: all.

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
    num_mask_words: int = 0
    prompt_logprobs: bool = False
    max_prompt_chunk: int | None = None
    policy: str | policies.Policy = "fcfs"
    policy_parameters: tuple[float, ...] = ()
    preemption_policy: str | policies.Policy = "latest"
    preemption_parameters: tuple[float, ...] = ()
    eviction_policy: str | policies.EvictionPolicy = "lru"
    eviction_parameters: tuple[float, ...] = ()
    budget_policy: str | policies.BudgetPolicy = "decode_first"
    budget_parameters: tuple[float, ...] = ()
    watermark: float = 0.01
    preemption: str = "recompute"
    num_swap_blocks: int = 0
    enable_prefix_caching: bool = False
    attention: str | None = None
    cascade: bool = False
    group_windows: tuple[int | None, ...] = (None,)
    max_num_prefixes: int = 0
    max_beam_width: int = 0
    rules: RuleSizes | None = None
    automata: AutomataSizes | None = None
    speculation: Speculation | None = None
    sampling: str = "filtered"
    logprobs_mode: str = "raw"
    batch_invariant: bool = False
    algorithms: tuple[tuple[DecodingAlgorithm, int], ...] = ()
    seen_hidden: bool = False
    seen_layers: tuple[int, ...] = ()
    seen_draft: bool = False
    processors: tuple[Chain, ...] = ()
    num_recorded_events: int = 0
    num_recorded_steps: int = 0
    retention: Retention | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int":
                least = 0 if field.name in _MAY_BE_ZERO else 1
                _check_integer(field.name, getattr(self, field.name), least)
        if self.max_prompt_chunk is not None:
            _check_integer("max_prompt_chunk", self.max_prompt_chunk, least=1)
        self._check_policies()
        if not 0 <= self.watermark < 1:
            raise ValueError(
                f"watermark: expected a share from 0 to below 1, got {self.watermark!r}"
            )
        if self.sampling not in SAMPLING:
            raise ValueError(
                f"sampling: expected one of {SAMPLING}, got {self.sampling!r}"
            )
        if self.batch_invariant and self.cascade:
            raise ValueError(
                "cascade: expected False with batch_invariant=True, because which rows "
                "share a prefix would decide in which order they sum, got True"
            )
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise ValueError(
                f"logprobs_mode: expected one of {LOGPROBS_MODES}, got "
                f"{self.logprobs_mode!r}"
            )
        self._check_preemption()
        self._check_capacities()
        self._check_retention()
        self._check_groups()

    def _check_policies(self) -> None:
        for kind in policies.KINDS:
            given = getattr(self, kind.parameters)
            if not isinstance(given, tuple) or not all(
                isinstance(one, int | float) and math.isfinite(one) for one in given
            ):
                raise ValueError(
                    f"{kind.parameters}: expected a tuple of finite numbers, got "
                    f"{given!r}"
                )
            policies.check(kind, getattr(self, kind.argument), given)
        if self.eviction_policy != "lru" and not self.enable_prefix_caching:
            raise ValueError(
                "eviction_policy: expected 'lru', the default, without a prefix cache, "
                f"got {self.eviction_policy!r}; set enable_prefix_caching=True to use "
                "it"
            )

    def _check_retention(self) -> None:
        if self.retention is None:
            return
        if not isinstance(self.retention, Retention):
            raise ValueError(
                "retention: expected None or a retention.Retention, got "
                f"{self.retention!r:.100}"
            )
        if self.group_windows != (None,):
            raise ValueError(
                "retention: expected None with cache groups, got a method; set "
                "group_windows=(None,) to use it"
            )
        if self.batch_invariant and self.retention.statistic is not None:
            raise ValueError(
                "retention: expected a method without a statistic with "
                "batch_invariant=True, because sums of statistics depend on the batch, "
                f"got one that reads {self.retention.statistic!r}"
            )
        if self.retention.only_reads and (self.cascade or self.swaps):
            name = "cascade" if self.cascade else "preemption"
            raise ValueError(
                f"{name}: expected the default with a retention method that selects "
                f"what is read, got {getattr(self, name)!r}"
            )
        if self.speculation is not None:
            raise ValueError(
                "retention: expected None with speculation, whose rejected drafts may "
                "be behind a decision, got a method; use one of the two"
            )

    def _check_capacities(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens: expected at least max_num_seqs "
                f"({self.max_num_seqs}), because every running sequence decodes one "
                f"token per step, got {self.max_num_batched_tokens}; increase it, or "
                "decrease max_num_seqs"
            )
        if self.max_num_requests < self.num_rows:
            raise ValueError(
                f"max_num_requests: expected at least max_num_seqs + max_num_prefixes "
                f"({self.num_rows}), got {self.max_num_requests}"
            )
        if self.max_beam_width > self.max_num_seqs:
            raise ValueError(
                f"max_beam_width: expected at most max_num_seqs ({self.max_num_seqs}), "
                f"because all beams run in one batch, got {self.max_beam_width}"
            )
        for algorithm, num_rows in self.algorithms:
            if not 1 <= num_rows <= self.max_num_seqs:
                raise ValueError(
                    f"algorithms: expected from 1 to max_num_seqs "
                    f"({self.max_num_seqs}) rows, got {num_rows} for {algorithm!r}"
                )

    def _check_groups(self) -> None:
        windows = self.group_windows
        is_known = isinstance(windows, tuple) and len(windows) > 0
        if not is_known or any(w is not None and w < 1 for w in windows):
            raise ValueError(
                "group_windows: expected a tuple with None or at least 1 for each "
                f"group, got {windows!r}"
            )

    def _check_preemption(self) -> None:
        if self.preemption not in PREEMPTIONS:
            raise ValueError(
                f"preemption: expected one of {PREEMPTIONS}, got {self.preemption!r}"
            )
        if self.swaps and not self.num_swap_blocks:
            raise ValueError(
                "num_swap_blocks: expected at least 1 with preemption='swap', got 0; "
                "set it to the size of the host pool, or use preemption='recompute'"
            )
        if self.num_swap_blocks and not self.swaps:
            raise ValueError(
                "num_swap_blocks: expected 0 with preemption='recompute', got "
                f"{self.num_swap_blocks}; set preemption='swap' to use them"
            )

    @property
    def sees_more(self) -> bool:
        """Whether algorithms need more of the decoder than logits."""
        return self.seen_hidden or bool(self.seen_layers)

    @property
    def swaps(self) -> bool:
        """Whether the blocks of preempted sequences are copied to the host's memory."""
        return self.preemption == "swap"

    def limits(self, num_seqs: int, num_tokens: int) -> tuple[int, int]:
        """Return lower (max_num_seqs, max_num_batched_tokens) that suffice for a load.

        There are few classes, so that few programs are compiled: 1, 8 or all rows; and
        64 tokens per step if all prompts together have at most 64. The rows are never
        fewer than a beam search or an algorithm of the config needs.

        Args:
          num_seqs: sequences of the load.
          num_tokens: tokens of all its prompts together.
        """
        widest = max((rows for _, rows in self.algorithms), default=0)
        num_seqs = max(num_seqs, widest, self.max_beam_width)
        seqs = next((n for n in (1, 8) if num_seqs <= n), self.max_num_seqs)
        seqs = min(seqs, self.max_num_seqs)
        tokens = self.max_num_batched_tokens
        return seqs, min(64, tokens) if max(num_tokens, seqs) <= 64 else tokens

    @property
    def num_rows(self) -> int:
        """Rows of the block tables: for running sequences and for pinned prefixes."""
        return self.max_num_seqs + self.max_num_prefixes

    @property
    def max_blocks_per_seq(self) -> int:
        """Width of the block table of each cache group."""
        return cdiv(self.max_model_len, self.block_size)

    @property
    def uses_priorities(self) -> bool:
        """Whether a policy reads the requests' priorities."""
        return (
            callable(self.policy)
            or callable(self.preemption_policy)
            or callable(self.budget_policy)
            or self.policy in ("priority", "weighted")
        )

    def uses(self, kind: policies.Kind) -> bool:
        """Whether the policy of this kind is another than the default."""
        return getattr(self, kind.argument) != kind.default

    @property
    def columns_read(self) -> frozenset[str]:
        """The columns of `policies.Requests` that the policies read."""
        found: frozenset[str] = frozenset()
        for kind in policies.KINDS:
            policy, given = getattr(self, kind.argument), getattr(self, kind.parameters)
            if self.uses(kind):
                found |= policies.columns_read(kind, policy, given)
        return found

    @property
    def has_attributes(self) -> bool:
        """Whether the request table has the columns `policies.ATTRIBUTES`."""
        return not self.columns_read.isdisjoint(policies.ATTRIBUTES)

    @property
    def reads_clock(self) -> bool:
        """Whether a policy depends on the time."""
        return not self.columns_read.isdisjoint(("ages", "times_left"))

    @property
    def largest_chunk(self) -> int:
        """Largest number of tokens that a row computes in one step."""
        return max(
            min(
                self.max_prompt_chunk or self.max_num_batched_tokens,
                self.max_num_batched_tokens,
            ),
            1 + self.num_drafts,
        )

    @property
    def scheduler_params(self) -> policies.SchedulerParams:
        """The scheduler's settings: their initial values and upper limits, of NumPy."""
        chunk = self.max_prompt_chunk or self.max_num_batched_tokens

        def parameters(kind: policies.Kind) -> Any:
            given = getattr(self, kind.parameters)
            return np.array(given, np.float32) if self.uses(kind) else None

        settings: dict[str, Any] = dict(
            parameters=np.array(self.policy_parameters, np.float32),
            preemption=parameters(policies.PREEMPTION),
            eviction=parameters(policies.EVICTION),
            budget=parameters(policies.BUDGET),
            num_watermark_blocks=np.int32(int(self.watermark * self.num_blocks)),
            max_num_seqs=np.int32(self.max_num_seqs),
            max_num_batched_tokens=np.int32(self.max_num_batched_tokens),
            max_prompt_chunk=np.int32(min(chunk, self.max_num_batched_tokens)),
        )
        return policies.SchedulerParams(**settings)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Numbers of rows for which a decode step is compiled, ascending.

        Powers of two, and from 16 on one size between them, because there each row
        costs time. Up to four rows have one size: they cost little more than one row,
        and compile faster.
        """
        if self.max_num_seqs <= 4:
            return (self.max_num_seqs,)
        return _buckets((1, 4, 8, 16, 24, 32, 48, 64), self.max_num_seqs)

    @property
    def num_drafts(self) -> int:
        """Largest number of drafts per row and step."""
        return 0 if self.speculation is None else self.speculation.num_tokens

    @property
    def max_num_logits(self) -> int:
        """Rows of logits in a step: one per batch row and one per draft."""
        return self.max_num_seqs * (1 + self.num_drafts)

    @property
    def logit_buckets(self) -> tuple[int, ...]:
        """Numbers of rows of logits for which a step is compiled."""
        more = _buckets((64, 128, 256), self.max_num_logits)
        rows = self.row_buckets
        return (*rows, *(size for size in more if size > rows[-1]))

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """Numbers of tokens for which a step with prompt chunks is compiled.

        A step with drafts is also such a step, with few tokens.
        """
        few = (1 + self.num_drafts, 2 * (1 + self.num_drafts), 16)
        few = tuple(sorted({size for size in few if size < 32 and self.num_drafts}))
        return _buckets((*few, 32, 64, 128, 256, 512), self.max_num_batched_tokens)


def _buckets(sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """Return the sizes below `largest`, extended by doubling, and `largest`."""
    buckets = [size for size in sizes if size < largest]
    while buckets and buckets[-1] * 2 < largest:
        buckets.append(buckets[-1] * 2)
    return (*buckets, largest)
