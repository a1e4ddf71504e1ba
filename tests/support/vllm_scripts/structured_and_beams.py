"""Guided decoding by its old and new names, samples, beams and prompt logprobs."""

import json

from jpaged import LLM, BeamSearchParams, SamplingParams
from jpaged.sampling_params import GuidedDecodingParams, StructuredOutputsParams

llm = LLM(model="tiny-python", max_num_seqs=4, enable_prefix_caching=True)
choice = ["yes", "no"]
old = SamplingParams(guided_decoding=GuidedDecodingParams(choice=choice), temperature=0)
new = SamplingParams(
    structured_outputs=StructuredOutputsParams(choice=choice), temperature=0
)
texts = [llm.generate("answer = ", one)[0].outputs[0].text for one in (old, new)]
assert texts[0] == texts[1]
assert texts[0] in choice
(samples,) = llm.generate(
    ["x = "], SamplingParams(n=2, temperature=1.0, seed=1, prompt_logprobs=0)
)
assert samples.prompt_logprobs[0] is None
assert all(
    token in likely
    for token, likely in zip(
        samples.prompt_token_ids[1:], samples.prompt_logprobs[1:], strict=True
    )
)
params = BeamSearchParams(beam_width=3, max_tokens=6)
(output,) = llm.beam_search([{"prompt": "def "}], params)
scores = []
for sequence in output.sequences:
    num_generated = len(sequence.logprobs)
    scores.append(sequence.cum_logprob / max(1, num_generated))
    assert "def " in sequence.text  # after the BOS token
assert scores == sorted(scores, reverse=True)
reasons = [sample.finish_reason for sample in samples.outputs]
print(json.dumps({"finish_reasons": reasons}))
