"""Batch invariance: log-probabilities of rollouts and of the trainer, bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import rl
from jpaged.arithmetic import sum_in_order
from jpaged.attention import backends
from jpaged.llm import LLM
from jpaged.models.loading.checkpoint import load_model
from jpaged.params import BeamSearchParams, SamplingParams
from tests.support.tiny_llm import MAX_LEN, SIZES, random_prompts

pytestmark = pytest.mark.long

PROMPTS = random_prompts(9, seed=3, longest=45)
PARAMS = [
    SamplingParams(max_tokens=14, ignore_eos=True, seed=i, temperature=i % 2)
    for i in range(len(PROMPTS))
]
# Other batches, chunks and block sizes, and so few blocks that requests are preempted.
OTHERS = [
    dict(block_size=16, num_blocks=40, max_num_batched_tokens=64, max_num_seqs=8),
    dict(block_size=3, num_blocks=34, max_num_batched_tokens=9, max_num_seqs=8),
]
IMPLEMENTATIONS = ["xla", *(["cpu"] if backends.serving_name(None) == "cpu" else [])]


def make(model, attention, **sizes):
    return LLM(model, batch_invariant=True, attention=attention, **SIZES | sizes)


def tokens_and_bits(outputs):
    return [
        (list(o.outputs[0].token_ids), o.outputs[0].token_logprobs.tobytes())
        for o in outputs
    ]


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def base(request, decoder):
    """The backend, an LLM with it, and its outputs without anything cached."""
    llm = make(decoder, request.param, num_blocks=200)
    return request.param, llm, llm.generate(PROMPTS, PARAMS)


def test_bits_do_not_depend_on_batch_chunks_blocks_cache_or_preemption(base, decoder):
    attention, llm, outputs = base
    expected = tokens_and_bits(outputs)
    again = llm.generate(PROMPTS, PARAMS)  # from the prefix cache
    assert sum(o.metrics["num_cached_tokens"] for o in again) > 0
    assert tokens_and_bits(again) == expected
    for i in (0, 3, 5):
        assert tokens_and_bits(llm.generate([PROMPTS[i]], PARAMS[i])) == [expected[i]]
    for sizes in OTHERS if attention != "xla" else OTHERS[1:]:
        with make(decoder, attention, **sizes) as other:
            assert tokens_and_bits(other.generate(PROMPTS, PARAMS)) == expected
            num_preemptions = other.stats()["num_preemptions"]
    assert num_preemptions > 0


def check_training(model, attention, outputs):
    batch = rl.pad(rl.rollouts_of(outputs), MAX_LEN)

    def score(model, tokens):
        with rl.batch_invariant(attention):
            return rl.token_logprobs(model, tokens, chunk=100)

    scores = np.asarray(jax.jit(score)(model, batch.tokens))
    np.testing.assert_array_equal(scores[batch.mask], batch.logprobs[batch.mask])
    return score, batch


def test_the_training_forward_has_the_same_bits_and_a_gradient(base, decoder):
    attention, _, outputs = base
    score, batch = check_training(decoder, attention, outputs)
    plain = rl.token_logprobs(decoder, batch.tokens)
    gap = np.abs(np.asarray(plain) - batch.logprobs)[batch.mask]
    assert 0 < gap.max() < 1e-4

    def total(function):
        mask = batch.mask.astype(np.float32)
        return jax.grad(lambda m: (function(m, batch.tokens) * mask).sum())

    got, expected = total(score)(decoder), total(rl.token_logprobs)(decoder)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()))


def test_bfloat16_has_the_same_bits_too(folder):
    model = load_model(folder, "bfloat16")
    with make(model, None) as llm:
        check_training(model, None, llm.generate(PROMPTS, PARAMS))


def test_beams_run_and_what_is_not_supported_is_refused(base, decoder):
    _, llm, _ = base
    (output,) = llm.generate([PROMPTS[0]], BeamSearchParams(2, 4))
    assert len(output.outputs) == 2
    with pytest.raises(ValueError, match="cascade: expected False"):
        make(decoder, None, cascade=True)
    with pytest.raises(ValueError, match="kv_dtype: expected a dtype of floats"):
        make(decoder, None, kv_dtype="int8")
    with rl.batch_invariant(), pytest.raises(ValueError, match="segment_ids: expected"):
        decoder(jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))


def test_products_have_the_same_shapes_for_all_numbers_of_tokens(decoder):
    """For TPUs and GPUs: what they compile is independent of the batch."""

    def products(num_tokens):
        def forward(model, tokens):
            with rl.batch_invariant("xla"):
                return model(tokens)

        tokens = jnp.ones((1, num_tokens), jnp.int32)
        text = jax.jit(forward).lower(decoder, tokens).as_text()
        return set(re.findall(r"dot_general.*: (\(.*\) -> \S+)", text))

    assert products(3) == products(40)
    assert len(products(3)) >= 6


def test_sums_in_order_do_not_depend_on_the_number_of_rows():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 300)), jnp.float32)
    whole = jax.jit(sum_in_order)(x)
    np.testing.assert_allclose(whole, np.asarray(x, np.float64).sum(1), atol=1e-4)
    for rows in (1, 2, 3, 17):
        np.testing.assert_array_equal(jax.jit(sum_in_order)(x[:rows]), whole[:rows])
    gradient = jax.grad(lambda x: sum_in_order(x).sum())(x)
    np.testing.assert_array_equal(gradient, np.ones_like(x))
