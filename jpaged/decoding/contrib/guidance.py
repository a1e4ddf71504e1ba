"""Classifier-free guidance: the prompt's effect on the logits is amplified.

Two rows generate one text: one after the prompt, and one after an unconditional prompt,
the companion. Both get the token of the combined log-probabilities.

Source: Sanchez et al. 2023. https://arxiv.org/abs/2306.17806
"""

import jax
import jax.numpy as jnp

from jpaged.decoding.base import Context, Decision, DecodingAlgorithm
from jpaged.decoding.parameters import Range
from jpaged.decoding.sample import sample_rows


def _step(
    keys: jax.Array, logits: jax.Array, state: tuple[()], context: Context
) -> tuple[tuple[()], Decision]:
    conditional, unconditional = logits
    scale = context.parameters["scale"]
    guided = unconditional + scale * (conditional - unconditional)
    guided = jnp.where(conditional == -jnp.inf, -jnp.inf, guided)
    token = sample_rows(keys[:1], guided[None], context.parameters["temperature"])
    token = jnp.broadcast_to(token, (2,))
    logprobs = jnp.broadcast_to(conditional[token[0]], (2,))
    own = jnp.arange(2, dtype=jnp.int32)
    return state, Decision(token, own, logprobs, jnp.zeros(2, bool))


def classifier_free_guidance(
    scale: float = 1.5, temperature: float = 0.0
) -> DecodingAlgorithm:
    """Build the algorithm; use it with two rows and one companion.

        AlgorithmParams(classifier_free_guidance(), num_rows=2, companions=["Hi"])

    The log-probabilities of outputs are those of the conditional prompt.

    Args:
      scale: 1 is the prompt alone; above 1, what distinguishes it from the companion
        counts more. Data.
      temperature: 0 is greedy. Data.
    """
    parameters = {"scale": scale, "temperature": temperature}
    ranges = {"scale": Range(), "temperature": Range(low=0)}
    return DecodingAlgorithm(
        _init,
        _step,
        parameters=parameters,
        ranges=ranges,
        keeps_rows=True,
        num_companions=1,
    )


def _init(num_rows: int) -> tuple[()]:
    """No state; checks the number of rows."""
    if num_rows != 2:
        raise ValueError(
            "num_rows: expected 2 (the prompt's row and the companion's), got "
            f"{num_rows}"
        )
    return ()
