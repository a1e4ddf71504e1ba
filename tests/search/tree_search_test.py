"""Tree search through the LLM, against a search that computes every text anew.

The pool of the LLM is small, so that searches evict its prefix cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import TreeSearchParams
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from tests.llm.cache_groups_test import window_model
from tests.support import tree_oracle as trees
from tests.support.engine.full_llm import Oracle
from tests.support.tiny_llm import (
    EOS,
    GREEDY,
    MAX_LEN,
    SIZES,
    VOCAB_SIZE,
    is_idle,
    random_prompts,
    tokens_of,
)

pytestmark = pytest.mark.long

A = 5  # actions
WEIGHTS = np.random.default_rng(3).normal(size=VOCAB_SIZE).astype(np.float32)


def gains(leaf, *, weights, share):
    """Weights of the output's tokens, and the model's log-probability."""
    index = jnp.arange(leaf.tokens.shape[0], dtype=jnp.int32)
    is_output = (index >= leaf.prompt_len) & (index < leaf.num_tokens)
    tokens = jnp.minimum(leaf.tokens, VOCAB_SIZE - 1)
    total = jnp.sum(jnp.where(is_output, weights[tokens], 0.0))
    return total + share * leaf.logprob


PARAMS = TreeSearchParams(
    gains,
    num_simulations=20,
    num_actions=A,
    max_tokens=6,
    parameters={"weights": WEIGHTS, "share": 0.3},
    stop_token_ids=(9,),
)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **(SIZES | dict(num_blocks=128)))


@pytest.fixture(scope="module")
def oracle(llm):
    return Oracle(llm)


def looker(oracle, prompt, params, value=None):
    """What the oracle's search learns of a text, by a forward pass over all of it."""
    known = {}

    def look(text):
        if text in known:
            return known[text]
        rows = oracle.logprobs([*prompt, *text])
        order = np.argsort(-rows[-1], kind="stable")[:A].tolist()
        start = len(prompt) - 1
        logprob = sum(rows[start + i, token] for i, token in enumerate(text))
        is_stop = bool(text) and text[-1] in (*EOS, *params.stop_token_ids)
        length = len(prompt) + len(text)
        is_over = is_stop or len(text) == params.max_tokens or length == MAX_LEN
        total = sum(float(WEIGHTS[token]) for token in text) + 0.3 * logprob
        if value is not None:
            total = value(rows[-1], logprob, text, is_over)
        known[text] = trees.Facts(order, rows[-1][order], total, is_over)
        return known[text]

    return look


def expected(look, params):
    """The visits of each step, and the text."""
    root, steps = trees.root_of(look), []
    while not root.facts.is_terminal:
        trees.simulate(root, look, params.num_simulations)
        counts = trees.counts(root)
        steps.append(counts)
        root = root.children[int(np.argmax(counts))]
        if not params.reuse_tree:
            root = trees.root_of(look, root.text)
    return steps, root


def run(llm, prompts, params):
    return llm.tree_search(prompts, params)


