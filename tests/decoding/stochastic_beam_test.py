"""Stochastic beam search against exact sampling without replacement."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding import stochastic_beam, stochastic_beam_search
from tests.decoding.sample_test import chi_square_z
from tests.support import beam_oracle as oracle

pytestmark = pytest.mark.long

NUM_RUNS = 40_000
STOP = (0,)


@functools.lru_cache
def table_and_sequences(vocab_size: int = 3, num_steps: int = 3, forbidden: float = 0):
    """A table model, its sequences, and their probabilities."""
    table = oracle.random_table(
        7, num_steps=num_steps, vocab_size=vocab_size, forbidden=forbidden
    )
    # The other tokens share the probability of forbidden tokens.
    sequences = oracle.every_sequence(
        oracle.table_logits(oracle.normalised(table)), STOP, num_steps
    )
    return (
        table,
        [tokens for _, tokens in sequences],
        np.exp([total for total, _ in sequences]),
    )


def sample_runs(table, num_rows, step=stochastic_beam.step, num_runs=NUM_RUNS):
    """Tokens i32[runs, S, T], lengths i32[runs, S] and bool: which samples exist."""
    algorithm = stochastic_beam_search(max_tokens=len(table), stop_token_ids=STOP)
    run = functools.partial(oracle.rollout, step, algorithm.init(num_rows), table)
    keys = jax.random.split(jax.random.key(1), num_runs)
    tokens, lengths, state = jax.jit(jax.vmap(run))(keys)
    return np.asarray(tokens), np.asarray(lengths), np.asarray(state.has_hypothesis)


def numbered(tokens, lengths, sequences):
    """The index of each sample in `sequences`, i32[runs, S]."""
    size = 1 + max(token for sequence in sequences for token in sequence)
    num_steps = tokens.shape[-1]

    def code(sequence, length):
        digits = np.where(np.arange(num_steps) < length, sequence + 1, 0)
        return digits @ (size + 1) ** np.arange(num_steps)

    padded = [s + (0,) * (num_steps - len(s)) for s in sequences]
    codes = code(np.array(padded), np.array([[len(s)] for s in sequences]))
    order = np.argsort(codes)
    found = code(tokens, lengths[..., None])
    index = np.clip(np.searchsorted(codes[order], found), 0, len(codes) - 1)
    assert np.all(codes[order][index] == found), "not a sequence of the model"
    return order[index]


def ordered_probabilities(probabilities, num):
    """Exact probabilities of ordered samples without replacement."""
    exact = {}
    for order in itertools.permutations(range(len(probabilities)), num):
        chance, left = 1.0, 1.0
        for index in order:
            chance *= probabilities[index] / left
            left -= probabilities[index]
        exact[order] = chance
    return exact


def inclusion_z(sampled, probabilities):
    """Deviation of each sequence's inclusions from the mean, in standard deviations."""
    num_runs, num = sampled.shape
    expected = np.zeros(len(probabilities))
    for order, chance in ordered_probabilities(probabilities, num).items():
        expected[list(order)] += chance
    counts = np.bincount(sampled.reshape(-1), minlength=len(probabilities))
    deviation = np.sqrt(num_runs * expected * (1.0 - expected))
    return (counts - num_runs * expected) / deviation


def pair_z(sampled, probabilities):
    """Chi-square of the first two samples, in their order."""
    exact = ordered_probabilities(probabilities, 2)
    numbers = {order: number for number, order in enumerate(exact)}
    pairs = np.array([numbers[tuple(pair)] for pair in sampled[:, :2].tolist()])
    return chi_square_z(pairs, np.array(list(exact.values())))


@pytest.mark.parametrize("forbidden", [0.0, 0.2])
def test_ordered_samples_have_the_exact_distribution(forbidden):
    table, sequences, probabilities = table_and_sequences(forbidden=forbidden)
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-5)
    assert (len(sequences) == 15) == (forbidden == 0)
    probabilities = probabilities / probabilities.sum()
    tokens, lengths, has_hypothesis = sample_runs(table, 3)
    assert has_hypothesis.all()
    sampled = numbered(tokens, lengths, sequences)
    assert all(len(set(row)) == 3 for row in sampled.tolist())
    # Seeds are fixed; by chance a correct program fails with probability 1e-3 in all.
    assert np.abs(inclusion_z(sampled, probabilities)).max() < 4
    assert pair_z(sampled, probabilities) < 4
    assert chi_square_z(sampled[:, 0], probabilities) < 4


def test_tokens_of_many_vocabulary_groups_are_sampled_without_replacement():
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32) * 2
    logits[::7] = -np.inf
    table = np.broadcast_to(logits, (1, 300, 300))
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum()
    tokens, _, _ = sample_runs(table, 4, num_runs=10_000)
    sampled = tokens[:, :, 0]
    assert all(len(set(row)) == 4 for row in sampled.tolist())
    # The second sample given the first, summed over the first.
    second = exact * (np.sum(exact / (1 - exact)) - exact / (1 - exact))
    assert chi_square_z(sampled[:, 0], exact) < 4
    assert chi_square_z(sampled[:, 1], second) < 4
    assert chi_square_z(sampled[:, 1], exact) > 6, "no power"


