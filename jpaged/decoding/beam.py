"""Beam search as in Hugging Face `generate`, and parts that other searches share.

Pipeline: log-probabilities -> [beam] -> (tokens, parents) -> engine.

A request has S running rows, followed by S retained sequences: its best finished
hypotheses so far, best first. A step lists the most probable continuations of every
row. Those that end and are among the best become hypotheses; the rows continue with the
best that do not end. All parameters are arrays in the state, so that requests with
different parameters share a compiled step. See docs/decisions/beams.md.

Shape symbols: S rows of one request, V vocabulary, E stop tokens, C candidates.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.decoding.base import Decision, DecodingAlgorithm, own_rows
from jpaged.decoding.transforms import leading

EARLY_STOPPING = (False, True, "never")  # the state has an index into it
NO_TOKEN = -1  # padding of `stop_ids`
LARGEST_PENALTY = 1e30  # of either sign


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """The state of one request's beam search: parameters, rows and hypotheses."""

    width: jax.Array  # i32[], beams; further rows never run
    max_tokens: jax.Array  # i32[], length at which every sequence ends
    length_penalty: jax.Array  # f32[], scores are divided by length ** length_penalty
    early_stopping: jax.Array  # i32[], index in EARLY_STOPPING
    stop_ids: jax.Array  # i32[E], tokens that end a sequence; NO_TOKEN is padding
    scores: (
        jax.Array
    )  # f32[S], cumulative log-probabilities, best first; -inf: not running
    hypothesis_scores: jax.Array  # f32[S], with length penalty, best first; -inf: none
    has_hypothesis: jax.Array  # bool[S], whether there is such a hypothesis
    num_generated: jax.Array  # i32[], generated tokens of a running row


class Candidates(NamedTuple):
    """Continuations of the running rows by one token."""

    scores: jax.Array  # f32[C], by which they are ranked; -inf: no candidate
    parents: jax.Array  # i32[C], rows
    tokens: jax.Array  # i32[C]
    logprobs: jax.Array  # f32[C], log-probability of the token
    is_stop: jax.Array  # bool[C], whether the token ends the sequence


class Hypotheses(NamedTuple):
    """The finished hypotheses after a step, and the origin of each."""

    scores: jax.Array  # f32[S], best first; -inf: none
    has_hypothesis: jax.Array  # bool[S]
    parents: jax.Array  # i32[S], a row, or S + the previous index
    tokens: jax.Array  # i32[S], 0 for a previous hypothesis
    logprobs: jax.Array  # f32[S], 0 for a previous hypothesis


def beam_search(
    *,
    max_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop_token_ids: Sequence[int] = (),
) -> DecodingAlgorithm:
    """Builds beam search over all rows of a request.

    Sequences S..2S-1 of its decisions are the finished hypotheses, best first, as
    Hugging Face's `generate(num_beams=S, num_return_sequences=S)` returns them; their
    scores are `hypothesis_scores` of the state. A row without a continuation has
    finished; it runs again when it continues another row. Width 1 is greedy decoding,
    as in Hugging Face. `init` raises ValueError as `beam_state`.

    Args:
      max_tokens: Generated tokens after which every sequence ends.
      length_penalty: The score of a hypothesis is its cumulative log-probability
        divided by (number of generated tokens) ** length_penalty.
      early_stopping: When the search ends once there are S hypotheses. True: at once.
        False: when the best row, at its current length, would not be better than the
        worst hypothesis. "never": when no row can be, at any length up to `max_tokens`.
      stop_token_ids: Tokens that end a sequence, and are part of it.

    Source: `GenerationMixin._beam_search` of transformers 5.
    """

    def init(num_rows: int) -> BeamState:
        return beam_state(
            num_rows,
            width=num_rows,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            stop_ids=stop_token_ids,
            num_stop_ids=len(stop_token_ids),
        )

    return DecodingAlgorithm(init, step)


def beam_state(
    num_rows: int,
    *,
    width: int,
    max_tokens: int,
    length_penalty: float,
    early_stopping: bool | str,
    stop_ids: Sequence[int],
    num_stop_ids: int,
) -> BeamState:
    """The state before the first step, as numpy arrays.

    Args:
      num_rows: Rows S of the request.
      width: Beams, at most S.
      max_tokens: Generated tokens after which every sequence ends, at least 1.
      length_penalty: Any finite number, see `beam_search`.
      early_stopping: False, True or "never", see `beam_search`.
      stop_ids: Tokens that end a sequence, at most `num_stop_ids`.
      num_stop_ids: Size E of the array of stop tokens.

    Raises:
      ValueError: An argument is out of range.
    """
    stop_array = check_search(num_rows, width, max_tokens, stop_ids, num_stop_ids)
    if early_stopping not in EARLY_STOPPING:
        raise ValueError(
            f'early_stopping: expected False, True or "never", got {early_stopping!r}'
        )
    check_length_penalty(length_penalty, max_tokens)
    return BeamState(
        width=as_array(width, np.int32),
        max_tokens=as_array(max_tokens, np.int32),
        length_penalty=as_array(length_penalty, np.float32),
        early_stopping=as_array(EARLY_STOPPING.index(early_stopping), np.int32),
        stop_ids=stop_array,
        scores=first_scores(num_rows),
        hypothesis_scores=as_array(np.full(num_rows, -np.inf), np.float32),
        has_hypothesis=as_array(np.zeros(num_rows), bool),
        num_generated=as_array(0, np.int32),
    )


