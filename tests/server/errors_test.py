"""Requests that are refused: status, field, and nothing left behind."""

import dataclasses
import json
import random

import pytest

from tests.server.completions_test import post
from tests.server.conftest import SETTINGS, running

pytestmark = pytest.mark.long

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "a"}]
# (fields beside the prompt, the field that the error names)
WRONG = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": True}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": "a" * 5000}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"seed": 2**64}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"logit_bias": {"5": None}}, "logit_bias"),
    ({"bad_words": ["a"] * 33}, "bad_words"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options",
    ),
    ({"user": 1.5}, "user"),
    ({"user": ""}, "user"),
    ({"best_of": 3, "temperature": 0}, "best_of"),
    ({"best_of": 99}, "best_of"),
    ({"use_beam_search": True, "best_of": 4, "n": 5}, "n"),
    ({"use_beam_search": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"echo": True, "logprobs": 1000}, "logprobs"),
    ({"choice": ["éa" * 9], "max_tokens": 2}, "max_tokens"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a" * 101}}, "structured_outputs"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs"),
    ({"structured_outputs": {"json": {"multipleOf": 1e-20}}}, "structured_outputs"),
    ({"guided_json": {"type": "what"}}, "guided_json"),
    ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"echo": "yes"}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 3, "stream": True}, "best_of"),
    ({"temprature": 1}, "temprature"),
    ({"beam_width": 3, "use_beam_search": False}, "beam_width"),
    ({"beam_width": 3, "n": 4}, "n"),
    ({"beam_width": 3, "temperature": 1}, "temperature"),
    ({"beam_width": 3, "logprobs": 1}, "logprobs"),
    ({"beam_width": 3, "top_k": 1}, "top_k"),
    ({"length_penalty": 1.0}, "length_penalty"),
    ({"regex": "("}, "regex"),
    ({"regex": "a" * 101}, "regex"),
    ({"guided_regex": "a" * 101}, "guided_regex"),
    ({"choice": ["a"] * 11}, "choice"),
    ({"choice": []}, "choice"),
    ({"regex": "a", "choice": ["a"]}, "choice"),
    ({"json": {"type": "x" * 2000}}, "json"),
    ({"json": {"type": "what"}}, "json"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"store": True}, "store"),
    ({"token_masks": True}, "token_masks"),
    ({"model": 5}, "model"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [300]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [2] * 200}, "prompt"),
    ({"prompt": ["a"] * 21}, "prompt"),
    ({"prompt": ["a", [5, 400]]}, "prompt"),
    ({"prompt": ["a"] * 20, "n": 3}, "prompt"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["a"]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 900}]}, "messages"),
    ({"messages": USER, "tools": {}}, "tools"),
    ({"messages": USER, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
    ({"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template"),
    ({"messages": USER, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
    (
        {"messages": USER, "chat_template_kwargs": {"tokenizer": 1}},
        "chat_template_kwargs",
    ),
    ({"messages": USER, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ({"messages": USER, "logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
    ({"messages": USER, "max_completion_tokens": 1.5}, "max_completion_tokens"),
    (
        {"messages": USER, "max_completion_tokens": 2, "regex": "a{9}"},
        "max_completion_tokens",
    ),
    (
        {
            "messages": USER,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"pattern": "("}},
            },
        },
        "response_format",
    ),
    ({"messages": USER, "top_logprobs": 1}, "top_logprobs"),
    ({"messages": USER, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"messages": USER, "modalities": ["audio"]}, "modalities"),
    ({"messages": USER, "prompt": "a"}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_a_wrong_field_is_named(client, fields, param):
    is_chat = "messages" in fields
    body = fields if is_chat else {"prompt": "ab", "max_tokens": 4, **fields}
    response = client.post(CHAT if is_chat else "/v1/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400) or (
        fields == {"model": 5}
    ), error
    assert error["param"] == param, error
    assert "expected" in error["message"] or "refused" in error["message"], error


def test_nesting_in_the_arguments_of_a_tool_call_is_bounded(client):
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": deep}}
    messages = [*USER, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    for path in (CHAT, "/tokenize"):
        # Too deep for the JSON parser of some versions of Python: a text then.
        response = client.post(path, json={"messages": messages})
        assert response.status_code in (200, 400), response.text


BROKEN = [
    b"",
    b"[]",
    b"5",
    b"{",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\\ud800"}',
    b'{"\\udfff": 1}',
    b'{"prompt": "a", "stop": ["\\ud800"]}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    b'{"json": ' + b'{"not":' * 100 + b"{}" + b"}" * 100 + b', "prompt": "a"}',
]


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_body_is_refused(client, data):
    for path in ("/v1/completions", CHAT, "/tokenize", "/detokenize", "/pause"):
        response = client.post(path, content=data)
        if path == "/pause" and not data:  # freezes the engine, as it should
            assert response.status_code == 200
            assert client.post("/resume").status_code == 200
            continue
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_sizes_paths_and_methods_have_their_status(client):
    large = json.dumps({"prompt": "a" * 100_001}).encode()
    assert client.post("/v1/completions", content=large).status_code == 413
    parts = iter([large[:50_000], large[50_000:]])  # without a length
    assert client.post("/v1/completions", content=parts).status_code == 413
    assert client.get("/nothing").status_code == 404
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    found = client.post("/v1/completions", json={"prompt": "a", "model": "b"})
    assert found.status_code == 404
    page = {"origin": "https://a.example"}
    found = client.post("/v1/completions", json={"prompt": "a"}, headers=page)
    assert found.status_code == 403


def test_keys_and_admin_endpoints(llm, served):
    settings = dataclasses.replace(SETTINGS, api_keys=("k1", "k2"), allow_admin=False)
    served.wait_until_idle()
    with running(llm, settings) as other:
        assert other.client.get("/health").status_code == 200
        for key in (None, "k3", "k1", "k", "é"):
            headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
            found = other.client.get("/v1/models", headers=headers)
            assert found.status_code == (200 if key == "k1" else 401)
        headers = {"authorization": "bearer k2"}
        assert other.client.get("/v1/models", headers=headers).status_code == 200
        paths = ["/pause", "/resume", "/update_weights", "/reset_prefix_cache"]
        for path in paths:
            found = other.client.post(path, json={}, headers=headers)
            assert found.json()["error"]["code"] == "admin_only", path
        assert other.client.get("/stats", headers=headers).status_code == 403


VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 10**20, -(10**20), 2**31, 0.5, 1e300, -0.0, "",
    "a", "é" * 9, "\x00", "1", [], {}, [[]], [1], ["a"], [1.5], {"a": 1}, {"1": 1},
    {"type": "text"}, {"type": "json_object"}, [None], ["a", 1], {"regex": "a+"},
    "auto",
    [{"role": "user", "content": "a"}], [{"role": "user"}], [{"role": 1}], "never",
    [[5, 6], "b"], {"include_usage": True}, {"json": {"enum": [1]}},
]  # fmt: skip
NAMES = [
    "prompt", "messages", "model", "n", "temperature", "top_p", "top_k", "min_p",
    "stop",
    "max_tokens", "max_completion_tokens", "min_tokens", "logprobs", "top_logprobs",
    "echo", "stream", "stream_options", "seed", "logit_bias", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "ignore_eos", "stop_token_ids",
    "best_of",
    "use_beam_search", "beam_width", "length_penalty", "early_stopping", "regex",
    "choice", "json", "guided_json", "structured_outputs", "response_format", "tools",
    "tool_choice", "priority", "bad_words", "allowed_token_ids", "user", "suffix",
    "prompt_logprobs", "add_special_tokens", "return_token_ids", "chat_template_kwargs",
    "include_stop_str_in_output", "skip_special_tokens", "return_tokens_as_token_ids",
    "spaces_between_special_tokens", "tokens", "mode", "path", "prefix_cache", "store",
    "metadata", "parallel_tool_calls", "service_tier", "add_generation_prompt",
]  # fmt: skip


def test_no_body_is_an_internal_error(client):
    rng = random.Random(0)
    paths = ["/v1/completions", CHAT, "/tokenize", "/detokenize", "/update_weights"]
    counts = {}
    for _ in range(700):
        path = rng.choice(paths)
        names = rng.sample(NAMES, rng.randint(0, 3))
        body = {name: rng.choice(VALUES) for name in names}
        if rng.random() < 0.8:
            body |= {"messages": USER} if path == CHAT else {"prompt": "ab"}
        if rng.random() < 0.9 and path in paths[:2]:
            body["max_tokens"] = body.get("max_tokens") or 3
        response = client.post(path, json=body)
        assert response.status_code in (200, 400, 403, 404), (body, response.text)
        if response.status_code != 200:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            # It names a field that was sent, or one that is missing.
            missing = {"prompt", "messages", "tokens", "path"} - set(body)
            named = {*body, *missing, "max_tokens"}
            if response.status_code == 400:
                assert error["param"] in named, (path, body, error)
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
    assert counts[200] > 50
    assert counts[400] > 300


def test_a_bad_request_does_not_disturb_another(client, llm):
    good = {"prompt": "ab", "temperature": 0, "max_tokens": 40, "ignore_eos": True}
    alone = post(client, good)["choices"]
    with client.stream("POST", "/v1/completions", json={**good, "stream": True}) as r:
        lines = r.iter_lines()
        text = ""
        for line in lines:
            if not line.startswith("data: {"):
                continue
            text += json.loads(line[6:])["choices"][0]["text"]
            post(client, {"prompt": [[5], [999]]}, 400)
            post(client, {"prompt": "a", "regex": "("}, 400)
    assert text == alone[0]["text"]
