"""Sequential Monte Carlo against enumeration, and in the engine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model
from jpaged.config import EngineConfig
from jpaged.decoding import Context, DecodingAlgorithm, contrib, smc, token_keys
from jpaged.decoding.smc import systematic
from jpaged.kv import block_manager
from jpaged.params import AlgorithmParams, SamplingParams
from tests.support import beam_oracle as oracle
from tests.support.engine.oracle import FOREVER, all_logprobs
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

NUM_RUNS, NUM_ROWS, NUM_STEPS = 20_000, 4, 4
STOP = (2,)


@functools.lru_cache
def table_model(forbidden: float = 0.0):
    """Log-probabilities f32[T, V, V]; some forbidden, without renormalisation."""
    table = oracle.normalised(oracle.random_table(3, num_steps=NUM_STEPS, vocab_size=3))
    is_removed = np.random.default_rng(4).random(table.shape) < forbidden
    return np.where(is_removed, -np.inf, table).astype(np.float32)


# Log-potentials of token t after token s; very different, so that weights are uneven.
LOG_POTENTIALS = np.array(
    [[0.0, -3.0, -1.0], [-4.0, 0.5, -2.0], [0.0, 0.0, 0.0]], np.float32
)


def potential(last, token):
    return token, jnp.asarray(LOG_POTENTIALS)[last, token]


@functools.lru_cache
def exact(forbidden: float = 0.0) -> dict[tuple[int, ...], float]:
    """The probability of every sequence times its potentials."""
    logits_of = oracle.table_logits(table_model(forbidden))
    found = {}
    for logprob, tokens in oracle.every_sequence(logits_of, STOP, NUM_STEPS):
        pairs = zip((0, *tokens), tokens, strict=False)
        total = logprob + sum(float(LOG_POTENTIALS[pair]) for pair in pairs)
        found[tokens] = float(np.exp(total))
    return found


def rollout(algorithm, table, key):
    """Tokens i32[S, T] (-1 after the end), parents i32[T, S] and the last state.

    As in the engine, the key of a row depends on its number of tokens, the logits of a
    finished row are NaN, and rows that continue it get no token.
    """
    table, rows = jnp.asarray(table), jnp.arange(NUM_ROWS)

    def body(carry, t):
        tokens, lengths, finished, state = carry
        keys = jax.vmap(
            lambda row, n: jax.random.fold_in(jax.random.fold_in(key, row), n)
        )
        last = jnp.where(t > 0, tokens[:, t - 1], 0)
        logits = jnp.where(finished[:, None], jnp.nan, table[t, last])
        state, decision = algorithm.step(keys(rows, lengths), logits, state)
        tokens, lengths = tokens[decision.parents], lengths[decision.parents]
        grows = ~finished[decision.parents]
        tokens = tokens.at[:, t].set(jnp.where(grows, decision.tokens, -1))
        lengths = lengths + grows.astype(jnp.int32)
        return (tokens, lengths, decision.finished, state), decision.parents

    start = (
        jnp.full((NUM_ROWS, NUM_STEPS), -1),
        jnp.zeros(NUM_ROWS, jnp.int32),
        jnp.zeros(NUM_ROWS, bool),
        algorithm.init(NUM_ROWS),
    )
    carry, parents = jax.lax.scan(body, start, jnp.arange(NUM_STEPS))
    return carry[0], parents, carry[3]


def run(algorithm, forbidden=0.0, num_runs=NUM_RUNS):
    keys = jax.random.split(jax.random.key(1), num_runs)
    each = functools.partial(rollout, algorithm, table_model(forbidden))
    tokens, parents, state = jax.device_get(jax.jit(jax.vmap(each))(keys))
    return tokens, parents, state


def estimates(state) -> tuple[np.ndarray, np.ndarray]:
    """Normaliser f64[runs] and weights of particles f64[runs, S] of each run."""
    log_weights = state.log_weights.astype(np.float64)
    scale = np.exp(state.log_mean_weight.astype(np.float64))
    return scale * np.exp(log_weights).mean(axis=1), np.exp(log_weights) * scale[
        :, None
    ]


def deviations(samples: np.ndarray, expected: np.ndarray | float) -> np.ndarray:
    """Deviation of the mean of independent runs, in standard errors."""
    error = samples.std(axis=0) / np.sqrt(len(samples))
    return (samples.mean(axis=0) - expected) / error


def per_sequence(tokens, weights, forbidden=0.0) -> tuple[np.ndarray, np.ndarray]:
    """Weight of each sequence in each run, [runs, sequences], and exact weights."""
    weight_of = exact(forbidden)
    number = {sequence: index for index, sequence in enumerate(weight_of)}
    found = np.zeros((len(tokens), len(weight_of)))
    flat = [
        tuple(t for t in row if t >= 0)
        for row in tokens.reshape(-1, NUM_STEPS).tolist()
    ]
    for index, sequence in enumerate(flat):
        weight = weights.reshape(-1)[index]
        if weight > 0:  # an impossible particle may have any tokens
            found[index // NUM_ROWS, number[sequence]] += weight / NUM_ROWS
    return found, np.array(list(weight_of.values()))


@pytest.mark.parametrize(
    ("threshold", "forbidden"), [(0.0, 0.25), (0.5, 0.0), (0.5, 0.25), (1.0, 0.0)]
)
def test_normaliser_and_posterior_are_unbiased(threshold, forbidden):
    algorithm = smc(potential, 0, threshold=threshold, stop_token_ids=STOP)
    tokens, _, state = run(algorithm, forbidden)
    normaliser = sum(exact(forbidden).values())
    assert len(exact(forbidden)) > 8
    found, weights = estimates(state)
    # 4 standard errors, with fixed keys. The error is below 1 %, so that a bias of 4 %
    # would be found.
    assert found.std() / np.sqrt(NUM_RUNS) < 0.01 * normaliser
    assert abs(deviations(found, normaliser)) < 4
    own = jax.vmap(lambda one: one.log_normaliser)(state)
    np.testing.assert_allclose(np.exp(own), found, rtol=1e-4)
    posterior, expected = per_sequence(tokens, weights, forbidden)
    is_common = expected > 0.002 * normaliser  # the error of others is not normal
    assert is_common.sum() > 5
    assert np.abs(deviations(posterior[:, is_common], expected[is_common])).max() < 4
    assert (state.num_resamplings.max() > 0) == (threshold > 0)


def twisted(threshold, twist=None):
    """A twisted particle method for the potential of these tests."""
    method = contrib.twisted_smc(
        potential, 0, twist=twist, threshold=threshold, stop_token_ids=STOP
    )
    return DecodingAlgorithm(method.init, with_context(method, threshold))


def with_context(method, threshold):
    """The step of a method, with the context that the engine would pass."""

    def step(keys, logits, state):
        lens = jnp.full(NUM_ROWS, state.num_tokens)
        limits = jnp.full(NUM_ROWS, NUM_STEPS)
        parameters = {"threshold": jnp.float32(threshold)}
        return method.step(
            keys, logits, state, Context(parameters, num_tokens=lens, limits=limits)
        )

    return step


def hopes(last):
    """A twist that is far from right."""
    return jnp.array([0.7, -1.5, 0.2])[last]


@pytest.mark.parametrize(("threshold", "twist"), [(0.0, None), (0.5, hopes)])
def test_twisted_particles_have_the_same_target(threshold, twist):
    tokens, _, state = run(twisted(threshold, twist), 0.25)
    normaliser = sum(exact(0.25).values())
    found, weights = estimates(state)
    assert abs(deviations(found, normaliser)) < 4
    posterior, expected = per_sequence(tokens, weights, 0.25)
    is_common = expected > 0.002 * normaliser
    assert np.abs(deviations(posterior[:, is_common], expected[is_common])).max() < 4
    assert (state.num_resamplings.max() > 0) == (threshold > 0)


def test_the_exact_twist_leaves_no_noise():
    """With the true expectation of the rest, every particle knows the normaliser."""
    table = table_model(0.25).astype(np.float64)
    rest = np.zeros((NUM_STEPS + 1, 3))
    for t in reversed(range(NUM_STEPS)):
        after = np.where(np.arange(3) == STOP[0], 1.0, np.exp(rest[t + 1]))
        rest[t] = np.log((np.exp(table[t] + LOG_POTENTIALS) * after).sum(axis=1))

    def counted(state, token):
        number, last = state
        return (number + 1, token), jnp.asarray(LOG_POTENTIALS)[last, token]

    method = contrib.twisted_smc(
        counted,
        (0, 0),
        twist=lambda state: jnp.asarray(rest, jnp.float32)[state],
        stop_token_ids=STOP,
    )
    algorithm = DecodingAlgorithm(method.init, with_context(method, 0.5))
    _, _, state = run(algorithm, 0.25, num_runs=500)
    found, _ = estimates(state)
    np.testing.assert_allclose(found, sum(exact(0.25).values()), rtol=1e-4)


def test_a_twist_that_is_never_taken_back_is_found():
    method = twisted(0.5, hopes)

    def init(num_rows):
        return dataclasses.replace(
            method.init(num_rows), log_mean_weight=jnp.float32(0.0)
        )

    _, _, state = run(DecodingAlgorithm(init, method.step), 0.25)
    assert abs(deviations(estimates(state)[0], sum(exact(0.25).values()))) > 8


def test_threshold_0_is_importance_sampling():
    tokens, parents, state = run(smc(potential, 0, threshold=0.0, stop_token_ids=STOP))
    assert np.all(parents == np.arange(NUM_ROWS))
    assert np.all(state.log_mean_weight == 0)
    before = np.concatenate([np.zeros_like(tokens[..., :1]), tokens[..., :-1]], axis=-1)
    each = np.where(tokens >= 0, LOG_POTENTIALS[before, tokens], 0.0)
    np.testing.assert_allclose(
        state.log_weights, each.sum(axis=-1), rtol=1e-5, atol=1e-5
    )


def test_parents_are_rows_and_weights_are_equal_after_resampling():
    algorithm = smc(potential, 0, threshold=1.0, stop_token_ids=STOP)
    _, parents, state = run(algorithm, num_runs=500)
    assert np.all((parents >= 0) & (parents < NUM_ROWS))
    assert np.any(parents != np.arange(NUM_ROWS))
    # Particles differ only by the potential of the last step.
    spread = state.log_weights.max(axis=1) - state.log_weights.min(axis=1)
    assert 0 < spread.max() <= np.ptp(LOG_POTENTIALS) + 1e-5


def test_systematic_resampling_rounds_the_expected_counts_up_or_down():
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=(4000, 7)) ** 3 * (rng.random((4000, 7)) < 0.7)
    weights = weights[weights.sum(axis=1) > 0].astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    keys = jax.random.split(jax.random.key(0), len(weights))
    parents = np.asarray(jax.jit(jax.vmap(systematic))(keys, weights))
    counts = np.stack([(parents == row).sum(axis=1) for row in range(7)], axis=1)
    assert np.all(counts.sum(axis=1) == 7)
    assert np.all(np.abs(counts - 7 * weights) < 1 + 1e-5)
    assert np.all(counts[weights == 0] == 0)
    assert np.abs(deviations(counts - 7 * weights, 0.0)).max() < 4


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-24])
def test_rounding_never_resamples_a_row_without_weight(number, monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(number))
    for weights in ([0, 1, 0, 0], [0, 0.3, 0.7, 0], [0, 0.1, 0.1, 0.8, 0, 0, 0, 0]):
        parents = systematic(jax.random.key(0), jnp.array(weights, jnp.float32))
        assert np.all(np.array(weights)[parents] > 0)


def test_a_request_ends_if_all_particles_are_impossible():
    def never(count, token):
        del token
        return count + 1, jnp.where(count == 1, -jnp.inf, 0.0)

    algorithm = smc(never, jnp.int32(0))
    step, state = jax.jit(algorithm.step), algorithm.init(3)
    logits = jnp.log(jnp.full((3, 4), 0.25))
    keys = jax.random.split(jax.random.key(0), 3)
    state, decision = step(keys, logits, state)
    assert not decision.finished.any()
    np.testing.assert_allclose(state.weights, 1 / 3, rtol=1e-6)
    state, decision = step(keys, logits, state)
    assert decision.finished.all()
    assert state.log_normaliser == -jnp.inf
    assert state.weights.tolist() == [0, 0, 0]


def keeps_weights(before, after, decision):
    """Weights are not reset after resampling."""
    resampled = after.num_resamplings > before.num_resamplings
    kept = before.log_weights[decision.parents]
    return dataclasses.replace(
        after, log_weights=after.log_weights + jnp.where(resampled, kept, 0.0)
    )


def keeps_potential_states(before, after, decision):
    """The potential's states do not follow the parents."""
    states = before.potential_states
    _, good = jax.vmap(potential)(states[decision.parents], decision.tokens)
    _, wrong = jax.vmap(potential)(states, decision.tokens)
    change = jnp.where(before.is_finished[decision.parents], 0.0, wrong - good)
    return dataclasses.replace(after, log_weights=after.log_weights + change)


