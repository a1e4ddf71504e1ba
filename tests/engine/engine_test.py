"""The engine against a loop that recomputes everything, for several pools and loads.

Greedy and sampled tokens are compared exactly: the checkpoints' logits are far enough
apart that another order of summation changes no token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model, scheduler
from jpaged.config import EngineConfig
from jpaged.kv import block_manager
from jpaged.models import Decoder
from jpaged.params import SamplingParams
from tests.support.engine.configs import OneSizeConfig
from tests.support.engine.oracle import (
    FOREVER,
    all_logprobs,
    differences,
    generate,
    naive,
)
from tests.support.models import checkpoints

MAX_LEN = 48
VOCABULARY = checkpoints.LLAMA["vocab_size"]
ROOMY = EngineConfig(
    num_blocks=64,
    block_size=4,
    max_num_seqs=4,
    max_model_len=MAX_LEN,
    max_num_batched_tokens=16,
    max_num_requests=64,
)
# The smallest legal pool: it holds the longest sequence and no further token, so
# requests preempt each other often. 7 tokens per step split prompts inside blocks.
TIGHT = dataclasses.replace(ROOMY, num_blocks=12, max_num_batched_tokens=7)
CONFIGS = {
    "roomy": ROOMY,
    "tight": TIGHT,
    # Always run with lower limits than the config's, see LIMITS.
    "blocks_of_1": dataclasses.replace(ROOMY, block_size=1, num_blocks=48),
    # Also another family, another policy, and the most likely tokens.
    "opt_blocks_of_16": OneSizeConfig(
        num_blocks=4,
        block_size=16,
        max_num_seqs=4,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=64,
        max_num_requests=64,
        num_logprobs=3,
        policy="priority",
    ),
}
LIMITS = {"blocks_of_1": dict(max_num_seqs=3, max_num_batched_tokens=3)}
STEPS = functools.partial(jnp.asarray, dtype=jnp.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Decoder]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": load_model(checkpoints.write_tiny_llama(root / "llama")),
        "opt": load_model(checkpoints.write_tiny_opt(root / "opt")),
    }


@pytest.fixture(scope="module")
def llama(models) -> Decoder:
    return models["llama"]


def model_of(models: dict[str, Decoder], name: str) -> Decoder:
    """The model for a name of CONFIGS."""
    return models["opt" if name.startswith("opt") else "llama"]


def mixed_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 32, count)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def greedy_params(count: int, seed: int = 0) -> list[SamplingParams]:
    lengths = np.random.default_rng(seed + 1).integers(1, 17, count)
    return [
        SamplingParams(temperature=0.0, max_tokens=int(n), priority=int(n) % 3)
        for n in lengths
    ]


def sampled_params(count: int) -> list[SamplingParams]:
    """Requests with all kinds of sampling, each with its own seed."""
    kinds = [
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=20),
        dict(temperature=0.0),
        dict(temperature=1.3, top_p=0.9),
        dict(temperature=1.0, min_p=0.01),
    ]
    return [
        SamplingParams(**kinds[i % len(kinds)], seed=100 + i, max_tokens=5 + i % 9)
        for i in range(count)
    ]


def token_ids(results) -> list[list[list[int]]]:
    return [[result.token_ids for result in samples] for samples in results]


def start(model, config, prompts, params, **options):
    state = engine.init(model, config)
    return engine.submit(state, prompts, params, **options)


def mask(config: EngineConfig, seq_indices: list[int]) -> jax.Array:
    marked = np.zeros(config.max_num_requests, bool)
    marked[seq_indices] = True
    return jnp.asarray(marked)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_a_loop_that_recomputes_everything(name, models):
    config = CONFIGS[name]
    model = model_of(models, name)
    prompts, params = mixed_prompts(24), greedy_params(24)
    run = functools.partial(engine.run, **LIMITS.get(name, {}))
    state, results = generate(model, config, prompts, params, run=run)
    expected = naive(model, prompts, params, max_model_len=MAX_LEN)
    assert differences(state, results, expected) == []
    # Not a repeated token, which a wrong engine might also generate.
    longest = max((one[0].tokens for one in expected), key=len)
    assert len(set(longest)) > 3
    preempted = int(state.counters.num_preemptions)
    assert (preempted > 0) == (name != "roomy")
    assert sum(r.num_preemptions for one in results for r in one) == preempted
    assert int(state.counters.num_generated) == sum(p.max_tokens for p in params)
    assert int(state.counters.max_used_blocks) <= config.num_blocks


@pytest.mark.parametrize("name", ["roomy", "tight"])
def test_the_order_of_submission_changes_no_token(name, llama):
    prompts, params = mixed_prompts(24), greedy_params(24)
    order = np.random.default_rng(3).permutation(24).tolist()
    state, results = generate(llama, CONFIGS[name], prompts, params, order=order)
    expected = naive(llama, prompts, params, max_model_len=MAX_LEN)
    assert differences(state, results, expected) == []


@pytest.mark.parametrize("name", ["roomy", "tight"])
def test_sampled_tokens_do_not_depend_on_the_batch_or_its_order(name, llama):
    config = CONFIGS[name]
    prompts, params = mixed_prompts(20, seed=5), sampled_params(20)
    expected = naive(llama, prompts, params, max_model_len=MAX_LEN)
    for order in (range(20), np.random.default_rng(0).permutation(20).tolist()):
        state, results = generate(llama, config, prompts, params, order=order)
        assert differences(state, results, expected) == []
    for i in (0, 6, 13):
        state, results = generate(llama, config, prompts[i : i + 1], params[i : i + 1])
        assert differences(state, results, expected[i : i + 1]) == []


def test_requests_without_a_seed_sample_by_the_seed_of_submit_and_their_number(llama):
    prompts = [[3, 4, 5]] * 3
    params = [SamplingParams(max_tokens=12)] * 3
    samples = [
        token_ids(generate(llama, ROOMY, prompts, params, seed=seed)[1])
        for seed in (0, 0, 1)
    ]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]
    assert len({tuple(one[0]) for one in samples[0]}) == 3


@pytest.mark.parametrize("name", ["roomy", "tight", "opt_blocks_of_16"])
def test_samples_share_the_blocks_of_their_prompt_and_equal_the_loop(name, models):
    config, llama = CONFIGS[name], model_of(models, name)
    prompts = [*mixed_prompts(6, seed=8), [7]]
    params = [
        SamplingParams(n=1 + i % config.max_num_seqs, seed=i, max_tokens=3 + 2 * i)
        for i in range(7)
    ]
    state, results = generate(llama, config, prompts, params)
    expected = naive(llama, prompts, params, max_model_len=MAX_LEN)
    assert differences(state, results, expected) == []
    assert all([r.sample for r in one] == list(range(len(one))) for one in results)
    assert len({tuple(tokens) for tokens in token_ids(results)[3]}) > 1
    assert float(state.counters.saved_share) > 0
    assert int(state.counters.num_block_copies) > 0


def test_a_request_with_more_samples_than_rows_finishes(llama):
    params = [SamplingParams(n=9, seed=4, max_tokens=6)]
    prompts = [list(range(10))]
    state, results = generate(llama, TIGHT, prompts, params)
    expected = naive(llama, prompts, params, max_model_len=MAX_LEN)
    assert differences(state, results, expected) == []


def test_stop_ids_eos_and_limits_end_a_sequence_with_their_reason(llama):
    prompt = mixed_prompts(1, seed=2)[0]
    free_run = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    ((run,),) = naive(llama, [prompt], [free_run], max_model_len=MAX_LEN)
    tokens = run.tokens
    stop = tokens[6]
    first = tokens.index(stop)
    params = [
        dataclasses.replace(free_run, stop_token_ids=(stop,)),
        dataclasses.replace(free_run, ignore_eos=False),  # `stop` is the EOS token
        free_run,  # ignores the EOS token
        dataclasses.replace(free_run, stop_token_ids=(stop,), ignore_eos=False),
        dataclasses.replace(free_run, max_tokens=first + 1, stop_token_ids=(stop,)),
        dataclasses.replace(free_run, max_tokens=1000),
    ]
    state, results = generate(llama, ROOMY, [prompt] * 6, params, eos_token_ids=(stop,))
    ended = (tokens[: first + 1], "stop")
    pairs = [(r.token_ids, r.finish_reason) for (r,) in results]
    assert pairs[:5] == [ended, ended, (tokens, "length"), ended, ended]
    assert pairs[5][1] == "length"
    assert len(pairs[5][0]) == MAX_LEN - len(prompt)
    expected = naive(
        llama, [prompt] * 6, params, max_model_len=MAX_LEN, eos_token_ids=(stop,)
    )
    assert differences(state, results, expected) == []


@pytest.mark.parametrize("name", ["roomy", "tight"])
def test_64_requests_finish_inside_one_device_call(name, llama):
    prompts, params = mixed_prompts(64, seed=4), greedy_params(64, seed=4)
    state, _ = start(llama, CONFIGS[name], prompts, params)
    steps = STEPS(FOREVER)
    with jax.transfer_guard("disallow"):
        state = engine.run(llama, state, steps)
        jax.block_until_ready(state)
    results = [[result] for result in engine.collect(state)]
    expected = naive(llama, prompts, params, max_model_len=MAX_LEN)
    assert differences(state, results, expected) == []
    # Requests share steps: fewer than if they ran one after the other.
    one_by_one = sum(param.max_tokens for param in params)
    assert int(state.counters.num_steps) < one_by_one


def test_slices_of_a_run_end_in_the_same_state_as_one_run(llama):
    prompts, params = mixed_prompts(12), sampled_params(12)
    whole, _ = generate(llama, TIGHT, prompts, params)
    state, _ = start(llama, TIGHT, prompts, params)
    num_slices = 0
    while bool(engine.has_work(state)):
        before = int(state.counters.num_steps)
        state = engine.run(llama, state, STEPS(5))
        num_slices += 1
        assert 0 < int(state.counters.num_steps) - before <= 5
    assert num_slices > 5
    got, want = jax.tree.leaves(state), jax.tree.leaves(whole)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_with_lower_limits_generates_the_same_tokens(llama):
    prompts, params = mixed_prompts(12), sampled_params(12)
    expected = naive(llama, prompts, params, max_model_len=MAX_LEN)
    state, _ = start(llama, CONFIGS["blocks_of_1"], prompts, params)
    run = functools.partial(engine.run, **LIMITS["blocks_of_1"])
    most_rows = 0
    for _ in range(40):
        state = run(llama, state, STEPS(1))
        num_rows = int((np.asarray(state.rows) != scheduler.NO_REQUEST).sum())
        most_rows = max(most_rows, num_rows)
    assert int(state.counters.num_tokens) <= 40 * 3
    assert most_rows == 3
    state = run(llama, state, STEPS(FOREVER))
    results = [[result] for result in engine.collect(state)]
    assert differences(state, results, expected) == []


def test_requests_submitted_later_run_beside_the_others(llama):
    prompts, params = mixed_prompts(12, seed=6), greedy_params(12, seed=6)
    state, _ = start(llama, ROOMY, prompts[:5], params[:5])
    state = engine.run(llama, state, STEPS(3))
    assert bool(engine.has_work(state))
    state, _ = engine.submit(state, prompts[5:], params[5:])
    state = engine.run(llama, state, STEPS(FOREVER))
    results = engine.collect(state)
    assert [result.arrival for result in results] == list(range(12))
    expected = naive(llama, prompts, params, max_model_len=MAX_LEN)
    assert differences(state, [[result] for result in results], expected) == []


def test_a_copy_of_a_live_engine_continues_as_the_original_does(llama):
    prompts, params = mixed_prompts(10), sampled_params(10)
    state, _ = start(llama, TIGHT, prompts, params)
    state = engine.run(llama, state, STEPS(9))
    assert bool(engine.has_work(state))
    twin = jax.tree.map(jnp.copy, state)
    ends = [engine.run(llama, one, STEPS(FOREVER)) for one in (state, twin)]
    expected = naive(llama, prompts, params, max_model_len=MAX_LEN)
    for end in ends:
        results = [[result] for result in engine.collect(end)]
        assert differences(end, results, expected) == []


def check_logprobs(model: Decoder, result) -> None:
    sequence = result.prompt_token_ids + result.token_ids
    padded = np.zeros((1, MAX_LEN), np.int32)
    padded[0, : len(sequence)] = sequence
    logprobs = np.asarray(all_logprobs(model, jnp.asarray(padded)))[0]
    before = len(result.prompt_token_ids) - 1 + np.arange(len(result.token_ids))
    rows = logprobs[before]
    chosen = rows[np.arange(len(rows)), result.token_ids]
    np.testing.assert_allclose(result.logprobs, chosen, atol=1e-4)
    kept = result.top_ids.shape[1]
    if not kept:
        return
    order = np.argsort(-rows, axis=1, kind="stable")[:, :kept]
    np.testing.assert_array_equal(result.top_ids, order)
    top = np.take_along_axis(rows, order, axis=1)
    np.testing.assert_allclose(result.top_logprobs, top, atol=1e-4)
    ranks = 1 + (rows > chosen[:, None]).sum(axis=1)
    np.testing.assert_array_equal(result.ranks, ranks)


@pytest.mark.parametrize("name", ["tight", "opt_blocks_of_16"])
def test_logprobs_equal_those_of_the_plain_forward_pass(name, models):
    model = model_of(models, name)
    prompts = mixed_prompts(8, seed=9)
    params = [*sampled_params(7), SamplingParams(n=2, seed=3, max_tokens=8)]
    _, results = generate(model, CONFIGS[name], prompts, params)
    for samples in results:
        for result in samples:
            assert len(result.logprobs) == len(result.token_ids)
            check_logprobs(model, result)


def test_one_compiled_program_serves_all_loads(llama):
    config, start_size = ROOMY, engine.run._cache_size()
    engine.run(llama, engine.init(llama, config), STEPS(1))
    before = engine.run._cache_size()
    assert before - start_size <= 1  # 0 if another test has run it before
    for seed, steps in ((0, 3), (1, FOREVER)):
        state, _ = start(llama, config, mixed_prompts(20, seed), sampled_params(20))
        state = engine.run(llama, state, STEPS(steps))
        state = engine.end(state, mask(config, [0, 5]), STEPS(3))
        state = engine.run(llama, state, STEPS(FOREVER))
        state = engine.release(state, mask(config, [0, 1, 2]))
        state, _ = engine.submit(state, [[1, 2]], SamplingParams(n=2, max_tokens=2))
        state = engine.run(llama, state, STEPS(FOREVER))
        assert not engine.has_work(state)
    assert engine.run._cache_size() == before


def test_ended_requests_free_their_blocks_and_change_no_other_request(llama):
    prompts, params = mixed_prompts(10), greedy_params(10)
    params = [dataclasses.replace(param, max_tokens=15) for param in params]
    state, seq_indices = start(llama, TIGHT, prompts, params)
    state = engine.run(llama, state, STEPS(6))
    rows = np.asarray(state.rows)
    running = int(rows[rows >= 0].min())
    waiting = seq_indices[9][0]
    state = engine.end(state, mask(TIGHT, [running, waiting]), STEPS(3))
    assert running not in np.asarray(state.rows).tolist()
    assert block_manager.violations(state.blocks) == []
    state = engine.run(llama, state, STEPS(FOREVER))
    expected = naive(llama, prompts, params, max_model_len=MAX_LEN)
    ended = {running, waiting}
    results = engine.collect(state)
    assert len(results) == 10
    for result in results:
        (want,) = expected[result.arrival]
        if result.seq_index in ended:
            assert result.finish_reason == "abort"
            assert result.token_ids == want.tokens[: len(result.token_ids)]
        else:
            assert (result.token_ids, result.finish_reason) == (want.tokens, "length")
    # Ending finished sequences changes nothing.
    again = engine.end(state, mask(TIGHT, list(range(10))), STEPS(1))
    reasons = [result.finish_reason for result in engine.collect(again)]
    assert reasons == [result.finish_reason for result in results]


def test_released_sequence_indices_are_used_again(llama):
    prompts = mixed_prompts(64)
    state, _ = start(llama, ROOMY, prompts, greedy_params(64))
    with pytest.raises(ValueError, match="expected at most 0 sequences"):
        engine.submit(state, prompts[:1], greedy_params(1))
    # Releasing a waiting sequence changes nothing.
    state = engine.release(state, mask(ROOMY, [3]))
    state = engine.run(llama, state, STEPS(FOREVER))
    assert len(engine.collect(state)) == 64
    state = engine.release(state, mask(ROOMY, [3, 60]))
    state, seq_indices = engine.submit(state, prompts[:2], greedy_params(2))
    assert seq_indices == [[3], [60]]
    state = engine.run(llama, state, STEPS(FOREVER))
    results = engine.collect(state)
    assert [result.arrival for result in results][-2:] == [64, 65]
    expected = naive(llama, prompts[:2], greedy_params(2), max_model_len=MAX_LEN)
    assert [r.token_ids for r in results[-2:]] == [one[0].tokens for one in expected]


def test_a_sample_never_maps_blocks_of_a_request_that_reuses_its_leaders_index(llama):
    # The leader is ended and released while other samples of its request still wait for
    # a row. Another request of the same length gets its sequence index.
    params = [SamplingParams(n=6, seed=1, max_tokens=12)]
    prompt, other = [list(range(20, 32))], [list(range(60, 72))]
    state, ((leader, *_),) = start(llama, ROOMY, prompt, params)
    state = engine.run(llama, state, STEPS(2))
    state = engine.end(state, mask(ROOMY, [leader]), STEPS(3))
    state = engine.release(state, mask(ROOMY, [leader]))
    # An earlier arrival than that of the waiting samples, so that it runs beside them.
    state, ((seq_index,),) = engine.submit(
        state, other, SamplingParams(seed=2, max_tokens=20), arrivals=[-1]
    )
    assert seq_index == leader
    state = engine.run(llama, state, STEPS(FOREVER))
    ((*expected,),) = naive(llama, prompt, params, max_model_len=MAX_LEN)
    got = [r for r in engine.collect(state) if r.arrival == 0]
    assert [r.token_ids for r in got] == [one.tokens for one in expected[1:]]


def test_priorities_decide_the_order_of_admission(models):
    prompts = mixed_prompts(12, seed=1)
    params = [
        SamplingParams(temperature=0.0, max_tokens=4, priority=-i) for i in range(12)
    ]
    _, results = generate(models["opt"], CONFIGS["opt_blocks_of_16"], prompts, params)
    first_steps = [result.first_step for (result,) in results]
    assert first_steps == sorted(first_steps, reverse=True)
    _, results = generate(models["llama"], ROOMY, prompts, params)  # fcfs ignores them
    first_steps = [result.first_step for (result,) in results]
    assert first_steps == sorted(first_steps)


def test_a_result_has_the_steps_of_its_first_and_last_token(llama):
    params = SamplingParams(temperature=0.0, max_tokens=5)
    _, (((one,),)) = generate(llama, ROOMY, [[1, 2, 3]], [params])
    assert (one.first_step, one.last_step) == (0, 4)
    # A prompt of 31 tokens is computed in chunks of 16: the first token is generated in
    # the second step.
    _, (((one,),)) = generate(llama, ROOMY, [[1] * 31], [params])
    assert (one.first_step, one.last_step) == (1, 5)


def test_a_run_without_requests_does_nothing(llama):
    state = engine.init(llama, ROOMY)
    state, seq_indices = engine.submit(state, [], SamplingParams())
    assert seq_indices == []
    assert not engine.has_work(state)
    state = engine.run(llama, state, STEPS(FOREVER))
    assert int(state.counters.num_steps) == 0
    assert engine.collect(state) == []


WRONG = {
    "prompt: expected at least one token": ([], {}),
    r"prompt: expected fewer than max_model_len \(48\)": ([1] * 48, {}),
    r"prompt: expected token ids from 0 to 127 .* got 128": ([1, 128], {}),
    r"prompt: expected token ids from 0 to 127 .* got -1": ([-1], {}),
    "need 11 blocks of 4, the pool has 10; raise num_blocks": (
        [1] * 31,
        {"max_tokens": 12},
    ),
    r"stop_token_ids: expected at most max_num_stop_ids \(8\) ids, .* got 9": (
        [1],
        {"stop_token_ids": tuple(range(8))},
    ),
    r"n: expected at most max_num_requests \(64\), got 65": ([1], {"n": 65}),
    r"logprobs: expected at most num_logprobs \(0\), got 1": ([1], {"logprobs": 1}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_request_that_can_never_run_raises_before_anything_changes(message, llama):
    config = dataclasses.replace(ROOMY, num_blocks=10)
    state = engine.init(llama, config)
    prompt, options = WRONG[message]
    params = [SamplingParams(max_tokens=2), SamplingParams(**options)]
    with pytest.raises(ValueError, match=message):
        engine.submit(
            state, [[1], prompt], params, vocab_size=VOCABULARY, eos_token_ids=(99,)
        )
    assert (np.asarray(state.requests.queue.status) == scheduler.EMPTY).all()


def test_another_number_of_params_than_prompts_raises(llama):
    state = engine.init(llama, ROOMY)
    with pytest.raises(ValueError, match="params: expected one, or one for each of 2"):
        engine.submit(state, [[1], [2]], [SamplingParams()])


def test_samples_map_the_prompt_of_a_sample_that_ends_with_its_first_token(llama):
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=1)
    state, results = generate(llama, ROOMY, [list(range(1, 14))], [params])
    expected = naive(llama, [list(range(1, 14))], [params], max_model_len=MAX_LEN)
    assert differences(state, results, expected) == []
    # The prompt once, and its last token once more for each of the other two samples.
    assert int(state.counters.num_tokens) == 13 + 2
