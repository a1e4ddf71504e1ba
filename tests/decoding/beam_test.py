"""Beam search against slow Python with Hugging Face's rules, and enumeration."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jpaged import decoding
from jpaged.decoding import beam, beam_search, beam_state
from tests.support import beam_oracle as oracle

NUM_ROWS, VOCAB_SIZE, MAX_TOKENS = 8, 6, 6
PARAMS = {
    "width": 4,
    "max_tokens": 5,
    "length_penalty": 1.0,
    "early_stopping": False,
    "stop_ids": (1,),
}
step = jax.jit(beam.step)


def ours(logits_of, step=step, num_rows=NUM_ROWS, **params) -> oracle.Outcome:
    state = beam_state(num_rows, num_stop_ids=3, **PARAMS | params)
    return oracle.follow(step, state, logits_of, num_rows)


def slow(logits_of, **params) -> oracle.SlowBeams:
    beams = oracle.SlowBeams(**PARAMS | params)
    beams.run(logits_of)
    return beams


def differences(logits_of, step=step, **params) -> list[str]:
    """Differences between our search and the slow one."""
    outcome, beams = ours(logits_of, step, **params), slow(logits_of, **params)
    found, expected = [], beams.pool
    if outcome.num_steps != beams.length:
        found.append(f"steps: {outcome.num_steps}, expected {beams.length}")
    if outcome.hypotheses != [tokens for _, tokens in expected]:
        found.append(f"tokens: {outcome.hypotheses}, expected {expected}")
    scores = oracle.hypothesis_scores(outcome.state)
    # Sums of at most 6 float32 numbers below 10, and a power.
    if not np.allclose(scores, [score for score, _ in expected], rtol=1e-5, atol=1e-5):
        found.append(f"scores: {scores}, expected {expected}")
    return found


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    is_tied=st.booleans(),
    forbidden=st.sampled_from([0.0, 0.0, 0.3, 0.7]),
    width=st.integers(1, NUM_ROWS),
    max_tokens=st.integers(1, MAX_TOKENS),
    length_penalty=st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, -0.7]),
    early_stopping=st.sampled_from(beam.EARLY_STOPPING),
    stop_ids=st.sets(st.integers(0, VOCAB_SIZE), max_size=3).map(sorted),
)
def test_tokens_and_scores_equal_a_slow_search(
    seed, is_tied, forbidden, length_penalty, **params
):
    # With other penalties rounding would decide between exact ties.
    is_tied &= length_penalty in (0.0, 1.0)
    table = oracle.random_table(
        seed,
        num_steps=MAX_TOKENS,
        vocab_size=VOCAB_SIZE,
        forbidden=forbidden,
        is_tied=is_tied,
    )
    logits_of = oracle.table_logits(table)
    params |= {"length_penalty": length_penalty}
    assert not differences(logits_of, **params)


def test_a_vocabulary_of_many_groups_equals_the_slow_search():
    table = oracle.random_table(0, num_steps=1, vocab_size=3000)[0]
    table[:, ::3] = np.round(table[:, ::3], 1)

    def logits_of(prefixes):
        return table[[prefix[-1] if prefix else 0 for prefix in prefixes]]

    for width in (1, 3, 8):
        stop_ids = [7, 2999, *np.argsort(-table[0])[[2]].tolist()]
        assert not differences(logits_of, width=width, stop_ids=stop_ids)


@pytest.mark.parametrize("early_stopping", beam.EARLY_STOPPING)
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 3.0])
def test_width_1_is_greedy_decoding(early_stopping, length_penalty):
    for seed in range(10):
        table = oracle.random_table(
            seed, num_steps=6, vocab_size=VOCAB_SIZE, is_tied=True
        )
        tokens = []
        while len(tokens) < 6 and (not tokens or tokens[-1] != 1):
            row = table[len(tokens), tokens[-1] if tokens else 0]
            tokens.append(int(np.argmax(row)))
        outcome = ours(
            oracle.table_logits(table),
            width=1,
            max_tokens=6,
            early_stopping=early_stopping,
            length_penalty=length_penalty,
        )
        assert outcome.hypotheses == [tuple(tokens)]
        assert outcome.num_steps == len(tokens)


@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", beam.EARLY_STOPPING)
def test_a_beam_as_wide_as_all_sequences_returns_them_sorted(
    length_penalty, early_stopping
):
    table = oracle.normalised(oracle.random_table(3, num_steps=4, vocab_size=3))
    logits_of = oracle.table_logits(table)
    everything = [
        (total / len(tokens) ** length_penalty, tokens)
        for total, tokens in oracle.every_sequence(logits_of, (2,), 4)
    ]
    everything.sort(reverse=True)
    assert len(everything) == 31
    params = {
        "max_tokens": 4,
        "stop_ids": (2,),
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
    }
    outcome = ours(logits_of, num_rows=32, width=32, **params)
    assert outcome.hypotheses == [tokens for _, tokens in everything]
    scores = oracle.hypothesis_scores(outcome.state)
    np.testing.assert_allclose(scores, [score for score, _ in everything], rtol=1e-5)


def test_logprobs_of_a_sequence_sum_to_its_score():
    table = oracle.normalised(oracle.random_table(4, num_steps=5, vocab_size=6))
    outcome = ours(oracle.table_logits(table), length_penalty=1.0, stop_ids=(1, 4))
    assert len({len(tokens) for tokens in outcome.hypotheses}) > 1
    expected = [
        logprob / len(tokens)
        for tokens, logprob in zip(outcome.hypotheses, outcome.logprobs, strict=True)
    ]
    np.testing.assert_allclose(
        oracle.hypothesis_scores(outcome.state), expected, rtol=1e-5
    )


def test_rows_beyond_the_width_never_run_and_have_no_effect():
    table = oracle.random_table(5, num_steps=6, vocab_size=VOCAB_SIZE, is_tied=True)
    logits_of = oracle.table_logits(table)
    for width in (1, 3, 8):
        padded = ours(logits_of, num_rows=8, width=width)
        exact = ours(logits_of, num_rows=width, width=width)
        assert padded.hypotheses == exact.hypotheses
        assert padded.num_steps == exact.num_steps
        kept = oracle.hypothesis_scores(padded.state)
        assert kept == oracle.hypothesis_scores(exact.state)
    state = beam_state(8, num_stop_ids=3, **PARAMS | {"width": 3})
    logits = np.zeros((8, VOCAB_SIZE), np.float32)
    for _ in range(4):
        keys = jax.random.split(jax.random.key(0), 8)
        state, decision = step(keys, logits, state)
        assert decision.finished[3:].all()


def test_a_row_without_a_candidate_finishes_and_can_run_again():
    table = oracle.random_table(6, num_steps=5, vocab_size=3)
    outcome = ours(oracle.table_logits(table), width=8, stop_ids=(2,))
    assert outcome.was_revived
    assert len(set(outcome.hypotheses)) == len(outcome.hypotheses) == 8


def test_a_search_ends_with_its_hypotheses_if_all_tokens_are_forbidden():
    table = oracle.random_table(7, num_steps=5, vocab_size=VOCAB_SIZE)
    table[2] = -np.inf
    outcome = ours(oracle.table_logits(table), width=8)
    assert outcome.num_steps == 3
    assert 0 < len(outcome.hypotheses) < 8
    assert all(tokens[-1] == 1 for tokens in outcome.hypotheses)
    table[0] = -np.inf
    outcome = ours(oracle.table_logits(table))
    assert outcome.num_steps == 1
    assert outcome.hypotheses == []


def test_forbidden_tokens_never_occur_and_others_are_not_renormalised():
    table = oracle.normalised(oracle.random_table(8, num_steps=5, vocab_size=6))
    table[:, :, [2, 5]] = -np.inf
    outcome = ours(oracle.table_logits(table))
    assert not {2, 5} & {token for tokens in outcome.hypotheses for token in tokens}
    best = outcome.hypotheses[0]
    lasts = (0, *best[:-1])
    raw = sum(
        table[t, last, token]
        for t, (last, token) in enumerate(zip(lasts, best, strict=True))
    )
    np.testing.assert_allclose(outcome.logprobs[0], raw, rtol=1e-5)


def test_steps_after_the_end_do_not_change_the_hypotheses():
    table = oracle.random_table(9, num_steps=6, vocab_size=VOCAB_SIZE)
    state = ours(oracle.table_logits(table), early_stopping=True).state
    keys, logits = jax.random.split(jax.random.key(0), 8), np.zeros((8, 6), np.float32)
    after, decision = step(keys, logits, state)
    np.testing.assert_array_equal(after.hypothesis_scores, state.hypothesis_scores)
    assert decision.finished.all()
    np.testing.assert_array_equal(decision.parents[8:], np.arange(8, 16))


def test_requests_with_different_parameters_are_independent_in_one_program():
    kinds = [
        {"width": 3, "length_penalty": 0.0, "early_stopping": True},
        {"width": 8, "length_penalty": 1.0, "early_stopping": "never"},
        {"width": 1, "max_tokens": 2},
        {"width": 5, "length_penalty": -1.0, "stop_ids": (0, 1, 2)},
        {"width": 4, "max_tokens": 6, "stop_ids": ()},
    ]
    tables = np.stack(
        [oracle.random_table(n, num_steps=6, vocab_size=6) for n in range(len(kinds))]
    )
    states = [beam_state(8, num_stop_ids=3, **PARAMS | kind) for kind in kinds]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    keys = jax.random.split(jax.random.key(0), len(kinds))
    run = jax.jit(jax.vmap(functools.partial(oracle.rollout, beam.step)))
    tokens, lengths, end = run(together, tables, keys)
    for n, kind in enumerate(kinds):
        outcome = ours(oracle.table_logits(tables[n]), **kind)
        assert np.asarray(end.has_hypothesis[n]).sum() == len(outcome.hypotheses)
        for rank, expected in enumerate(outcome.hypotheses):
            got = np.asarray(tokens[n, rank, : lengths[n, rank]])
            assert tuple(got.tolist()) == expected
        scores = np.asarray(end.hypothesis_scores[n])[: len(outcome.hypotheses)]
        expected = oracle.hypothesis_scores(outcome.state)
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_one_compiled_step_serves_all_parameters():
    fresh = jax.jit(lambda *args: beam.step(*args))
    table = oracle.random_table(0, num_steps=6, vocab_size=6)
    for width, penalty, early in [(1, 0.0, True), (4, 1.0, "never"), (8, -2.0, False)]:
        ours(
            oracle.table_logits(table),
            fresh,
            width=width,
            length_penalty=penalty,
            early_stopping=early,
            stop_ids=(width % 3,),
        )
    # The state has numpy arrays before the first step and device arrays after it.
    assert fresh._cache_size() <= 2


def test_beam_search_uses_all_rows():
    table = oracle.random_table(1, num_steps=6, vocab_size=6)
    logits_of = oracle.table_logits(table)
    algorithm = beam_search(
        max_tokens=6, length_penalty=0.5, early_stopping="never", stop_token_ids=(1, 3)
    )
    assert isinstance(algorithm, decoding.DecodingAlgorithm)
    got = oracle.follow(jax.jit(algorithm.step), algorithm.init(4), logits_of, 4)
    expected = slow(
        logits_of,
        width=4,
        max_tokens=6,
        length_penalty=0.5,
        early_stopping="never",
        stop_ids=(1, 3),
    )
    assert got.hypotheses == [tokens for _, tokens in expected.pool]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, "width: expected from 1 to 8, the rows of the request, got 9"),
        ({"width": 0}, "width: expected from 1 to 8, the rows"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"stop_ids": (1, 2, 3, 4)}, "expected at most num_stop_ids=3 tokens, got 4"),
        ({"stop_ids": (-1,)}, "stop_ids: expected token ids"),
        ({"early_stopping": "always"}, "early_stopping: expected False, True or"),
        ({"length_penalty": float("nan")}, "length_penalty: expected max_tokens"),
        ({"length_penalty": -200.0}, "choose a value nearer to 0"),
    ],
)
def test_an_invalid_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        beam_state(NUM_ROWS, num_stop_ids=3, **PARAMS | change)


def count_the_prompt(divisor, length, length_penalty):
    return divisor(length + 3, length_penalty)


def reverse_ties(best, found, scores, num):
    found = jax.tree.map(lambda array: array[::-1], found)
    return best(found, scores[::-1], num)


def count_every_stop_token(best, found, scores, num):
    if scores is not found.scores:
        return best(found, scores, num)
    lifted = best(found, jnp.where(found.is_stop, scores + 64.0, scores), num)
    scores = jnp.where(lifted.is_stop, lifted.scores - 64.0, lifted.scores)
    return lifted._replace(scores=scores)


def all_rows_at_first(first_scores, num_rows):
    return np.zeros_like(first_scores(num_rows))


def new_before_old(update, previous_scores, ended, ended_scores, width):
    return update(previous_scores, ended, ended_scores + 1e-3, width)


def never_over_early(is_over, state, best_score, hypotheses, length):
    del is_over, state, hypotheses, length
    return best_score == -jnp.inf


def lower_the_best_score(is_over, state, best_score, hypotheses, length):
    return is_over(state, best_score - 0.5, hypotheses, length)


FAULTS = {
    "_length_divisor": [count_the_prompt],
    "best_candidates": [reverse_ties, count_every_stop_token],
    "first_scores": [all_rows_at_first],
    "update_hypotheses": [new_before_old],
    "_is_over": [never_over_early, lower_the_best_score],
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name, faults in FAULTS.items() for fault in faults],
)
def test_a_planted_fault_is_found(name, fault, monkeypatch):
    faulty = functools.partial(fault, getattr(beam, name))
    monkeypatch.setattr(beam, name, faulty)
    # A new function, since jax would reuse the program without the fault.
    fresh = jax.jit(lambda *args: beam.step(*args))
    tables = [
        oracle.random_table(seed, num_steps=5, vocab_size=VOCAB_SIZE, is_tied=True)
        for seed in range(20)
    ]
    cases = [
        (oracle.table_logits(table), {"early_stopping": early, "stop_ids": stop_ids})
        for table in tables
        for early in beam.EARLY_STOPPING
        for stop_ids in [(1,), (0, 1, 2)]
    ]
    assert any(differences(logits_of, fresh, **case) for logits_of, case in cases)
    monkeypatch.undo()
    assert not any(differences(logits_of, **case) for logits_of, case in cases)
