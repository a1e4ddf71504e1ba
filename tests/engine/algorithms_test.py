"""Decoding algorithms in the engine against loops that recompute every token.

Beam search is compared with a slow search on Python lists, and a user's algorithms with
a driver that applies their decisions to lists. The pools are large, or the smallest
legal ones, in which requests preempt each other.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model
from jpaged.config import EngineConfig
from jpaged.decoding import Decision, DecodingAlgorithm
from jpaged.engine import limits
from jpaged.kv import block_manager
from jpaged.params import AlgorithmParams, BeamSearchParams, SamplingParams
from tests.support.engine.algorithms_oracle import Expected, Plain, drive, search
from tests.support.engine.configs import one_size
from tests.support.engine.oracle import FOREVER, naive
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

MAX_LEN = 40
VOCABULARY = checkpoints.LLAMA["vocab_size"]
LONGEST_PROMPT = 20  # more tokens than a step computes
MAX_TOKENS = 9


class Race(NamedTuple):
    """The state of `race`."""

    totals: jax.Array  # f32[S]
    ended: jax.Array  # bool[S]


def race_step(keys, logits, state):
    """Each row samples, and ends at a multiple of 5. In the next step it continues the
    best row that has not ended, if there is one."""
    own = jnp.arange(len(logits), dtype=jnp.int32)
    best = jnp.argmax(jnp.where(state.ended, -jnp.inf, state.totals)).astype(jnp.int32)
    parents = jnp.where(state.ended, best, own)
    tokens = jax.vmap(jax.random.categorical)(keys, logits[parents]).astype(jnp.int32)
    logprobs = logits[parents, tokens]
    ended = tokens % 5 == 0
    state = Race(state.totals[parents] + logprobs, ended)
    return state, Decision(tokens, parents, logprobs, ended)


def race_init(num_rows):
    return Race(np.zeros(num_rows, np.float32), np.zeros(num_rows, np.bool_))


class Peak(NamedTuple):
    """The state of `peak`."""

    totals: jax.Array  # f32[S]
    mean: jax.Array  # f32[], of the retained sequence
    length: jax.Array  # i32[]


def peak_step(keys, logits, state):
    """Each row samples. The only output is a retained sequence: the prefix of a row, of
    at least two tokens, whose tokens are the most probable on average."""
    own = jnp.arange(len(logits), dtype=jnp.int32)
    tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    logprobs = logits[own, tokens]
    totals, length = state.totals + logprobs, state.length + 1
    best = jnp.argmax(totals).astype(jnp.int32)
    mean = totals[best] / length.astype(jnp.float32)
    is_new = (length >= 2) & (mean > state.mean)
    decision = Decision(
        tokens=jnp.append(tokens, jnp.where(is_new, tokens[best], 0)),
        parents=jnp.append(own, jnp.where(is_new, best, jnp.int32(len(own)))),
        logprobs=jnp.append(logprobs, jnp.where(is_new, logprobs[best], 0.0)),
        finished=jnp.append(jnp.zeros(len(own), bool), True),
    )
    return Peak(totals, jnp.where(is_new, mean, state.mean), length), decision


def peak_init(num_rows):
    totals = np.zeros(num_rows, np.float32)
    return Peak(totals, np.float32(-np.inf), np.int32(0))


race = DecodingAlgorithm(race_init, race_step)
peak = DecodingAlgorithm(peak_init, peak_step)
ALGORITHMS = ((race, 4), (peak, 2))


def smallest_pool(width: int, block_size: int) -> int:
    """The number of blocks that the largest request of these tests needs."""
    params = BeamSearchParams(width, MAX_TOKENS)

    def is_enough(num_blocks: int) -> bool:
        config = EngineConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=width,
            max_model_len=MAX_LEN,
            max_beam_width=width,
        )
        try:
            for length in range(1, LONGEST_PROMPT + 1):
                limits.check_request(config, [1] * length, params)
        except ValueError:
            return False
        return True

    return next(filter(is_enough, itertools.count(1)))


def make_config(
    block_size: int, *, is_tight: bool = False, algorithms: tuple = ()
) -> EngineConfig:
    width = 4 if is_tight else 8
    num_blocks = smallest_pool(width, block_size)
    return EngineConfig(
        num_blocks=num_blocks if is_tight else 8 * num_blocks,
        block_size=block_size,
        max_num_seqs=8,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=8 if is_tight else 16,
        max_num_requests=256,
        max_beam_width=width,
        algorithms=algorithms,
    )


# The configs of blocks of 4 serve most tests. All step sizes are compiled for one only.
ROOMY = make_config(4, algorithms=ALGORITHMS)
TIGHT = one_size(make_config(4, is_tight=True, algorithms=ALGORITHMS))
CONFIGS = {
    ("llama", 4, "roomy"): ROOMY,
    ("llama", 4, "tight"): TIGHT,
    ("opt", 16, "roomy"): make_config(16),
    ("opt", 1, "tight"): make_config(1, is_tight=True),
    ("llama", 1, "roomy"): make_config(1),
    ("llama", 1, "tight"): make_config(1, is_tight=True),
    ("llama", 16, "roomy"): make_config(16),
    ("llama", 16, "tight"): make_config(16, is_tight=True),
    ("opt", 4, "roomy"): make_config(4),
    ("opt", 4, "tight"): make_config(4, is_tight=True),
    ("opt", 1, "roomy"): make_config(1),
    ("opt", 16, "tight"): make_config(16, is_tight=True),
}
CONFIGS |= {key: one_size(CONFIGS[key]) for key in list(CONFIGS)[2:]}
QUICK = list(CONFIGS)[:4]
CASES = [
    pytest.param(*key, id="-".join(map(str, key)), marks=() if key in QUICK else SLOW)
    for SLOW in [pytest.mark.slow]
    for key in CONFIGS
]


@pytest.fixture(scope="module")
def plains(tmp_path_factory) -> dict[str, Plain]:
    """The two families, with last layers so sharp that beams diverge and merge."""
    root, plains = tmp_path_factory.mktemp("models"), {}
    writers = {
        "llama": (checkpoints.write_tiny_llama, 1.0),
        "opt": (checkpoints.write_tiny_opt, 4.0),
    }
    for family, (write, sharpness) in writers.items():
        folder = write(root / family, tie_word_embeddings=False)
        tensors = checkpoints.read_tensors(folder)
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * np.float32(sharpness)
        checkpoints.write_tensors(folder, tensors)
        plains[family] = Plain(load_model(folder), MAX_LEN)
    return plains


@pytest.fixture(scope="module")
def llama(plains) -> Plain:
    return plains["llama"]


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of one token, of more tokens than a step computes, and between."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LONGEST_PROMPT + 1, count)
    lengths[:2] = 1, LONGEST_PROMPT
    return [rng.integers(3, VOCABULARY, length).tolist() for length in lengths]


def likely_stops(plain: Plain, prompt: list[int], count: int) -> tuple[int, ...]:
    """Tokens that beams reach after their first two."""
    beams = search(plain, prompt, BeamSearchParams(8, 6))
    tokens = [token for beam in beams for token in beam.tokens[2:]]
    values, counts = np.unique(tokens, return_counts=True)
    return tuple(values[np.argsort(-counts, kind="stable")][:count].tolist())


def beam_requests(plain: Plain, max_width: int):
    """All widths, early stopping and penalties; with no, one or three stop tokens."""
    kinds = itertools.product(range(1, max_width + 1), (False, True, "never"))
    penalties = itertools.cycle((1.0, 0.0, 2.0, -1.0, 0.7))
    num_stops = itertools.cycle((1, 3, 0, 3))
    kinds = list(kinds)
    prompts = prompts_of(len(kinds))
    params = [
        BeamSearchParams(
            width,
            MAX_TOKENS,
            length_penalty=penalty,
            early_stopping=early_stopping,
            stop_token_ids=likely_stops(plain, prompt, count),
        )
        for (width, early_stopping), penalty, count, prompt in zip(
            kinds, penalties, num_stops, prompts, strict=False
        )
    ]
    return prompts, params


def run(plain: Plain, config: EngineConfig, prompts, params, order=None):
    """Run the engine; return it and the results of each request, in request order."""
    order = list(range(len(prompts))) if order is None else list(order)
    state = engine.init(plain.model, config)
    state, _ = engine.submit(
        state,
        [prompts[i] for i in order],
        [params[i] for i in order],
        vocab_size=VOCABULARY,
    )
    state = engine.run(plain.model, state, jnp.int32(FOREVER))
    results: list[list[Any]] = [[] for _ in prompts]
    for result in engine.collect(state):
        results[order[result.arrival]].append(result)
    return state, results


def expected_of(plain: Plain, prompt, param) -> list[Expected]:
    if isinstance(param, BeamSearchParams):
        return search(plain, prompt, param)
    if isinstance(param, AlgorithmParams):
        return drive(plain, prompt, param)[0]
    (samples,) = naive(plain.model, [prompt], [param], max_model_len=MAX_LEN)
    return [Expected(one.tokens, one.reason, np.nan) for one in samples]


def differences(state, results, expected) -> list[str]:
    """One sentence for each fault of a finished run."""
    found = block_manager.violations(state.blocks)
    if int(block_manager.num_free_blocks(state.blocks)) != state.config.num_blocks:
        found.append("not all blocks are free at the end")
    if bool(state.counters.is_stalled) or bool(engine.has_work(state)):
        found.append("not all requests have finished")
    for request, (got, want) in enumerate(zip(results, expected, strict=True)):
        if [result.sample for result in got] != list(range(len(got))):
            found.append(f"request {request}: outputs are not numbered in order")
        pairs = [(result.token_ids, result.finish_reason) for result in got]
        tokens = [(one.tokens, one.reason) for one in want]
        if pairs != tokens:
            found.append(f"request {request}: expected {tokens}, got {pairs}")
            continue
        for result, one in zip(got, want, strict=True):
            total = float(np.sum(result.logprobs, dtype=np.float64))
            if not np.isnan(one.logprob) and abs(total - one.logprob) > 1e-3:
                found.append(f"request {request}: {total} is not {one.logprob}")
    return found


@pytest.mark.parametrize(("family", "block_size", "pool"), CASES)
def test_beams_equal_a_search_that_recomputes_everything(
    family, block_size, pool, plains
):
    config, plain = CONFIGS[family, block_size, pool], plains[family]
    prompts, params = beam_requests(plain, config.max_beam_width)
    state, results = run(plain, config, prompts, params)
    expected = [search(plain, *pair) for pair in zip(prompts, params, strict=True)]
    assert differences(state, results, expected) == []
    # Some beams end early, others at their limit, and their lengths differ.
    assert {one.reason for beams in expected for one in beams} == {"stop", "length"}
    lengths = {len(one.tokens) for beams in expected for one in beams}
    assert len(lengths) > 3
    num_preemptions = int(state.counters.num_preemptions)
    preempted = [result.num_preemptions for beams in results for result in beams]
    assert (sum(preempted) > 0) == (num_preemptions > 0)
    # Two blocks of 16 hold a whole sequence, so rows rarely need another block.
    if pool == "roomy" or block_size < 16:
        assert (num_preemptions > 0) == (pool == "tight")
    assert float(state.counters.saved_share) > 0


def test_beam_search_of_width_1_is_greedy(llama):
    prompts = prompts_of(6, seed=3)
    stops = [likely_stops(llama, prompt, 1) for prompt in prompts]
    greedy = [
        SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop_token_ids=stop)
        for stop in stops
    ]
    beams = [BeamSearchParams(1, MAX_TOKENS, stop_token_ids=stop) for stop in stops]
    _, one = run(llama, ROOMY, prompts, greedy)
    _, other = run(llama, ROOMY, prompts, beams)
    for (left,), (right,) in zip(one, other, strict=True):
        assert left.token_ids == right.token_ids
        assert left.finish_reason == right.finish_reason
        np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-4)


def test_beams_end_at_max_model_len(llama):
    prompt = prompts_of(3)[1] + [7] * (MAX_LEN - LONGEST_PROMPT - 4)
    params = BeamSearchParams(3, 30)
    state, results = run(llama, ROOMY, [prompt], [params])
    assert [len(result.token_ids) for result in results[0]] == [4, 4, 4]
    assert differences(state, results, [search(llama, prompt, params)]) == []


def mixed_load(plain: Plain, max_width: int):
    """Greedy and sampled requests, n samples, beams and a user's algorithms."""
    prompts = prompts_of(15, seed=1)
    kinds: list[Any] = [
        lambda i: SamplingParams(temperature=0.0, max_tokens=5 + i % 4),
        lambda i: BeamSearchParams(2 + i % (max_width - 1), MAX_TOKENS),
        lambda i: SamplingParams(n=1 + i % 4, seed=i, top_p=0.9, max_tokens=6),
        lambda i: AlgorithmParams(race, 4, max_tokens=MAX_TOKENS, seed=i),
        lambda i: AlgorithmParams(peak, 2, max_tokens=4 + i % 5, seed=i),
    ]
    params = [kinds[i % len(kinds)](i) for i in range(len(prompts))]
    stops = likely_stops(plain, prompts[6], 2)
    params[6] = dataclasses.replace(params[6], stop_token_ids=stops)
    params[13] = dataclasses.replace(params[13], stop_token_ids=range(100, 108))
    return prompts, params


