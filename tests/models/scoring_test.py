"""Scores against log-softmax in numpy and against generated log-probabilities."""

import json
import math

import jax
import numpy as np
import pytest

from jpaged import LLM, SamplingParams
from jpaged.models import load_model, scoring
from jpaged.models.loading.checkpoint import load_config
from jpaged.models.scoring import Perplexity, Score
from tests.support.models import checkpoints
from tests.support.paths import ROOT

pytestmark = pytest.mark.long

SAME_SUMS = 1e-5  # float32 log-probabilities that are computed in other shapes

apply = jax.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny-python", max_num_seqs=4, max_model_len=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(checkpoints.write_tiny_llama(tmp_path_factory.mktemp("llama")))


def logprobs_by_numpy(model, tokens: list[int]) -> np.ndarray:
    """Log-probability of each token after the first, given those before, in float64."""
    padded = np.zeros((1, 256), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(apply(model, padded)[0, : len(tokens)], np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[np.arange(len(tokens) - 1), tokens[1:]]


def some_tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 128, length).tolist()


def test_scores_of_texts_of_all_lengths_equal_log_softmax_in_numpy(model):
    lengths = [(1, 1), (3, 4), (1, 40), (60, 5), (31, 1), (32, 1), (100, 90)]
    prompts = [some_tokens(n, i) for i, (n, _) in enumerate(lengths)]
    continuations = [some_tokens(n, 50 + i) for i, (_, n) in enumerate(lengths)]
    scores = scoring.score(model, prompts, continuations)
    for prompt, continuation, got in zip(prompts, continuations, scores, strict=True):
        want = logprobs_by_numpy(model, prompt + continuation)[len(prompt) - 1 :]
        assert isinstance(got, Score)
        assert (got.prompt_token_ids, got.token_ids) == (prompt, continuation)
        np.testing.assert_allclose(got.token_logprobs, want, atol=SAME_SUMS)
        assert got.cumulative_logprob == pytest.approx(want.sum(), abs=1e-4)
        assert got.perplexity == pytest.approx(math.exp(-want.mean()), rel=1e-4)


@pytest.fixture(scope="module")
def outputs(llm):
    """Two samples for each of four prompts, and one greedy continuation."""
    prompts = ["def ", "class Reader", "import os\n\n\n", "for i in", "def "]
    sampled = SamplingParams(n=2, temperature=0.9, seed=3, max_tokens=24, logprobs=0)
    greedy = SamplingParams(temperature=0.0, max_tokens=9, logprobs=0)
    return llm.generate(prompts, [sampled] * 4 + [greedy])


def test_log_probabilities_of_generated_tokens_equal_their_scores(llm, outputs):
    pairs = [
        (output.prompt_token_ids, sample)
        for output in outputs
        for sample in output.outputs
    ]
    scores = llm.score(
        [prompt for prompt, _ in pairs], [sample.token_ids for _, sample in pairs]
    )
    for (_, sample), got in zip(pairs, scores, strict=True):
        generated = [
            entry[token].logprob
            for token, entry in zip(sample.token_ids, sample.logprobs, strict=True)
        ]
        np.testing.assert_allclose(generated, got.token_logprobs, atol=SAME_SUMS)
        assert sample.cumulative_logprob == pytest.approx(
            got.cumulative_logprob, abs=24 * SAME_SUMS
        )


def test_only_a_greedy_continuation_is_scored_as_greedy(llm, outputs):
    output = outputs[-1]
    (chosen,) = output.outputs
    greedy, other = llm.score(
        [output.prompt_token_ids] * 2,
        [chosen.token_ids, [*chosen.token_ids[:-1], (chosen.token_ids[-1] + 1) % 256]],
    )
    assert greedy.is_greedy
    assert not other.is_greedy


def test_the_score_of_a_text_is_that_of_its_tokens(llm):
    encode = llm.tokenizer.encode
    (got,) = llm.score("def ", "main():")
    assert got.prompt_token_ids == encode("def ")
    assert got.token_ids == encode("main():", add_special_tokens=False)
    assert llm.tokenizer.decode(got.token_ids) == "main():"
    assert llm.score(["def "], ["main():"]) == [got]
    assert llm.score([], []) == []


def test_texts_of_many_lengths_compile_few_programs(model):
    before = scoring._forward._cache_size()
    rng = np.random.default_rng(5)
    for _ in range(5):
        lengths = rng.integers(2, 120, 9)
        scoring.score(model, [some_tokens(n) for n in lengths], [[1]] * 9)
    # Lengths of 32, 64 and 128; numbers of rows of 1, 2, 4, 8 and 16.
    assert scoring._forward._cache_size() - before <= 3 * 5


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([[]], [[1]], r"prompts\[0\]: expected at least one token, got none"),
        ([[1]], [[]], r"continuations\[0\]: expected at least one token, got none"),
        ([[1], [2]], [[1]], "continuations: expected one for each of 2 prompts, got 1"),
        ([[1]], [[9999]], r"prompts\[0\]: expected token ids from 0 to .*, got 9999"),
        ([[1]], [[1] * 2000], r"expected at most max_position_embeddings \(1024\)"),
        ([[1.5]], [[1]], r"prompts\[0\]: expected text or a list of token ids"),
        (7, [[1]], r"prompts: expected text, a list of token ids, or .* got 7"),
    ],
)
def test_invalid_prompts_and_continuations_are_refused(
    llm, prompts, continuations, message
):
    with pytest.raises(ValueError, match=message):
        llm.score(prompts, continuations)


