"""Beam search, as Hugging Face `generate` does it, and the parts its relatives share.

Place on the road: log-probabilities -> [beam] -> (tokens, parents) -> engine.

A request has S rows that run and, behind them, S sequences that are held: the best
finished ones so far, best first. A step lists for every row its most probable
continuations, moves those that end among the best to the held sequences, and lets
the rows run on with the best that do not end. All parameters are arrays in the
state, so requests with different ones share a compiled step.
See docs/decisions/beams.md.

Shape letters: S rows of one request, V vocabulary, E stop tokens, C candidates.
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

EARLY_STOPPING = (False, True, "never")  # their places are the codes in the state
NO_TOKEN = -1  # fills `stop_ids` after the last


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """One request's beam search: its parameters, its rows and what it holds."""

    width: jax.Array  # i32[], rows in use; those behind them never run
    max_tokens: jax.Array  # i32[], at which every sequence ends
    length_penalty: jax.Array  # f32[], a score is scores / length ** length_penalty
    early_stopping: jax.Array  # i32[], place in EARLY_STOPPING
    stop_ids: jax.Array  # i32[E], tokens that end a sequence; NO_TOKEN after the last
    scores: jax.Array  # f32[S], cumulative log-probabilities, best first; -inf: idle
    held_scores: jax.Array  # f32[S], with length penalty, best first; -inf: nothing
    is_held: jax.Array  # bool[S], whether there is such a sequence
    num_generated: jax.Array  # i32[], tokens per running row


class Candidates(NamedTuple):
    """Continuations of the running rows by one token each."""

    scores: jax.Array  # f32[C], what they compete with; -inf: no candidate
    parents: jax.Array  # i32[C], rows
    tokens: jax.Array  # i32[C]
    logprobs: jax.Array  # f32[C], the token's own
    is_stop: jax.Array  # bool[C], the token ends the sequence


class Held(NamedTuple):
    """The held sequences after a step, and where each came from."""

    scores: jax.Array  # f32[S], best first; -inf: nothing
    is_held: jax.Array  # bool[S]
    parents: jax.Array  # i32[S], a row, or S + the place it had before
    tokens: jax.Array  # i32[S], 0 for one that was held before
    logprobs: jax.Array  # f32[S], 0 for one that was held before


