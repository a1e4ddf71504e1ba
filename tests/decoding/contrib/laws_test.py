"""One list of laws for all decoding methods, over `tests.support.decoding_methods`.

A request has the same tokens alone, beside requests of all other methods, in a pool so
small that it is preempted, and with prompts in other chunks. The same seed gives the
same tokens. Streams never take back text. All blocks are free afterwards, and new
numbers compile nothing. What a method does not accept is refused by name.

The last tests plant faults, and show that the laws fail.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import TreeSearchParams
from jpaged.decoding import Decision, DecodingAlgorithm, LogitsProcessor, processors
from jpaged.llm import LLM
from jpaged.outputs import CompletionOutput
from jpaged.params import AlgorithmParams, SamplingParams
from jpaged.search import search
from jpaged.serving import batcher, stepping
from jpaged.serving.request_state import Delta
from tests.support.decoding_methods import LENGTH, METHODS, OPTIONAL, Method
from tests.support.models.checkpoints import write_tiny_llama
from tests.support.tiny_llm import EOS, VOCAB_SIZE, is_idle
from tests.support.tiny_llm import folder as folder

pytestmark = pytest.mark.long

NUM_BLOCKS, BLOCK_SIZE = 48, 4
SIZES = dict(
    max_num_seqs=8,
    max_num_batched_tokens=16,
    block_size=BLOCK_SIZE,
    num_blocks=NUM_BLOCKS,
    max_model_len=36,
    max_num_prefixes=8,
    check_invariants=True,
)
RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(2, VOCAB_SIZE, n).tolist() for n in (9, 6, 7)]
EVERY = pytest.mark.parametrize("name", METHODS)


def start_llm(names, *args, **sizes):
    """An LLM with one program for all requests of these methods, and their laws."""
    llm = LLM(*args, **(SIZES | sizes))
    params = [METHODS[name].params for name in names]
    # The first call has a request with log-probabilities, so that all programs have.
    params += [one for name in names[-1:] for one in with_logprobs(METHODS[name])]
    llm.generate([[3]] * len(params), params, progress=False)
    return llm


def with_logprobs(method):
    return [] if "logprobs" in method.refuses else [method.request(logprobs=2)]


def names_of(engine):
    """Methods of an LLM, but tree searches, which are no requests."""
    return [
        name
        for name, method in METHODS.items()
        if method.engine == engine and not method.is_tree
    ]


@pytest.fixture(scope="module")
def one_program():
    """Only what `check_invariants` runs is compiled: single steps, in one size."""
    start = stepping.Stepper._start

    def no_loops(self, key, state):
        return key if key.name == "loop" else start(self, key, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping.Stepper, "_start", no_loops)
        patch.setattr(stepping, "_WASTE_S", 1e9)
        patch.setattr(batcher, "STREAM_S", 0.0)  # a stream's slice is one step
        yield


@pytest.fixture(scope="module")
def llms(folder, tmp_path_factory, one_program):
    """The LLMs that run the methods."""
    small = write_tiny_llama(
        tmp_path_factory.mktemp("models") / "small",
        vocab_size=VOCAB_SIZE,
        eos_token_id=list(EOS),
        num_hidden_layers=1,
        seed=5,
    )
    draft = dict(model=str(small), num_speculative_tokens=2)
    return {
        "plain": start_llm(names_of("plain"), folder),
        "seen": start_llm(names_of("seen"), folder),
        "drafted": start_llm(names_of("drafted"), folder, speculative_config=draft),
    }


@functools.cache
def prompts_of(name):
    """Other prompts for each method, so that methods share no prefixes."""
    shift = 1 + list(METHODS).index(name)
    return [[2 + (t + shift) % (VOCAB_SIZE - 2) for t in prompt] for prompt in PROMPTS]


def run(llm, prompts, params):
    """The outputs of all requests; all blocks are free afterwards."""
    if isinstance(params, TreeSearchParams):
        outputs = llm.tree_search(prompts, params)
    else:
        outputs = llm.generate(prompts, params, progress=False)
    assert is_idle(llm)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return outputs


def tokens_of(outputs):
    return [[tuple(one.token_ids) for one in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def alone(llms):
    """A function: the tokens of a method after each prompt, one request at a time."""

    @functools.cache
    def tokens(name):
        method = METHODS[name]
        llm = llms[method.engine]
        return [
            tokens_of(run(llm, [prompt], method.params))[0]
            for prompt in prompts_of(name)
        ]

    return tokens


@pytest.fixture(scope="module")
def mixed(llms):
    """The tokens of one call with the requests of all methods of an LLM."""
    found = {}
    for engine, llm in llms.items():
        pairs = [(prompt, n) for n in names_of(engine) for prompt in prompts_of(n)]
        prompts, names = zip(*pairs, strict=True)
        outputs = run(llm, list(prompts), [METHODS[name].params for name in names])
        for name, tokens in zip(names, tokens_of(outputs), strict=True):
            found.setdefault(name, []).append(tokens)
    return found


# ---- the laws


def check_mixed(llm, prompts, params, expected):
    """Requests of one call have the tokens of each request alone."""
    assert tokens_of(run(llm, prompts, params)) == expected


def check_seed(llm, method, prompt):
    """The same seed gives the same tokens; another one others, if it is stochastic."""
    first, again = (tokens_of(run(llm, [prompt], method.params)) for _ in range(2))
    assert first == again
    if "seed" in method.refuses:
        return
    others = [
        tokens_of(run(llm, [prompt], method.request(seed=seed))) for seed in (6, 7)
    ]
    assert any(other != first for other in others) == method.is_stochastic


def check_stream(deltas, outputs):
    """At all times the text and tokens so far are the start of the final output."""
    texts, tokens = [""] * len(outputs), [()] * len(outputs)
    for delta in deltas:
        number = delta.sample
        texts[number] += delta.text
        tokens[number] += tuple(delta.token_ids)
        assert outputs[number].text.startswith(texts[number])
    assert texts == [one.text for one in outputs]
    assert tokens == [tuple(one.token_ids) for one in outputs]


def check_numbers(llm, method, prompts):
    """New values of numbers compile nothing, and change tokens (dry: rarely)."""
    first = tokens_of(run(llm, prompts, method.params))
    before = llm.stats()["num_compilations"], search._cache_size()
    found = tokens_of(run(llm, prompts, method.request(**method.changed)))
    assert (llm.stats()["num_compilations"], search._cache_size()) == before
    assert (found != first) != method.acts_rarely


@contextlib.contextmanager
def small_pool(llm, num_free):
    """All blocks but `num_free` are used by pinned prefixes."""
    with contextlib.ExitStack() as stack:
        for i in range(0, NUM_BLOCKS - num_free, 8):
            length = BLOCK_SIZE * min(8, NUM_BLOCKS - num_free - i)
            tokens = [2 + (11 * i + 7 * k) % 290 for k in range(length)]
            stack.enter_context(llm.pin(tokens))
        yield


def least_pool(method, prompts):
    """Blocks that the largest of the requests needs, if its rows share a prompt."""

    def blocks(length):
        shared = (length - 1) // BLOCK_SIZE  # the last token is computed in each row
        longest = -(-(length + method.params.max_tokens) // BLOCK_SIZE)
        return shared + method.num_rows * (longest - shared)

    return max(blocks(len(prompt)) for prompt in prompts)


@EVERY
def test_a_mixed_batch_has_the_tokens_of_each_request_alone(name, llms, alone, mixed):
    method, prompts = METHODS[name], prompts_of(name)
    if method.is_tree:  # beside an open request
        llm, expected = llms[method.engine], alone(name)
        request = llm.submit([4, 4], METHODS["sampling"].params)
        llm.run_slice(0.0)
        assert tokens_of(llm.tree_search(prompts, method.params)) == expected
        assert len(request.output().outputs[0].token_ids) == LENGTH
        assert is_idle(llm)
    else:
        assert mixed[name] == alone(name)
    lens = {len(tokens) for outputs in alone(name) for tokens in outputs}
    assert lens == {LENGTH}


@EVERY
def test_a_seed_gives_its_tokens(name, llms):
    method = METHODS[name]
    check_seed(llms[method.engine], method, prompts_of(name)[0])


@EVERY
def test_preemption_changes_nothing(name, llms, alone):
    method, prompts = METHODS[name], prompts_of(name)
    llm = llms[method.engine]
    if method.is_tree:  # it gets all of its blocks before it starts, or is refused
        with small_pool(llm, 9):
            llm.generate(prompts[:1], METHODS["greedy"].params)  # and the prefixes
            with pytest.raises(ValueError, match=r"num_simulations: .* 9 of 48 are"):
                llm.tree_search(prompts, method.params)
        return
    with small_pool(llm, least_pool(method, prompts)):
        found = llm.generate(prompts, method.params, progress=False)
    assert sum(output.metrics["num_preemptions"] for output in found) > 0
    assert tokens_of(found) == alone(name)
    assert is_idle(llm)


@EVERY
def test_prompts_in_other_chunks_change_nothing(name, llms, alone, monkeypatch):
    method, prompts = METHODS[name], prompts_of(name)
    llm, counts = llms[method.engine], []
    expected = alone(name)
    stepper = type(llm._host.runner._stepper)
    for budget in (16, 8):
        monkeypatch.setattr(stepper, "max_num_tokens", lambda *_, n=budget: n)
        llm.reset_prefix_cache()
        before = llm.stats()["num_steps"]
        check_mixed(llm, prompts, method.params, expected)
        counts.append(llm.stats()["num_steps"] - before)
    assert method.is_tree or counts[1] > counts[0]


@EVERY
def test_a_stream_never_takes_back_text(name, llms):
    method, prompt = METHODS[name], prompts_of(name)[1]
    llm = llms[method.engine]
    if method.is_tree:
        with pytest.raises(ValueError, match="params: expected SamplingParams"):
            llm.stream([prompt], method.params)
        return
    (output,) = run(llm, [prompt], method.params)
    deltas = list(llm.stream([prompt], method.params))
    check_stream(deltas, output.outputs)
    # The outputs of methods whose rows move are known at their end.
    assert (len(deltas) > len(output.outputs)) == method.streams
    assert is_idle(llm)


@EVERY
def test_new_numbers_compile_nothing(name, llms):
    method = METHODS[name]
    check_numbers(llms[method.engine], method, prompts_of(name))


@EVERY
@pytest.mark.parametrize("option", OPTIONAL)
def test_what_a_method_lacks_is_refused_by_name(name, option, llms):
    params, refuses = METHODS[name].params, METHODS[name].refuses
    given = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    if option in refuses:
        with pytest.raises(ValueError, match=rf"\b{option}\b"):
            type(params)(**(given | {option: OPTIONAL[option]}))
    else:
        type(params)(**(given | {option: OPTIONAL[option]}))


@EVERY
def test_log_probabilities_are_finite_and_one_per_token(name, llms):
    method, prompt = METHODS[name], prompts_of(name)[0]
    llm = llms[method.engine]
    params = [*with_logprobs(method), method.params][0]
    (output,) = run(llm, [prompt], params)
    for one in output.outputs:
        each = np.asarray(one.token_logprobs)
        assert each.shape == (len(one.token_ids),)
        assert np.isfinite(each).all()
        assert (each <= 0).all()
        assert abs(each.sum() - one.cumulative_logprob) < 1e-3
        if "logprobs" in method.refuses:
            continue
        assert len(one.logprobs) == len(one.token_ids)
        for token, logprob, entry in zip(
            one.token_ids, each, one.logprobs, strict=True
        ):
            assert 2 <= len(entry) <= 3
            assert abs(entry[token].logprob - logprob) < 1e-3


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.accepts("stop")])
def test_a_stop_string_ends_an_output(name, llms):
    method, prompt = METHODS[name], prompts_of(name)[0]
    llm = llms[method.engine]
    (free,) = run(llm, [prompt], method.params)
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    (output,) = run(llm, [prompt], method.request(stop=stop))
    one = output.outputs[0]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    assert one.text == text[: text.index(stop)]
    for other in output.outputs:
        assert stop not in other.text


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, method in METHODS.items()
        if isinstance(method.params, SamplingParams) and method.accepts("n")
    ],
)
def test_n_samples_of_ordinary_requests(name, llms, alone):
    method, prompt = METHODS[name], prompts_of(name)[0]
    llm = llms[method.engine]
    (three,) = tokens_of(run(llm, [prompt], method.request(n=3)))
    assert three[:1] == alone(name)[0]
    assert tokens_of(run(llm, [prompt], method.request(n=2))) == [three[:2]]
    assert len(set(three)) > 1


@pytest.fixture(scope="module")
def doubled(llms):
    """The tokens of two runs of each algorithm without a draft model."""
    found = {}
    for engine in ("plain", "seen"):
        names = [n for n in names_of(engine) if METHODS[n].is_algorithm]
        params = [METHODS[name].request(n=2) for name in names]
        outputs = run(llms[engine], [prompts_of(n)[0] for n in names], params)
        found |= dict(zip(names, tokens_of(outputs), strict=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if m.is_algorithm and not m.needs_draft]
)
def test_n_runs_of_algorithms(name, doubled, alone):
    method, (one, *_) = METHODS[name], alone(name)
    two = doubled[name]
    first, second = two[0::2], two[1::2]  # output i of run c is i * n + c
    assert len(first) == len(second) == len(one)
    if method.law_of_n == "equal":
        assert first == second == one
    elif method.law_of_n == "first":
        assert first == one
        assert second != one
    else:
        assert method.law_of_n == "different"
        assert first != second


# ---- planted faults


def _constant_keys(keys, logits, state):
    """An algorithm that ignores its keys, and with them its seed."""
    del keys
    own = jax.random.split(jax.random.key(0), len(logits))
    tokens = jax.vmap(jax.random.categorical)(own, logits).astype(jnp.int32)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    rows = jnp.arange(len(logits), dtype=jnp.int32)
    return state, Decision(tokens, rows, logprobs, jnp.zeros(len(logits), bool))


SEEDLESS = Method(
    AlgorithmParams(
        DecodingAlgorithm(lambda num_rows: (), _constant_keys, keeps_rows=True),
        max_tokens=LENGTH,
        ignore_eos=True,
        seed=5,
    ),
    {},
    is_stochastic=True,
)


def _prefer(logits, row, seen, *, strength):
    """A processor with a state: a number of the tokens so far chooses the next one."""
    return logits.at[seen].add(strength)


def _note(logits, row, seen, token, *, strength):
    return (7 * seen + token + 1) % VOCAB_SIZE


def chained():
    one = LogitsProcessor(
        _prefer, {"strength": 50.0}, init=lambda strength: jnp.int32(3), update=_note
    )
    return SamplingParams(
        temperature=0.0, max_tokens=LENGTH, ignore_eos=True, logits_processors=[one]
    )


def test_a_method_that_ignores_its_seed_is_found(folder, one_program):
    llm = LLM(folder, **SIZES)
    with pytest.raises(AssertionError):
        check_seed(llm, SEEDLESS, PROMPTS[0])
    check_seed(llm, dataclasses.replace(SEEDLESS, is_stochastic=False), PROMPTS[0])


@pytest.mark.parametrize("is_faulty", [False, True])
def test_a_state_that_leaks_between_rows_is_found(
    folder, one_program, monkeypatch, is_faulty
):
    next_states = processors.next_states

    def leaking(*args):
        states = next_states(*args)
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), states)

    if is_faulty:
        monkeypatch.setattr(processors, "next_states", leaking)
    llm, params = LLM(folder, **SIZES), chained()
    expected = [tokens_of(run(llm, [prompt], params))[0] for prompt in PROMPTS]
    with pytest.raises(AssertionError) if is_faulty else contextlib.nullcontext():
        check_mixed(llm, PROMPTS, params, expected)


def test_a_number_that_is_compiled_is_found(folder, one_program):
    def made(bias):
        def step(keys, logits, state):
            tokens = jnp.argmax(logits.at[:, 7].add(bias), axis=1).astype(jnp.int32)
            logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
            rows = jnp.arange(len(logits), dtype=jnp.int32)
            ended = jnp.zeros(len(logits), bool)
            return state, Decision(tokens, rows, logprobs, ended)

        return DecodingAlgorithm(lambda num_rows: (), step, keeps_rows=True)

    llm = LLM(folder, **SIZES)
    params = AlgorithmParams(made(0.0), max_tokens=LENGTH, ignore_eos=True)
    method = Method(params, {"algorithm": made(50.0)})
    with pytest.raises(AssertionError):
        check_numbers(llm, method, PROMPTS[:1])


def test_a_stream_that_takes_back_text_is_found():
    one = CompletionOutput(0, [5, 6], "ab", 0.0)
    good = [Delta(0, 0, "a", [5]), Delta(0, 0, "b", [6])]
    check_stream(good, [one])
    for wrong in (good[:1], good[::-1], [Delta(0, 0, "ac", [5]), *good[1:]]):
        with pytest.raises(AssertionError):
            check_stream(wrong, [one])