def forgets_the_mean(before, after, decision):
    """The normaliser ignores resampling."""
    del before, decision
    return dataclasses.replace(after, log_mean_weight=jnp.float32(0.0))


def forgives(before, after, decision):
    """An impossible particle has a positive weight."""
    del before, decision
    log_weights = jnp.maximum(after.log_weights, -3.0)
    return dataclasses.replace(after, log_weights=log_weights)


@pytest.mark.parametrize(
    "fault", [keeps_weights, keeps_potential_states, forgets_the_mean, forgives]
)
def test_a_planted_fault_is_found_in_the_normaliser(fault):
    method = smc(potential, 0, stop_token_ids=STOP)

    def faulty(keys, logits, state):
        after, decision = method.step(keys, logits, state)
        return fault(state, after, decision), decision

    _, _, state = run(DecodingAlgorithm(method.init, faulty))
    assert abs(deviations(estimates(state)[0], sum(exact().values()))) > 8


def test_a_planted_fault_in_the_parents_is_found_in_the_posterior():
    method = smc(potential, 0, stop_token_ids=STOP)

    def faulty(keys, logits, state):
        state, decision = method.step(keys, logits, state)
        own = jnp.arange(NUM_ROWS, dtype=jnp.int32)
        return state, dataclasses.replace(decision, parents=own)

    tokens, _, state = run(DecodingAlgorithm(method.init, faulty))
    tokens = np.where(tokens == -1, 0, tokens)
    tokens = np.where(np.cumsum(tokens == 2, axis=-1) - (tokens == 2) > 0, -1, tokens)
    posterior, expected = per_sequence(tokens, estimates(state)[1])
    is_common = expected > 0.002 * expected.sum()
    assert np.abs(deviations(posterior[:, is_common], expected[is_common])).max() > 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    return load_model(checkpoints.write_tiny_llama(folder))