@pytest.mark.parametrize("pool", ["roomy", "tight"])
def test_requests_of_all_kinds_share_a_program_and_do_not_change_each_other(
    pool, llama
):
    config = CONFIGS["llama", 4, pool]
    prompts, params = mixed_load(llama, config.max_beam_width)
    expected = [expected_of(llama, *pair) for pair in zip(prompts, params, strict=True)]
    state, results = run(llama, config, prompts, params)
    assert differences(state, results, expected) == []
    assert (int(state.counters.num_preemptions) > 0) == (pool == "tight")
    known = engine.run._cache_size()
    order = np.random.default_rng(2).permutation(len(prompts))
    state, results = run(llama, config, prompts, params, order)
    assert differences(state, results, expected) == []
    for i in (0, 1, 2, 3, 4, 13):
        state, results = run(llama, config, prompts[i : i + 1], params[i : i + 1])
        assert differences(state, results, expected[i : i + 1]) == []
    assert engine.run._cache_size() == known


def test_ended_rows_of_a_users_algorithm_can_continue_other_rows(llama):
    prompts = prompts_of(8, seed=5)
    params = [
        AlgorithmParams(race, 4, max_tokens=MAX_TOKENS, seed=20 + i) for i in range(8)
    ]
    runs = [drive(llama, *pair) for pair in zip(prompts, params, strict=True)]
    assert any(was_revived for _, was_revived in runs)
    state, results = run(llama, TIGHT, prompts, params)
    assert differences(state, results, [outputs for outputs, _ in runs]) == []
    assert int(state.counters.num_preemptions) > 0


