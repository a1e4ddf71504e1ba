"""Prompts in a list, sampled, with vLLM's names of arguments and fields."""

import json

from jpaged import LLM, SamplingParams

prompts = ["def area(", "class Point:", "import ", "for i in "]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=7)
llm = LLM(model="tiny-python", max_num_seqs=4, gpu_memory_utilization=0.5)
outputs = llm.generate(prompts, sampling_params, use_tqdm=False)
for output in outputs:
    print(f"{output.request_id} {output.prompt!r}: {output.outputs[0].text!r}")
    assert output.num_cached_tokens == 0
    assert output.metrics.finished_time >= output.metrics.first_token_time
    assert len(output.outputs[0].token_ids) <= 16
reasons = [output.outputs[0].finish_reason for output in outputs]
print(json.dumps({"finish_reasons": reasons}))
