"""Diverse beam search against slow groups, and its invariants."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jpaged.decoding import beam, beam_search, diverse_beam, diverse_beam_search
from tests.support import beam_oracle as oracle

VOCAB_SIZE, MAX_TOKENS = 6, 5
step = jax.jit(diverse_beam.step)
PARAMS = {
    "max_tokens": 5,
    "length_penalty": 1.0,
    "early_stopping": False,
    "stop_token_ids": (1, 4),
}


def slow_groups(logits_of, num_rows, num_groups, diversity_penalty, **params):
    """The groups at the end; in each step they run one after the other with counts."""
    params = PARAMS | params
    params["stop_ids"] = params.pop("stop_token_ids")
    width = num_rows // num_groups
    groups = [oracle.SlowBeams(width=width, **params) for _ in range(num_groups)]
    while any(group.running for group in groups):
        counts = np.zeros(VOCAB_SIZE)
        for group in groups:
            if group.running:
                group.advance(logits_of, diversity_penalty * counts)
                for _, tokens in group.continued:
                    counts[tokens[-1]] += 1
    return groups


def ours(logits_of, num_rows, num_groups, diversity_penalty, step=step, **params):
    algorithm = diverse_beam_search(
        num_groups=num_groups, diversity_penalty=diversity_penalty, **PARAMS | params
    )
    return oracle.follow(step, algorithm.init(num_rows), logits_of, num_rows)


def differences(logits_of, num_rows, num_groups, penalty, step=step, **params):
    outcome = ours(logits_of, num_rows, num_groups, penalty, step, **params)
    groups = slow_groups(logits_of, num_rows, num_groups, penalty, **params)
    found = []
    if outcome.hypotheses != [tokens for group in groups for _, tokens in group.pool]:
        found.append(
            f"tokens: {outcome.hypotheses}, expected {[g.pool for g in groups]}"
        )
    scores = oracle.hypothesis_scores(outcome.state)
    expected = [score for group in groups for score, _ in group.pool]
    if not np.allclose(scores, expected, rtol=1e-5, atol=1e-5):
        found.append(f"scores: {scores}, expected {expected}")
    return found


@hypothesis.settings(max_examples=100)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    is_tied=st.booleans(),
    forbidden=st.sampled_from([0.0, 0.3]),
    shape=st.sampled_from([(6, 3), (6, 2), (4, 4), (6, 1)]),
    diversity_penalty=st.sampled_from([0.0, 0.5, 2.0]),
    length_penalty=st.sampled_from([0.0, 1.0]),
    early_stopping=st.sampled_from(beam.EARLY_STOPPING),
)
def test_tokens_and_scores_equal_slow_groups(
    seed, is_tied, forbidden, shape, diversity_penalty, **params
):
    table = oracle.random_table(
        seed,
        num_steps=MAX_TOKENS,
        vocab_size=VOCAB_SIZE,
        forbidden=forbidden,
        is_tied=is_tied,
    )
    logits_of = oracle.table_logits(table)
    assert not differences(logits_of, *shape, diversity_penalty, **params)


def table_logits(seed: int):
    table = oracle.random_table(seed, num_steps=MAX_TOKENS, vocab_size=VOCAB_SIZE)
    return oracle.table_logits(oracle.normalised(table))


def test_one_group_is_beam_search_with_any_penalty():
    algorithm = beam_search(**PARAMS)
    for seed, penalty in enumerate([0.0, 3.0]):
        logits_of = table_logits(seed)
        plain = oracle.follow(
            jax.jit(algorithm.step), algorithm.init(4), logits_of, num_rows=4
        )
        outcome = ours(logits_of, 4, 1, penalty)
        assert outcome.hypotheses == plain.hypotheses
        assert outcome.logprobs == plain.logprobs


def test_the_first_group_is_beam_search_of_its_width():
    algorithm = beam_search(**PARAMS)
    logits_of = table_logits(2)
    plain = oracle.follow(
        jax.jit(algorithm.step), algorithm.init(2), logits_of, num_rows=2
    )
    outcome = ours(logits_of, 6, 3, 0.7)
    assert outcome.hypotheses[:2] == plain.hypotheses


def test_without_a_penalty_all_groups_are_equal():
    outcome = ours(table_logits(3), 6, 3, 0.0)
    assert outcome.hypotheses[:2] == outcome.hypotheses[2:4] == outcome.hypotheses[4:]


def test_with_a_large_penalty_groups_never_get_equal_tokens_in_a_step():
    outcome = ours(table_logits(4), 4, 4, 100.0, stop_token_ids=())
    for tokens in zip(*outcome.hypotheses, strict=True):
        assert len(set(tokens)) == 4


def test_a_larger_penalty_gives_more_different_sequences():
    def different(penalty: float) -> int:
        outcomes = [ours(table_logits(seed), 4, 4, penalty) for seed in range(10)]
        return sum(len(set(outcome.hypotheses)) for outcome in outcomes)

    assert different(0.0) == 10
    assert different(0.0) < different(0.5) <= different(5.0)


def test_logprobs_are_the_model_s_and_scores_include_the_penalty():
    all_shared = []
    for seed in range(5):
        logits_of = table_logits(seed)
        outcome = ours(logits_of, 4, 2, 0.3, length_penalty=0.0, stop_token_ids=())
        raw = [
            sum(logits_of([tokens[:t]])[0, token] for t, token in enumerate(tokens))
            for tokens in outcome.hypotheses
        ]
        np.testing.assert_allclose(outcome.logprobs, raw, rtol=1e-5)
        shared = (np.array(raw) - oracle.hypothesis_scores(outcome.state)) / 0.3
        all_shared.append(shared)
    # These are the numbers of equal tokens in the first group: whole numbers.
    all_shared = np.array(all_shared)
    np.testing.assert_allclose(all_shared, np.round(all_shared), atol=1e-4)
    np.testing.assert_allclose(all_shared[:, :2], 0.0, atol=1e-4)
    assert 1 <= np.round(all_shared[:, 2:]).max() <= 2 * MAX_TOKENS


def test_requests_mapped_together_are_independent():
    tables = np.stack(
        [oracle.random_table(n, num_steps=MAX_TOKENS, vocab_size=6) for n in range(3)]
    )
    algorithm = diverse_beam_search(num_groups=2, diversity_penalty=0.6, **PARAMS)
    state = algorithm.init(6)
    run = functools.partial(oracle.rollout, diverse_beam.step)
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, lengths, _ = jax.jit(jax.vmap(run, in_axes=(None, 0, 0)))(
        state, tables, keys
    )
    for n, table in enumerate(tables):
        outcome = ours(oracle.table_logits(table), 6, 2, 0.6)
        for rank, expected in enumerate(outcome.hypotheses):
            got = np.asarray(tokens[n, rank, : lengths[n, rank]])
            assert tuple(got.tolist()) == expected


@pytest.mark.parametrize(
    ("num_groups", "penalty", "message"),
    [
        (4, 1.0, "num_groups: expected a divisor of 6, the rows of the request, got 4"),
        (0, 1.0, "num_groups: expected a divisor"),
        (2, -1.0, "diversity_penalty: expected a finite number of at least 0"),
        (2, float("inf"), "diversity_penalty: .* got inf"),
    ],
)
def test_an_invalid_argument_is_named(num_groups, penalty, message):
    algorithm = diverse_beam_search(
        num_groups=num_groups, diversity_penalty=penalty, **PARAMS
    )
    with pytest.raises(ValueError, match=message):
        algorithm.init(6)


def ended_groups_do_not_count(advance, logits, state):
    state, decision, continued = advance(logits, state)
    return state, decision, continued._replace(scores=state.scores)


def stop_tokens_count_too(advance, logits, state):
    found = beam.candidates(logits, state.scores, state.stop_ids)
    leaders = beam.best_candidates(found, found.scores, len(state.scores))
    return *advance(logits, state)[:2], leaders


def other_tokens_count(advance, logits, state):
    state, decision, continued = advance(logits, state)
    return state, decision, continued._replace(tokens=continued.tokens[::-1] * 0)


@pytest.mark.parametrize(
    "fault", [ended_groups_do_not_count, stop_tokens_count_too, other_tokens_count]
)
def test_a_planted_fault_is_found(fault, monkeypatch):
    monkeypatch.setattr(
        beam, "advance_beams", functools.partial(fault, beam.advance_beams)
    )
    fresh = jax.jit(lambda *args: diverse_beam.step(*args))
    cases = [(table_logits(seed), 6, 3, 1.0) for seed in range(10)]
    assert any(differences(*case, fresh) for case in cases)
    monkeypatch.undo()
    assert not any(differences(*case) for case in cases)
