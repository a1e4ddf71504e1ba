"""Diverse beam search against slow groups, and its laws."""

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
    """The groups at their end: in each step one after the other, with word counts."""
    params = PARAMS | params
    params["stop_ids"] = params.pop("stop_token_ids")
    width = num_rows // num_groups
    groups = [oracle.SlowBeams(width=width, **params) for _ in range(num_groups)]
    while any(group.running for group in groups):
        counts = np.zeros(VOCAB_SIZE)
        for group in groups:
            if group.running:
                group.advance(logits_of, diversity_penalty * counts)
                for _, tokens in group.going:
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
    if outcome.held != [tokens for group in groups for _, tokens in group.pool]:
        found.append(f"tokens: {outcome.held}, wanted {[g.pool for g in groups]}")
    scores = oracle.held_scores(outcome.state)
    wanted = [score for group in groups for score, _ in group.pool]
    if not np.allclose(scores, wanted, rtol=1e-5, atol=1e-5):
        found.append(f"scores: {scores}, wanted {wanted}")
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
def test_tokens_and_scores_are_those_of_slow_groups(
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


def test_one_group_is_beam_search_whatever_the_penalty():
    algorithm = beam_search(**PARAMS)
    for seed, penalty in enumerate([0.0, 3.0]):
        logits_of = table_logits(seed)
        plain = oracle.follow(
            jax.jit(algorithm.step), algorithm.init(4), logits_of, num_rows=4
        )
        outcome = ours(logits_of, 4, 1, penalty)
        assert outcome.held == plain.held
        assert outcome.logprobs == plain.logprobs


def test_the_first_group_is_beam_search_of_its_width():
    algorithm = beam_search(**PARAMS)
    logits_of = table_logits(2)
    plain = oracle.follow(
        jax.jit(algorithm.step), algorithm.init(2), logits_of, num_rows=2
    )
    outcome = ours(logits_of, 6, 3, 0.7)
    assert outcome.held[:2] == plain.held


def test_without_a_penalty_all_groups_are_equal():
    outcome = ours(table_logits(3), 6, 3, 0.0)
    assert outcome.held[:2] == outcome.held[2:4] == outcome.held[4:]


def test_a_large_penalty_keeps_groups_from_taking_the_same_token_at_once():
    outcome = ours(table_logits(4), 4, 4, 100.0, stop_token_ids=())
    for taken in zip(*outcome.held, strict=True):
        assert len(set(taken)) == 4


def test_more_penalty_gives_more_different_first_words():
    def different(penalty: float) -> int:
        outcomes = [ours(table_logits(seed), 4, 4, penalty) for seed in range(10)]
        return sum(len(set(outcome.held)) for outcome in outcomes)

    assert different(0.0) == 10
    assert different(0.0) < different(0.5) <= different(5.0)


def test_logprobs_are_the_models_own_and_scores_contain_the_penalty():
    all_shared = []
    for seed in range(5):
        logits_of = table_logits(seed)
        outcome = ours(logits_of, 4, 2, 0.3, length_penalty=0.0, stop_token_ids=())
        raw = [
            sum(logits_of([tokens[:t]])[0, token] for t, token in enumerate(tokens))
            for tokens in outcome.held
        ]
        np.testing.assert_allclose(outcome.logprobs, raw, rtol=1e-5)
        shared = (np.array(raw) - oracle.held_scores(outcome.state)) / 0.3
        all_shared.append(shared)
    # How often a word was in the first group, or in it twice: whole numbers.
    all_shared = np.array(all_shared)
    np.testing.assert_allclose(all_shared, np.round(all_shared), atol=1e-4)
    np.testing.assert_allclose(all_shared[:, :2], 0.0, atol=1e-4)
    assert 1 <= np.round(all_shared[:, 2:]).max() <= 2 * MAX_TOKENS


def test_requests_mapped_together_get_what_they_get_alone():
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
        for place, wanted in enumerate(outcome.held):
            got = np.asarray(tokens[n, place, : lengths[n, place]])
            assert tuple(got.tolist()) == wanted


@pytest.mark.parametrize(
    ("num_groups", "penalty", "message"),
    [
        (4, 1.0, "num_groups must divide the 6 rows of the request; got 4"),
        (0, 1.0, "num_groups must divide"),
        (2, -1.0, "diversity_penalty must be 0 or larger"),
        (2, float("inf"), "diversity_penalty must be 0 or larger, and finite"),
    ],
)
def test_a_bad_argument_is_refused_by_name(num_groups, penalty, message):
    algorithm = diverse_beam_search(
        num_groups=num_groups, diversity_penalty=penalty, **PARAMS
    )
    with pytest.raises(ValueError, match=message):
        algorithm.init(6)


def ended_groups_do_not_count(advance, logits, state):
    state, decision, going = advance(logits, state)
    return state, decision, going._replace(scores=state.scores)


def stop_tokens_count_too(advance, logits, state):
    found = beam.candidates(logits, state.scores, state.stop_ids)
    ahead = beam.best(found, found.scores, len(state.scores))
    return *advance(logits, state)[:2], ahead


def other_words_count(advance, logits, state):
    state, decision, going = advance(logits, state)
    return state, decision, going._replace(tokens=going.tokens[::-1] * 0)


@pytest.mark.parametrize(
    "fault", [ended_groups_do_not_count, stop_tokens_count_too, other_words_count]
)
def test_a_planted_fault_makes_a_difference(fault, monkeypatch):
    monkeypatch.setattr(beam, "advance", functools.partial(fault, beam.advance))
    fresh = jax.jit(lambda *args: diverse_beam.step(*args))
    cases = [(table_logits(seed), 6, 3, 1.0) for seed in range(10)]
    assert any(differences(*case, fresh) for case in cases)
    monkeypatch.undo()
    assert not any(differences(*case) for case in cases)
