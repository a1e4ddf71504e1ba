"""Conversations, one and several, with a template of one's own."""

import json

from jpaged import LLM
from jpaged.sampling_params import SamplingParams

TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}\n{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}# assistant\n{% endif %}"
)
conversation = [
    {"role": "system", "content": "You write Python"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "def hello():"},
    {"role": "user", "content": "And a class"},
]
llm = LLM(model="tiny-python", max_num_seqs=4, trust_remote_code=True)
params = SamplingParams(max_tokens=8, temperature=0.0)
(one,) = llm.chat(conversation, params, use_tqdm=False, chat_template=TEMPLATE)
outputs = llm.chat(
    [conversation] * 3,
    sampling_params=params,
    use_tqdm=True,
    chat_template=TEMPLATE,
    tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
)
assert [output.outputs[0].text for output in outputs] == [one.outputs[0].text] * 3
assert outputs[2].num_cached_tokens > 0
tokenizer = llm.get_tokenizer()
prompt = tokenizer.apply_chat_template(
    conversation, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
)
again = llm.generate(
    {"prompt_token_ids": tokenizer.encode(prompt, add_special_tokens=False)}, params
)
assert again[0].outputs[0].token_ids == one.outputs[0].token_ids
print(json.dumps({"finish_reasons": [one.outputs[0].finish_reason]}))