def test_a_retained_sequence_is_the_output_and_the_rows_are_not(llama):
    prompts = prompts_of(6, seed=6)
    params = [AlgorithmParams(peak, 2, max_tokens=MAX_TOKENS, seed=i) for i in range(6)]
    runs = [drive(llama, *pair)[0] for pair in zip(prompts, params, strict=True)]
    assert all(len(outputs) == 1 for outputs in runs)
    # The peak is before the end in some runs.
    assert len({len(outputs[0].tokens) for outputs in runs}) > 1
    state, results = run(llama, ROOMY, prompts, params)
    assert differences(state, results, runs) == []


def test_slices_of_a_run_and_a_copy_of_it_generate_the_same_tokens(llama):
    prompts, params = mixed_load(llama, TIGHT.max_beam_width)
    expected = [expected_of(llama, *pair) for pair in zip(prompts, params, strict=True)]
    state = engine.init(llama.model, TIGHT)
    state, _ = engine.submit(state, prompts, params, vocab_size=VOCABULARY)
    copies = []
    while bool(engine.has_work(state)):
        state = engine.run(llama.model, state, jnp.int32(7))
        assert block_manager.violations(state.blocks) == []
        copies.append(jax.tree.map(jnp.copy, state))
    assert len(copies) > 5
    copy = engine.run(llama.model, copies[2], jnp.int32(FOREVER))
    for end in (state, copy):
        results: list[list[Any]] = [[] for _ in prompts]
        for result in engine.collect(end):
            results[result.arrival].append(result)
        assert differences(end, results, expected) == []


