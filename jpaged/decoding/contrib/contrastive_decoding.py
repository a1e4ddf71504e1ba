"""Contrastive decoding: what a large model finds more probable than a small one.

The small model is the engine's draft model, which computes the same tokens under the
same block tables.

Source: Li et al. 2022. https://arxiv.org/abs/2210.15097
"""

import jax
import jax.numpy as jnp

from jpaged.decoding.base import Context, Decision, DecodingAlgorithm, own_rows
from jpaged.decoding.parameters import Range
from jpaged.decoding.sample import sample_rows


def _init(num_rows: int) -> tuple[()]:
    return ()


def _step(
    keys: jax.Array, logits: jax.Array, state: tuple[()], context: Context
) -> tuple[tuple[()], Decision]:
    assert context.draft is not None
    values = context.parameters
    best = jnp.max(logits, axis=-1, keepdims=True)
    is_plausible = logits >= best + jnp.log(values["alpha"])
    beta = values["beta"]
    scores = (1.0 + beta) * logits - beta * context.draft
    scores = jnp.where(is_plausible, scores, -jnp.inf)
    tokens = sample_rows(keys, scores, values["temperature"])
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return state, Decision(
        tokens, own_rows(len(logits)), logprobs, jnp.zeros(len(logits), bool)
    )


def contrastive_decoding(
    alpha: float = 0.1, beta: float = 0.5, temperature: float = 0.0
) -> DecodingAlgorithm:
    """Build the algorithm, for an LLM with a draft model.

        llm = LLM(large, speculative_config={"model": small})
        llm.generate("Hi", AlgorithmParams(contrastive_decoding()))

    Scores are (1 + beta) log p(large) - beta log p(small), the form of O'Brien and
    Lewis 2023 (https://arxiv.org/abs/2309.09117).

    Args:
      alpha: tokens with less than this share of the largest probability are dropped,
        above 0 and at most 1. Data.
      beta: strength of the contrast; 0 is the large model alone. Data.
      temperature: of the scores; 0 is greedy. Data.
    """
    parameters = {"alpha": alpha, "beta": beta, "temperature": temperature}
    ranges = {
        "alpha": Range(above=0, high=1),
        "beta": Range(low=0),
        "temperature": Range(low=0),
    }
    return DecodingAlgorithm(
        _init,
        _step,
        needs={"draft"},
        parameters=parameters,
        ranges=ranges,
        keeps_rows=True,
    )
