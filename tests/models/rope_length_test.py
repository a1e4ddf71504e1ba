"""Rotary scaling that depends on the length: dynamic and LongRoPE.

The numbers are those of transformers 5.24; huggingface_test compares whole models.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM
from jpaged.models import ModelConfig, load_model, rotary
from tests.support.models import checkpoints
from tests.support.models.paged_greedy import LENGTH, served

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 32,
}
SCALINGS = {"dynamic": DYNAMIC, "longrope": LONGROPE}


def changes(name: str) -> dict:
    """Entries of config.json of a model that was trained with 32 positions."""
    positions = {"dynamic": 32, "longrope": 128}[name]
    return {"rope_scaling": SCALINGS[name], "max_position_embeddings": positions}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_change_where_longer_sequences_are_possible(name):
    config = ModelConfig.from_hf(checkpoints.LLAMA | changes(name))
    assert (config.default_length, config.max_length) == (32, 128)
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    want = plain / np.array(LONGROPE["short_factor"]) if name == "longrope" else plain
    for length in (None, 1, 32):
        got = rotary.frequencies(config, length=length)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    for length in (33, 64, 128):
        got = rotary.frequencies(config, length=length)
        if name == "longrope":
            want = plain / np.array(LONGROPE["long_factor"])
        else:  # NTK: the base grows with the length
            base = 10000.0 * (4 * length / 32 - 3) ** (16 / 14)
            want = base ** -(np.arange(0, 16, 2) / 16)
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_the_length_of_an_llm_is_the_trained_one_or_the_chosen_one(name, tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path, **changes(name))
    options = {"num_blocks": 16, "max_num_seqs": 1}
    with LLM(folder, **options) as llm:
        assert llm.config.max_model_len == 32
    prompt, rest = [5, 6, 7, 8], [9, 10, 11, 12]
    with LLM(folder, max_model_len=128, **options) as llm:
        assert llm.config.max_model_len == 128
        (long,) = llm.score([prompt], [rest])
    model = load_model(folder)
    for length, is_equal in ((128, True), (None, False)):
        logits = model(jnp.array([prompt + rest]), length=length)[0]
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        want = [logprobs[3 + i, token] for i, token in enumerate(rest)]
        assert np.allclose(long.token_logprobs, want, atol=1e-5) == is_equal


@pytest.mark.long
@pytest.mark.parametrize("name", SCALINGS)
def test_the_engine_rotates_like_one_pass_over_its_longest_sequence(name, tmp_path):
    model = load_model(checkpoints.write_tiny_llama(tmp_path, **changes(name)))
    prompts = [[pow(3, i + 1, 127) for i in range(size)] for size in (1, 5, 50)]
    got = served(model, prompts, 32, 16)
    for prompt, tokens in zip(prompts, got, strict=True):
        sequence = jnp.array([prompt + tokens])
        logits = model(sequence, length=LENGTH)[0]
        chosen = logits[len(prompt) - 1 : -1].argmax(-1)
        assert chosen.tolist() == tokens