def test_ending_a_beam_search_changes_no_other_request(llama):
    prompts = prompts_of(4, seed=7)
    params = [BeamSearchParams(width, MAX_TOKENS) for width in (3, 2, 4, 1)]
    state = engine.init(llama.model, TIGHT)
    state, seq_indices = engine.submit(state, prompts, params, vocab_size=VOCABULARY)
    state = engine.run(llama.model, state, jnp.int32(9))
    mask = np.zeros(TIGHT.max_num_requests, bool)
    mask[seq_indices[0] + seq_indices[2]] = True
    state = engine.end(state, jnp.asarray(mask), jnp.int32(3))
    assert block_manager.violations(state.blocks) == []
    state = engine.run(llama.model, state, jnp.int32(FOREVER))
    results: list[list[Any]] = [[] for _ in prompts]
    for result in engine.collect(state):
        results[result.arrival].append(result)
    assert {r.finish_reason for i in (0, 2) for r in results[i]} == {"abort"}
    pick = [1, 3]
    expected = [search(llama, prompts[i], params[i]) for i in pick]
    assert differences(state, [results[i] for i in pick], expected) == []
    # All sequence indices are free again.
    state = engine.release(state, jnp.ones(TIGHT.max_num_requests, bool))
    state, again = engine.submit(state, prompts, params, vocab_size=VOCABULARY)
    assert again == seq_indices


