"""Stochastic beam search: S different sequences, sampled without replacement.

Place on the road: log-probabilities -> [stochastic beam] -> tokens, parents -> engine.

Whoever adds independent Gumbel noise to the log-probability of every sequence there is,
and takes the S largest, has sampled S sequences without replacement. Beam search finds
them without listing all: a prefix carries the largest perturbed log-probability among
its sequences, and its continuations are given theirs so that the largest is just that.

The same is done once more inside the vocabulary, which is cut into groups as if the
group were a token of its own: only the S leading groups of a row are perturbed entry
by entry, which takes V / 128 + 128 S random numbers per row in place of V.

Shape letters: S rows of one request, V vocabulary, G groups of 128 entries, E stop
tokens.
Source: Kool et al. 2019, Algorithm 1 and appendix B. https://arxiv.org/abs/1903.06059
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.decoding import beam
from jpaged.decoding.base import Decision, DecodingAlgorithm, own_rows
from jpaged.decoding.transforms import finite_or_zero, grouped, leading

_GROUP_SIZE = 128  # vocabulary entries per group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StochasticBeamState:
    """One request's stochastic beam search: parameters, rows and what it holds."""

    width: jax.Array  # i32[], rows in use; those behind them never run
    max_tokens: jax.Array  # i32[], at which every sequence ends
    stop_ids: jax.Array  # i32[E], tokens that end a sequence; -1 after the last
    cumulative: jax.Array  # f32[S], log-probabilities of the rows
    perturbed: jax.Array  # f32[S], the same with Gumbel noise; -inf: idle
    held_perturbed: jax.Array  # f32[S], best first; -inf: nothing
    is_held: jax.Array  # bool[S], whether there is such a sequence
    num_generated: jax.Array  # i32[], tokens per running row


def stochastic_beam_search(
    *, max_tokens: int, stop_token_ids: Sequence[int] = ()
) -> DecodingAlgorithm:
    """Return sampling without replacement, over all rows of a request.

    Sequences S..2S-1 of its decisions are the samples that have ended, in the order in
    which they were drawn: the first is distributed as by `sampling`, the second as by
    `sampling` that may not give the first again, and so on. If there are fewer than S
    sequences all of them are found. Where tokens are forbidden, the others share their
    probability, as in `sampling`.

    Args:
        max_tokens: generated tokens after which every sequence ends.
        stop_token_ids: tokens that end a sequence, and count as a part of it.

    Raises:
        ValueError: from `init`, for a bad argument.
    """

    def init(num_rows: int) -> StochasticBeamState:
        stop_array = beam.check_search(
            num_rows, num_rows, max_tokens, stop_token_ids, len(stop_token_ids)
        )
        return StochasticBeamState(
            width=beam.as_array(num_rows, np.int32),
            max_tokens=beam.as_array(max_tokens, np.int32),
            stop_ids=stop_array,
            cumulative=beam.as_array(np.zeros(num_rows), np.float32),
            # The prompt's own noise moves all sequences alike: 0, as in the paper.
            perturbed=beam.first_scores(num_rows),
            held_perturbed=beam.as_array(np.full(num_rows, -np.inf), np.float32),
            is_held=beam.as_array(np.zeros(num_rows), bool),
            num_generated=beam.as_array(0, np.int32),
        )

    return DecodingAlgorithm(init, step)


def step(
    keys: jax.Array, logits: jax.Array, state: StochasticBeamState
) -> tuple[StochasticBeamState, Decision]:
    """Return the state and the decision after one more token (a `StepFn`)."""
    num_rows, _ = logits.shape
    length = state.num_generated + 1
    is_running = state.perturbed > -jnp.inf
    logits = logits.astype(jnp.float32)
    # A row that does not run may have any logits, NaN too.
    logits = jnp.where(is_running[:, None], logits, -jnp.inf)
    found, shift = _candidates(keys, logits, state)

    ends = found.is_stop | (length >= state.max_tokens)
    ended_scores = jnp.where(ends, found.scores, -jnp.inf)
    held = beam.hold(state.held_perturbed, found, ended_scores, state.width)

    # Held sequences and rows compete for the same `width` places. One that is held and
    # falls out of them is not forgotten: it counts again if rows reach a dead end.
    order = jnp.where(ends, -jnp.inf, found.scores)
    running = beam.best(found, order, num_rows)
    num_ahead = jnp.sum(held.scores[None] > running.scores[:, None], axis=1)
    place = own_rows(num_rows) + num_ahead.astype(jnp.int32)
    runs = (running.scores > -jnp.inf) & (place < state.width)
    state = dataclasses.replace(
        state,
        cumulative=jnp.where(runs, running.logprobs + shift[running.parents], 0.0),
        perturbed=jnp.where(runs, running.scores, -jnp.inf),
        held_perturbed=held.scores,
        is_held=held.is_held,
        num_generated=length,
    )
    return state, beam.decide(running, runs, held)


