"""Speculation changes the number of tokens per step, and never the tokens.

Prompt lookup is compared with a slow search in Python lists, the engine with drafts
with the engine without, and sampled tokens with the model's exact distribution.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged import engine, load_model
from jpaged.config import EngineConfig, Speculation
from jpaged.decoding.automaton import token_automaton
from jpaged.decoding.constraints import AutomataSizes
from jpaged.decoding.prompt_lookup import prompt_lookup
from jpaged.decoding.rule_arrays import RuleSizes
from jpaged.engine import speculation
from jpaged.kv import block_manager
from jpaged.models import Decoder, ModelConfig, init_model
from jpaged.params import SamplingParams
from tests.support.engine.configs import OneSizeConfig, one_size
from tests.support.engine.oracle import FOREVER
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

VOCABULARY = checkpoints.LLAMA["vocab_size"]
EOS = [7]
LENGTH = 24  # of the arrays of prompt lookup


def slow_lookup(tokens, num_drafts, min_ngram, max_ngram) -> list[int]:
    """The drafts of one sequence, by trying every position and length."""
    for size in range(max_ngram, min_ngram - 1, -1):
        last = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(last) == size and tokens[start : start + size] == last:
                return tokens[start + size : start + size + num_drafts]
    return []


_lookup = jax.jit(
    prompt_lookup, static_argnames=("num_drafts", "min_ngram", "max_ngram")
)


@given(
    rows=st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=LENGTH), min_size=4, max_size=4
    ),
    sizes=st.sampled_from([(3, 1, 3), (2, 2, 2), (5, 1, 1), (4, 2, 4)]),
    garbage=st.integers(0, 3),
)
def test_prompt_lookup_equals_a_slow_search(rows, sizes, garbage):
    num_drafts, min_ngram, max_ngram = sizes
    tokens = np.full((4, LENGTH), garbage, np.int32)
    for row, known in zip(tokens, rows, strict=True):
        row[: len(known)] = known
    drafts, count = _lookup(
        tokens,
        np.array([len(known) for known in rows], np.int32),
        num_drafts=num_drafts,
        min_ngram=min_ngram,
        max_ngram=max_ngram,
    )
    for known, found, number in zip(rows, drafts, count, strict=True):
        expected = slow_lookup(known, num_drafts, min_ngram, max_ngram)
        assert found[: int(number)].tolist() == expected


CONFIG = EngineConfig(
    num_blocks=80,
    block_size=4,
    max_num_seqs=6,
    max_model_len=48,
    max_num_batched_tokens=24,
    max_num_requests=24,
    max_beam_width=2,
    rules=RuleSizes(num_bias=1),
    automata=AutomataSizes(VOCABULARY, 1, 4, 4, 4),
)
# The smallest pool that holds the longest request: there are preemptions.
TIGHT = one_size(dataclasses.replace(CONFIG, num_blocks=14))
METHODS = {
    "prompt_lookup": Speculation("prompt_lookup", num_tokens=3),
    "model": Speculation("model", num_tokens=2),
}
# All step sizes are compiled for prompt lookup only.
CONFIGS = {
    "prompt_lookup": dataclasses.replace(CONFIG, speculation=METHODS["prompt_lookup"]),
    "model": dataclasses.replace(one_size(CONFIG), speculation=METHODS["model"]),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Decoder:
    return load_model(checkpoints.write_tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def models(target) -> dict[str, engine.Model]:
    # The target's weights with noise: it often agrees with the target, but not always.
    noise = jax.random.normal(jax.random.key(0), ())
    rough = jax.tree.map(
        lambda w: w + 0.004 * jnp.sin(1000 * w + noise).astype(w.dtype), target
    )
    return {
        "prompt_lookup": target,
        "model": engine.DraftedModel(target, rough),
    }


def automaton():
    """Tokens 10 to 19 and 20 to 29 alternately, any number of them."""
    transitions = np.full((2, VOCABULARY), -1)
    transitions[0, 10:20], transitions[1, 20:30] = 1, 0
    return token_automaton(transitions, np.array([True, True]), EOS)


def requests():
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCABULARY, n).tolist() for n in (5, 1, 9, 14, 3, 8)]
    prompts.append([11, 12, 13, 14] * 5)
    params = [
        SamplingParams(temperature=0.0, max_tokens=18),
        SamplingParams(temperature=0.0, max_tokens=1),
        SamplingParams(temperature=0.9, seed=4, max_tokens=14, top_k=8),
        SamplingParams(
            temperature=0.8,
            seed=5,
            max_tokens=12,
            frequency_penalty=0.7,
            repetition_penalty=1.2,
            min_tokens=6,
        ),
        SamplingParams(n=2, temperature=0.6, seed=6, max_tokens=12),
        SamplingParams(
            temperature=1.0, seed=7, max_tokens=10, structured_outputs=automaton()
        ),
        SamplingParams(temperature=0.0, max_tokens=16, logit_bias={12: 1.5}),
    ]
    return prompts, params


def run(model, config):
    prompts, params = requests()
    state = engine.init(model, config)
    state, _ = engine.submit(
        state, prompts, params, vocab_size=VOCABULARY, eos_token_ids=EOS
    )
    state = engine.run(model, state, jnp.int32(FOREVER))
    assert block_manager.violations(state.blocks) == []
    assert int(block_manager.num_free_blocks(state.blocks)) == config.num_blocks
    found = {
        (result.arrival, result.sample): (
            result.token_ids,
            result.finish_reason,
            result.logprobs.tolist(),
        )
        for result in engine.collect(state)
    }
    return found, jax.device_get(state.counters)


@pytest.fixture(scope="module")
def plain(target):
    return run(target, CONFIG)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_equal_those_without_drafts(method, models, plain):
    found, counters = run(models[method], CONFIGS[method])
    expected, plain_counters = plain
    assert found.keys() == expected.keys()
    for key, (tokens, reason, logprobs) in expected.items():
        assert found[key][:2] == (tokens, reason), key
        # A chunk's products are summed in another order than a single row's.
        np.testing.assert_allclose(found[key][2], logprobs, atol=2e-5)
    assert counters.num_generated == plain_counters.num_generated
    assert 0 < counters.num_accepted < counters.num_drafts
    # The longest request may be one whose drafts are never accepted.
    assert counters.num_steps <= plain_counters.num_steps


@pytest.mark.parametrize("method", METHODS)
def test_in_the_smallest_pool_drafts_change_no_token(method, models, plain):
    config = dataclasses.replace(TIGHT, speculation=METHODS[method])
    found, counters = run(models[method], config)
    assert {key: value[:2] for key, value in found.items()} == {
        key: value[:2] for key, value in plain[0].items()
    }
    assert counters.num_preemptions > 0


def test_all_tokens_of_a_perfect_draft_are_accepted(target):
    config = CONFIGS["model"]
    state = engine.init(engine.DraftedModel(target, target), config)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)
    state, _ = engine.submit(state, [[1, 2, 3]], params)
    # The arguments of `run` below, so that both tests share a program.
    state = engine.run(engine.DraftedModel(target, target), state, jnp.int32(FOREVER))
    counters = jax.device_get(state.counters)
    # The prompt step generates one token, and each later step three; the last step two.
    assert counters.num_steps == 1 + 4
    assert counters.num_accepted == counters.num_drafts == 7


def test_sampled_tokens_have_the_models_distribution():
    sizes = dict(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=5,
        hidden_size=16,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=0.35,
        **sizes,
    )
    model = engine.DraftedModel(init_model(config, seed=1), init_model(config, seed=2))
    engine_config = OneSizeConfig(
        num_blocks=400,
        block_size=4,
        max_num_seqs=100,
        max_model_len=8,
        max_num_batched_tokens=400,
        max_num_requests=400,
        speculation=Speculation("model", num_tokens=2),
    )
    prompt, number = [1, 3, 2], 400
    counts: collections.Counter = collections.Counter()
    for trial in range(4):
        state = engine.init(model, engine_config)
        params = [
            SamplingParams(temperature=1.0, seed=trial * number + i, max_tokens=3)
            for i in range(number)
        ]
        state, _ = engine.submit(state, [prompt] * number, params)
        state = engine.run(model, state)
        counts.update(tuple(result.token_ids) for result in engine.collect(state))
    # The two models are unrelated, so few drafts are accepted, but enough for the test.
    assert int(state.counters.num_accepted) > number / 10

    # The exact probability of each of the 125 continuations, from the plain forward.
    grid = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    rows = jnp.asarray(np.concatenate([np.tile(prompt, (125, 1)), grid], axis=1))
    logprobs = jax.nn.log_softmax(model.target(rows), axis=-1)[:, 2:5]
    chosen = jnp.take_along_axis(logprobs, rows[:, 3:, None], axis=2)[..., 0]
    expected = np.exp(np.asarray(chosen, np.float64).sum(axis=1)) * 4 * number
    observed = np.array([counts[tuple(row)] for row in grid.tolist()])
    # Merge cells with few expected counts, as the chi-square test requires.
    order = np.argsort(expected)
    groups = np.cumsum(expected[order]) // 8
    pairs = [
        (observed[order][groups == g].sum(), expected[order][groups == g].sum())
        for g in np.unique(groups)
    ]
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in pairs)
    degrees = len(pairs) - 1
    # Five standard deviations of chi-square; unverified drafts are far outside.
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)
    drafted = jax.nn.log_softmax(model.draft(rows), axis=-1)[:, 2:5]
    wrong = jnp.take_along_axis(drafted, rows[:, 3:, None], axis=2)[..., 0]
    wrong = np.exp(np.asarray(wrong, np.float64).sum(axis=1)) * 4 * number
    fault = sum(
        (observed[order][groups == g].sum() - wrong[order][groups == g].sum()) ** 2
        / wrong[order][groups == g].sum()
        for g in np.unique(groups)
    )
    assert fault > 10 * (degrees + 5 * np.sqrt(2 * degrees))


def test_a_draft_that_is_never_judged_is_noticed(monkeypatch, models, plain):
    """The planted fault: all drafts are accepted."""

    def credulous(table, new, entries, step, most):
        safe = jnp.minimum(new.seq_indices, table.tokens.shape[0] - 1)
        drafts = table.tokens[safe, entries.positions]
        is_next = jnp.roll(entries.offsets, -1) > entries.offsets
        tokens = jnp.where(is_next, drafts, new.tokens)
        return accept(
            table, dataclasses.replace(new, tokens=tokens), entries, step, most
        )

    accept = speculation.accept
    monkeypatch.setattr(speculation, "accept", credulous)
    # A config that no other test has, so that it is compiled with the fault.
    config = dataclasses.replace(
        one_size(CONFIG), num_blocks=81, speculation=METHODS["prompt_lookup"]
    )
    found, _ = run(models["prompt_lookup"], config)
    assert found != plain[0]


WRONG = {
    "method: expected one of": dict(method="guess"),
    "num_tokens: expected an integer of at least 1, got 0": dict(num_tokens=0),
    "min_ngram: expected at most max_ngram \\(3\\), got 4": dict(min_ngram=4),
}


@pytest.mark.parametrize("message", WRONG)
def test_invalid_speculation_raises(message):
    with pytest.raises(ValueError, match=message):
        Speculation(**WRONG[message])


def test_a_draft_model_that_does_not_fit_raises(target):
    other = dataclasses.replace(target.config, vocab_size=VOCABULARY - 1)
    config = dataclasses.replace(CONFIG, speculation=METHODS["model"])
    with pytest.raises(ValueError, match="expected the target's vocabulary"):
        engine.init(engine.DraftedModel(target, init_model(other)), config)
    with pytest.raises(
        ValueError, match="expected method 'model' together with a DraftedModel"
    ):
        engine.init(target, config)
    with pytest.raises(
        ValueError, match="expected method 'model' together with a DraftedModel"
    ):
        engine.init(engine.DraftedModel(target, target), CONFIG)