@pytest.mark.parametrize(
    ("params", "options", "match"),
    [
        (
            BeamSearchParams(9, 2),
            {},
            r"beam_width: expected at most max_num_seqs \(8\).* got 9",
        ),
        (
            BeamSearchParams(5, 2),
            dict(max_beam_width=4),
            r"beam_width: expected at most max_beam_width \(4\) of the config, got 5",
        ),
        (
            BeamSearchParams(2, 2),
            dict(max_beam_width=0),
            r"beam_width: expected at most max_beam_width \(0\)",
        ),
        (
            AlgorithmParams(race, 5),
            {},
            r"algorithm: expected one of the config's .* rows \(5\)",
        ),
        (
            AlgorithmParams(DecodingAlgorithm(race_init, race_step), 9),
            {},
            r"num_rows: expected at most max_num_seqs \(8\).* got 9",
        ),
        (
            AlgorithmParams(DecodingAlgorithm(peak_init, race_step), 4),
            {},
            "algorithm: expected one of the config's",
        ),
        (
            BeamSearchParams(8, 20),
            dict(num_blocks=20),
            r"in each of 8 rows need \d+ blocks of 4, the pool has 20",
        ),
        (
            BeamSearchParams(8, 2),
            dict(max_num_requests=15),
            r"at most max_num_requests \(15\) sequences, got 16",
        ),
        (
            BeamSearchParams(2, 30, length_penalty=99.0),
            {},
            "length_penalty: expected max_tokens",
        ),
    ],
)
def test_a_request_that_can_never_run_raises_before_anything_changes(
    params, options, match, llama
):
    config = dataclasses.replace(ROOMY, **options)
    state = engine.init(llama.model, config)
    with pytest.raises(ValueError, match=match):
        engine.submit(
            state, [[1], [2]], [SamplingParams(), params], vocab_size=VOCABULARY
        )
    assert not engine.has_work(state)