def _candidates(
    keys: jax.Array, logits: jax.Array, state: StochasticBeamState
) -> tuple[beam.Candidates, jax.Array]:
    """Return the S best perturbed continuations of every row, and f32[S] for the rows:
    what to add to a token's logit for the cumulative log-probability."""
    num_rows, _ = logits.shape
    logits_SGW = grouped(logits, _GROUP_SIZE)
    masses_SG = jax.nn.logsumexp(logits_SGW, axis=-1)
    # Rows share out their probability among the tokens that are allowed.
    total = jax.nn.logsumexp(masses_SG, axis=-1)
    shift = state.cumulative - finite_or_zero(total)

    num_groups = masses_SG.shape[1]
    num_open = min(num_rows, num_groups)
    num_noise = num_groups + num_open * _GROUP_SIZE
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (num_noise,)))(keys)
    perturbed_SG = perturb(
        masses_SG + shift[:, None], noise[:, :num_groups], state.perturbed
    )
    maxima, groups = lax.top_k(perturbed_SG, num_open)
    opened = jnp.take_along_axis(logits_SGW, groups[:, :, None], axis=1)
    perturbed = perturb(
        opened + shift[:, None, None],
        noise[:, num_groups:].reshape(opened.shape),
        maxima,
    )
    flat = (num_rows, num_open * _GROUP_SIZE)
    num = min(num_rows, num_open * _GROUP_SIZE)
    scores, at = leading(perturbed.reshape(flat), num)
    logprobs = jnp.take_along_axis(opened.reshape(flat), at, axis=1)
    group = jnp.take_along_axis(groups, at // _GROUP_SIZE, axis=1)
    tokens = (group * _GROUP_SIZE + at % _GROUP_SIZE).astype(jnp.int32).reshape(-1)
    found = beam.Candidates(
        scores=scores.reshape(-1),
        parents=jnp.repeat(own_rows(num_rows), num),
        tokens=tokens,
        logprobs=logprobs.reshape(-1),
        is_stop=beam.is_any_of(tokens, state.stop_ids),
    )
    return found, shift


def perturb(logprobs: jax.Array, noise: jax.Array, largest: jax.Array) -> jax.Array:
    """Return f32[..., N]: log-probabilities plus Gumbel noise whose largest is known.

    The distribution is that of `logprobs + noise` given that its largest is `largest`.

    Args:
        logprobs: f32[..., N]; -inf gives -inf.
        noise: f32[..., N], standard Gumbel.
        largest: f32[...]; -inf gives -inf throughout.
    """
    free = logprobs + noise
    largest = largest[..., None]
    is_possible = (free > -jnp.inf) & (largest > -jnp.inf)
    below = free - finite_or_zero(free.max(axis=-1, keepdims=True))
    # -log(exp(-largest) - exp(-max) + exp(-free)), as in the paper's appendix B.3: of
    # the exponentials only ratios are formed, so none overflows.
    gap = jnp.where(is_possible, largest - free + _log1mexp(below), 0.0)
    shifted = largest - jnp.maximum(gap, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(gap)))
    return jnp.where(is_possible, shifted, -jnp.inf)


def _log1mexp(x: jax.Array) -> jax.Array:
    """Return log(1 - exp(x)) for x <= 0, exact near 0 as well as far from it."""
    near = jnp.log(-jnp.expm1(x))
    far = jnp.log1p(-jnp.exp(x))
    return jnp.where(x > -0.6931472, near, far)
