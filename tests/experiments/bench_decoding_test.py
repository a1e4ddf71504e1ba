"""The benchmark of decoding methods at tiny sizes, and its baseline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib import baseline
from experiments.lib.decoding import baseline as baseline_decoding
from experiments.lib.decoding.costs import shares_of_step
from experiments.lib.decoding.loads import (
    HAS_HUGGING_FACE,
    METHODS,
    DecodingLoad,
    EngineDecoding,
    PlainDecoding,
    load_in_progress,
)
from experiments.lib.timing import once
from jpaged.config import EngineConfig
from tests.support.models.tiny_llama import tiny_llama
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long

CONFIG = EngineConfig(
    num_blocks=32,
    block_size=4,
    max_num_seqs=4,
    max_model_len=32,
    max_num_batched_tokens=8,
    max_num_requests=8,
    max_beam_width=4,
)
OTHERS = ["plain", *(["hugging_face"] if HAS_HUGGING_FACE else [])]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def plain_search(model, num_rows, num_tokens, method="beams"):
    weights, shape = baseline.weights_of(model)
    prompt = jnp.asarray(np.random.default_rng(2).integers(0, 256, 9), jnp.int32)
    sizes = dict(shape=shape, num_rows=num_rows, num_tokens=num_tokens)
    if method == "beams":
        return baseline_decoding.begin_beams(weights, prompt, **sizes), prompt
    key = jax.random.key(5)
    return baseline_decoding.begin_samples(weights, prompt, key, **sizes), prompt


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def slow_beams(model, prompt, width, num_tokens):
    """Beam search that recomputes every sequence: tokens and scores, best first."""
    forward = jax.jit(lambda model, tokens: model(tokens))
    beams = [((), 0.0)]
    for _ in range(num_tokens):
        found = []
        for tokens, score in beams:
            padded = np.zeros((1, 32), np.int32)
            known = [*prompt, *tokens]
            padded[0, : len(known)] = known
            logits = np.asarray(forward(model, padded), np.float64)[0, len(known) - 1]
            logprobs = log_softmax(logits)
            found += [((*tokens, t), score + p) for t, p in enumerate(logprobs)]
        beams = sorted(found, key=lambda beam: -beam[1])[:width]
    return np.array([tokens for tokens, _ in beams]), [score for _, score in beams]


@pytest.mark.parametrize("form", ["calls", "loop"])
def test_plain_beams_equal_a_search_that_recomputes_everything(form, model):
    start, prompt = plain_search(model, 4, 6)
    weights, shape = baseline.weights_of(model)
    decode = getattr(baseline_decoding.decode_beams, form)
    got = decode(weights, start, shape=shape)
    tokens, scores = slow_beams(model, prompt.tolist(), 4, 6)
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_allclose(got.scores, scores, atol=1e-4)
    assert len(set(tokens[:, 0])) > 1  # the beams have several first tokens


@pytest.mark.parametrize("form", ["calls", "loop"])
def test_plain_samples_are_sampled_after_their_own_tokens(form, model):
    weights, shape = baseline.weights_of(model)
    key = jax.random.key(5)
    start, prompt = plain_search(model, 3, 5, "samples")
    decode = getattr(baseline_decoding.decode_samples, form)
    got = np.asarray(decode(weights, start, shape=shape).tokens)
    assert len({tuple(row) for row in got.tolist()}) == 3

    forward = jax.jit(lambda model, tokens: model(tokens))
    known = np.tile(np.asarray(prompt), (3, 1))
    for _ in range(5):
        key, used = jax.random.split(key)
        padded = np.zeros((3, 16), np.int32)
        padded[:, : known.shape[1]] = known
        logits = forward(model, padded)[:, known.shape[1] - 1]
        sampled = np.asarray(jax.random.categorical(used, logits))
        if known.shape[1] == len(prompt):  # the first tokens share one row's logits
            sampled = np.asarray(jax.random.categorical(used, logits[0], shape=(3,)))
        known = np.concatenate([known, sampled[:, None]], axis=1)
    np.testing.assert_array_equal(got, known[:, len(prompt) :])


@pytest.mark.parametrize("method", METHODS)
def test_runs_of_a_load_are_repeatable_and_equal_the_baseline(method, model):
    load = DecodingLoad(method, list(range(7)), 3, 5)
    ours = EngineDecoding(model, CONFIG)
    plain = PlainDecoding(model)
    found = []
    for one in (load, load.cut(), load):
        once(ours.contender(one))
        found.append(ours.tokens())
        assert found[-1].shape == (3, one.num_tokens)
    np.testing.assert_array_equal(found[0], found[2])
    for contender in plain.contenders(load).values():
        once(contender)
        assert plain.tokens().shape == (3, 5)
        if method == "beams":
            np.testing.assert_array_equal(plain.tokens(), found[0])


def test_a_load_in_progress_has_the_requested_context(model):
    load = DecodingLoad("beams", list(range(7)), 3, 9)
    state = load_in_progress(model, CONFIG, load, load.middle(4))
    lengths = np.asarray(state.blocks.context_lens)
    assert lengths[:3].tolist() == [9, 9, 9]
    with pytest.raises(ValueError, match=r"--cost_steps: .*at most 7"):
        load.middle(8)


def test_the_shares_of_a_step_add_up_to_one():
    seconds = dict(step=20.0, products=12.0, attention=3.0)
    seconds |= dict(none=0.5, algorithm=1.5, fork=1.75, copies=2.0)
    shares = shares_of_step(seconds)
    assert shares == pytest.approx(
        dict(
            products=0.6,
            attention=0.15,
            scheduler=0.025,
            algorithm=0.05,
            fork=0.0125,
            copies=0.0125,
            rest=0.15,
        )
    )
    assert sum(shares.values()) == pytest.approx(1.0)


def test_the_smoke_run_reports_all_figures():
    status, stdout, stderr = call_experiment("bench_decoding", "--smoke")
    assert status == 0, stderr[-4000:]
    report = last_json(stdout)
    sides = ("products", "jpaged", *OTHERS)
    assert set(report["steps_per_s"]) == {f"beams_{side}" for side in sides}
    assert set(report["tokens_per_s"]) == {f"samples_{side}" for side in sides}
    figures = [*report["steps_per_s"].values(), *report["tokens_per_s"].values()]
    assert np.isfinite(figures).all()
    assert min(figures) > 0
    assert set(report["ratios"]) == {
        f"{method}_jpaged_over_{other}{what}"
        for method in METHODS
        for other in OTHERS
        for what in ("", "_processor_time", "_step")
    } | {
        "beam_step_over_greedy_step",
        "block_work_share_of_beam_step",
        "algorithm_share_of_beam_step",
    }
    details = report["details"]
    equal = details["beams"]["equal_tokens_share"]
    assert set(equal) == {"plain_calls", "plain_loop", *OTHERS} - {"plain"}
    assert set(equal.values()) == {1.0}  # all contenders find the same beams
    cost = details["cost"]
    assert sum(cost["shares_of_beam_step"].values()) == pytest.approx(1.0)
    assert cost["block_copies_per_step"] > 0
    copied = cost["block_copies_per_step"] * cost["block_bytes"]
    assert cost["bytes_copied_per_step"] == pytest.approx(copied)
    programs = details["programs"]
    assert programs["first"]["engine"] >= 1
    assert programs["second"] == {"all": 0, "engine": 0}
    assert {"beams", "choice", "rules", "prompt_logprobs"} <= set(programs["methods"])
