"""Stochastic beam search: S different sequences, sampled without replacement.

Pipeline: log-probabilities -> [stochastic beam] -> tokens, parents -> engine.

If independent Gumbel noise is added to the log-probability of every possible sequence,
the S largest are S sequences sampled without replacement. Beam search finds them
without listing all sequences: a prefix has the largest perturbed log-probability of its
sequences, and its continuations get perturbed log-probabilities whose maximum is just
that value.

The same is done within the vocabulary, which is divided into groups, as if a group were
a token: only the S leading groups of a row are perturbed entry by entry. This needs
V / 128 + 128 S random numbers per row instead of V.

Shape symbols: S rows of one request, V vocabulary, G groups of 128 entries, E stop
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
    """The state of one request's stochastic beam search."""

    width: jax.Array  # i32[], rows in use; further rows never run
    max_tokens: jax.Array  # i32[], length at which every sequence ends
    stop_ids: jax.Array  # i32[E], tokens that end a sequence; -1 is padding
    cumulative: jax.Array  # f32[S], log-probabilities of the rows
    perturbed: jax.Array  # f32[S], the same with Gumbel noise; -inf: not running
    hypothesis_perturbed: jax.Array  # f32[S], best first; -inf: none
    has_hypothesis: jax.Array  # bool[S], whether there is such a hypothesis
    num_generated: jax.Array  # i32[], generated tokens of a running row


def stochastic_beam_search(
    *, max_tokens: int, stop_token_ids: Sequence[int] = ()
) -> DecodingAlgorithm:
    """Builds sampling without replacement over all rows of a request.

    Sequences S..2S-1 of its decisions are the finished samples, in the order in which
    they were sampled. The first has the distribution of `sampling`, the second that of
    `sampling` without the first sequence, and so on. If fewer than S sequences are
    possible, all of them are found. If tokens are forbidden, the other tokens share
    their probability, as in `sampling`. `init` raises ValueError for an invalid
    argument.

    Args:
      max_tokens: Generated tokens after which every sequence ends.
      stop_token_ids: Tokens that end a sequence, and are part of it.
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
            # Noise of the prompt would shift all sequences equally: 0, as in the paper.
            perturbed=beam.first_scores(num_rows),
            hypothesis_perturbed=beam.as_array(np.full(num_rows, -np.inf), np.float32),
            has_hypothesis=beam.as_array(np.zeros(num_rows), bool),
            num_generated=beam.as_array(0, np.int32),
        )

    return DecodingAlgorithm(init, step)


def step(
    keys: jax.Array, logits: jax.Array, state: StochasticBeamState
) -> tuple[StochasticBeamState, Decision]:
    """The `StepFn` of stochastic beam search."""
    num_rows, _ = logits.shape
    length = state.num_generated + 1
    is_running = state.perturbed > -jnp.inf
    logits = logits.astype(jnp.float32)
    # The logits of a row that does not run are undefined and may be NaN.
    logits = jnp.where(is_running[:, None], logits, -jnp.inf)
    found, shift = _candidates(keys, logits, state)

    ends = found.is_stop | (length >= state.max_tokens)
    ended_scores = jnp.where(ends, found.scores, -jnp.inf)
    hypotheses = beam.update_hypotheses(
        state.hypothesis_perturbed, found, ended_scores, state.width
    )

    # Hypotheses and rows compete for the same `width` ranks. A hypothesis of a lower
    # rank is retained: it counts again if rows reach a dead end.
    order = jnp.where(ends, -jnp.inf, found.scores)
    running = beam.best_candidates(found, order, num_rows)
    num_ahead = jnp.sum(hypotheses.scores[None] > running.scores[:, None], axis=1)
    rank = own_rows(num_rows) + num_ahead.astype(jnp.int32)
    runs = (running.scores > -jnp.inf) & (rank < state.width)
    state = dataclasses.replace(
        state,
        cumulative=jnp.where(runs, running.logprobs + shift[running.parents], 0.0),
        perturbed=jnp.where(runs, running.scores, -jnp.inf),
        hypothesis_perturbed=hypotheses.scores,
        has_hypothesis=hypotheses.has_hypothesis,
        num_generated=length,
    )
    return state, beam.make_decision(running, runs, hypotheses)


def _candidates(
    keys: jax.Array, logits: jax.Array, state: StochasticBeamState
) -> tuple[beam.Candidates, jax.Array]:
    """The S best perturbed continuations of every row.

    Returns:
      The candidates, and f32[S]: a row's number that is added to a token's logit to get
      the cumulative log-probability.
    """
    num_rows, _ = logits.shape
    logits_SGW = grouped(logits, _GROUP_SIZE)
    masses_SG = jax.nn.logsumexp(logits_SGW, axis=-1)
    # A row's probability is distributed over the allowed tokens.
    total = jax.nn.logsumexp(masses_SG, axis=-1)
    shift = state.cumulative - finite_or_zero(total)

    num_groups = masses_SG.shape[1]
    num_opened = min(num_rows, num_groups)
    num_noise = num_groups + num_opened * _GROUP_SIZE
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (num_noise,)))(keys)
    perturbed_SG = perturb(
        masses_SG + shift[:, None], noise[:, :num_groups], state.perturbed
    )
    maxima, groups = lax.top_k(perturbed_SG, num_opened)
    opened = jnp.take_along_axis(logits_SGW, groups[:, :, None], axis=1)
    perturbed = perturb(
        opened + shift[:, None, None],
        noise[:, num_groups:].reshape(opened.shape),
        maxima,
    )
    flat = (num_rows, num_opened * _GROUP_SIZE)
    num = min(num_rows, num_opened * _GROUP_SIZE)
    scores, index = leading(perturbed.reshape(flat), num)
    logprobs = jnp.take_along_axis(opened.reshape(flat), index, axis=1)
    group = jnp.take_along_axis(groups, index // _GROUP_SIZE, axis=1)
    tokens = (group * _GROUP_SIZE + index % _GROUP_SIZE).astype(jnp.int32).reshape(-1)
    found = beam.Candidates(
        scores=scores.reshape(-1),
        parents=jnp.repeat(own_rows(num_rows), num),
        tokens=tokens,
        logprobs=logprobs.reshape(-1),
        is_stop=beam.is_any_of(tokens, state.stop_ids),
    )
    return found, shift


def perturb(logprobs: jax.Array, noise: jax.Array, largest: jax.Array) -> jax.Array:
    """Adds Gumbel noise to log-probabilities, conditioned on the maximum of the sums.

    The distribution is that of `logprobs + noise` given that its maximum is `largest`.

    Args:
      logprobs: f32[..., N]; -inf stays -inf.
      noise: f32[..., N], standard Gumbel.
      largest: f32[...]; if it is -inf, all results are -inf.

    Returns:
      f32[..., N].
    """
    free = logprobs + noise
    largest = largest[..., None]
    is_possible = (free > -jnp.inf) & (largest > -jnp.inf)
    below = free - finite_or_zero(free.max(axis=-1, keepdims=True))
    # -log(exp(-largest) - exp(-max) + exp(-free)) as in appendix B.3 of the paper, with
    # ratios of exponentials only, so that none overflows.
    gap = jnp.where(is_possible, largest - free + _log1mexp(below), 0.0)
    shifted = largest - jnp.maximum(gap, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(gap)))
    return jnp.where(is_possible, shifted, -jnp.inf)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x <= 0, accurate near 0 and far from it."""
    near = jnp.log(-jnp.expm1(x))
    far = jnp.log1p(-jnp.exp(x))
    return jnp.where(x > -0.6931472, near, far)