def check_length_penalty(length_penalty: float, max_tokens: int) -> None:
    """Raises ValueError if scores of up to `max_tokens` tokens leave float32's range.

    Args:
      length_penalty: Any finite number, see `beam_search`.
      max_tokens: Generated tokens of the longest sequence, at least 1.
    """
    # Beyond e**80 a float32 score would become 0 or infinity; the penalty itself is a
    # float32 number too, also for sequences of one token.
    size = abs(length_penalty)
    if not (size * math.log(max_tokens) < 80 and size <= LARGEST_PENALTY):
        raise ValueError(
            "length_penalty: expected max_tokens ** length_penalty within the range of "
            f"float32, got length_penalty={length_penalty} and "
            f"max_tokens={max_tokens}; choose a value nearer to 0"
        )


def as_array(value: Any, dtype: Any) -> jax.Array:
    """A numpy array, which is cheaper than a jax array; typed as jax for the state."""
    return cast(jax.Array, np.asarray(value, dtype))


def check_search(
    num_rows: int,
    width: int,
    max_tokens: int,
    stop_ids: Sequence[int],
    num_stop_ids: int,
) -> jax.Array:
    """Stop tokens as i32[E]; raises ValueError for an invalid argument."""
    if not 1 <= width <= num_rows:
        raise ValueError(
            f"width: expected from 1 to {num_rows}, the rows of the request, "
            f"got {width}"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    if len(stop_ids) > num_stop_ids:
        raise ValueError(
            f"stop_ids: expected at most num_stop_ids={num_stop_ids} tokens, "
            f"got {len(stop_ids)}"
        )
    if any(token < 0 for token in stop_ids):
        raise ValueError(
            f"stop_ids: expected token ids of at least 0, got {list(stop_ids)}"
        )
    padding = [NO_TOKEN] * (num_stop_ids - len(stop_ids))
    return as_array([*stop_ids, *padding], np.int32)


def first_scores(num_rows: int) -> jax.Array:
    """First scores f32[S]: only row 0 runs, since all rows continue the same prompt."""
    return as_array([0.0] + [-np.inf] * (num_rows - 1), np.float32)


def step(
    keys: jax.Array, logits: jax.Array, state: BeamState
) -> tuple[BeamState, Decision]:
    """The `StepFn` of beam search; the keys are not used.

    At the end of the search all rows have finished, and further steps do not change the
    hypotheses.
    """
    del keys
    state, decision, _ = advance_beams(logits, state)
    return state, decision


def advance_beams(
    logits: jax.Array, state: BeamState
) -> tuple[BeamState, Decision, Candidates]:
    """Advances all beams by one token.

    Args:
      logits: f32[S, V], log-probabilities.
      state: The state.

    Returns:
      The results of `step`, and the S candidates with which the rows would continue if
      the search did not end; those with a score of -inf are none.
    """
    (num_rows,) = state.scores.shape
    length = state.num_generated + 1
    is_last = length >= state.max_tokens
    is_used = own_rows(num_rows) < state.width
    found = candidates(logits, state.scores, state.stop_ids)

    # A stop token counts only if it is among the best `width` candidates.
    leaders = best_candidates(found, found.scores, num_rows)
    ends = is_used & (leaders.is_stop | is_last)
    divisor = _length_divisor(length, state.length_penalty)
    ended_scores = jnp.where(ends, leaders.scores / divisor, -jnp.inf)
    hypotheses = update_hypotheses(
        state.hypothesis_scores, leaders, ended_scores, state.width
    )

    continued = best_candidates(
        found, jnp.where(found.is_stop, -jnp.inf, found.scores), num_rows
    )
    continued = continued._replace(
        scores=jnp.where(is_used, continued.scores, -jnp.inf)
    )
    is_over = is_last | _is_over(state, continued.scores[0], hypotheses, length)
    scores = jnp.where(is_over, -jnp.inf, continued.scores)
    decision = make_decision(continued, scores > -jnp.inf, hypotheses)
    state = dataclasses.replace(
        state,
        scores=scores,
        hypothesis_scores=hypotheses.scores,
        has_hypothesis=hypotheses.has_hypothesis,
        num_generated=length,
    )
    return state, decision, continued


def _length_divisor(length: jax.Array, length_penalty: jax.Array) -> jax.Array:
    return length.astype(jnp.float32) ** length_penalty


def _is_over(
    state: BeamState,
    best_score: jax.Array,
    hypotheses: Hypotheses,
    length: jax.Array,
) -> jax.Array:
    """Whether no row can improve the hypotheses, or no row is left; bool[]."""
    exists = hypotheses.has_hypothesis
    is_full = jnp.sum(exists, dtype=jnp.int32) >= state.width
    worst = jnp.where(exists, hypotheses.scores, jnp.inf).min()
    # With a positive penalty, the same sum is a better score at a greater length.
    is_never = state.early_stopping == EARLY_STOPPING.index("never")
    is_longest = is_never & (state.length_penalty > 0.0)
    best_length = jnp.where(is_longest, state.max_tokens, length)
    bound = best_score / _length_divisor(best_length, state.length_penalty)
    # A single beam is greedy decoding, which always ends at its first stop token.
    at_once = state.early_stopping == EARLY_STOPPING.index(True)
    at_once |= state.width == 1
    return (best_score == -jnp.inf) | (is_full & (at_once | ~(bound > worst)))


def candidates(logits: jax.Array, scores: jax.Array, stop_ids: jax.Array) -> Candidates:
    """The S + E best continuations of every row: C = S * min(S + E, V).

    They include the S best of each row, and the S best without a stop token, and
    therefore also the S best of all rows. Equal scores are in the order of row and
    token id.

    Args:
      logits: f32[S, V], log-probabilities; -inf where a token is forbidden.
      scores: f32[S], added to them; -inf for rows that do not run, whose logits are
        undefined.
      stop_ids: i32[E].
    """
    num_rows, vocab_size = logits.shape
    num = min(num_rows + len(stop_ids), vocab_size)
    logprobs, tokens = leading(logits.astype(jnp.float32), num)
    totals = jnp.where(scores[:, None] > -jnp.inf, scores[:, None] + logprobs, -jnp.inf)
    return Candidates(
        scores=totals.reshape(-1),
        parents=jnp.repeat(own_rows(num_rows), num),
        tokens=tokens.reshape(-1),
        logprobs=logprobs.reshape(-1),
        is_stop=is_any_of(tokens.reshape(-1), stop_ids),
    )


def is_any_of(tokens: jax.Array, stop_ids: jax.Array) -> jax.Array:
    """Whether each token of i32[C] is in `stop_ids`, i32[E]; bool[C]."""
    return jnp.any(tokens[:, None] == stop_ids[None], axis=1)


def best_candidates(found: Candidates, scores: jax.Array, num: int) -> Candidates:
    """The `num` candidates with the largest `scores`, f32[C], which replace theirs.

    They are in descending order; on ties the first comes first.
    """
    values, index = lax.top_k(scores, num)
    return jax.tree.map(lambda array: array[index], found)._replace(scores=values)


def update_hypotheses(
    previous_scores: jax.Array,
    ended: Candidates,
    ended_scores: jax.Array,
    width: jax.Array,
) -> Hypotheses:
    """The best `width` of the previous hypotheses and the ended candidates, best first.

    On ties, previous hypotheses come first, then candidates in their order.

    Args:
      previous_scores: f32[S], best first; -inf: none.
      ended: C candidates.
      ended_scores: f32[C], their scores as hypotheses; -inf for those that did not end.
      width: i32[], at most S.
    """
    (num_rows,) = previous_scores.shape
    rank = own_rows(num_rows)
    scores, index = lax.top_k(
        jnp.concatenate([previous_scores, ended_scores]), num_rows
    )
    exists = (scores > -jnp.inf) & (rank < width)
    is_new = exists & (index >= num_rows)
    new = jax.tree.map(lambda array: array[jnp.maximum(index - num_rows, 0)], ended)
    # A rank without a hypothesis had none before, so it may continue itself.
    previous = num_rows + jnp.where(exists, index, rank)
    return Hypotheses(
        scores=jnp.where(exists, scores, -jnp.inf),
        has_hypothesis=exists,
        parents=jnp.where(is_new, new.parents, previous),
        tokens=jnp.where(is_new, new.tokens, 0),
        logprobs=jnp.where(is_new, new.logprobs, 0.0),
    )


def make_decision(
    running: Candidates, runs: jax.Array, hypotheses: Hypotheses
) -> Decision:
    """The decision in which the rows that run (bool[S]) continue as `running`."""
    own = own_rows(len(runs))
    return Decision(
        tokens=jnp.concatenate([jnp.where(runs, running.tokens, 0), hypotheses.tokens]),
        parents=jnp.concatenate(
            [jnp.where(runs, running.parents, own), hypotheses.parents]
        ),
        logprobs=jnp.concatenate(
            [jnp.where(runs, running.logprobs, 0.0), hypotheses.logprobs]
        ),
        finished=jnp.concatenate([~runs, jnp.ones_like(runs)]),
    )
