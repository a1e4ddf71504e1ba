"""`/v1/completions` against the outputs of `LLM.generate`."""

import json

import pytest

from jpaged.params import BeamSearchParams, SamplingParams

pytestmark = pytest.mark.long

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
PROMPTS = ["naïve café", "日本", "the text"]


def post(client, body, status=200, path="/v1/completions"):
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def events(client, body, path="/v1/completions"):
    """The chunks of a stream."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def generated(llm, prompts, params):
    """The outputs of the LLM itself, while the server has none."""
    return [output.outputs for output in llm.generate(prompts, params)]


def test_texts_and_token_ids_give_the_outputs_of_generate(client, llm):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = generated(llm, PROMPTS, params)
    token_ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    for prompts in (PROMPTS, token_ids):
        found = post(client, {"model": "tiny", "prompt": prompts, **GREEDY})
        assert [c["text"] for c in found["choices"]] == [o[0].text for o in expected]
        assert [c["index"] for c in found["choices"]] == [0, 1, 2]
        assert found["object"] == "text_completion"
        assert found["usage"]["prompt_tokens"] == sum(map(len, token_ids))
        assert found["usage"]["completion_tokens"] == 36
        assert {c["finish_reason"] for c in found["choices"]} == {"length"}
    one = post(client, {"prompt": token_ids[0], "return_token_ids": True, **GREEDY})
    assert one["choices"][0]["token_ids"] == list(expected[0][0].token_ids)
    assert one["choices"][0]["prompt_token_ids"] == token_ids[0]


def test_streams_concatenate_to_the_whole_response(client):
    body = {"prompt": PROMPTS, "n": 2, "seed": 5, "max_tokens": 30, "stop": ["a", "é"]}
    whole = post(client, body)
    chunks = events(client, {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        **whole["usage"],
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"],
    }
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    texts, ends = [""] * 6, [None] * 6
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        assert ends[choice["index"]] is None
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert ends == [choice["finish_reason"] for choice in whole["choices"]]


def test_echo_with_logprobs_is_what_evaluation_harnesses_read(client, llm):
    token_ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    params = SamplingParams(
        temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1, ignore_eos=True
    )
    outputs = llm.generate(token_ids, params)
    for most in (1, 0):
        body = {"prompt": token_ids, "echo": True, "logprobs": 1, "max_tokens": most}
        body |= {"temperature": 0, "ignore_eos": True, "seed": 1234}
        found = post(client, body)
        for choice, output in zip(found["choices"], outputs, strict=True):
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids[:most]]
            entries = [*output.prompt_logprobs, *output.outputs[0].logprobs[:most]]
            form = choice["logprobs"]
            assert form["token_logprobs"][0] is form["top_logprobs"][0] is None
            right = [e[t].logprob for t, e in zip(ids[1:], entries[1:], strict=True)]
            assert form["token_logprobs"][1:] == right
            for top, entry in zip(form["top_logprobs"][1:], entries[1:], strict=True):
                assert max(top.values()) == max(v.logprob for v in entry.values())
            names = [llm.tokenizer.decoded_token(token) for token in ids]
            assert form["tokens"] == names
            # A token within a character has the offset of the character.
            before = [llm.tokenizer.decode(ids[:i], False) for i in range(len(ids))]
            starts = [len(text.rstrip("\ufffd")) for text in before]
            assert form["text_offset"] == starts
        assert found["usage"]["completion_tokens"] == 3 * most
        assert all(c["finish_reason"] == "length" for c in found["choices"])
    texts = post(client, {"prompt": PROMPTS, "echo": True, "max_tokens": 0})
    assert [choice["text"] for choice in texts["choices"]] == PROMPTS
    (chunk,) = events(client, {**body, "prompt": token_ids[0]})
    assert chunk["choices"][0]["logprobs"] == found["choices"][0]["logprobs"]


def test_the_user_of_a_request_reaches_the_policies(client, served, monkeypatch):
    users, submit = [], served.llm.submit

    def submitted(prompt, params):
        users.append(params.user)
        return submit(prompt, params)

    monkeypatch.setattr(served.llm, "submit", submitted)
    post(client, {"prompt": "a", "max_tokens": 1, "user": "ada"})
    post(client, {"prompt": "a", "max_tokens": 1, "user": 7})
    assert users == ["ada", 7]


def test_logprobs_of_streams_and_of_wholes_are_those_of_generate(client, llm):
    params = SamplingParams(seed=3, max_tokens=10, logprobs=2, n=2)
    (outputs,) = generated(llm, ["ab"], params)
    body = {"prompt": "ab", "seed": 3, "max_tokens": 10, "logprobs": 2, "n": 2}
    whole = post(client, body)["choices"]
    parts = [{"token_logprobs": [], "text_offset": [], "tokens": []} for _ in whole]
    for chunk in events(client, body):
        (choice,) = chunk["choices"]
        for name, values in parts[choice["index"]].items():
            values += choice["logprobs"][name]
    for choice, part, one in zip(whole, parts, outputs, strict=True):
        right = [e[t].logprob for t, e in zip(one.token_ids, one.logprobs, strict=True)]
        assert choice["logprobs"]["token_logprobs"] == right
        assert part == {name: choice["logprobs"][name] for name in part}
    as_ids = post(client, {**body, "return_tokens_as_token_ids": True})["choices"]
    assert as_ids[0]["logprobs"]["tokens"] == [
        f"token_id:{token}" for token in outputs[0].token_ids
    ]


def test_beam_search_and_best_of(client, llm):
    params = BeamSearchParams(beam_width=3, num_return=2, max_tokens=8)
    (expected,) = generated(llm, ["ab"], params)
    body = {"prompt": "ab", "max_tokens": 8, "use_beam_search": True, "beam_width": 3}
    found = post(client, {**body, "n": 2})["choices"]
    assert [c["text"] for c in found] == [beam.text for beam in expected]
    assert [c["score"] for c in found] == [beam.score for beam in expected]
    texts = ["", ""]
    for chunk in events(client, {**body, "n": 2}):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [beam.text for beam in expected]
    (samples,) = generated(llm, ["ab"], SamplingParams(n=4, seed=9, max_tokens=8))
    best = max(samples, key=lambda s: s.cumulative_logprob / len(s.token_ids))
    body = {"prompt": "ab", "best_of": 4, "seed": 9, "max_tokens": 8}
    assert post(client, body)["choices"][0]["text"] == best.text


CONSTRAINTS = [
    {"regex": "(ab|cd){2}x"},
    {"guided_regex": "(ab|cd){2}x"},
    {"structured_outputs": {"regex": "(ab|cd){2}x"}},
    {"choice": ["abab", "cdcd"]},
    {"json": {"type": "boolean"}},
    {"response_format": {"type": "json_object"}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"enum": [1, "b"]}},
        }
    },
]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_constraints_hold(client, constraint):
    body = {"prompt": "ab", "max_tokens": 60, "seed": 1, **constraint}
    (choice,) = post(client, body)["choices"]
    text = choice["text"]
    if "json" in str(constraint):
        if choice["finish_reason"] == "stop":
            value = json.loads(text)
            kind = str(constraint)
            if "boolean" in kind:
                assert isinstance(value, bool)
            elif "enum" in kind:
                assert value in (1, "b")
            else:
                assert isinstance(value, dict)
    elif "choice" in constraint:
        assert text in ("abab", "cdcd")
    else:
        assert text in ("ababx", "abcdx", "cdabx", "cdcdx")


def test_penalties_biases_and_stops_reach_the_engine(client, llm):
    options = dict(
        logit_bias={"70": 50.0},
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        top_k=20,
        min_p=0.01,
        top_p=0.9,
        min_tokens=3,
        stop_token_ids=[71],
        seed=8,
        priority=2,
        skip_special_tokens=False,
        temperature=0.7,
        max_tokens=9,
    )
    params = SamplingParams(**{**options, "logit_bias": {70: 50.0}})
    (expected,) = generated(llm, ["text"], params)
    (choice,) = post(client, {"prompt": "text", **options})["choices"]
    assert choice["text"] == expected[0].text
    assert choice["stop_reason"] == expected[0].stop_reason
