"""Workload: which requests come when, and how long they are, on the host.

Place on the road: [workload] -> system -> load -> cost model -> clock.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

import numpy as np

from jpaged.arithmetic import cdiv
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
    """Requests in order of arrival, all of whose output lengths are known.

    Prompts that begin with the same `contents`, piece for piece, begin with the same
    tokens. What lies behind a prompt's last named piece is its own.

    Raises:
      ValueError: shapes that differ, an arrival that is negative or earlier than the
        one before it, a length below 1, samples of a beam search, or more pieces than
        the prompt has (each with the request's index).
    """

    arrivals: np.ndarray  # f64[N], seconds, sorted
    prompt_lens: np.ndarray  # i32[N]
    output_lens: np.ndarray  # i32[N], tokens that each sequence generates
    # i32[N], or one for all: sequences; 1 for beams
    num_samples: np.ndarray = dataclasses.field(default_factory=lambda: np.array(1))
    # i32[N], or one for all; 0: no beam search
    beam_widths: np.ndarray = dataclasses.field(default_factory=lambda: np.array(0))
    contents: np.ndarray | None = None  # i32[N, H], NO_CONTENT behind the last piece
    content_size: int = 1  # tokens of a piece; a prompt's last may be partial
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by reason

    def __post_init__(self):
        times = _checked_times(self.arrivals)
        count = len(times)
        found = dict(
            arrivals=times,
            prompt_lens=positive("prompt_lens", self.prompt_lens),
            output_lens=positive("output_lens", self.output_lens),
            num_samples=positive("num_samples", _for_all(self.num_samples, count)),
            beam_widths=positive("beam_widths", _for_all(self.beam_widths, count), 0),
        )
        for name, numbers in found.items():
            if len(numbers) != count:
                raise ValueError(
                    f"{name}: wanted {count} numbers, one for each arrival, got "
                    f"{len(numbers)}"
                )
            object.__setattr__(self, name, numbers)
        both = np.flatnonzero((self.num_samples > 1) & (self.beam_widths > 0))
        if both.size:
            raise ValueError(
                f"num_samples: wanted 1 where beam_widths is not 0, got "
                f"{self.num_samples[both[0]]} at index {both[0]}"
            )
        if self.content_size < 1:
            raise ValueError(
                f"content_size: wanted at least 1 token, got {self.content_size}"
            )
        if self.contents is not None:
            checked = _checked_contents(self)
            object.__setattr__(self, "contents", checked)

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def num_skipped(self) -> int:
        """Requests of the source that were left out."""
        return sum(self.skipped.values())

    def with_samples(self, num_samples: int) -> Workload:
        """The same requests, each for `num_samples` sequences."""
        counts = np.full(len(self), num_samples, np.int32)
        none = np.zeros(len(self), np.int32)
        return dataclasses.replace(self, num_samples=counts, beam_widths=none)

    def with_beams(self, beam_width: int) -> Workload:
        """The same requests, each a beam search (of width 1 or more)."""
        if beam_width < 1:
            raise ValueError(f"beam_width: wanted at least 1, got {beam_width}")
        widths = np.full(len(self), beam_width, np.int32)
        ones = np.ones(len(self), np.int32)
        return dataclasses.replace(self, num_samples=ones, beam_widths=widths)

    def with_shared_prefix(self, num_tokens: int, content_size: int = 16) -> Workload:
        """The same requests, whose prompts all begin with the same tokens.

        Their lengths stay as they are. The whole pieces of the first `num_tokens` are
        shared; the rest is each prompt's own, as in the paper's runs, which share whole
        blocks: 336 of 341 tokens.

        Raises:
          ValueError: a prompt is shorter, or prompts share something already.
        """
        if self.contents is not None:
            raise ValueError("contents: wanted None, for prompts already share tokens")
        if num_tokens < 0 or content_size < 1:
            raise ValueError(
                f"num_tokens, content_size: wanted at least 0 and 1, got {num_tokens} "
                f"and {content_size}"
            )
        short = np.flatnonzero(self.prompt_lens < num_tokens)
        if short.size:
            raise ValueError(
                f"num_tokens: wanted at most the shortest prompt's length, got "
                f"{num_tokens}, but prompt_lens is {self.prompt_lens[short[0]]} at "
                f"index {short[0]}; the prefix counts as part of each prompt"
            )
        pieces = np.arange(num_tokens // content_size, dtype=np.int32)
        contents = np.tile(pieces, (len(self), 1))
        return dataclasses.replace(self, contents=contents, content_size=content_size)

    def limited(self, max_model_len: int) -> Workload:
        """Those of at most `max_model_len` tokens, prompt and output."""
        totals = self.prompt_lens.astype(np.int64) + self.output_lens
        return self.only(
            totals <= max_model_len, f"more than {max_model_len} tokens in all"
        )

    def only(self, kept: np.ndarray, reason: str) -> Workload:
        """Those where bool[N] `kept` is true; the others are counted under `reason`."""
        count = int(np.sum(~kept))
        skipped = dict(self.skipped)
        if count:
            skipped[reason] = skipped.get(reason, 0) + count
        return dataclasses.replace(self._rows(kept), skipped=skipped)

    def head(self, count: int) -> Workload:
        """The first `count` requests (all, where there are no more)."""
        if count < 0:
            raise ValueError(f"count: wanted at least 0, got {count}")
        return self._rows(slice(count))

    def _rows(self, rows: np.ndarray | slice) -> Workload:
        return dataclasses.replace(
            self,
            arrivals=self.arrivals[rows],
            prompt_lens=self.prompt_lens[rows],
            output_lens=self.output_lens[rows],
            num_samples=self.num_samples[rows],
            beam_widths=self.beam_widths[rows],
            contents=None if self.contents is None else self.contents[rows],
        )


def _for_all(given: np.ndarray, count: int) -> np.ndarray:
    return np.full(count, given) if np.ndim(given) == 0 else given


def _checked_times(given: object) -> np.ndarray:
    times = np.asarray(given, np.float64)
    if times.ndim != 1:
        raise ValueError(f"arrivals: wanted a vector of seconds, got {times.shape}")
    wrong = np.flatnonzero(~(np.isfinite(times) & (times >= 0)))
    if wrong.size:
        raise ValueError(
            f"arrivals: wanted finite seconds of at least 0, got {times[wrong[0]]} at "
            f"index {wrong[0]}"
        )
    back = np.flatnonzero(np.diff(times) < 0)
    if back.size:
        raise ValueError(
            f"arrivals: wanted them sorted, got {times[back[0] + 1]} after "
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
            f"contents: wanted whole numbers of shape ({len(workload)}, H), got shape "
            f"{contents.shape} and dtype {contents.dtype}"
        )
    is_piece = contents != NO_CONTENT
    counts = is_piece.sum(axis=1)
    places = np.arange(contents.shape[1])
    gaps = (is_piece != (places < counts[:, None])).any(axis=1)
    outside = (is_piece & ((contents < 0) | (contents >= 2**31))).any(axis=1)
    long = counts > cdiv(workload.prompt_lens, workload.content_size)
    wrong = np.flatnonzero(gaps | outside | long)
    if wrong.size:
        index = wrong[0]
        raise ValueError(
            f"contents: wanted ids from 0 to 2**31 - 1, {NO_CONTENT} behind the last, "
            f"for at most the {workload.prompt_lens[index]} tokens of the prompt in "
            f"pieces of {workload.content_size}, got "
            f"{np.array2string(contents[index], threshold=8)} at index {index}"
        )
    return contents.astype(np.int32)


def paper_trace(
    lengths: Lengths | str, rate: float, duration: float, seed: int
) -> Workload:
    """A run of the paper's: its arrivals, and the lengths in its order.

    The first lengths of fewer than 2,048 tokens, prompt and output, as many as there
    are arrivals, are shuffled; a list that is too short is repeated. The authors' file,
    rate, duration and seed give the requests that the authors ran.

    Args:
      lengths: of a file, or the name of built-in ones (drawn with the same seed).
      rate: requests per second.
      duration: seconds.
      seed: of arrivals and order.

    Raises:
      ValueError: as `poisson` and `builtin_lengths`; or no length below 2,048 tokens.

    Source: the driver of the artifact of Kwon et al. 2023, Section 6.1.
    """
    times = arrivals_.poisson(rate, duration, seed)
    if isinstance(lengths, str):
        lengths = builtin_lengths(lengths, len(times), seed)
    totals = lengths.prompt_lens.astype(np.int64) + lengths.output_lens
    short = np.flatnonzero(totals < PAPER_MAX_LEN)
    if len(times) and not short.size:
        raise ValueError(
            f"lengths: wanted some below {PAPER_MAX_LEN} tokens, prompt and output, "
            f"got none among {len(totals)}"
        )
    chosen = np.resize(short, len(times)).tolist()
    # The same shuffle as that of the global generator, which the driver seeded.
    random.Random(seed).shuffle(chosen)
    skipped = dict(lengths.skipped)
    looked_at = max(chosen, default=-1) + 1
    num_long = looked_at - int(np.sum(short < looked_at))
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
    """Rounds of conversations, each with what was said before as its prompt.

    At each of the paper's arrivals a conversation begins, with the probability
    `new_conversation`, or one that has begun, any with equal probability, goes on.
    A round's question and answer have the next of the shuffled `lengths`. Its prompt
    is the last `max_prompt_len` tokens of all rounds before it and the question, and
    its output the answer, cut to `max_output_len`. No keys and values are kept between
    rounds, so no prompt shares anything.

    That a round comes whether or not the one before it has been answered, and with
    lengths that do not depend on its number, is this model's own: the paper's file of
    whole conversations is not public. The paper states the limits; its two drivers
    begin conversations with probabilities of 0.5 and 0.1.

    Raises:
      ValueError: as `paper_trace`; a probability outside [0, 1]; a limit below 1.

    Source: Kwon et al. 2023, Section 6.4, and its artifact.
    """
    if not 0 <= new_conversation <= 1:
        raise ValueError(
            f"new_conversation: wanted a probability, got {new_conversation}"
        )
    if max_prompt_len < 1 or max_output_len < 1:
        raise ValueError(
            f"max_prompt_len, max_output_len: wanted at least 1, got {max_prompt_len} "
            f"and {max_output_len}"
        )
    rounds = paper_trace(lengths, rate, duration, seed)
    draws = np.random.default_rng(seed).random((len(rounds), 2))
    said: list[int] = []  # tokens of each conversation so far
    prompt_lens = np.empty_like(rounds.prompt_lens)
    output_lens = np.minimum(rounds.output_lens, np.int32(max_output_len))
    for index, (begins, which) in enumerate(draws):
        if not said or begins < new_conversation:
            said.append(0)
            talk = len(said) - 1
        else:
            talk = int(which * len(said))
        said[talk] += int(rounds.prompt_lens[index])
        prompt_lens[index] = min(said[talk], max_prompt_len)
        said[talk] += int(output_lens[index])
    return dataclasses.replace(rounds, prompt_lens=prompt_lens, output_lens=output_lens)