def by_hand(model, algorithm, num_rows, prompt, params):
    """Tokens of each row by forward passes, the state, and how many rows revived."""
    rows = [list(prompt) for _ in range(num_rows)]
    finished = np.zeros(num_rows, bool)
    step, state = jax.jit(algorithm.step), algorithm.init(num_rows)
    revived = 0
    while not finished.all():
        lens = np.array([len(row) for row in rows])
        padded = np.zeros((num_rows, len(prompt) + params.max_tokens), np.int32)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        logits = all_logprobs(model, jnp.asarray(padded))[np.arange(num_rows), lens - 1]
        logits = jnp.where(jnp.asarray(finished)[:, None], jnp.nan, logits)
        seeds = jnp.full(num_rows, params.seed)
        keys = token_keys(seeds, jnp.arange(num_rows), jnp.full(num_rows, lens.max()))
        state, decision = step(keys, logits, state)
        decision = jax.device_get(decision)
        grows = ~finished[decision.parents]
        revived += int(np.sum(finished & grows))
        rows = [
            rows[parent] + [int(token)] * bool(grow)
            for parent, token, grow in zip(
                decision.parents, decision.tokens, grows, strict=True
            )
        ]
        lens = np.array([len(row) - len(prompt) for row in rows])
        finished = decision.finished | (lens == params.max_tokens)
    return [row[len(prompt) :] for row in rows], state, revived


