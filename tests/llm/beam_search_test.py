"""Beam search of the LLM against `generate` of transformers.

Needs the extra `huggingface`. All beams of a family run in one call of the LLM.
"""

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest

from jpaged.llm import LLM
from jpaged.params import BeamSearchParams, SamplingParams
from tests.support.models import checkpoints

pytestmark = [
    pytest.mark.huggingface,
    pytest.mark.usefixtures("one_torch_thread"),
]

MAX_TOKENS = 10
SIZES = dict(
    max_num_seqs=8,
    max_num_batched_tokens=8,  # prompts need several steps
    block_size=4,
    num_blocks=40,
    max_model_len=40,
    max_num_prefixes=0,
)
FAMILIES = {
    "llama": (checkpoints.write_tiny_llama, 1.0),
    "opt": (checkpoints.write_tiny_opt, 4.0),
}
PROMPTS = [
    np.random.default_rng(i).integers(3, 128, 3 + 8 * i).tolist() for i in (0, 1)
]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One checkpoint, in transformers and in jpaged."""

    theirs: Any
    ours: LLM
    eos: tuple[int, ...]  # the checkpoint's; beams generate them
    others: tuple[int, ...]  # further tokens that beams generate


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    import transformers

    write, sharpness = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("model") / request.param
    write(folder, tie_word_embeddings=False)
    tensors = checkpoints.read_tensors(folder)
    # A sharper last layer: beams diverge and merge.
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * np.float32(sharpness)
    checkpoints.write_tensors(folder, tensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    likely = likely_tokens(theirs)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["eos_token_id"] = likely[:2]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return Pair(theirs, LLM(folder, **SIZES), tuple(likely[:2]), tuple(likely[2:5]))


def generate(model, prompt, params, stop_ids):
    """Tokens and scores of transformers, without the padding of ended sequences."""
    import torch

    width = params.beam_width
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=params.max_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **(
            dict(
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
            )
            if width > 1
            else {}
        ),
    )
    tokens = []
    for row in out.sequences.tolist():
        row = row[len(prompt) :]
        ends = [i for i, token in enumerate(row) if token in stop_ids]
        tokens.append(row[: ends[0] + 1] if ends else row)
    return tokens, None if width == 1 else out.sequences_scores.tolist()


def likely_tokens(model):
    """Tokens of beams that nothing ends, after the first two; most frequent first."""
    found = []
    for prompt in PROMPTS:
        tokens, _ = generate(model, prompt, BeamSearchParams(8, 7), ())
        found += [token for row in tokens for token in row[2:]]
    values, counts = np.unique(found, return_counts=True)
    return values[np.argsort(-counts, kind="stable")].tolist()


def requests_of(pair):
    """All widths and kinds of early stopping, with varied penalties and stop tokens."""
    penalties = (1.0, 0.0, 0.7, 2.0, -1.0)
    ends = (
        dict(),  # the checkpoint's own EOS
        dict(stop_token_ids=pair.others, ignore_eos=True),
        dict(stop_token_ids=pair.others[:1]),  # both
        dict(ignore_eos=True),  # none
        dict(num_return=1),
        dict(stop_token_ids=pair.others),
        dict(),
    )
    kinds = itertools.product(PROMPTS, range(1, 9), (False, True, "never"))
    return [
        (
            prompt,
            BeamSearchParams(
                width,
                MAX_TOKENS,
                length_penalty=penalties[i % len(penalties)],
                early_stopping=early_stopping,
                **ends[i % len(ends)],
            ),
        )
        for i, (prompt, width, early_stopping) in enumerate(kinds)
    ]


def test_tokens_scores_and_order_are_those_of_generate_for_widths_1_to_8(pair):
    requests = requests_of(pair)
    prompts, params = map(list, zip(*requests, strict=True))
    outputs = pair.ours.generate(prompts, params)
    reasons, lengths, leaders = set(), set(), set()
    for (prompt, param), output in zip(requests, outputs, strict=True):
        eos = () if param.ignore_eos else pair.eos
        stop_ids = {*param.stop_token_ids, *eos}
        tokens, scores = generate(pair.theirs, prompt, param, stop_ids)
        expected = tokens[: param.num_return]
        assert [sample.token_ids for sample in output.outputs] == expected, param
        assert [sample.index for sample in output.outputs] == list(range(len(expected)))
        for sample in output.outputs:
            last = sample.token_ids[-1]
            reason = "stop" if last in stop_ids else "length"
            assert sample.finish_reason == reason
            assert sample.stop_reason == (last if last in stop_ids - {*eos} else None)
            reasons.add(reason)
            lengths.add(len(sample.token_ids))
        leaders.add((tuple(prompt), tuple(expected[0])))
        if scores is not None:
            got = [sample.score for sample in output.outputs]
            # With a penalty of -1 scores are in the hundreds, near float32 precision.
            np.testing.assert_allclose(
                got, scores[: param.num_return], atol=1e-4, rtol=1e-6
            )
    assert reasons == {"stop", "length"}
    assert len(lengths) > 4
    assert len(leaders) > 6  # for 2 prompts: the best beam depends on the parameters
    stats = pair.ours.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]


def test_width_1_is_greedy_decoding(pair):
    for prompt in PROMPTS:
        (beam,) = pair.ours.generate([prompt], BeamSearchParams(1, MAX_TOKENS))
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        (greedy,) = pair.ours.generate([prompt], params)
        ((expected,), _) = generate(
            pair.theirs, prompt, BeamSearchParams(1, MAX_TOKENS), pair.eos
        )
        assert beam.outputs[0].token_ids == greedy.outputs[0].token_ids == expected
        assert beam.outputs[0].finish_reason == greedy.outputs[0].finish_reason
