"""Sequential Monte Carlo: sample from the model times a potential of the user's.

Place on the road: log-probabilities -> [smc] -> tokens, parents -> engine.

A potential says after each token how welcome it is. The target gives a sequence its
probability under the model times the exponential of the sum of its log-potentials.
Particles are the rows: each draws its token from the model and is weighted by the
potential; where few carry most of the weight, particles are drawn anew in proportion to
theirs, which is nothing but `parents`. What the weights sum up to on the way is an
unbiased estimate of the target's normaliser.

Shape letters: S rows of one request (particles), V vocabulary, E stop tokens.
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

# (state, token i32[]) -> (next state, log-potential f32[]), of one particle.
Potential = Callable[[Any, jax.Array], tuple[Any, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SMCState:
    """One request's particles."""

    log_weights: jax.Array  # f32[S], since the last resampling; -inf: impossible
    log_mean_weight: jax.Array  # f32[], sum over resamplings of the log mean weight
    potential_states: Any  # of each particle what the potential keeps: [S, ...]
    is_finished: jax.Array  # bool[S], the particle ended with a stop token
    num_tokens: jax.Array  # i32[], tokens of particles that have not finished
    num_resamplings: jax.Array  # i32[]

    @property
    def log_normaliser(self) -> jax.Array:
        """f32[], the estimate so far: its exponential is unbiased."""
        return self.log_mean_weight + _log_mean(self.log_weights)

    @property
    def weights(self) -> jax.Array:
        """f32[S], of the particles, summing up to 1; all 0 if none is possible."""
        return _normalised(self.log_weights)


def smc(
    potential: Potential,
    initial: Any,
    *,
    threshold: float = 0.5,
    stop_token_ids: Sequence[int] = (),
) -> DecodingAlgorithm:
    """Return the particle method for the model steered by a potential.

    Its outputs are weighted: `SMCState.weights`, in the engine's `states`, says how
    much each counts. A request whose particles have all become impossible ends.

    Where a request's own rules or its structured output forbid tokens, particles are
    weighted by the probability of what is allowed: the target is then the model
    restricted to it, not a model that is renormalised token by token.

    Args:
        potential: from a particle's state and its token, i32[], to its next state and
            the log-potential, f32[]; -inf forbids. It is mapped over particles, and
            sees stop tokens too: that is where the end of a text can be judged.
        initial: the state of a particle before its first token, any pytree.
        threshold: resample when the effective sample size is below this share of the
            rows; 0 never does (importance sampling), 1 does whenever weights differ.
        stop_token_ids: tokens that end a particle. They must be those that end the
            request's sequences, EOS included unless it is ignored.

    Raises:
        ValueError: threshold is not from 0 to 1, or a stop token is negative.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: wanted a share from 0 to 1, got {threshold!r}")
    if any(token < 0 for token in stop_token_ids):
        raise ValueError(
            f"stop_token_ids: wanted token ids, 0 or more, got {tuple(stop_token_ids)}"
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
        # Whoever drives this by hand may give the same keys in every step.
        keys = jax.vmap(lambda key: jax.random.fold_in(key, state.num_tokens))(keys)
        state, parents = _resample(jax.random.fold_in(keys[0], 1), state, threshold)
        goes_on = ~state.is_finished
        logits = jnp.where(goes_on[:, None], logits[parents], 0.0)
        tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]

        after, log_potentials = jax.vmap(potential)(state.potential_states, tokens)
        gain = jnp.asarray(log_potentials, jnp.float32)
        gain += jax.nn.logsumexp(logits, axis=1)  # below 0 where tokens are forbidden
        state = dataclasses.replace(
            state,
            log_weights=state.log_weights + jnp.where(goes_on, gain, 0.0),
            potential_states=_where(goes_on, after, state.potential_states),
            is_finished=~goes_on | jnp.isin(tokens, jnp.asarray(stop_ids)),
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


def _resample(
    key: jax.Array, state: SMCState, threshold: float
) -> tuple[SMCState, jax.Array]:
    """Return the particles drawn anew if they have to be, and their parents i32[S]."""
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
    """Return i32[S], rising: row s is drawn weights[s] * S times, rounded up or down.

    Args:
        key: consumed.
        weights: f32[S], not negative, with a sum above 0.

    >>> systematic(jax.random.key(0), jnp.array([0.0, 0.5, 0.0, 0.5])).tolist()
    [1, 1, 3, 3]
    """
    num_rows = len(weights)
    ends = jnp.cumsum(weights)
    at = (own_rows(num_rows).astype(jnp.float32) + jax.random.uniform(key)) / num_rows
    # Rounding must not carry the last one past the end, to a row without weight.
    at = jnp.minimum(at * ends[-1], jnp.nextafter(ends[-1], jnp.float32(0.0)))
    return jnp.searchsorted(ends, at, side="right").astype(jnp.int32)


def _where(is_new: jax.Array, new: Any, old: Any) -> Any:
    """Return a pytree of [S, ...] whose rows are those of `new` where bool[S] holds."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(is_new.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def _log_mean(log_weights: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(log_weights) - jnp.log(jnp.float32(len(log_weights)))


def _normalised(log_weights: jax.Array) -> jax.Array:
    largest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(largest > -jnp.inf, largest, 0.0))
    return weights / jnp.maximum(weights.sum(), 1.0)