def test_a_width_of_at_least_the_number_of_sequences_finds_all_of_them():
    table = oracle.random_table(1, num_steps=3, vocab_size=3)
    table[1, :, 2] = -90.0  # beyond the range of float32 probabilities
    sequences = [
        s for _, s in oracle.every_sequence(oracle.table_logits(table), STOP, 3)
    ]
    tokens, lengths, has_hypothesis = sample_runs(table, 20, num_runs=50)
    assert np.all(has_hypothesis.sum(axis=1) == 15)
    sampled = numbered(tokens[:, :15], lengths[:, :15], sequences)
    assert all(sorted(row) == list(range(15)) for row in sampled.tolist())


def test_order_logprobs_and_perturbed_scores_agree():
    table, _, _ = table_and_sequences()
    algorithm = stochastic_beam_search(max_tokens=3, stop_token_ids=STOP)
    logits_of = oracle.table_logits(oracle.normalised(table))
    outcome = oracle.follow(jax.jit(algorithm.step), algorithm.init(4), logits_of, 4)
    perturbed = np.asarray(outcome.state.hypothesis_perturbed)
    # The best sequence has the perturbed score of the prompt: 0.
    assert perturbed[0] == 0.0
    assert np.all(np.diff(perturbed) < 0)
    every = {s: total for total, s in oracle.every_sequence(logits_of, STOP, 3)}
    expected = [every[tokens] for tokens in outcome.hypotheses]
    np.testing.assert_allclose(outcome.logprobs, expected, rtol=1e-5)


def test_other_sequences_replace_a_dead_end():
    table = oracle.random_table(2, num_steps=3, vocab_size=3)
    table[1, 1] = -np.inf  # nothing may follow a first 1
    tokens, lengths, has_hypothesis = sample_runs(table, 4, num_runs=200)
    first, length = tokens[:, :, 0], lengths
    assert has_hypothesis.any(axis=1).all()
    assert not np.any(has_hypothesis & (first == 1))
    assert np.all((length > 0) == has_hypothesis)


def test_width_1_is_ancestral_sampling():
    table, sequences, probabilities = table_and_sequences()
    tokens, lengths, _ = sample_runs(table, 1)
    sampled = numbered(tokens, lengths, sequences)[:, 0]
    assert abs(chi_square_z(sampled, probabilities / probabilities.sum())) < 4


def test_perturbed_numbers_have_the_given_maximum_and_the_exact_distribution():
    logprobs = np.array([-0.5, -3.0, -np.inf, -20.0, -1.5], np.float32)
    noise = np.asarray(jax.random.gumbel(jax.random.key(0), (20_000, 5)))
    # Below -4 float32 is too coarse to test the distribution.
    largest = np.linspace(-4.0, 10.0, 20_000, dtype=np.float32)
    perturb = jax.jit(stochastic_beam.perturb)
    got = np.asarray(perturb(np.broadcast_to(logprobs, noise.shape), noise, largest))
    np.testing.assert_array_equal(got.max(axis=1), largest)
    assert np.all(got[:, 2] == -np.inf)
    assert not np.isnan(got).any()
    for index in (0, 1, 3, 4):
        x, location = got[:, index].astype(np.float64), float(logprobs[index])
        is_below = x < largest
        # The distribution function of Gumbel noise truncated at the maximum.
        quantile = np.exp(np.exp(location - largest) - np.exp(location - x))[is_below]
        counts, _ = np.histogram(quantile, bins=20, range=(0.0, 1.0))
        assert counts.sum() == is_below.sum()
        statistic = np.sum((counts - counts.mean()) ** 2) / counts.mean()
        assert statistic < 19 + 4 * 38**0.5
    # Extremes: a very small maximum, and a certain token.
    far = np.array([[-300.0, -1e-7, -90.0]], np.float32)
    got = np.asarray(perturb(far, noise[:1, :3], np.array([-500.0], np.float32)))
    assert got.max() == -500.0
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"stop_token_ids": (-2,)}, "stop_ids: expected token ids"),
    ],
)
def test_an_invalid_argument_is_named(change, message):
    algorithm = stochastic_beam_search(**{"max_tokens": 3} | change)
    with pytest.raises(ValueError, match=message):
        algorithm.init(4)


def free_noise(perturb, logprobs, noise, largest):
    del perturb, largest
    return logprobs + noise


def shared_noise(perturb, logprobs, noise, largest):
    return perturb(logprobs, jnp.broadcast_to(noise[:1], noise.shape), largest)


def less_noise(perturb, logprobs, noise, largest):
    return perturb(logprobs, 0.9 * noise, largest)


@pytest.mark.parametrize("fault", [free_noise, shared_noise, less_noise])
def test_a_planted_fault_is_found_by_the_statistics(fault, monkeypatch):
    table, sequences, probabilities = table_and_sequences()
    probabilities = probabilities / probabilities.sum()
    faulty = functools.partial(fault, stochastic_beam.perturb)
    monkeypatch.setattr(stochastic_beam, "perturb", faulty)
    tokens, lengths, _ = sample_runs(
        table, 3, step=lambda *args: stochastic_beam.step(*args)
    )
    sampled = numbered(tokens, lengths, sequences)
    largest = np.abs(inclusion_z(sampled, probabilities)).max()
    assert max(largest, pair_z(sampled, probabilities)) > 6
