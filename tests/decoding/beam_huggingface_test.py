"""Beam search beside transformers: its `generate`, and `step` on its logits.

Needs the extra `huggingface`.
"""

import functools

import jax
import numpy as np
import pytest

from jpaged.decoding import beam, beam_state
from tests.support import beam_oracle as oracle
from tests.support.models import checkpoints

pytestmark = [
    pytest.mark.huggingface,
    pytest.mark.usefixtures("one_torch_thread"),
]

NUM_ROWS, MAX_TOKENS = 8, 12
PROMPT = [5, 17, 3, 99, 42]
WRITERS = {
    "llama": checkpoints.write_tiny_llama,
    "opt": checkpoints.write_tiny_opt,
}
SHARPNESS = {
    "llama": 1.0,
    "opt": 4.0,
}  # factors of the last layer, with which beams diverge
step = jax.jit(beam.step)


@pytest.fixture(scope="module", params=WRITERS)
def model(request, tmp_path_factory):
    """A transformers model with random weights and its own last layer."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("model") / request.param
    WRITERS[request.param](folder, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPNESS[request.param])
    return model


def logits_of(model, prefixes):
    """Log-probabilities f32[..., V] after the prompt and prefixes of equal length."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])).logits
    return torch.log_softmax(logits[:, -1].float(), dim=-1).numpy()


def theirs(model, width, stop_ids, length_penalty, early_stopping):
    """Tokens and scores of `generate`, without the padding of ended sequences."""
    import torch

    out = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones((1, len(PROMPT)), dtype=torch.long),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **(
            {"length_penalty": length_penalty, "early_stopping": early_stopping}
            if width > 1
            else {}
        ),
    )
    tokens = [ended(row[len(PROMPT) :].tolist(), stop_ids) for row in out.sequences]
    return tokens, None if width == 1 else out.sequences_scores.tolist()


def ended(tokens, stop_ids):
    """The tokens up to the first stop token."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tuple(tokens[: index + 1])
    return tuple(tokens)


def ours(model, width, stop_ids, length_penalty, early_stopping):
    state = beam_state(
        NUM_ROWS,
        width=width,
        max_tokens=MAX_TOKENS,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        stop_ids=stop_ids,
        num_stop_ids=4,
    )
    return oracle.follow(step, state, functools.partial(logits_of, model), NUM_ROWS)


def likely_tokens(model, num):
    """The most frequent tokens of a search without stop tokens."""
    outcome = ours(model, NUM_ROWS, (), 1.0, False)
    tokens = [token for sequence in outcome.hypotheses for token in sequence[2:]]
    values, counts = np.unique(tokens, return_counts=True)
    return tuple(values[np.argsort(-counts, kind="stable")][:num].tolist())


@pytest.mark.parametrize("early_stopping", beam.EARLY_STOPPING)
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 2.0])
def test_tokens_and_scores_equal_those_of_generate(
    model, length_penalty, early_stopping
):
    lengths = set()
    for width in range(1, NUM_ROWS + 1):
        for stop_ids in (likely_tokens(model, 1), likely_tokens(model, 4)[1:]):
            case = (width, stop_ids, length_penalty, early_stopping)
            tokens, scores = theirs(model, *case)
            outcome = ours(model, *case)
            assert outcome.hypotheses == tokens, case
            lengths |= {len(sequence) for sequence in tokens}
            if width > 1:
                # With a penalty of -1 scores are hundreds, with float32 rounding.
                got = oracle.hypothesis_scores(outcome.state)
                np.testing.assert_allclose(got, scores, atol=1e-4, rtol=1e-6)
    assert len(lengths) > 1, "no beam ended early"


def test_without_stop_tokens_all_beams_have_max_tokens(model):
    for width in (1, 4):
        tokens, _ = theirs(model, width, (), 1.0, False)
        assert {len(sequence) for sequence in tokens} == {MAX_TOKENS}
        assert ours(model, width, (), 1.0, False).hypotheses == tokens


def test_a_planted_fault_is_found(model, monkeypatch):
    divisor = beam._length_divisor

    def with_the_prompt(length, length_penalty):
        return divisor(length + len(PROMPT), length_penalty)

    case = (4, likely_tokens(model, 4)[1:], 1.0, False)
    tokens, scores = theirs(model, *case)
    monkeypatch.setattr(beam, "_length_divisor", with_the_prompt)
    monkeypatch.setitem(globals(), "step", jax.jit(lambda *args: beam.step(*args)))
    outcome = ours(model, *case)
    got = oracle.hypothesis_scores(outcome.state)
    assert outcome.hypotheses != tokens or not np.allclose(got, scores, atol=1e-2)
