"""Diverse beam search: groups of beams that are penalised for equal tokens.

Pipeline: log-probabilities -> [diverse beam] -> (tokens, parents) -> engine.

Within a step the groups follow one after the other. Each is a separate beam search, on
log-probabilities from which `diversity_penalty` is subtracted once for every row of an
earlier group that got the token in this step (Hamming diversity).

Shape symbols: S rows of one request, G groups, W = S / G rows of a group, V vocabulary.

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
    """The state of one request's diverse beam search."""

    groups: beam.BeamState  # states of the groups, with a leading axis G
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
    """Builds diverse beam search over all rows of a request.

    Group g has rows g * W .. (g + 1) * W - 1, and S further the retained hypotheses of
    these rows, best first within the group. Each group ends by its own rule, and the
    request ends with the last group. The first group finds the hypotheses of beam
    search of width W. As in Hugging Face, scores include the penalties of all steps;
    `logprobs` do not. `init` raises ValueError for an invalid argument.

    Args:
      num_groups: Groups G, which must divide the number of rows.
      diversity_penalty: At least 0; 0 makes all groups equal.
      max_tokens: As in `beam_search`, for every group.
      length_penalty: As in `beam_search`, for every group.
      early_stopping: As in `beam_search`, for every group.
      stop_token_ids: As in `beam_search`, for every group.
    """

    def init(num_rows: int) -> DiverseBeamState:
        if num_groups < 1 or num_rows % num_groups:
            raise ValueError(
                f"num_groups: expected a divisor of {num_rows}, the rows of the "
                f"request, got {num_groups}"
            )
        if not 0.0 <= diversity_penalty < float("inf"):
            raise ValueError(
                "diversity_penalty: expected a finite number of at least 0, "
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
    """The `StepFn` of diverse beam search; the keys are not used."""
    del keys
    num_groups, width = state.groups.scores.shape
    num_rows, vocab_size = logits.shape
    logits = logits.astype(jnp.float32)

    def advance_group(
        counts: jax.Array, group: tuple[jax.Array, beam.BeamState]
    ) -> tuple[jax.Array, tuple[beam.BeamState, Decision]]:
        group_logits, group_state = group
        penalised = group_logits - state.diversity_penalty * counts[None]
        group_state, decision, continued = beam.advance_beams(penalised, group_state)
        # Rows count even in the step that ends their group; stop tokens never count.
        is_live = (continued.scores > -jnp.inf).astype(jnp.float32)
        return counts.at[continued.tokens].add(is_live), (group_state, decision)

    groups = logits.reshape(num_groups, width, vocab_size), state.groups
    _, (states, decisions) = lax.scan(advance_group, jnp.zeros(vocab_size), groups)

    tokens, finished = _flat(decisions.tokens), _flat(decisions.finished)
    parents = _of_request(decisions.parents, num_rows)
    # Log-probabilities without penalties; 0 for sequences without a new token, as in
    # `beam`.
    is_row = jnp.arange(2 * num_rows) < num_rows
    has_token = (parents < num_rows) & (~finished | ~is_row)
    raw = logits[jnp.minimum(parents, num_rows - 1), tokens]
    logprobs = jnp.where(has_token, raw, 0.0)
    decision = Decision(tokens, parents, logprobs, finished)
    return dataclasses.replace(state, groups=states), decision


def _flat(array: jax.Array) -> jax.Array:
    """Reorders [G, 2W] to [2S]: the rows of all groups, then their hypotheses."""
    num_groups = len(array)
    return array.reshape(num_groups, 2, -1).swapaxes(0, 1).reshape(-1)


def _of_request(parents: jax.Array, num_rows: int) -> jax.Array:
    """Parents i32[2S] as indices in the request, from i32[G, 2W] within each group."""
    num_groups, num_sequences = parents.shape
    width = num_sequences // 2
    first = width * jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    is_row = parents < width
    return _flat(first + jnp.where(is_row, parents, num_rows + parents - width))