@pytest.mark.parametrize("reuses", [True, False])
def test_texts_and_visits_are_those_of_a_search_without_pages(llm, oracle, reuses):
    params = dataclasses.replace(PARAMS, reuse_tree=reuses)
    prompts = [*random_prompts(2, seed=3, longest=12), [5] * 61]
    outputs = run(llm, prompts, params)
    reasons = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        steps, root = expected(looker(oracle, prompt, params), params)
        assert [step.visits.tolist() for step in output.steps] == steps
        (chosen,) = output.outputs
        assert tuple(chosen.token_ids) == root.text
        assert abs(chosen.score - root.facts.value) < 1e-3
        is_stop = root.text[-1] in (*EOS, 9)
        assert chosen.finish_reason == ("stop" if is_stop else "length")
        reasons.add(len(root.text))
        assert sum(map(len, output.outputs[0].token_logprobs.reshape(1, -1))) == len(
            root.text
        )
        logprob = oracle.logprobs([*prompt, *root.text])
        start = len(prompt) - 1
        total = sum(logprob[start + i, token] for i, token in enumerate(root.text))
        assert abs(chosen.cumulative_logprob - total) < 1e-3
        assert output.best is not None
        assert output.best.score >= chosen.score - 1e-6
        metrics = output.metrics
        assert metrics["max_used_blocks"] < metrics["max_blocks_without_sharing"]
        nodes = params.num_simulations + 1
        text = -(-(len(prompt) + 6) // SIZES["block_size"])
        assert metrics["max_used_blocks"] <= text + nodes
    assert reasons >= {6, 3}  # the limits of the parameters and of the model
    assert is_idle(llm)


def test_the_default_value_is_the_mean_log_probability(llm, oracle):
    params = TreeSearchParams(num_simulations=12, num_actions=A, max_tokens=3)

    def mean(row, logprob, text, is_over):
        if is_over:
            return logprob / len(text)
        return (logprob + (np.exp(row) * row).sum()) / (len(text) + 1)

    prompt = random_prompts(1, seed=4)[0]
    (output,) = run(llm, prompt, params)
    steps, root = expected(looker(oracle, prompt, params, mean), params)
    assert [step.visits.tolist() for step in output.steps] == steps
    assert tuple(output.outputs[0].token_ids) == root.text


def test_more_trees_than_fit_and_numbers_that_compile_nothing(llm):
    prompts = random_prompts(5, seed=6, longest=10)
    together = run(llm, prompts, PARAMS)
    alone = [run(llm, [prompt], PARAMS)[0] for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert [s.visits.tolist() for s in one.steps] == [
            s.visits.tolist() for s in other.steps
        ]
    from jpaged.search import search

    before = search._cache_size()
    other = dataclasses.replace(
        PARAMS,
        num_simulations=18,
        exploration=3.0,
        temperature=1.0,
        parameters={"weights": -WEIGHTS, "share": 0.0},
        seed=4,
    )
    first, again = (run(llm, prompts[:1], other) for _ in range(2))
    assert search._cache_size() == before
    assert first[0].outputs[0].token_ids == again[0].outputs[0].token_ids
    assert int(first[0].steps[0].visits.sum()) == 18
    seeds = [dataclasses.replace(other, seed=seed) for seed in range(6)]
    texts = {tuple(run(llm, prompts[:1], one)[0].outputs[0].token_ids) for one in seeds}
    assert len(texts) > 1


def test_a_search_beside_open_requests_and_a_prefix_cache(llm):
    llm.reset_prefix_cache()
    prompts = random_prompts(20, seed=8, longest=40)
    long = [*range(20, 52)]
    plain = run(llm, [long], PARAMS)[0]
    assert plain.metrics["num_cached_tokens"] == 0
    before = tokens_of(llm.generate([*prompts, long], GREEDY, progress=False))
    cached = run(llm, [long], PARAMS)[0]
    assert cached.metrics["num_cached_tokens"] == 28
    assert cached.outputs[0].token_ids == plain.outputs[0].token_ids
    # The cached blocks that were not evicted are as they were.
    assert tokens_of(llm.generate([*prompts, long], GREEDY, progress=False)) == before
    count = llm.stats()["num_cached_blocks"]
    run(llm, [long] * 4, PARAMS)
    assert 0 < llm.stats()["num_cached_blocks"] < count
    assert tokens_of(llm.generate([*prompts, long], GREEDY, progress=False)) == before
    request = llm.submit(prompts[0], dataclasses.replace(GREEDY, max_tokens=12))
    llm.run_slice(0.0)
    again = run(llm, [long], PARAMS)[0]
    assert again.outputs[0].token_ids == plain.outputs[0].token_ids
    assert [list(request.output().outputs[0].token_ids)] == [
        list(tokens) for tokens in before[0]
    ]
    assert is_idle(llm)


def test_the_pool_is_updated_in_place(llm):
    state = llm._host.runner.state
    pages = jax.tree.leaves(state.cache)[0]
    address = pages.unsafe_buffer_pointer()
    run(llm, [[5, 6]], PARAMS)
    assert pages.is_deleted()
    after = jax.tree.leaves(llm._host.runner.state.cache)[0]
    assert after.unsafe_buffer_pointer() == address


def never(leaf):
    return jnp.log(-leaf.num_tokens.astype(jnp.float32))


def two(leaf):
    return leaf.logprobs


INVALID = [
    (lambda: dict(num_simulations=0), "num_simulations: expected an integer of at"),
    (lambda: dict(num_actions=VOCAB_SIZE + 1), "num_actions: expected at most 300"),
    (lambda: dict(max_tokens=0), "max_tokens: expected"),
    (lambda: dict(value=3), r"value: expected a function \(leaf"),
    (lambda: dict(value=two), r"value: expected a function that returns one number"),
    (lambda: dict(value=gains), "got TypeError with gains"),
    (lambda: dict(temperature=-1), "temperature: expected"),
    (lambda: dict(parameters=[1]), "parameters: expected a dict"),
    (lambda: dict(stop_token_ids=[300]), "stop_token_ids: expected ids from 0 to 299"),
    (lambda: dict(num_simulations=150), "tree_search: num_sim.* 128 are free"),
    (lambda: dict(width=2), "unknown argument 'width'"),
    (lambda: dict(stop=["x"]), r"stop.*tree search has no stop strings; set stop_tok"),
    (
        lambda: dict(structured_outputs={"regex": "a+"}),
        "structured_outputs.*tree search has no structured output; Beam",
    ),
    (lambda: dict(logits_processors=[print]), "logits_processors.*no logits rules"),
    (lambda: dict(logprobs=2), "logprobs.*have token_logprobs and steps"),
    (lambda: dict(n=2), r"\bn\b.*chooses one text"),
]


@pytest.mark.parametrize(("make", "message"), INVALID)
def test_invalid_arguments_are_refused(llm, make, message):
    with pytest.raises(ValueError, match=message):
        run(llm, [[3, 4]], TreeSearchParams(**make()))


def test_bad_prompts_and_values_are_refused(llm):
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected token ids from 0"):
        run(llm, [[3], [300]], PARAMS)
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected at least one token"):
        run(llm, [[]], PARAMS)
    with pytest.raises(ValueError, match="params: expected TreeSearchParams or None"):
        run(llm, [[3]], SamplingParams())
    bad = TreeSearchParams(never, num_simulations=3, num_actions=A, max_tokens=2)
    (output,) = run(llm, [[3]], bad)
    assert output.outputs == []
    assert "value: expected finite numbers from never" in output.error


@pytest.mark.slow
def test_block_tables_of_several_groups_find_the_same_texts():
    prompts = [np.random.default_rng(1).integers(0, 64, n).tolist() for n in (30, 7)]
    params = TreeSearchParams(
        num_simulations=10, num_actions=3, max_tokens=6, ignore_eos=True
    )
    model, found = window_model((3,)), []
    sizes = dict(block_size=4, num_blocks=96, max_num_seqs=2, max_model_len=64)
    for is_grouped in (True, False):
        llm = LLM(model, cache_groups=is_grouped, **sizes)
        assert (len(llm.config.group_windows) > 1) == is_grouped
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=2))
        outputs = run(llm, prompts, params)
        assert outputs[0].metrics["num_cached_tokens"] == 28
        found.append(
            [
                (o.outputs[0].token_ids, [s.visits.tolist() for s in o.steps])
                for o in outputs
            ]
        )
    assert found[0] == found[1]
    text = list(found[0][0][0])
    logits = model(jnp.asarray([[*prompts[0], *text[:-1]]]))[0]
    logprobs = jax.nn.log_softmax(logits)[len(prompts[0]) - 1 :]
    total = sum(float(logprobs[i, token]) for i, token in enumerate(text))
    (output,) = run(llm, prompts[:1], params)
    assert abs(output.outputs[0].cumulative_logprob - total) < 1e-3
