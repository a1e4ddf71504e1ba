"""Logits processors through the LLM, beside everything else that requests may use.

The expected tokens come from loops over the plain forward pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding import Decision, DecodingAlgorithm, Row, contrib, processor
from jpaged.decoding.sample import token_keys
from jpaged.engine.features import Features
from jpaged.llm import LLM
from jpaged.params import (
    AlgorithmParams,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)
from jpaged.serving.program_specs import GREEDY as NO_FEATURES
from jpaged.serving.program_specs import ProgramSpecs, program_key
from tests.support.beam_oracle import SlowBeams
from tests.support.engine.full_llm import Oracle, draw
from tests.support.tiny_llm import MAX_LEN, SIZES, VOCAB_SIZE, is_idle, random_prompts

pytestmark = pytest.mark.long


def no_echo(logits, row, *, penalty):
    """The last token is less probable, the more so the longer the output."""
    last = row.tokens[row.num_tokens - 1]
    length = (row.num_tokens - row.prompt_len).astype(jnp.float32)
    return logits.at[last].add(-penalty * (1.0 + length))


def echo(*penalties):
    return [processor(no_echo, penalty=penalty) for penalty in penalties]


MIROSTAT = contrib.mirostat(2.0, 0.3)
RANDOM = contrib.xtc(threshold=0.02, probability=0.5)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **SIZES)


@pytest.fixture(scope="module")
def oracle(llm):
    return Oracle(llm)


def row_of(tokens, prompt_len, key):
    padded = np.full(MAX_LEN, VOCAB_SIZE, np.int32)
    padded[: len(tokens)] = tokens
    return Row(jnp.asarray(padded), jnp.int32(prompt_len), jnp.int32(len(tokens)), key)


def expected(oracle, prompt, params, number=0, mask=None):
    """The tokens of a sample: forward pass, processors, temperature, sampling."""
    output, temperature = [], params.temperature
    kinds = [one.kind for one in params.logits_processors]
    values = [dict(one.parameters) for one in params.logits_processors]
    states = [kind.init_state(value) for kind, value in zip(kinds, values, strict=True)]
    seed = jnp.uint32(params.seed or 0)
    while len(output) < params.max_tokens:
        tokens = [*prompt, *output]
        logits = jnp.asarray(oracle.logits(tokens)[-1])
        if mask is not None:
            logits = jnp.where(mask(output), logits, -jnp.inf)
        position = jnp.int32(len(tokens))
        key = token_keys(seed[None], jnp.int32(number)[None], position[None])[0]
        divided, inputs = False, []
        late = [kind.after_temperature for kind in kinds]
        for i in sorted(range(len(kinds)), key=lambda i: late[i]):
            if late[i] and not divided and temperature:
                logits, divided = logits / temperature, True
            row = row_of(tokens, len(prompt), jax.random.fold_in(key, i + 1))
            inputs.append((i, logits, row))
            new = kinds[i].apply(logits, row, states[i], values[i])
            logits = jnp.where(logits == -jnp.inf, logits, new)
        left = 1.0 if divided else temperature
        mine = dataclasses.replace(params, temperature=left, n=1)
        token = draw(np.asarray(logits), mine, number, len(tokens))
        for i, given, row in inputs:
            if kinds[i].init is not None:
                states[i] = kinds[i].updated(
                    given, row, states[i], jnp.int32(token), values[i]
                )
        output.append(token)
    return output


CASES = {
    "greedy": dict(temperature=0.0, logits_processors=echo(-2.0)),
    "two in order": dict(
        temperature=0.0, logits_processors=[contrib.dry(5.0, 1.2, 1), *echo(1.0)]
    ),
    "random": dict(seed=3, logits_processors=[RANDOM, *echo(0.5)]),
    "after the temperature": dict(
        seed=4, temperature=1.7, logits_processors=[contrib.typical(0.6), *echo(3.0)]
    ),
    "with filters": dict(
        seed=5, temperature=0.7, top_k=9, top_p=0.9, logits_processors=[MIROSTAT]
    ),
    "none": dict(seed=6),
}


def params_of(name, **more):
    return SamplingParams(max_tokens=14, ignore_eos=True, **CASES[name], **more)


@pytest.fixture(scope="module")
def mixed(llm):
    """The outputs of all cases in one batch, with samples."""
    prompts = random_prompts(len(CASES), seed=1, longest=12)
    params = [params_of(name) for name in CASES]
    params[2] = dataclasses.replace(params[2], n=3)
    params[4] = dataclasses.replace(params[4], n=2)
    return prompts, params, llm.generate(prompts, params, progress=False)


@pytest.mark.parametrize("index", range(len(CASES)), ids=list(CASES))
def test_tokens_equal_a_loop_over_the_plain_forward(index, mixed, oracle):
    prompts, params, outputs = mixed
    for number, sample in enumerate(outputs[index].outputs):
        tokens = expected(oracle, prompts[index], params[index], number)
        assert list(sample.token_ids) == tokens
    plain = dataclasses.replace(params[index], logits_processors=[], n=1)
    is_changed = expected(oracle, prompts[index], plain) != list(
        outputs[index].outputs[0].token_ids
    )
    assert is_changed == bool(params[index].logits_processors)


def test_requests_have_the_tokens_and_logprobs_that_they_have_alone(llm, mixed):
    prompts, params, outputs = mixed
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        (alone,) = llm.generate([prompt], param, progress=False)
        for one, other in zip(alone.outputs, output.outputs, strict=True):
            assert one.token_ids == other.token_ids
            assert abs(one.cumulative_logprob - other.cumulative_logprob) < 1e-3
    assert is_idle(llm)


def test_log_probabilities_are_those_of_the_model(llm, mixed, oracle):
    prompts, _, outputs = mixed
    sample = outputs[0].outputs[0]
    tokens = [*prompts[0], *sample.token_ids]
    logprobs = oracle.logprobs(tokens)[len(prompts[0]) - 1 : -1]
    total = sum(logprobs[i, token] for i, token in enumerate(sample.token_ids))
    assert abs(sample.cumulative_logprob - total) < 1e-3


def test_new_values_compile_nothing(llm, mixed):
    before = llm.stats()["num_compilations"]
    params = [
        SamplingParams(max_tokens=3, temperature=0.0, logits_processors=echo(penalty))
        for penalty in (0.1, -2.5, -9.0)
    ]
    tokens = [
        tuple(one.outputs[0].token_ids)
        for one in llm.generate([[5, 6, 7]] * 3, params, progress=False)
    ]
    assert llm.stats()["num_compilations"] == before
    assert len(set(tokens)) > 1


def test_beams_search_with_the_processed_log_probabilities(llm, oracle):
    prompt, width, length = [9, 30, 77], 3, 6
    (one,) = echo(2.0)

    def logprobs_of(prefixes):
        found = []
        for prefix in prefixes:
            tokens = [*prompt, *prefix]
            row = row_of(tokens, len(prompt), jax.random.key(0))
            raw = jnp.asarray(oracle.logprobs(tokens)[-1], jnp.float32)
            found.append(one.kind.apply(raw, row, (), dict(one.parameters)))
        return np.asarray(found)

    slow = SlowBeams(
        width=width,
        max_tokens=length,
        length_penalty=1.0,
        early_stopping=False,
        stop_ids=(),
    )
    beams = slow.run(logprobs_of)
    params = BeamSearchParams(width, length, ignore_eos=True, logits_processors=[one])
    (output,) = llm.generate([prompt], params, progress=False)
    assert [list(b.token_ids) for b in output.outputs] == [list(t) for _, t in beams]
    np.testing.assert_allclose(
        [beam.score for beam in output.outputs], [s for s, _ in beams], atol=1e-4
    )


def swap_init(num_rows):
    return jnp.int32(0)


def swap_step(keys, logits, state):
    """Two rows that sample, and exchange their texts in every step."""
    parents = jnp.array([1, 0], jnp.int32)
    tokens = jnp.argmax(logits[parents], axis=1).astype(jnp.int32)
    tokens = jnp.where(jnp.arange(2) == 0, tokens, (tokens + 1) % VOCAB_SIZE)
    logprobs = jnp.take_along_axis(logits[parents], tokens[:, None], axis=1)[:, 0]
    return state + 1, Decision(tokens, parents, logprobs, jnp.zeros(2, bool))


def test_states_of_processors_follow_the_rows_of_an_algorithm(llm, oracle):
    prompt, length = [8, 20, 41], 7
    one = contrib.mirostat(1.0, 0.9)
    params = AlgorithmParams(
        DecodingAlgorithm(swap_init, swap_step),
        2,
        max_tokens=length,
        ignore_eos=True,
        logits_processors=[one],
    )
    (output,) = llm.generate([prompt], params, progress=False)
    rows = [([], one.kind.init_state(one.parameters))] * 2
    for _ in range(length):
        after = []
        for number, (tokens, state) in enumerate(reversed(rows)):
            row = row_of([*prompt, *tokens], len(prompt), jax.random.key(0))
            raw = oracle.logprobs([*prompt, *tokens])[-1]
            raw = jnp.asarray(raw, jnp.float32)
            kept = one.kind.apply(raw, row, state, dict(one.parameters))
            token = (int(jnp.argmax(kept)) + number) % VOCAB_SIZE
            state = one.kind.updated(
                raw, row, state, jnp.int32(token), dict(one.parameters)
            )
            after.append(([*tokens, token], state))
        rows = after
    assert [list(each.token_ids) for each in output.outputs] == [t for t, _ in rows]


def test_structured_output_keeps_its_constraint(llm, oracle):
    choices = ("yes", "oh", "yesterday", "ever")
    params = SamplingParams(
        max_tokens=12,
        seed=1,
        structured_outputs=StructuredOutputsParams(choice=choices),
        logits_processors=[lambda logits, row: -logits],
    )
    (output,) = llm.generate([[5, 9]], params, progress=False)
    assert output.outputs[0].text in choices


def test_speculation_with_states_changes_no_token(folder, mixed):
    drafted = LLM(
        folder,
        **SIZES,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
    )
    prompts, params, outputs = mixed
    # Text that repeats itself, so that drafts are accepted.
    loop = SamplingParams(
        max_tokens=20,
        temperature=0.0,
        ignore_eos=True,
        logits_processors=[contrib.mirostat(0.5, 1.0), *echo(-3.0)],
    )
    prompts, params = [*prompts, [7, 7, 7, 7]], [*params, loop]
    found = drafted.generate(prompts, params, progress=False)
    for one, other in zip(found, outputs, strict=False):
        assert [s.token_ids for s in one.outputs] == [
            s.token_ids for s in other.outputs
        ]
    assert drafted.stats()["accepted_tokens"] > 5
    assert is_idle(drafted)


SIZE = {"loop": 4, "trunk": 16}  # rows, tokens


def lowered(llm, name, used):
    state = llm._host.runner.state
    specs = ProgramSpecs(llm.model, None)
    program = specs.program(
        program_key(name, SIZE.get(name, 0), used, state.config), state
    )
    function = jax.jit(program.function, donate_argnums=tuple(program.donated))
    return function.lower(*program.args).as_text()


@pytest.mark.parametrize("name", ["schedule", "trunk", "decode", "loop", "settle"])
def test_programs_of_others_are_those_of_an_engine_without_processors(
    name, llm, mixed, folder, plain_llm
):
    used = (
        NO_FEATURES if name in ("schedule", "trunk", "settle") else Features(sampling=2)
    )
    assert llm.config.processors
    assert not plain_llm.config.processors
    assert lowered(llm, name, used) == lowered(plain_llm, name, used)


def test_bad_functions_lose_nothing_of_their_batch(llm):
    good = SamplingParams(max_tokens=3, temperature=0.0)
    bad = SamplingParams(max_tokens=3, logits_processors=[lambda logits, row: 1.0])
    outputs = llm.generate(
        [[5, 6], [7, 8]], [bad, good], on_error="return", progress=False
    )
    assert "logits_processors[0]" in (outputs[0].error or "")
    assert len(outputs[1].outputs[0].token_ids) == 3
    with pytest.raises(ValueError, match=r"expected logits float32 of shape \(300,\)"):
        llm.generate([[5, 6]], bad, progress=False)