def beam_search(
    *,
    max_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop_token_ids: Sequence[int] = (),
) -> DecodingAlgorithm:
    """Return beam search over all rows of a request.

    Sequences S..2S-1 of its decisions are the best finished ones, best first, as
    `generate(num_beams=S, num_return_sequences=S)` of Hugging Face returns them; their
    scores are `held_scores` of the state. A row with nothing to continue has finished,
    and runs again when it takes over the continuation of another row. Width 1 is greedy
    decoding, there and here.

    Args:
        max_tokens: generated tokens after which every sequence ends.
        length_penalty: a finished sequence's score is its cumulative log-probability
            divided by (number of generated tokens) ** length_penalty.
        early_stopping: when the search ends, once S sequences are held. True: at once.
            False: when the best row, at its present length, would not beat the worst
            of them. "never": when no row can, at any length up to `max_tokens`.
        stop_token_ids: tokens that end a sequence, and count as a part of it.

    Raises:
        ValueError: from `init`, see `beam_state`.

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
    """Return the state before the first step, in numpy arrays.

    Args:
        num_rows: S, rows that the request has a place for.
        width: beams, at most S.
        max_tokens: generated tokens after which every sequence ends, at least 1.
        length_penalty: any finite number, see `beam_search`.
        early_stopping: False, True or "never", see `beam_search`.
        stop_ids: tokens that end a sequence, at most `num_stop_ids`.
        num_stop_ids: E, the size of the array that holds them.

    Raises:
        ValueError: an argument is out of range.
    """
    stop_array = check_search(num_rows, width, max_tokens, stop_ids, num_stop_ids)
    if early_stopping not in EARLY_STOPPING:
        raise ValueError(
            f'early_stopping must be False, True or "never"; got {early_stopping!r}'
        )
    # Beyond e**80 a float32 score would be rounded to 0 or to infinity.
    if not abs(length_penalty) * math.log(max_tokens) < 80:
        raise ValueError(
            "length_penalty: max_tokens ** length_penalty must be a number that "
            f"float32 holds; got length_penalty={length_penalty} and "
            f"max_tokens={max_tokens}: choose one nearer to 0"
        )
    return BeamState(
        width=as_array(width, np.int32),
        max_tokens=as_array(max_tokens, np.int32),
        length_penalty=as_array(length_penalty, np.float32),
        early_stopping=as_array(EARLY_STOPPING.index(early_stopping), np.int32),
        stop_ids=stop_array,
        scores=first_scores(num_rows),
        held_scores=as_array(np.full(num_rows, -np.inf), np.float32),
        is_held=as_array(np.zeros(num_rows), bool),
        num_generated=as_array(0, np.int32),
    )


def as_array(value: Any, dtype: Any) -> jax.Array:
    """Return a numpy array, cheaper than one of jax, typed as what steps make of it."""
    return cast(jax.Array, np.asarray(value, dtype))


def check_search(
    num_rows: int,
    width: int,
    max_tokens: int,
    stop_ids: Sequence[int],
    num_stop_ids: int,
) -> jax.Array:
    """Return i32[E] of the stop tokens, or raise ValueError for a bad argument."""
    if not 1 <= width <= num_rows:
        raise ValueError(
            f"width must be between 1 and the {num_rows} rows of the request; "
            f"got {width}"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1; got {max_tokens}")
    if len(stop_ids) > num_stop_ids:
        raise ValueError(
            f"stop_ids: room for num_stop_ids={num_stop_ids} tokens; "
            f"got {len(stop_ids)}"
        )
    if any(token < 0 for token in stop_ids):
        raise ValueError(
            f"stop_ids must be token ids, 0 or larger; got {list(stop_ids)}"
        )
    padding = [NO_TOKEN] * (num_stop_ids - len(stop_ids))
    return as_array([*stop_ids, *padding], np.int32)


def first_scores(num_rows: int) -> jax.Array:
    """Return f32[S]: row 0 runs alone, since at first all rows hold the same prompt."""
    return as_array([0.0] + [-np.inf] * (num_rows - 1), np.float32)


def step(
    keys: jax.Array, logits: jax.Array, state: BeamState
) -> tuple[BeamState, Decision]:
    """Return the state and the decision after one more token (a `StepFn`).

    When the search is over all rows have finished, and further steps change nothing
    that is held. The keys are not used.
    """
    del keys
    state, decision, _ = advance(logits, state)
    return state, decision


def advance(
    logits: jax.Array, state: BeamState
) -> tuple[BeamState, Decision, Candidates]:
    """Return what `step` does, and the S candidates that rows would run on with if
    the search never ended (scores -inf: none)."""
    (num_rows,) = state.scores.shape
    length = state.num_generated + 1
    is_last = length >= state.max_tokens
    is_used = own_rows(num_rows) < state.width
    found = candidates(logits, state.scores, state.stop_ids)

    # A stop token is heard among the best `width` of all candidates only.
    ahead = best(found, found.scores, num_rows)
    ends = is_used & (ahead.is_stop | is_last)
    divisor = _length_divisor(length, state.length_penalty)
    ended_scores = jnp.where(ends, ahead.scores / divisor, -jnp.inf)
    held = hold(state.held_scores, ahead, ended_scores, state.width)

    going = best(found, jnp.where(found.is_stop, -jnp.inf, found.scores), num_rows)
    going = going._replace(scores=jnp.where(is_used, going.scores, -jnp.inf))
    is_over = is_last | _is_over(state, going.scores[0], held, length)
    scores = jnp.where(is_over, -jnp.inf, going.scores)
    decision = decide(going, scores > -jnp.inf, held)
    state = dataclasses.replace(
        state,
        scores=scores,
        held_scores=held.scores,
        is_held=held.is_held,
        num_generated=length,
    )
    return state, decision, going


def _length_divisor(length: jax.Array, length_penalty: jax.Array) -> jax.Array:
    return length.astype(jnp.float32) ** length_penalty


def _is_over(
    state: BeamState, best_score: jax.Array, held: Held, length: jax.Array
) -> jax.Array:
    """Return bool[]: what runs cannot improve what is held, or nothing runs."""
    is_full = jnp.sum(held.is_held, dtype=jnp.int32) >= state.width
    worst = jnp.where(held.is_held, held.scores, jnp.inf).min()
    # With a positive penalty the same sum is a better score at a greater length.
    is_never = state.early_stopping == EARLY_STOPPING.index("never")
    is_longest = is_never & (state.length_penalty > 0.0)
    hoped_length = jnp.where(is_longest, state.max_tokens, length)
    hoped = best_score / _length_divisor(hoped_length, state.length_penalty)
    # A single beam is greedy decoding: it ends with its first stop token, always.
    at_once = state.early_stopping == EARLY_STOPPING.index(True)
    at_once |= state.width == 1
    return (best_score == -jnp.inf) | (is_full & (at_once | ~(hoped > worst)))


def candidates(logits: jax.Array, scores: jax.Array, stop_ids: jax.Array) -> Candidates:
    """Return the S + E best continuations of every row: C = S * min(S + E, V).

    Among them are the S best of each row, and the S best without a stop token, so also
    those of all rows together. Equal scores stand in the order of row and token id.

    Args:
        logits: f32[S, V], log-probabilities; -inf where a token is forbidden.
        scores: f32[S], added to them; -inf for rows that do not run, whose logits
            may be anything.
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
    """Return bool of the shape of `tokens`, i32[C]: whether each is in i32[E]."""
    return jnp.any(tokens[:, None] == stop_ids[None], axis=1)


