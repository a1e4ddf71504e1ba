"""Logits processors and guidance beside those of transformers.

Needs the extra `huggingface`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding import Context, contrib
from tests.decoding.contrib.processors_test import V, apply
from tests.support.models import checkpoints

pytestmark = [
    pytest.mark.huggingface,
    pytest.mark.usefixtures("one_torch_thread"),
]

SEEDS = range(20)


def logits_of(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.uniform(0.3, 5), V).astype(np.float32)
    if seed % 3 == 2:
        logits[rng.random(V) < 0.4] = -np.inf
    return logits


def pairs():
    from transformers.generation import logits_process as theirs

    for value in (0.1, 0.5, 0.9, 0.99):
        yield contrib.typical(value), theirs.TypicalLogitsWarper(value)
    for value in (1e-4, 0.01, 0.2, 0.9):
        yield contrib.epsilon_sampling(value), theirs.EpsilonLogitsWarper(value)
        yield contrib.eta_sampling(value), theirs.EtaLogitsWarper(value)


@pytest.mark.parametrize("seed", SEEDS)
def test_filters_equal_those_of_transformers(seed):
    import torch

    logits = logits_of(seed)
    for ours, theirs in pairs():
        expected = theirs(torch.tensor([[0]]), torch.from_numpy(logits)[None].clone())
        np.testing.assert_array_equal(
            apply(ours, logits), expected[0].numpy(), err_msg=repr(ours)
        )


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_score_of_the_watermark_is_that_of_transformers(share):
    from transformers import WatermarkDetector, WatermarkingConfig
    from transformers.configuration_utils import PreTrainedConfig

    theirs = WatermarkDetector(
        PreTrainedConfig(vocab_size=V, bos_token_id=0),
        "cpu",
        WatermarkingConfig(greenlist_ratio=share, context_width=1),
    )
    mark = contrib.Watermark(V, share=share)
    text = np.random.default_rng(0).integers(0, V, 60).tolist()
    for once in (True, False):
        found = mark.detect(text, once=once)
        expected = theirs._compute_z_score(
            np.array([found.num_green]), np.array([found.num_tokens])
        )
        np.testing.assert_allclose(found.z_score, expected[0], rtol=1e-6)
        p_value = theirs._compute_pval(np.array([found.z_score]))
        np.testing.assert_allclose(found.p_value, p_value[0], atol=2e-2)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_guidance_equals_that_of_transformers(scale, tmp_path):
    import torch
    import transformers
    from transformers.generation import logits_process

    folder = checkpoints.write_tiny_llama(tmp_path / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt, companion, length = [5, 17, 3, 99], [42, 8], 8
    # With scale 1 the processor of transformers does nothing.
    processor = logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(
        scale, model, unconditional_ids=torch.tensor([companion])
    )
    tokens, ours = list(prompt), contrib.classifier_free_guidance(scale)
    step = jax.jit(ours.step)
    with torch.no_grad():
        for _ in range(length):
            rows = [
                model(torch.tensor([[*start, *tokens[len(prompt) :]]])).logits[0, -1]
                for start in (prompt, companion)
            ]
            rows = torch.stack(rows).float()
            expected = int(
                processor(torch.tensor([tokens]), rows[:1].clone())[0].argmax()
            )
            logprobs = jnp.asarray(torch.log_softmax(rows, dim=-1).numpy())
            keys = jax.random.split(jax.random.key(0), 2)
            _, decision = step(keys, logprobs, (), Context(ours.parameters))
            assert decision.tokens.tolist() == [expected] * 2
            tokens.append(expected)