# Perplexity.


@pytest.mark.parametrize(("window", "overlap"), [(16, 1), (16, 8), (33, 32), (200, 5)])
@pytest.mark.parametrize("length", [2, 16, 17, 25, 150])
def test_perplexity_counts_each_token_once_given_its_window(
    model, length, window, overlap
):
    tokens = some_tokens(length, 7)
    got = scoring.perplexity(model, tokens, window=window, overlap=overlap)
    total, first, end = 0.0, 1, min(window, length)
    while first < length:
        # The window that begins at `start` adds the tokens from `first` to `end`.
        start = 0 if first == 1 else first - overlap
        part = logprobs_by_numpy(model, tokens[start:end])
        total += part[first - start - 1 :].sum()
        first, end = end, min(end + window - overlap, length)
    assert got.num_tokens == length - 1
    assert got.cumulative_logprob == pytest.approx(total, abs=length * SAME_SUMS)
    assert got.perplexity == pytest.approx(math.exp(-total / (length - 1)), rel=1e-4)


def test_the_perplexity_of_a_file_is_that_of_its_text(llm, tmp_path):
    text = "import os\n\n\ndef main():\n    return os.path.join('ä', 'b')\n" * 4
    file = tmp_path / "text.py"
    file.write_text(text, "utf-8")
    got = llm.perplexity(file, window=64)
    assert isinstance(got, Perplexity)
    assert got == llm.perplexity(text, window=64)
    assert got.num_tokens == len(llm.tokenizer.encode(text)) - 1
    assert got.num_characters == len(text)
    bits = -got.cumulative_logprob / math.log(2)
    assert got.bits_per_character == pytest.approx(bits / len(text))
    assert math.isnan(llm.perplexity(llm.tokenizer.encode(text)).bits_per_character)
    # A model of code predicts code better than noise.
    assert llm.perplexity("q zj xv kw; " * 20).perplexity > 3 * got.perplexity


def test_invalid_texts_and_windows_are_refused(llm, tmp_path):
    with pytest.raises(ValueError, match="text: expected at least two tokens, got 1"):
        llm.perplexity([5])
    with pytest.raises(ValueError, match="window: expected from 2 to 1024, got 4096"):
        llm.perplexity("import os", window=4096)
    with pytest.raises(ValueError, match="overlap: expected from 1 to 7, got 8"):
        llm.perplexity("import os", window=8, overlap=8)
    with pytest.raises(FileNotFoundError, match="no such file"):
        llm.perplexity(tmp_path / "missing.txt")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected UTF-8 text"):
        llm.perplexity(tmp_path / "bytes")


def test_a_model_with_windows_and_soft_caps_scores_its_greedy_text_as_greedy(tmp_path):
    golden = json.loads(
        (ROOT / "tests" / "support" / "golden" / "families.json").read_text("utf-8")
    )["gemma2"]
    folder = checkpoints.write_shapes(
        tmp_path, golden["config"], golden["shapes"], seed=golden["seed"]
    )
    assert load_config(folder).logits_soft_cap
    model = load_model(folder)
    prompt, greedy = golden["prompts"][1], golden["greedy"][1]
    (got,) = scoring.score(model, [prompt], [greedy])
    assert got.is_greedy
    assert jax.tree.leaves(model)[0].dtype == np.float32