def best(found: Candidates, scores: jax.Array, num: int) -> Candidates:
    """Return the `num` candidates of the largest `scores`, f32[C], which become theirs.

    In descending order, the first on ties.
    """
    values, at = lax.top_k(scores, num)
    return jax.tree.map(lambda array: array[at], found)._replace(scores=values)


def hold(
    held_scores: jax.Array, ended: Candidates, ended_scores: jax.Array, width: jax.Array
) -> Held:
    """Return the best `width` of what is held and of what has ended, best first.

    On ties what was held before comes first, then the order of `ended`.

    Args:
        held_scores: f32[S]; -inf where nothing is held, and that only at the end.
        ended: C candidates.
        ended_scores: f32[C], their scores among the held; -inf for those that did
            not end.
        width: i32[], at most S.
    """
    (num_rows,) = held_scores.shape
    place = own_rows(num_rows)
    scores, at = lax.top_k(jnp.concatenate([held_scores, ended_scores]), num_rows)
    is_held = (scores > -jnp.inf) & (place < width)
    is_new = is_held & (at >= num_rows)
    new = jax.tree.map(lambda array: array[jnp.maximum(at - num_rows, 0)], ended)
    # A place without a sequence had none before, so it may continue itself.
    before = num_rows + jnp.where(is_held, at, place)
    return Held(
        scores=jnp.where(is_held, scores, -jnp.inf),
        is_held=is_held,
        parents=jnp.where(is_new, new.parents, before),
        tokens=jnp.where(is_new, new.tokens, 0),
        logprobs=jnp.where(is_new, new.logprobs, 0.0),
    )


def decide(running: Candidates, runs: jax.Array, held: Held) -> Decision:
    """Return the decision in which rows that run, bool[S], take their candidate."""
    own = own_rows(len(runs))
    return Decision(
        tokens=jnp.concatenate([jnp.where(runs, running.tokens, 0), held.tokens]),
        parents=jnp.concatenate([jnp.where(runs, running.parents, own), held.parents]),
        logprobs=jnp.concatenate(
            [jnp.where(runs, running.logprobs, 0.0), held.logprobs]
        ),
        finished=jnp.concatenate([~runs, jnp.ones_like(runs)]),
    )
