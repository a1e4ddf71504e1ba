"""Log-probabilities and masks for trainers, against numpy on the model's logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.llm import LLM
from jpaged.params import (
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)
from tests.support.tiny_llm import SIZES, VOCAB_SIZE

pytestmark = pytest.mark.long

PROMPT = [5, 9, 13, 200, 77, 31]
BIAS = {7: 3.0, 11: -2.0}
CASES = {
    "greedy": dict(temperature=0.0),
    "greedy with a bias": dict(temperature=0.0, logit_bias=BIAS),
    "plain": dict(),
    "hot": dict(temperature=1.7),
    "top_k": dict(top_k=5),
    "cold top_p": dict(temperature=0.6, top_p=0.7),
    "min_p": dict(min_p=0.3),
    "all": dict(temperature=1.3, top_k=9, top_p=0.8, min_p=0.01, logit_bias=BIAS),
    "allowed": dict(allowed_token_ids=range(40, 90), top_k=20, temperature=0.9),
}


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def processed(logits, params):
    """Log-probabilities f64[V] of the distribution that is sampled from."""
    x = logits.astype(np.float64).copy()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if params.allowed_token_ids is not None:
        is_allowed = np.isin(np.arange(len(x)), params.allowed_token_ids)
        x = np.where(is_allowed, x, -np.inf)
    if params.temperature == 0:
        return log_softmax(x)
    x /= params.temperature
    probs = np.exp(log_softmax(x))
    x = np.where(probs >= params.min_p * probs.max(), x, -np.inf)
    if params.top_k:
        x = np.where(x >= np.sort(x)[-params.top_k], x, -np.inf)
    order = np.argsort(-x)
    cumulative = np.cumsum(np.exp(log_softmax(x))[order])
    last = min(np.searchsorted(cumulative, params.top_p), len(x) - 1)
    x = np.where(x >= x[order[last]], x, -np.inf)
    return log_softmax(x)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **SIZES, logprobs_mode="processed")


def steps_of(llm, output, sample):
    """(logits f32[V], token) for each generated token, by the plain forward pass."""
    tokens = [*output.prompt_token_ids, *sample.token_ids]
    logits = np.asarray(llm.model(jnp.asarray([tokens]))[0])
    start = len(output.prompt_token_ids)
    return list(zip(logits[start - 1 : -1], tokens[start:], strict=True))


def test_processed_logprobs_and_masks_are_those_sampled_from(llm):
    params = [
        SamplingParams(
            max_tokens=8,
            seed=i,
            n=1 if "greedy" in name else 2,
            logprobs=3,
            prompt_logprobs=1,
            token_masks=True,
            ignore_eos=True,
            **case,
        )
        for i, (name, case) in enumerate(CASES.items())
    ]
    outputs = llm.generate([PROMPT] * len(params), params)
    sizes = set()
    for output, param in zip(outputs, params, strict=True):
        for sample in output.outputs:
            assert sample.token_logprobs.dtype == np.float32
            assert sample.token_masks.shape == (8, VOCAB_SIZE)
            total = sample.token_logprobs.sum(dtype=np.float64)
            assert sample.cumulative_logprob == pytest.approx(total, abs=1e-5)
            for i, (logits, token) in enumerate(steps_of(llm, output, sample)):
                expected = processed(logits, param)
                assert np.isfinite(expected[token])
                assert sample.token_logprobs[i] == pytest.approx(
                    expected[token], abs=2e-4
                )
                mask = sample.token_masks[i]
                np.testing.assert_array_equal(mask, np.isfinite(expected))
                sizes.add(int(mask.sum()))
                entries = sample.logprobs[i]
                best = sorted(entries, key=lambda t: -entries[t].logprob)[:3]
                assert [entries[t].logprob for t in best] == pytest.approx(
                    np.sort(expected)[::-1][:3].tolist(), abs=2e-4
                )
        for entry, token in zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True):
            position = PROMPT.index(token) - 1
            raw = log_softmax(np.asarray(llm.model(jnp.asarray([PROMPT])))[0, position])
            assert entry[token].logprob == pytest.approx(raw[token], abs=2e-4)
    assert min(sizes) < 6
    assert max(sizes) == VOCAB_SIZE


def test_outputs_without_masks_have_none(llm):
    (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=2))
    assert output.outputs[0].token_masks is None
    assert output.outputs[0].token_logprobs.shape == (2,)


def test_beams_have_the_log_probabilities_of_what_was_allowed(llm):
    constraint = StructuredOutputsParams(choice=["a", "b"])
    params = BeamSearchParams(2, 6, structured_outputs=constraint)
    (output,) = llm.generate([PROMPT], params)
    ids = [llm.tokenizer.encode(text, add_special_tokens=False)[0] for text in "ab"]
    for sample in output.outputs:
        # "a" and "b" are the only tokens that are allowed first.
        logits, token = steps_of(llm, output, sample)[0]
        expected = logits[token] - np.logaddexp(*logits[ids])
        assert sample.token_logprobs[0] == pytest.approx(expected, abs=2e-4)
    for sample in output.outputs:
        assert sample.token_logprobs.sum() == pytest.approx(
            sample.cumulative_logprob, abs=1e-5
        )
    free = llm.generate([PROMPT], BeamSearchParams(2, 6, ignore_eos=True))[0]
    for sample in free.outputs:
        raw = [log_softmax(x)[t] for x, t in steps_of(llm, free, sample)]
        np.testing.assert_allclose(sample.token_logprobs, raw, atol=2e-4)


def test_raw_logprobs_are_the_models_and_modes_are_checked(plain_llm, folder):
    params = SamplingParams(max_tokens=6, temperature=0.7, top_k=4, ignore_eos=True)
    (output,) = plain_llm.generate([PROMPT], params)
    sample = output.outputs[0]
    raw = [log_softmax(x)[t] for x, t in steps_of(plain_llm, output, sample)]
    np.testing.assert_allclose(sample.token_logprobs, raw, atol=2e-4)
    with pytest.raises(ValueError, match="logprobs_mode: expected one of"):
        LLM(folder, **SIZES, logprobs_mode="logits")
    with pytest.raises(ValueError, match="token_masks: expected True or False"):
        SamplingParams(token_masks=3)
