"""Twisted sequential Monte Carlo: particles that look ahead.

As in `jpaged.decoding.smc`, the target is the model times a user's potential. Here each
particle samples from the model times the potential of the next token, which is the best
proposal that looks one token ahead. A twist can also estimate the potential of the rest
of the text. Neither changes the target: the weights correct for both, and the estimate
of the normaliser is unbiased.

Source: Zhao et al. 2024. https://arxiv.org/abs/2404.17546
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.base import Context, Decision, DecodingAlgorithm
from jpaged.decoding.parameters import Range
from jpaged.decoding.smc import Potential, SMCState, resample, smc
from jpaged.indexing import where_rows

# The state of a particle -> log of the expected potential of the rest of its text.
Twist = Callable[[Any], jax.Array]


def twisted_smc(
    potential: Potential,
    initial: Any,
    *,
    twist: Twist | None = None,
    threshold: float = 0.5,
    stop_token_ids: Sequence[int] = (),
) -> DecodingAlgorithm:
    """Build the algorithm; the outputs are weighted by `SMCState.weights`.

    The potential is computed for every token of the vocabulary in each step.

    Args:
      potential: see `smc`.
      initial: state of a particle before its first token; any pytree.
      twist: maps a particle's state to an estimate of the log of the expected potential
        of the rest of its text, f32[]. None is 0.
      threshold: see `smc`. Data.
      stop_token_ids: see `smc`.

    Raises:
      ValueError: see `smc`.
    """
    plain = smc(potential, initial, threshold=threshold, stop_token_ids=stop_token_ids)
    ends = np.array(stop_token_ids, np.int32).reshape(-1)
    start = jnp.float32(0.0)

    def estimate(state: Any, is_over: jax.Array) -> jax.Array:
        found = start if twist is None else jnp.asarray(twist(state), jnp.float32)
        return jnp.where(is_over, 0.0, found)

    def init(num_rows: int) -> SMCState:
        state = plain.init(num_rows)
        first = jax.tree.map(jnp.asarray, initial)
        # The first weights are divided by this estimate; the mean weight restores it.
        return dataclasses.replace(
            state, log_mean_weight=estimate(first, jnp.bool_(False))
        )

    def look_ahead(state: Any, logits: jax.Array, is_last: jax.Array) -> jax.Array:
        """f32[V]: each token's log-potential plus the change of the twist."""
        tokens = jnp.arange(logits.shape[0], dtype=jnp.int32)
        after, gains = jax.vmap(potential, in_axes=(None, 0))(state, tokens)
        is_over = is_last | jnp.isin(tokens, jnp.asarray(ends))
        rest = jax.vmap(estimate)(after, is_over)
        return (
            jnp.asarray(gains, jnp.float32) + rest - estimate(state, jnp.bool_(False))
        )

    def step(
        keys: jax.Array, logits: jax.Array, state: SMCState, context: Context
    ) -> tuple[SMCState, Decision]:
        assert context.num_tokens is not None
        assert context.limits is not None
        keys = jax.vmap(lambda key: jax.random.fold_in(key, state.num_tokens))(keys)
        threshold = context.parameters["threshold"]
        state, parents = resample(jax.random.fold_in(keys[0], 1), state, threshold)
        is_running = ~state.is_finished
        logits = jnp.where(is_running[:, None], logits[parents], 0.0)
        is_last = jnp.max(context.num_tokens) + 1 >= jnp.max(context.limits)
        ahead = jax.vmap(look_ahead, in_axes=(0, 0, None))(
            state.potential_states, logits, is_last
        )
        scores = logits + ahead
        gain = jax.nn.logsumexp(scores, axis=1)
        is_possible = gain > -jnp.inf
        tokens = jax.vmap(jax.random.categorical)(
            keys, jnp.where(is_possible[:, None], scores, 0.0)
        ).astype(jnp.int32)
        logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
        after, _ = jax.vmap(potential)(state.potential_states, tokens)
        state = dataclasses.replace(
            state,
            log_weights=state.log_weights + jnp.where(is_running, gain, 0.0),
            potential_states=where_rows(is_running, after, state.potential_states),
            is_finished=~is_running | jnp.isin(tokens, jnp.asarray(ends)),
            num_tokens=state.num_tokens + 1,
        )
        is_impossible = jnp.all(state.log_weights == -jnp.inf)
        finished = state.is_finished | is_impossible
        return state, Decision(tokens, parents, logprobs, finished)

    return DecodingAlgorithm(
        init,
        step,
        parameters={"threshold": threshold},
        ranges={"threshold": Range(0, 1)},
    )