def test_the_engine_equals_plain_forward_passes(llama, monkeypatch):
    vocab_size = checkpoints.LLAMA["vocab_size"]
    rng = np.random.default_rng(2)
    gains = jnp.asarray(rng.normal(size=vocab_size) * 2, jnp.float32)
    # Tokens that end a particle have low potentials, so that other particles replace
    # it.
    stop = tuple(np.argsort(gains)[: vocab_size // 8].tolist())

    def likes_some(num_tokens, token):
        return num_tokens + 1, gains[token]

    algorithm = smc(likes_some, jnp.int32(0), threshold=0.7, stop_token_ids=stop)
    prompts = [rng.integers(0, vocab_size, n).tolist() for n in (9, 5)]
    params = [
        AlgorithmParams(
            algorithm, num_rows=5, max_tokens=12, ignore_eos=True, seed=s,
            stop_token_ids=stop,
        )
        for s in (3, 4)
    ]  # fmt: skip
    config = EngineConfig(
        num_blocks=32,
        block_size=4,
        max_num_seqs=11,
        max_model_len=24,
        max_num_batched_tokens=16,
        max_num_requests=16,
        max_num_stop_ids=len(stop),
        algorithms=((algorithm, 5),),
    )
    # One shape for decode steps and one for prompts compile faster.
    monkeypatch.setattr(EngineConfig, "row_buckets", (config.max_num_seqs,))
    monkeypatch.setattr(EngineConfig, "token_buckets", (16,))
    state = engine.init(llama, config)
    state, seq_indices = engine.submit(
        state,
        [*prompts, prompts[0]],
        [*params, SamplingParams(temperature=0.0, max_tokens=8)],
    )
    state = engine.run(llama, state, jnp.int32(FOREVER))
    assert block_manager.violations(state.blocks) == []
    assert int(block_manager.num_free_blocks(state.blocks)) == 32
    results = engine.collect(state)
    total_revived = 0
    for number, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        rows, expected, revived = by_hand(llama, algorithm, 5, prompt, param)
        got = [r.token_ids for r in results if r.arrival == number]
        assert got == rows
        leader = seq_indices[number][0]
        mine = jax.tree.map(lambda column, at=leader: column[at], state.states[0])
        np.testing.assert_allclose(
            mine.log_normaliser, expected.log_normaliser, rtol=1e-4
        )
        np.testing.assert_allclose(mine.weights, expected.weights, rtol=1e-3, atol=1e-6)
        assert int(mine.num_resamplings) == int(expected.num_resamplings) > 2
        total_revived += revived
    assert total_revived > 0, "no finished row continued another row"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"threshold": 1.5},
            "threshold: expected a finite number .* at most 1, got 1.5",
        ),
        (
            {"threshold": float("nan")},
            "threshold: expected a finite number .* at most 1, got nan",
        ),
        ({"stop_token_ids": (3, -1)}, r"stop_token_ids: .*got \(3, -1\)"),
    ],
)
def test_an_invalid_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        smc(potential, 0, **change)
