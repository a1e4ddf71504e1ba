"""Tokens do not depend on the schedule, except at ties of two candidates.

In float32 they are equal. In bfloat16, sums in another order differ in the last of 8
bits, so tokens can differ. Then the plain forward pass must find the two candidates
closer than the error of such sums.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM, SamplingParams

pytestmark = pytest.mark.long

HEADERS = ["import os\nimport sys\n\n\n", "class Reader:\n    "]
TAILS = ["def ", "class ", "for line in ", "    return ", "if not "]
PROMPTS = [header + tail for tail in TAILS for header in HEADERS]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SIZES = dict(max_num_seqs=4, max_model_len=64)
ROOMY = dict(num_blocks=64, enable_prefix_caching=False, max_num_batched_tokens=64)
# All at once: sequences are swapped out and in, and prompts computed in small chunks.
TIGHT = dict(
    num_blocks=17,
    block_size=4,
    preemption="swap",
    num_swap_blocks=12,
    policy="longest_prefix",
    max_num_batched_tokens=5,
    max_prompt_chunk=3,
)
# A logit is a sum of some hundred products. In bfloat16 (8 bits) its error is up to a
# few units in the last place of the largest logit.
BFLOAT16_TIE = 4 * 2.0**-8


def run(dtype, options):
    llm = LLM("tiny-python", dtype=dtype, **SIZES, **options)
    outputs = llm.generate(PROMPTS, GREEDY)
    again = llm.generate(PROMPTS[::-1], GREEDY)[::-1]  # with a filled prefix cache
    found = [
        [output.prompt_token_ids + output.outputs[0].token_ids for output in some]
        for some in (outputs, again)
    ]
    return found, llm


def gap(model, tokens, other) -> float:
    """Difference of the candidates' logits in the plain forward pass.

    At the first position that differs, relative to the largest logit; 0 if none does.
    """
    is_other = np.array(tokens) != np.array(other)
    if not is_other.any():
        return 0.0
    at = int(is_other.argmax())
    padded = jnp.array([tokens[:at] + [0] * (SIZES["max_model_len"] - at)])
    logits = np.asarray(model(padded)[0, at - 1], np.float64)
    return abs(logits[tokens[at]] - logits[other[at]]) / abs(logits).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_differ_only_at_ties(dtype):
    (cold, warm), llm = run(dtype, ROOMY)
    (tight_cold, tight_warm), tight = run(dtype, TIGHT)
    stats = tight.stats()
    assert stats["num_swapped_blocks"] > 0
    assert stats["prefix_hit_ratio"] > 0
    gaps = [
        gap(llm.model, tokens, other)
        for others in (warm, tight_cold, tight_warm)
        for tokens, other in zip(cold, others, strict=True)
    ]
    assert max(gaps) <= (0.0 if dtype == "float32" else BFLOAT16_TIE)
    # Planted faults: another token in the middle of each is no tie.
    faults = [[*tokens[:-9], (tokens[-9] + 7) % 512, *tokens[-8:]] for tokens in cold]
    gaps = [gap(llm.model, *pair) for pair in zip(cold, faults, strict=True)]
    assert np.mean(np.array(gaps) > BFLOAT16_TIE) > 0.8
