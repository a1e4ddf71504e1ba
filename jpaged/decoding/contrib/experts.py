"""DExperts: tokens of an expert are preferred to those of an anti-expert.

Three rows generate one text: one after the prompt, one after the expert's prompt and
one after the anti-expert's, such as instructions to be polite and to be rude. All get
the same token, by the combined log-probabilities. In the paper the experts are models.
Here they are prompts of one model, as in self-debiasing.

Source: Liu et al. 2021. https://arxiv.org/abs/2105.03023
Prompts as experts: Schick et al. 2021. https://arxiv.org/abs/2103.00453
"""

import jax
import jax.numpy as jnp

from jpaged.decoding.base import Context, Decision, DecodingAlgorithm, own_rows
from jpaged.decoding.parameters import Range
from jpaged.decoding.sample import sample_rows

_ROWS = 3


def _step(
    keys: jax.Array, logits: jax.Array, state: tuple[()], context: Context
) -> tuple[tuple[()], Decision]:
    base, expert, anti = logits
    values = context.parameters
    # Where both are certain that a token is impossible, they do not differ.
    gain = jnp.where(expert == anti, 0.0, expert - anti)
    is_plausible = base >= jnp.max(base) + jnp.log(values["share"])
    scores = jnp.where(is_plausible, base + values["alpha"] * gain, -jnp.inf)
    scores = jnp.where(base == -jnp.inf, -jnp.inf, scores)
    token = sample_rows(keys[:1], scores[None], values["temperature"])
    tokens = jnp.broadcast_to(token, (_ROWS,))
    logprobs = jnp.broadcast_to(base[token[0]], (_ROWS,))
    return state, Decision(tokens, own_rows(_ROWS), logprobs, jnp.zeros(_ROWS, bool))


def _init(num_rows: int) -> tuple[()]:
    """No state; checks the number of rows."""
    if num_rows != _ROWS:
        raise ValueError(
            "num_rows: expected 3 (the prompt's row and those of both companions), got "
            f"{num_rows}"
        )
    return ()


def experts(
    alpha: float = 1.0, share: float = 0.0, temperature: float = 0.0
) -> DecodingAlgorithm:
    """Build the algorithm; use it with three rows and two companions.

        AlgorithmParams(experts(), num_rows=3, companions=[polite, rude])

    Scores are log p(base) + alpha * (log p(expert) - log p(anti-expert)). The
    log-probabilities of outputs are those of the request's own prompt.

    Args:
      alpha: strength of the experts; 0 is the prompt alone. Data.
      share: tokens with less than this share of the base's largest probability are
        dropped, from 0 to 1. Data.
      temperature: of the scores; 0 is greedy. Data.

    Raises:
      ValueError: a value is out of range.
    """
    parameters = {"alpha": alpha, "share": share, "temperature": temperature}
    ranges = {
        "alpha": Range(),
        "share": Range(low=0, high=1),
        "temperature": Range(low=0),
    }
    return DecodingAlgorithm(
        _init,
        _step,
        parameters=parameters,
        ranges=ranges,
        keeps_rows=True,
        num_companions=_ROWS - 1,
    )