def test_a_beam_width_above_the_vocabulary_size_raises():
    config = dataclasses.replace(ROOMY, algorithms=())
    params = BeamSearchParams(6, 2)
    with pytest.raises(ValueError, match=r"the vocabulary's size \(5\), got 6"):
        limits.check_request(config, [1], params, vocab_size=5)


def with_decision(**changes):
    """`race` with changed fields in its decisions."""

    def step(keys, logits, state):
        state, decision = race_step(keys, logits, state)
        fields = {name: change(decision) for name, change in changes.items()}
        return state, dataclasses.replace(decision, **fields)

    return DecodingAlgorithm(race_init, step)


def with_state(change):
    """`race` with a changed form of its states."""

    def step(keys, logits, state):
        state, decision = race_step(keys, logits, state)
        return change(state), decision

    return DecodingAlgorithm(race_init, step)


@pytest.mark.parametrize(
    ("algorithm", "match"),
    [
        (
            with_decision(tokens=lambda d: d.tokens.astype(jnp.float32)),
            r"Decision\.tokens of int32 .* got float32 of \(3,\)",
        ),
        (
            with_decision(parents=lambda d: d.parents[:2]),
            r"Decision\.parents of int32 .* got int32 of \(2,\)",
        ),
        (
            with_decision(logprobs=lambda d: d.logprobs[:, None]),
            r"Decision\.logprobs of float32 .* got float32 of \(3, 1\)",
        ),
        (
            with_decision(finished=lambda d: d.finished.astype(jnp.int32)),
            r"Decision\.finished of bool .* got int32 of \(3,\)",
        ),
        (
            with_decision(
                **{
                    name: lambda d, name=name: getattr(d, name)[:2]
                    for name in ("tokens", "parents", "logprobs", "finished")
                }
            ),
            r"Q at least 3 \(its rows\)",
        ),
        (
            with_decision(tokens=lambda d: d.tokens[None]),
            r"Decision\.tokens of int32 .* got int32 of \(1, 3\)",
        ),
        (
            with_state(lambda s: s._replace(totals=jnp.append(s.totals, 0.0))),
            r"a state like the one that init returns, float32 of \(3,\), got .* \(4,\)",
        ),
        (
            with_state(lambda s: s._replace(totals=s.totals.astype(jnp.float16))),
            r"float32 of \(3,\), got float16 of \(3,\)",
        ),
        (with_state(tuple), "a state of the structure that init returns"),
        (
            DecodingAlgorithm(race_init, lambda keys, logits, state: (state, 3)),
            "expected a Decision as second result, got .*int32",
        ),
    ],
)
def test_an_algorithm_with_wrong_shapes_or_dtypes_raises(algorithm, match, llama):
    config = dataclasses.replace(ROOMY, algorithms=((algorithm, 3),))
    params = AlgorithmParams(algorithm, 3)
    with pytest.raises(ValueError, match=match):
        limits.check_request(config, [1], params, vocab_size=VOCABULARY)


def test_a_planted_fault_in_parents_is_found(llama, monkeypatch):
    from jpaged.decoding import beam

    make_decision = beam.make_decision

    def wrong(going, runs, held):
        # Row 1 continues row 0, whatever its parent is.
        decision = make_decision(going, runs, held)
        return dataclasses.replace(decision, parents=decision.parents.at[1].set(0))

    monkeypatch.setattr(beam, "make_decision", wrong)
    # Another number of stop ids: a program that is not compiled yet.
    config = dataclasses.replace(TIGHT, max_num_stop_ids=5, algorithms=())
    prompts, params = prompts_of(3), [BeamSearchParams(4, MAX_TOKENS)] * 3
    state, results = run(llama, config, prompts, params)
    expected = [search(llama, *pair) for pair in zip(prompts, params, strict=True)]
    assert differences(state, results, expected) != []
