"""Algorithms of users and of papers through the LLM: what they see, and what they get.

The expected tokens come from loops over the plain forward pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged.decoding import (
    Decision,
    DecodingAlgorithm,
    chain,
    contrib,
    greedy,
    sampling,
    temperature,
    top_k,
)
from jpaged.llm import LLM
from jpaged.params import (
    AlgorithmParams,
    SamplingParams,
    StructuredOutputsParams,
)
from jpaged.serving import batcher
from tests.support.engine.full_llm import Oracle
from tests.support.models import checkpoints
from tests.support.tiny_llm import (
    MAX_LEN,
    SIZES,
    VOCAB_SIZE,
    is_idle,
    random_prompts,
    tokens_of,
)

pytestmark = pytest.mark.long


def fresh_step(keys, logits, state, context):
    """The most probable token that is not among the last `window` ones."""
    index = jnp.arange(context.tokens.shape[1], dtype=jnp.int32)[None, :]
    first = context.num_tokens - context.parameters["window"]
    is_old = index >= first[:, None]
    rows = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
    at = jnp.where(is_old, context.tokens, VOCAB_SIZE)
    rows = jnp.broadcast_to(rows, at.shape)
    scores = logits.at[rows, at].set(-jnp.inf, mode="drop")
    tokens = jnp.argmax(scores, axis=1).astype(jnp.int32)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    own = jnp.arange(len(logits), dtype=jnp.int32)
    return state + 1, Decision(tokens, own, logprobs, jnp.zeros(len(logits), bool))


HIDDEN = checkpoints.LLAMA["hidden_size"]
FRESH = DecodingAlgorithm(
    lambda num_rows: jnp.int32(0),
    fresh_step,
    needs={"history"},
    parameters={"window": 3},
    keeps_rows=True,
)


@pytest.fixture(scope="module")
def llm(folder):
    """An LLM that knows all algorithms of these tests, so that few programs compile."""
    llm = LLM(folder, **SIZES)
    search = contrib.contrastive_search(max_tokens=12, hidden_size=HIDDEN)
    kinds = [
        (FRESH, 1),
        (greedy(), 1),
        (sampling(), 3),
        (sampling(chain(temperature(0.7), top_k(5))), 2),
        (contrib.classifier_free_guidance(), 2),
        (contrib.dola((0, 1)), 1),
        (search, 4),
        (contrib.entropy_branching(), 3),
    ]
    params = [params_of(*kind, max_tokens=1, **needs_of(kind[0])) for kind in kinds]
    run(llm, [[5]] * len(kinds), params)
    return llm


def needs_of(algorithm):
    return {"companions": [[6]]} if algorithm.num_companions else {}


@pytest.fixture(scope="module")
def oracle(llm):
    return Oracle(llm)


def fresh(oracle, prompt, window, length):
    output = []
    for _ in range(length):
        tokens = [*prompt, *output]
        logprobs = oracle.logprobs(tokens)[-1]
        logprobs[tokens[max(len(tokens) - window, 0) :]] = -np.inf
        output.append(int(logprobs.argmax()))
    return output


def run(llm, prompts, params):
    return llm.generate(prompts, params, progress=False)


def params_of(algorithm, num_rows=1, **more):
    settings = dict(max_tokens=10, ignore_eos=True) | more
    return AlgorithmParams(algorithm, num_rows, **settings)


def test_several_requests_of_one_algorithm_with_their_own_parameters(llm, oracle):
    prompts = random_prompts(7, seed=2, longest=12)
    windows = [1, 2, 3, 5, 8, 30, 4]
    params = [params_of(FRESH, parameters={"window": w}) for w in windows]
    params[2] = params_of(FRESH)
    llm.warm_up(params)  # otherwise some programs are compiled beside the run
    outputs = run(llm, prompts, params)
    for prompt, window, output in zip(prompts, windows, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == fresh(oracle, prompt, window, 10)
    before = llm.stats()["num_compilations"]
    again = params_of(FRESH, parameters={"window": 6})
    (output,) = run(llm, prompts[:1], again)
    assert list(output.outputs[0].token_ids) == fresh(oracle, prompts[0], 6, 10)
    assert llm.stats()["num_compilations"] == before
    assert is_idle(llm)


def test_sampling_as_an_algorithm_has_the_tokens_of_sampling_params(llm):
    prompt, found = [5, 60, 7], []
    for value, k in ((0.7, 5), (1.9, 40)):
        algorithm = sampling(chain(temperature(value), top_k(k)))
        settings = dict(seed=3, max_tokens=8, ignore_eos=True)
        same = SamplingParams(n=2, temperature=value, top_k=k, **settings)
        llm.warm_up([AlgorithmParams(algorithm, 2, **settings), same])
        ours, theirs = run(
            llm, [prompt] * 2, [AlgorithmParams(algorithm, 2, **settings), same]
        )
        assert tokens_of([ours]) == tokens_of([theirs])
        found.append((tokens_of([ours]), llm.stats()["num_compilations"]))
        settings |= dict(parameters={"temperature_0": 0.3, "top_k_1": 2.0})
        changed = run(llm, [prompt], AlgorithmParams(algorithm, 2, **settings))
        assert tokens_of(changed) != tokens_of([ours])
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


def test_an_algorithm_has_logprobs_stop_strings_and_streams(llm, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    plain = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3)
    ours = params_of(greedy(), max_tokens=12, logprobs=3)
    prompts = random_prompts(3, seed=5, longest=9)
    for prompt in prompts:
        theirs, mine = run(llm, [prompt] * 2, [plain, ours])
        assert tokens_of([mine]) == tokens_of([theirs])
        one, other = mine.outputs[0], theirs.outputs[0]
        for left, right in zip(one.logprobs, other.logprobs, strict=True):
            assert left.keys() == right.keys()
            for token, entry in left.items():
                assert entry.rank == right[token].rank
                assert abs(entry.logprob - right[token].logprob) < 1e-4
        text = other.text
        stop = text[len(text) // 2 : len(text) // 2 + 2]
        stopped = [dataclasses.replace(each, stop=stop) for each in (plain, ours)]
        theirs, mine = run(llm, [prompt] * 2, stopped)
        assert mine.outputs[0].text == theirs.outputs[0].text
        assert mine.outputs[0].stop_reason == stop
        deltas = list(llm.stream([prompt], ours))
        assert "".join(delta.text for delta in deltas) == text
        assert len(deltas) > 2
    assert is_idle(llm)


def test_rows_that_stop_leave_the_others_running(llm):
    prompt = random_prompts(1, seed=9)[0]
    params = params_of(sampling(), 3, seed=1, max_tokens=14)
    (free,) = run(llm, [prompt], params)
    text = free.outputs[1].text
    stop = next(
        text[i : i + 2]
        for i in range(len(text))
        if text[i : i + 2] not in free.outputs[0].text + "|" + free.outputs[2].text
    )
    (output,) = run(llm, [prompt], dataclasses.replace(params, stop=stop))
    assert [one.stop_reason for one in output.outputs] == [None, stop, None]
    assert output.outputs[0].token_ids == free.outputs[0].token_ids
    assert output.outputs[1].text == text[: text.index(stop)]
    assert is_idle(llm)


def test_num_return_and_structured_outputs(llm):
    params = params_of(
        sampling(),
        3,
        seed=2,
        num_return=2,
        ignore_eos=False,
        structured_outputs=StructuredOutputsParams(choice=["yes", "oh"]),
    )
    (output,) = run(llm, [[4, 4]], params)
    assert len(output.outputs) == 2
    assert {one.text for one in output.outputs} <= {"yes", "oh"}


def guided(oracle, prompt, companion, scale, length):
    output = []
    for _ in range(length):
        with_prompt = oracle.logprobs([*prompt, *output])[-1]
        without = oracle.logprobs([*companion, *output])[-1]
        scores = without + scale * (with_prompt - without)
        output.append(int(scores.argmax()))
    return output


def test_guidance_beside_an_unconditional_prompt(llm, oracle):
    prompts = random_prompts(4, seed=3, longest=20)
    companions = [[9], [*range(20, 41)], prompts[2][:-1] or [3], [5, 5]]
    scales = [1.5, 3.0, 2.0, 1.0]
    cfg = contrib.classifier_free_guidance()
    params = [
        params_of(cfg, 2, companions=[companion], parameters={"scale": scale})
        for companion, scale in zip(companions, scales, strict=True)
    ]
    outputs = run(llm, prompts, params)
    for prompt, companion, scale, output in zip(
        prompts, companions, scales, outputs, strict=True
    ):
        assert [list(one.token_ids) for one in output.outputs] == [
            guided(oracle, prompt, companion, scale, 10)
        ]
    plain = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    assert tokens_of(run(llm, prompts[3:], plain)) == tokens_of(outputs[3:])
    assert tokens_of(run(llm, prompts[:1], plain)) != tokens_of(outputs[:1])
    assert is_idle(llm)


def test_guidance_in_the_smallest_pool_is_preempted_and_equal(folder, oracle):
    llm = LLM(folder, **(SIZES | dict(num_blocks=18, max_num_seqs=4)))
    prompts = [[i, *range(30, 36)] for i in range(5)]
    params = params_of(
        contrib.classifier_free_guidance(2.0), 2, max_tokens=22, companions=[[7, 8, 9]]
    )
    outputs = run(llm, prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = guided(oracle, prompt, [7, 8, 9], 2.0, 22)
        assert list(output.outputs[0].token_ids) == expected
    assert llm.stats()["num_preemptions"] > 0
    assert is_idle(llm)
    with pytest.raises(ValueError, match="need 25 blocks"):
        run(llm, [[3] * 33], dataclasses.replace(params, max_tokens=None))


def layer_logprobs(model, layer):
    """A model of the first layers, without the final norm."""
    short = nnx.clone(model)
    short.layers = nnx.List(list(short.layers)[: layer + 1])
    short.final_norm = None

    @jax.jit
    def forward(tokens):
        return jax.nn.log_softmax(short.logits(short.hidden_states(tokens)))

    def logprobs(tokens):
        padded = np.zeros((1, MAX_LEN), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(jnp.asarray(padded)))[0, len(tokens) - 1]

    return logprobs


def divergence(p, q):
    middle = np.log((np.exp(p) + np.exp(q)) / 2)
    return (np.exp(p) * (p - middle)).sum() + (np.exp(q) * (q - middle)).sum()


def test_dola_contrasts_the_last_layer_with_the_most_different_one(llm, oracle):
    early = [layer_logprobs(llm.model, layer) for layer in (0, 1)]
    prompts = random_prompts(3, seed=4, longest=10)
    params = params_of(contrib.dola((0, 1), alpha=0.05))
    outputs = run(llm, prompts, params)
    chosen = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = []
        for _ in range(10):
            last = oracle.logprobs([*prompt, *tokens])[-1]
            others = [one([*prompt, *tokens]) for one in early]
            layer = int(np.argmax([divergence(last, other) for other in others]))
            chosen.add(layer)
            is_plausible = last >= last.max() + np.log(0.05)
            scores = np.where(is_plausible, last - others[layer], -np.inf)
            tokens.append(int(scores.argmax()))
        assert list(output.outputs[0].token_ids) == tokens
    plain = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    assert tokens_of(run(llm, prompts, plain)) != tokens_of(outputs)
    assert is_idle(llm)


def contrasted(llm, prompt, k, alpha, length, stop_ids=()):
    """Contrastive search, with a forward pass over each candidate."""
    forward = jax.jit(llm.model.hidden_states)
    head = jax.jit(llm.model.logits)

    def hidden_of(tokens):
        padded = np.zeros((1, MAX_LEN), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(jnp.asarray(padded)))[0, len(tokens) - 1]

    tokens, hidden = list(prompt), hidden_of(prompt)
    units = [hidden / np.linalg.norm(hidden)]
    while len(tokens) < len(prompt) + length:
        logprobs = np.asarray(jax.nn.log_softmax(head(jnp.asarray(hidden)[None])))[0]
        candidates = np.argsort(-logprobs, kind="stable")[:k]
        scores, found = [], []
        for token in candidates:
            found.append(hidden_of([*tokens, int(token)]))
            unit = found[-1] / np.linalg.norm(found[-1])
            worst = max(float(unit @ other) for other in units)
            scores.append((1 - alpha) * np.exp(logprobs[token]) - alpha * worst)
        best = int(np.argmax(scores))
        tokens.append(int(candidates[best]))
        hidden = found[best]
        units.append(hidden / np.linalg.norm(hidden))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def test_contrastive_search_equals_a_search_over_all_candidates(llm):
    prompts = random_prompts(3, seed=6, longest=9)
    search = contrib.contrastive_search(max_tokens=12, hidden_size=HIDDEN)
    params = [
        params_of(search, 4, max_tokens=12, parameters={"alpha": alpha})
        for alpha in (0.6, 0.9, 0.0)
    ]
    outputs = run(llm, prompts, params)
    for prompt, alpha, output in zip(prompts, (0.6, 0.9, 0.0), outputs, strict=True):
        (one,) = output.outputs
        assert list(one.token_ids) == contrasted(llm, prompt, 4, alpha, 11)
        assert one.finish_reason == "length"
    plain = SamplingParams(temperature=0.0, max_tokens=11, ignore_eos=True)
    greedy_tokens = tokens_of(run(llm, prompts, plain))
    assert greedy_tokens[2] == tokens_of(outputs)[2]
    assert greedy_tokens[0] != tokens_of(outputs)[0]
    stop = outputs[0].outputs[0].token_ids[5]
    search = contrib.contrastive_search(
        max_tokens=12, hidden_size=HIDDEN, stop_ids=(stop,)
    )
    (output,) = run(llm, prompts[:1], params_of(search, 4, max_tokens=12))
    expected = contrasted(llm, prompts[0], 4, 0.6, 11, (stop,))
    assert list(output.outputs[0].token_ids) == expected
    assert output.outputs[0].finish_reason == "stop"
    assert len(expected) <= 6
    assert is_idle(llm)


def test_branching_shares_the_text_before_the_branch(llm, oracle):
    prompt, length = random_prompts(1, seed=8)[0], 10
    entropies, tokens = [], []
    for _ in range(length):
        logprobs = oracle.logprobs([*prompt, *tokens])[-1]
        entropies.append(float(-(np.exp(logprobs) * logprobs).sum()))
        tokens.append(int(logprobs.argmax()))
    # The first step whose entropy is above all those before it, but not step 0.
    step = next(i for i in range(1, length) if entropies[i] > max(entropies[:i]))
    threshold = (entropies[step] + max(entropies[:step])) / 2
    branching = contrib.entropy_branching(threshold)
    (output,) = run(llm, [prompt], params_of(branching, 3))
    logprobs = oracle.logprobs([*prompt, *tokens[:step]])[-1]
    leading = np.argsort(-logprobs, kind="stable")[:3].tolist()
    for first, one in zip(leading, output.outputs, strict=True):
        expected = [*tokens[:step], first]
        while len(expected) < length:
            expected.append(int(oracle.logprobs([*prompt, *expected])[-1].argmax()))
        assert list(one.token_ids) == expected


def test_everything_in_one_batch_has_the_tokens_it_has_alone(llm):
    requests = [
        params_of(FRESH),
        params_of(contrib.classifier_free_guidance(), 2, companions=[[9, 3]]),
        SamplingParams(seed=1, max_tokens=10, logits_processors=[contrib.mirostat()]),
        params_of(contrib.dola((0, 1), alpha=0.3)),
        params_of(contrib.contrastive_search(max_tokens=12, hidden_size=HIDDEN), 4),
        params_of(sampling(), 3, seed=4, logits_processors=[contrib.top_n_sigma()]),
        SamplingParams(n=2, seed=2, max_tokens=10, top_p=0.8),
    ]
    prompts = random_prompts(len(requests), seed=12, longest=14)
    together = tokens_of(run(llm, prompts, requests))
    for prompt, params, tokens in zip(prompts, requests, together, strict=True):
        assert tokens_of(run(llm, [prompt], params)) == [tokens]
    assert is_idle(llm)


def constant(token, parent=0):
    """Always one token and one parent, from all rows."""

    def step(keys, logits, state):
        count = len(logits)
        tokens = jnp.full(count, token, jnp.int32)
        parents = jnp.full(count, parent, jnp.int32)
        return state, Decision(tokens, parents, logits[:, 0], jnp.zeros(count, bool))

    return DecodingAlgorithm(lambda num_rows: (), step)


def late_step(keys, logits, state, context):
    """Greedy; after three tokens a token or a parent that does not exist."""
    is_late = context.num_tokens - context.prompt_lens >= 3
    own = jnp.arange(len(logits), dtype=jnp.int32)
    tokens = jnp.argmax(logits, axis=1).astype(jnp.int32)
    tokens = jnp.where(is_late, context.parameters["token"], tokens)
    parents = jnp.where(is_late, own + context.parameters["parent"], own)
    logprobs = jnp.max(logits, axis=1)
    return state, Decision(tokens, parents, logprobs, jnp.zeros(len(logits), bool))


LATE = DecodingAlgorithm(
    lambda num_rows: (), late_step, parameters={"token": 5, "parent": 0}
)


def late_nan(logits, row):
    """The same logits; NaN for one token after four tokens of the output."""
    is_late = row.num_tokens - row.prompt_len == 4  # in none of the examples
    return logits.at[7].add(jnp.where(is_late, jnp.nan, 0.0))


def test_what_is_no_token_ends_its_request_with_an_error_and_n_runs(llm):
    (prompt,) = random_prompts(1, seed=14, longest=9)
    plain = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    params = [
        plain,
        params_of(LATE, parameters={"token": VOCAB_SIZE}),
        params_of(LATE, parameters={"token": -2}),
        params_of(LATE, parameters={"parent": 1}),
        dataclasses.replace(plain, logits_processors=[late_nan]),
        params_of(LATE, parameters={"token": 9}, logits_processors=[late_nan]),
    ]
    # Beside them, three runs of an algorithm, and one run with three rows.
    three = params_of(sampling(), 3, seed=3)
    more = params_of(sampling(), 1, seed=3, n=3, num_return=1)
    outputs = run(llm, [prompt] * 8, [*params, three, more])
    assert tokens_of(outputs[6:7]) == tokens_of(outputs[7:])
    expected = list(outputs[0].outputs[0].token_ids)
    assert outputs[0].error is None
    assert len(expected) == 9
    for output, length in zip(outputs[1:6], (3, 3, 3, 4, 4), strict=True):
        (one,) = output.outputs
        assert one.finish_reason == "error"
        assert len(one.token_ids) == length
        assert f"of a token after {length} generated tokens" in output.error
        assert list(one.token_ids)[:3] == expected[:3]
    assert outputs[1].error.startswith("algorithm: expected a Decision with tokens")
    assert outputs[4].error.startswith("logits_processors: expected finite logits")
    assert is_idle(llm)


INVALID = [
    (lambda: params_of(FRESH, parameters={"width": 3}), "parameters: expected names"),
    (lambda: params_of(FRESH, parameters={"window": 0.5}), r"\['window'\]: expected"),
    (lambda: params_of(FRESH, parameters=[3]), "parameters: expected a dict"),
    (lambda: params_of(FRESH, companions=[[3]]), "companions: expected fewer prompts"),
    (lambda: params_of(FRESH, 2, companions=[[]]), r"companions\[0\]: expected"),
    (lambda: params_of(FRESH, 2, companions=[[999]]), r"companions\[0\]: expected"),
    (lambda: params_of(FRESH, 2, num_return=3), "num_return: expected at most 2"),
    (lambda: params_of(contrib.dola((7,))), "expected layers from 0 to 1"),
    (
        lambda: params_of(contrib.contrastive_search(max_tokens=12, hidden_size=5), 2),
        "expected the model's hidden_size",
    ),
    (
        lambda: params_of(contrib.classifier_free_guidance(), 3, companions=[[4]]),
        "num_rows: expected 2",
    ),
    (
        lambda: params_of(contrib.classifier_free_guidance(), 2),
        r"companions: expected 1 prompts .* got \(\)",
    ),
    (lambda: params_of(constant(VOCAB_SIZE), 2), r"got 300 in step 0 of the example"),
    (lambda: params_of(constant(-7), 2), "tokens from 0 to 299 .* got -7 in step 0"),
    (lambda: params_of(constant(3, 9), 2), "expected parents from 0 to 1, .* got 9"),
    (lambda: params_of(sampling(), 3, n=2), r"n \* num_rows: .* \(4\), .* got 6"),
    (lambda: params_of(sampling(), n=0), "n: expected an integer of at least 1"),
    (lambda: params_of(contrib.contrastive_decoding()), "engine with a draft model"),
    (lambda: params_of(DecodingAlgorithm(lambda n: (), lambda *a: 1 / 0)), "Zero"),
    (lambda: params_of(DecodingAlgorithm(lambda n: (), lambda k: k)), "TypeError with"),
    (lambda: params_of(DecodingAlgorithm(lambda n: (), lambda *a: None)), "algorithm:"),
    (lambda: DecodingAlgorithm(len, len, needs={"speed"}), "needs: expected some of"),
    (lambda: DecodingAlgorithm(len, len, needs={"layers"}), "layers: expected numbers"),
    (lambda: DecodingAlgorithm(len, len, needs={"hidden"}), "hidden_size: expected"),
]


@pytest.mark.parametrize(("make", "message"), INVALID)
def test_invalid_requests_are_refused(llm, make, message):
    with pytest.raises(ValueError, match=message):
        run(llm, [[3, 4]], make())
