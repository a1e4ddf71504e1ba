"""Sequential Monte Carlo: samples from the model times a user's potential.

Pipeline: log-probabilities -> [smc] -> tokens, parents -> engine.

A potential scores each token of a sequence. The target probability of a sequence is its
probability under the model times the exponential of the sum of its log-potentials. The
rows are particles: each samples its token from the model and is weighted by the
potential. If few particles have most of the weight, particles are resampled in
proportion to their weights, which is expressed by `parents`. The mean weights give an
unbiased estimate of the target's normaliser.

Shape symbols: S rows of one request (particles), V vocabulary, E stop tokens.

Source: Lew et al. 2023, sequential Monte Carlo steering; the model is the proposal.
https://arxiv.org/abs/2306.03081
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.base import Decision, DecodingAlgorithm, own_rows
from jpaged.indexing import where_rows
from jpaged.validation import number

# (state, token i32[]) -> (next state, log-potential f32[]), for one particle.
Potential = Callable[[Any, jax.Array], tuple[Any, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SMCState:
    """The state of one request's particles."""

    log_weights: jax.Array  # f32[S], since the last resampling; -inf: impossible
    log_mean_weight: jax.Array  # f32[], sum over resamplings of the log mean weight
    potential_states: Any  # the potential's states, leaves [S, ...]
    is_finished: jax.Array  # bool[S], whether the particle ended with a stop token
    num_tokens: jax.Array  # i32[], tokens of a particle that has not finished
    num_resamplings: jax.Array  # i32[]

    @property
    def log_normaliser(self) -> jax.Array:
        """Estimate of the log-normaliser so far, f32[]; its exponential is unbiased."""
        return self.log_mean_weight + _log_mean(self.log_weights)

    @property
    def weights(self) -> jax.Array:
        """Normalised weights, f32[S]; all 0 if no particle is possible."""
        return _normalised(self.log_weights)


def smc(
    potential: Potential,
    initial: Any,
    *,
    threshold: float = 0.5,
    stop_token_ids: Sequence[int] = (),
) -> DecodingAlgorithm:
    """Builds the particle method for the model and a potential.

    The outputs are weighted by `SMCState.weights`, which is in the engine's `states`. A
    request ends if all its particles are impossible.

    If the request's rules or structured output forbid tokens, particles are weighted by
    the probability of the allowed tokens. The target is then the model restricted to
    allowed sequences, not a model that is renormalised token by token.

    Args:
      potential: Function from a particle's state and token (i32[]) to its next state
        and log-potential (f32[]); -inf forbids the token. It is mapped over particles.
        It also gets stop tokens, so that it can score complete texts.
      initial: The state of a particle before its first token; any pytree.
      threshold: Resample if the effective sample size is below this share of the rows.
        0 never resamples (importance sampling), 1 resamples whenever weights differ.
      stop_token_ids: Tokens that end a particle. They must be the tokens that end the
        request's sequences, including EOS unless it is ignored.

    Raises:
      ValueError: `threshold` is not from 0 to 1, or a stop token is negative.
    """
    threshold = number("threshold", threshold, low=0, high=1)
    if any(token < 0 for token in stop_token_ids):
        raise ValueError(
            f"stop_token_ids: expected ids of at least 0, got {tuple(stop_token_ids)}"
        )
    stop_ids = np.array(stop_token_ids, np.int32).reshape(-1)

    def init(num_rows: int) -> SMCState:
        def repeat(leaf: Any) -> jax.Array:
            leaf = jnp.asarray(leaf)
            return jnp.broadcast_to(leaf, (num_rows, *leaf.shape))

        return SMCState(
            log_weights=jnp.zeros(num_rows, jnp.float32),
            log_mean_weight=jnp.float32(0.0),
            potential_states=jax.tree.map(repeat, initial),
            is_finished=jnp.zeros(num_rows, bool),
            num_tokens=jnp.int32(0),
            num_resamplings=jnp.int32(0),
        )

    def step(
        keys: jax.Array, logits: jax.Array, state: SMCState
    ) -> tuple[SMCState, Decision]:
        # A caller without the engine may pass the same keys in every step.
        keys = jax.vmap(lambda key: jax.random.fold_in(key, state.num_tokens))(keys)
        state, parents = resample(jax.random.fold_in(keys[0], 1), state, threshold)
        is_running = ~state.is_finished
        logits = jnp.where(is_running[:, None], logits[parents], 0.0)
        tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]

        after, log_potentials = jax.vmap(potential)(state.potential_states, tokens)
        gain = jnp.asarray(log_potentials, jnp.float32)
        gain += jax.nn.logsumexp(logits, axis=1)  # negative if tokens are forbidden
        state = dataclasses.replace(
            state,
            log_weights=state.log_weights + jnp.where(is_running, gain, 0.0),
            potential_states=where_rows(is_running, after, state.potential_states),
            is_finished=~is_running | jnp.isin(tokens, jnp.asarray(stop_ids)),
            num_tokens=state.num_tokens + 1,
        )
        is_impossible = jnp.all(state.log_weights == -jnp.inf)
        decision = Decision(
            tokens=tokens,
            parents=parents,
            logprobs=logprobs,
            finished=state.is_finished | is_impossible,
        )
        return state, decision

    return DecodingAlgorithm(init, step)


def resample(
    key: jax.Array, state: SMCState, threshold: float | jax.Array
) -> tuple[SMCState, jax.Array]:
    """Resamples the particles if needed; returns the state and parents i32[S]."""
    num_rows = len(state.log_weights)
    weights = state.weights
    is_possible = weights.sum() > 0
    size = 1.0 / jnp.where(is_possible, jnp.sum(weights**2), 1.0)
    resamples = is_possible & (size < threshold * num_rows)
    parents = jnp.where(resamples, systematic(key, weights), own_rows(num_rows))
    moved = dataclasses.replace(
        state,
        log_weights=jnp.zeros_like(state.log_weights),
        log_mean_weight=state.log_normaliser,
        potential_states=jax.tree.map(lambda x: x[parents], state.potential_states),
        is_finished=state.is_finished[parents],
        num_resamplings=state.num_resamplings + 1,
    )
    return jax.tree.map(lambda a, b: jnp.where(resamples, a, b), moved, state), parents


def systematic(key: jax.Array, weights: jax.Array) -> jax.Array:
    """Systematic resampling: row s is chosen weights[s] * S times, rounded up or down.

    Args:
      key: A PRNG key.
      weights: f32[S], not negative, with a sum above 0.

    Returns:
      The chosen rows i32[S], in ascending order.

    >>> systematic(jax.random.key(0), jnp.array([0.0, 0.5, 0.0, 0.5])).tolist()
    [1, 1, 3, 3]
    """
    num_rows = len(weights)
    ends = jnp.cumsum(weights)
    points = own_rows(num_rows).astype(jnp.float32) + jax.random.uniform(key)
    # Rounding must not move the last point past the end, to a row without weight.
    last = jnp.nextafter(ends[-1], jnp.float32(0.0))
    points = jnp.minimum(points / num_rows * ends[-1], last)
    return jnp.searchsorted(ends, points, side="right").astype(jnp.int32)


def _log_mean(log_weights: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(log_weights) - jnp.log(jnp.float32(len(log_weights)))


def _normalised(log_weights: jax.Array) -> jax.Array:
    largest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(largest > -jnp.inf, largest, 0.0))
    return weights / jnp.maximum(weights.sum(), 1.0)
