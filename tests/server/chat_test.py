"""`/v1/chat/completions`, `/tokenize` and others against the LLM, and by `openai`."""

import json

import pytest

from jpaged.params import SamplingParams
from tests.server.completions_test import events, post

pytestmark = pytest.mark.long

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "naïve"}]
RENDERED = "user: naïve\nassistant: "
BODY = {"messages": MESSAGES, "temperature": 0, "max_tokens": 8}


def expected_text(llm, prompt=RENDERED, **options):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, **options})
    token_ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
    return llm.generate([token_ids], params)[0].outputs


def test_an_answer_is_that_of_the_rendered_prompt(client, llm):
    (one,) = expected_text(llm)
    for body in (BODY, {**BODY, "max_tokens": None, "max_completion_tokens": 8}):
        found = post(client, body, path=PATH)
        assert found["object"] == "chat.completion"
        (choice,) = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": one.text}
        assert choice["finish_reason"] == one.finish_reason
    chunks = events(client, BODY, PATH)
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(parts) == one.text
    assert chunks[-1]["choices"][0]["finish_reason"] == one.finish_reason


def test_tools_calls_parts_and_variables_are_rendered(client, llm):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"id": "1", "type": "function"}
    call["function"] = {"name": "f", "arguments": '{"x": "y"}'}
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "tool_calls": [call]},
        ],
        "tools": [tool],
        "chat_template_kwargs": {"extra": "E"},
        "add_generation_prompt": False,
    }
    prompt = "[f]user: a\nassistant: by\nE"
    tokens = post(client, body, path="/tokenize")["tokens"]
    assert tokens == llm.tokenizer.encode(prompt, add_special_tokens=False)
    (one,) = expected_text(llm, prompt)
    answer = post(client, {**body, "temperature": 0, "max_tokens": 8}, path=PATH)
    assert answer["choices"][0]["message"]["content"] == one.text
    del body["add_generation_prompt"]
    body["continue_final_message"] = True
    body["messages"] = [*body["messages"][:1], {"role": "assistant", "content": "so"}]
    tokens = post(client, body, path="/tokenize")["tokens"]
    assert llm.tokenizer.decode(tokens) == "[f]user: a\nassistant: so"
    none = post(client, {**body, "tool_choice": "none"}, path="/tokenize")["tokens"]
    assert llm.tokenizer.decode(none) == "user: a\nassistant: so"


def test_logprobs_have_the_form_of_openai(client, llm):
    (one,) = expected_text(llm, logprobs=2)
    body = {**BODY, "logprobs": True, "top_logprobs": 2}
    found = post(client, body, path=PATH)["choices"][0]["logprobs"]["content"]
    assert len(found) == len(one.token_ids)
    for entry, token, logprobs in zip(found, one.token_ids, one.logprobs, strict=True):
        assert entry["logprob"] == logprobs[token].logprob
        ranked = sorted(logprobs.values(), key=lambda value: value.rank)[:2]
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert tops == [value.logprob for value in ranked]
    # The bytes of tokens are those of the text, also where characters are divided.
    visible = [e for e, t in zip(found, one.token_ids, strict=True) if t >= 2]
    whole = b"".join(bytes(entry["bytes"]) for entry in visible)
    assert whole.decode("utf-8", "replace").startswith(one.text)
    parts = []
    for chunk in events(client, body, PATH):
        logprobs = chunk["choices"][0]["logprobs"]
        parts += logprobs["content"] if logprobs else []
    assert parts == found


def test_tokens_and_texts_are_converted(client, llm):
    found = post(
        client, {"prompt": "naïve 日", "return_token_strs": True}, path="/tokenize"
    )
    assert found["tokens"] == llm.tokenizer.encode("naïve 日")
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == llm.config.max_model_len
    back = post(client, {"tokens": found["tokens"]}, path="/detokenize")
    assert back == {"prompt": "naïve 日"}
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert "{% for m in messages %}" in info["chat_template"]


def test_the_openai_client_works(served, llm):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    (one,) = expected_text(llm)
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=8
    )
    assert answer.choices[0].message.content == one.text
    stream = client.chat.completions.create(
        model="alias",
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == one.text
    assert chunks[-1].usage.completion_tokens == len(one.token_ids)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        n=2,
        seed=1,
        max_completion_tokens=40,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": schema, "strict": True},
        },
    )
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content)["a"], bool)
    text = client.completions.create(
        model="tiny", prompt="ab", max_tokens=3, logprobs=1, extra_body={"top_k": 5}
    )
    assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens
    with pytest.raises(openai.NotFoundError, match="model: expected 'tiny'"):
        client.completions.create(model="gpt-4", prompt="ab")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="ab", temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    served.wait_until_idle()
