"""Diverse beam search: groups of beams, each kept from the words of those before it.

Place on the road: log-probabilities -> [diverse beam] -> (tokens, parents) -> engine.

Within one step the groups take their turns. Each is a beam search of its own, on
log-probabilities from which `diversity_penalty` is subtracted once for every row of an
earlier group that has just taken the token (Hamming diversity).

Shape letters: S rows of one request, G groups, W = S / G rows of a group, V vocabulary.
Source: Vijayakumar et al. 2016, Algorithm 1. https://arxiv.org/abs/1610.02424
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jpaged.decoding import beam
from jpaged.decoding.base import Decision, DecodingAlgorithm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiverseBeamState:
    """One request's diverse beam search."""

    groups: beam.BeamState  # of every group, with a leading axis G
    diversity_penalty: jax.Array  # f32[]


def diverse_beam_search(
    *,
    num_groups: int,
    diversity_penalty: float,
    max_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop_token_ids: Sequence[int] = (),
) -> DecodingAlgorithm:
    """Return beam search in groups, over all rows of a request.

    Group g has rows g * W .. (g + 1) * W - 1 and the held sequences S behind them, best
    first within the group; it ends by its own rule, and the request with the last
    group. The first group finds what beam search of width W finds. Scores contain the
    penalties of all steps, as in Hugging Face; `logprobs` do not.

    Args:
        num_groups: G, which must divide the number of rows.
        diversity_penalty: 0 or larger; 0 makes all groups equal.
        max_tokens, length_penalty, early_stopping, stop_token_ids: of every group, as
            in `beam_search`.

    Raises:
        ValueError: from `init`, for a bad argument.
    """

    def init(num_rows: int) -> DiverseBeamState:
        if num_groups < 1 or num_rows % num_groups:
            raise ValueError(
                f"num_groups must divide the {num_rows} rows of the request; "
                f"got {num_groups}"
            )
        if not 0.0 <= diversity_penalty < float("inf"):
            raise ValueError(
                "diversity_penalty must be 0 or larger, and finite; "
                f"got {diversity_penalty}"
            )
        group = beam.beam_search(
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            stop_token_ids=stop_token_ids,
        ).init(num_rows // num_groups)
        return DiverseBeamState(
            groups=jax.tree.map(lambda leaf: np.stack([leaf] * num_groups), group),
            diversity_penalty=beam.as_array(diversity_penalty, np.float32),
        )

    return DecodingAlgorithm(init, step)


def step(
    keys: jax.Array, logits: jax.Array, state: DiverseBeamState
) -> tuple[DiverseBeamState, Decision]:
    """Return the state and the decision after one more token (a `StepFn`).

    The keys are not used.
    """
    del keys
    num_groups, width = state.groups.scores.shape
    num_rows, vocab_size = logits.shape
    logits = logits.astype(jnp.float32)

    def take_turn(
        counts: jax.Array, group: tuple[jax.Array, beam.BeamState]
    ) -> tuple[jax.Array, tuple[beam.BeamState, Decision]]:
        group_logits, group_state = group
        penalised = group_logits - state.diversity_penalty * counts[None]
        group_state, decision, going = beam.advance(penalised, group_state)
        # Rows count in the step that ends their group too; stop tokens never do.
        is_live = (going.scores > -jnp.inf).astype(jnp.float32)
        return counts.at[going.tokens].add(is_live), (group_state, decision)

    groups = logits.reshape(num_groups, width, vocab_size), state.groups
    _, (states, decisions) = lax.scan(take_turn, jnp.zeros(vocab_size), groups)

    tokens, finished = _flat(decisions.tokens), _flat(decisions.finished)
    parents = _of_request(decisions.parents, num_rows)
    # The log-probabilities without penalties; 0 where no token was taken, as in `beam`.
    is_row = jnp.arange(2 * num_rows) < num_rows
    is_taken = (parents < num_rows) & (~finished | ~is_row)
    raw = logits[jnp.minimum(parents, num_rows - 1), tokens]
    logprobs = jnp.where(is_taken, raw, 0.0)
    decision = Decision(tokens, parents, logprobs, finished)
    return dataclasses.replace(state, groups=states), decision


def _flat(array: jax.Array) -> jax.Array:
    """Return [2S] of [G, 2W]: the rows of all groups, then what they hold."""
    num_groups = len(array)
    return array.reshape(num_groups, 2, -1).swapaxes(0, 1).reshape(-1)


def _of_request(parents: jax.Array, num_rows: int) -> jax.Array:
    """Return i32[2S]: parents of all groups, counted within the request.

    `parents` is i32[G, 2W], counted within each group.
    """
    num_groups, num_sequences = parents.shape
    width = num_sequences // 2
    first = width * jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    is_row = parents < width
    return _flat(first + jnp.where(is_row, parents, num_rows + parents - width))
