"""Workload: the arrival times and the lengths of requests.

Pipeline: [workload] -> system -> step load -> cost model -> clock. Host only.

Shape symbols: N requests, H pieces of a prompt.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.policies import NO_DEADLINE, NO_USER
from jpaged.simulator.workloads import arrivals as arrivals_
from jpaged.simulator.workloads.lengths import (
    PAPER_MAX_LEN,
    Lengths,
    builtin_lengths,
    positive,
)

NO_CONTENT = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of arrival, with known output lengths.

    A piece is `content_size` tokens of a prompt. Pieces with equal ids in `contents`
    have equal tokens. Tokens after the last piece with an id occur in no other prompt.

    Raises:
      ValueError: shapes differ, an arrival is negative or earlier than the one before
        it, a length is below 1, a beam search has several samples, or there are more
        ids than pieces (each with the request's index).
    """

    arrivals: np.ndarray  # f64[N], seconds, sorted
    prompt_lens: np.ndarray  # i32[N]
    output_lens: np.ndarray  # i32[N], tokens that each sequence generates
    # i32[N], or one number for all requests; 1 for beam search
    num_samples: np.ndarray = dataclasses.field(default_factory=lambda: np.array(1))
    # i32[N], or one number for all requests; 0: no beam search
    beam_widths: np.ndarray = dataclasses.field(default_factory=lambda: np.array(0))
    contents: np.ndarray | None = None  # i32[N, H], NO_CONTENT after the last id
    content_size: int = 1  # tokens of a piece; the last piece may be partial
    # i32[N], or one number for all requests: ms from arrival, or NO_DEADLINE
    deadlines_ms: np.ndarray = dataclasses.field(
        default_factory=lambda: np.array(NO_DEADLINE)
    )
    # i32[N], or one number for all requests: number of the user, or NO_USER
    users: np.ndarray = dataclasses.field(default_factory=lambda: np.array(NO_USER))
    # skipped requests, by reason
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        times = _checked_times(self.arrivals)
        count = len(times)
        found = dict(
            arrivals=times,
            prompt_lens=positive("prompt_lens", self.prompt_lens),
            output_lens=positive("output_lens", self.output_lens),
            num_samples=positive("num_samples", _for_all(self.num_samples, count)),
            beam_widths=positive("beam_widths", _for_all(self.beam_widths, count), 0),
            deadlines_ms=positive(
                "deadlines_ms", _for_all(self.deadlines_ms, count), 0
            ),
            users=positive("users", _for_all(self.users, count), NO_USER),
        )
        for name, numbers in found.items():
            if len(numbers) != count:
                raise ValueError(
                    f"{name}: expected {count} numbers, one for each arrival, got "
                    f"{len(numbers)}"
                )
            object.__setattr__(self, name, numbers)
        both = np.flatnonzero((self.num_samples > 1) & (self.beam_widths > 0))
        if both.size:
            raise ValueError(
                f"num_samples: expected 1 where beam_widths is not 0, got "
                f"{self.num_samples[both[0]]} at index {both[0]}"
            )
        if self.content_size < 1:
            raise ValueError(
                f"content_size: expected at least 1 token, got {self.content_size}"
            )
        if self.contents is not None:
            checked = _checked_contents(self)
            object.__setattr__(self, "contents", checked)

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def num_skipped(self) -> int:
        """Number of skipped requests of the source."""
        return sum(self.skipped.values())

    def with_samples(self, num_samples: int) -> Workload:
        """Return the same requests, each with `num_samples` sequences."""
        counts = np.full(len(self), num_samples, np.int32)
        none = np.zeros(len(self), np.int32)
        return dataclasses.replace(self, num_samples=counts, beam_widths=none)

    def with_beams(self, beam_width: int) -> Workload:
        """Return the same requests, each with a beam search of width 1 or more."""
        if beam_width < 1:
            raise ValueError(f"beam_width: expected at least 1, got {beam_width}")
        widths = np.full(len(self), beam_width, np.int32)
        ones = np.ones(len(self), np.int32)
        return dataclasses.replace(self, num_samples=ones, beam_widths=widths)

    def with_shared_prefix(self, num_tokens: int, content_size: int = 16) -> Workload:
        """Return the same requests, with a prefix that all prompts share.

        Lengths do not change. Only whole pieces of the first `num_tokens` are shared,
        as in the paper's runs, which share whole blocks: 336 of 341 tokens.

        Args:
          num_tokens: tokens of the prefix.
          content_size: tokens of a piece.

        Raises:
          ValueError: a prompt is shorter than the prefix, or prompts already share
            tokens.
        """
        if self.contents is not None:
            raise ValueError(
                "contents: expected None, got prompts that already share tokens"
            )
        if num_tokens < 0 or content_size < 1:
            raise ValueError(
                f"num_tokens, content_size: expected at least 0 and 1, got "
                f"{num_tokens} and {content_size}"
            )
        short = np.flatnonzero(self.prompt_lens < num_tokens)
        if short.size:
            raise ValueError(
                f"num_tokens: expected at most the shortest prompt's length, got "
                f"{num_tokens}, but prompt_lens is {self.prompt_lens[short[0]]} at "
                f"index {short[0]}; the prefix counts as part of each prompt"
            )
        pieces = np.arange(num_tokens // content_size, dtype=np.int32)
        contents = np.tile(pieces, (len(self), 1))
        return dataclasses.replace(self, contents=contents, content_size=content_size)

    def limited(self, max_model_len: int) -> Workload:
        """Keep requests of at most `max_model_len` tokens, prompt and output."""
        totals = self.prompt_lens.astype(np.int64) + self.output_lens
        return self.only(
            totals <= max_model_len, f"more than {max_model_len} tokens in all"
        )

    def only(self, kept: np.ndarray, reason: str) -> Workload:
        """Keep requests where bool[N] `kept` is true; count the others as skipped."""
        count = int(np.sum(~kept))
        skipped = dict(self.skipped)
        if count:
            skipped[reason] = skipped.get(reason, 0) + count
        return dataclasses.replace(self._rows(kept), skipped=skipped)

    def head(self, count: int) -> Workload:
        """Keep the first `count` requests, or all if there are fewer."""
        if count < 0:
            raise ValueError(f"count: expected at least 0, got {count}")
        return self._rows(slice(count))

    def _rows(self, rows: np.ndarray | slice) -> Workload:
        return dataclasses.replace(
            self,
            arrivals=self.arrivals[rows],
            prompt_lens=self.prompt_lens[rows],
            output_lens=self.output_lens[rows],
            num_samples=self.num_samples[rows],
            beam_widths=self.beam_widths[rows],
            deadlines_ms=self.deadlines_ms[rows],
            users=self.users[rows],
            contents=None if self.contents is None else self.contents[rows],
        )


def _for_all(given: np.ndarray, count: int) -> np.ndarray:
    return np.full(count, given) if np.ndim(given) == 0 else given


def _checked_times(given: object) -> np.ndarray:
    times = np.asarray(given, np.float64)
    if times.ndim != 1:
        raise ValueError(f"arrivals: expected a vector of seconds, got {times.shape}")
    wrong = np.flatnonzero(~(np.isfinite(times) & (times >= 0)))
    if wrong.size:
        raise ValueError(
            f"arrivals: expected finite seconds of at least 0, got {times[wrong[0]]} "
            f"at index {wrong[0]}"
        )
    back = np.flatnonzero(np.diff(times) < 0)
    if back.size:
        raise ValueError(
            f"arrivals: expected sorted seconds, got {times[back[0] + 1]} after "
            f"{times[back[0]]} at index {back[0] + 1}"
        )
    return times


def _checked_contents(workload: Workload) -> np.ndarray:
    contents = np.asarray(workload.contents)
    if (
        contents.ndim != 2
        or len(contents) != len(workload)
        or not np.issubdtype(contents.dtype, np.integer)
    ):
        raise ValueError(
            f"contents: expected integers of shape ({len(workload)}, H), got shape "
            f"{contents.shape} and dtype {contents.dtype}"
        )
    is_piece = contents != NO_CONTENT
    counts = is_piece.sum(axis=1)
    indices = np.arange(contents.shape[1])
    gaps = (is_piece != (indices < counts[:, None])).any(axis=1)
    outside = (is_piece & ((contents < 0) | (contents >= 2**31))).any(axis=1)
    long = counts > cdiv(workload.prompt_lens, workload.content_size)
    wrong = np.flatnonzero(gaps | outside | long)
    if wrong.size:
        index = wrong[0]
        raise ValueError(
            f"contents: expected ids from 0 to 2**31 - 1, {NO_CONTENT} after the last, "
            f"for at most the {workload.prompt_lens[index]} tokens of the prompt in "
            f"pieces of {workload.content_size}, got "
            f"{np.array2string(contents[index], threshold=8)} at index {index}"
        )
    return contents.astype(np.int32)


def paper_trace(
    lengths: Lengths | str, rate: float, duration: float, seed: int
) -> Workload:
    """Return the requests of a run of the paper.

    Lengths of 2,048 tokens or more, prompt and output, are skipped. The first of the
    remaining lengths, as many as there are arrivals, are shuffled; a list that is too
    short is repeated. With the authors' file, rate, duration and seed, the requests are
    those of the authors.

    Args:
      lengths: lengths of a file, or the name of built-in ones (sampled with `seed`).
      rate: requests per second.
      duration: seconds.
      seed: of arrivals and order.

    Raises:
      ValueError: as `poisson` and `builtin_lengths`; or all lengths are skipped.

    Source: the driver of the artifact of Kwon et al. 2023, Section 6.1.
    """
    times = arrivals_.poisson(rate, duration, seed)
    if isinstance(lengths, str):
        lengths = builtin_lengths(lengths, len(times), seed)
    totals = lengths.prompt_lens.astype(np.int64) + lengths.output_lens
    short = np.flatnonzero(totals < PAPER_MAX_LEN)
    if len(times) and not short.size:
        raise ValueError(
            f"lengths: expected some below {PAPER_MAX_LEN} tokens, prompt and output, "
            f"got none among {len(totals)}"
        )
    chosen = np.resize(short, len(times)).tolist()
    # The same shuffle as that of the global generator, which the driver seeds.
    random.Random(seed).shuffle(chosen)
    skipped = dict(lengths.skipped)
    num_read = max(chosen, default=-1) + 1
    num_long = num_read - int(np.sum(short < num_read))
    if num_long:
        skipped[f"{PAPER_MAX_LEN} tokens or more in all"] = num_long
    return Workload(
        times,
        lengths.prompt_lens[chosen],
        lengths.output_lens[chosen],
        skipped=skipped,
    )


def chat_rounds(
    lengths: Lengths | str,
    rate: float,
    duration: float,
    seed: int,
    *,
    new_conversation: float = 0.5,
    max_prompt_len: int = 1024,
    max_output_len: int = 1016,
) -> Workload:
    """Return rounds of conversations, whose prompts contain the previous rounds.

    Each of the paper's arrivals is a round of a conversation. With the probability
    `new_conversation` it starts a new conversation. Otherwise it continues one of the
    conversations that have started, each with equal probability. A round's question
    and answer have the next of the shuffled `lengths`. The prompt is the last
    `max_prompt_len` tokens of all previous rounds and the question. The output is the
    answer, cut to `max_output_len` tokens. No keys and values are kept between rounds,
    so prompts share no prefixes.

    Two properties are assumptions, since the paper's file of whole conversations is not
    public: a round arrives whether or not the previous round has been answered, and its
    lengths do not depend on its number. The paper states the limits. Its two drivers
    start conversations with probabilities of 0.5 and 0.1.

    Args:
      lengths, rate, duration, seed: of the rounds, as for `paper_trace`.
      new_conversation: probability that a round starts a conversation.
      max_prompt_len: most tokens of a prompt.
      max_output_len: most tokens of an output.

    Raises:
      ValueError: as `paper_trace`; a probability outside [0, 1]; a limit below 1.

    Source: Kwon et al. 2023, Section 6.4, and its artifact.
    """
    if not 0 <= new_conversation <= 1:
        raise ValueError(
            f"new_conversation: expected a probability, got {new_conversation}"
        )
    if max_prompt_len < 1 or max_output_len < 1:
        raise ValueError(
            f"max_prompt_len, max_output_len: expected at least 1, got "
            f"{max_prompt_len} and {max_output_len}"
        )
    rounds = paper_trace(lengths, rate, duration, seed)
    samples = np.random.default_rng(seed).random((len(rounds), 2))
    history: list[int] = []  # tokens of each conversation up to now
    prompt_lens = np.empty_like(rounds.prompt_lens)
    output_lens = np.minimum(rounds.output_lens, np.int32(max_output_len))
    for index, (start, which) in enumerate(samples):
        if not history or start < new_conversation:
            history.append(0)
            conversation = len(history) - 1
        else:
            conversation = int(which * len(history))
        history[conversation] += int(rounds.prompt_lens[index])
        prompt_lens[index] = min(history[conversation], max_prompt_len)
        history[conversation] += int(output_lens[index])
    return dataclasses.replace(rounds, prompt_lens=prompt_lens, output_lens=output_lens)
