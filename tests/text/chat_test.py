"""Chat templates: their text, their limits, and how `llm.chat` uses them.

In the tests marked `huggingface`, transformers renders the same templates.
"""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import processors

from jpaged import LLM, SamplingParams
from jpaged.models.loading.sources import bundled_path
from jpaged.text import sandbox
from jpaged.text.chat import ChatTemplates, render
from jpaged.text.tokenizer import Tokenizer
from tests.support.ids import stable_repr
from tests.support.tiny_llm import SIZES, byte_tokenizer, write_folder

pytestmark = pytest.mark.long

MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "Say “hé”\n\tand 'so'.  "},
    {"role": "assistant", "content": "hé, so", "reasoning": "short", "name": None},
    {"role": "user", "content": "again"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Ädd & <b>",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# Each uses features of published templates; the wording is our own.
TEMPLATES = {
    "roles between marks": """{% for message in messages %}
{{ '<|' + message['role'] + '|>' }}
{{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    "turns that must alternate": """{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {%- set first = messages[0].content ~ '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        [Q] {{ (first if loop.first else '') + message.content.strip() }} [/Q]
    {%- else -%}
        {{- ' ' + message.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}""",
    "tools and namespaces": """{%- set ns = namespace(seen=false, count=0) -%}
{%- if tools %}
    {{- 'tools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' + (tool.function | tojson(indent=2)) + '\\n' }}
    {%- endfor %}
{%- endif %}
{%- for m in messages if m.role != 'system' %}
    {%- set ns.count = ns.count + 1 %}
    {%- if m.role == 'assistant' %}{% set ns.seen = true %}{% endif %}
    {{- '%s %03d: %s' % (m.role, ns.count, m.content | replace('a', '4')) }}
    {%- if not loop.last %}{{ '\\n' }}{% else %}{% break %}{% endif %}
{%- endfor %}
{{- ns.seen }} {{ messages | map(attribute='role') | unique | join(', ') }}""",
    "a macro, generation and reasoning": """
{%- macro turn(role, text) -%}
<{{ role | upper }}>{{ text }}</{{ role | upper }}>
{%- endmacro -%}
{%- for m in messages -%}
    {% generation %}{{ turn(m.role, m.content) }}{% endgeneration %}
    {%- if m.reasoning_content is defined %}({{ m.thinking }}){% endif -%}
    {{- 'named' if 'name' in m else 'unnamed' -}}
{%- endfor -%}
{% for key, value in dict(a=1, b=[2, none]).items() %}{{ key }}={{ value }};{% endfor %}
{% for i in range(7) %}{% if i is odd %}{% continue %}{% endif %}{{ i }}{% endfor %}""",
    "slices, tests and strings": """{%- set last = messages | selectattr('role',
    'equalto', 'user') | list | last -%}
{{ last.content.split('g')[0] | default('x', true) }}|{{ messages | length }}|
{{- messages[::-1][0].content.title().center(9) }}|{{ 'a' * 3 }}|{{ 2 ** 10 }}|
{{- [1, 2] + [3] }}|{{ 'x'.join(['1', '2']) }}|{{ ('k' ~ 1 ~ none) | indent(2) }}|
{{- messages[1].content | tojson }}|{{ undefined_name }}|{{ undefined_name is defined }}
""",
}


def rendered(name: str, **options) -> str:
    return render(MESSAGES, TEMPLATES[name], special_tokens=TOKENS, **options)


def test_a_template_is_rendered_with_its_blocks_trimmed():
    assert rendered("roles between marks") == (
        "<|system|>\nBe <brief>.</s>\n<|user|>\nSay “hé”\n\tand 'so'.</s>\n"
        "<|assistant|>\nhé, so</s>\n<|user|>\nagain</s>\n<|assistant|>"
    )
    without = rendered("roles between marks", add_generation_prompt=False)
    assert without.endswith("again</s>\n")


WITH_PARTS = """{% for m in messages %}[{{ m.role }}]
{%- if m.content is string %} {{ m.content }}{% else %}
{%- for part in m.content %} <{{ part.type }}> {{ part.text }}{% endfor %}
{%- endif %}{% endfor %}"""
TEXT_ONLY = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
STRIPPED = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'].strip() }}{% endfor %}"
)
PARTS_OF_USERS = """{% for m in messages %}[{{ m.role }}]
{%- if m.role == 'user' and m.content is not string %}
{%- for part in m.content %} {{ part['text'] }}{% endfor %}
{%- else %} {{ m.content }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEXT_ONLY, "[user] hi\nyou[system] so"),
        (STRIPPED, "[user] hi\nyou[system] so"),
        (WITH_PARTS, "[user] <text> hi <text> you[system] <text> so"),
        (PARTS_OF_USERS, "[user] hi\nyou[system] so"),
    ],
    ids=["text only", "stripped", "with parts", "parts of users only"],
)
def test_text_parts_are_read_by_the_template_or_joined(template, expected):
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "system", "content": [{"type": "text", "text": "so"}]},
    ]
    assert render(messages, template) == expected
    assert messages[0]["content"] is parts
    texts = [
        {"role": "user", "content": "hi\nyou"},
        {"role": "system", "content": "so"},
    ]
    assert render(texts, TEXT_ONLY) == "[user] hi\nyou[system] so"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hi", r"messages\[0\]\['content'\]: expected a text or a list"),
        (5, r"messages\[0\]\['content'\]: expected a text or a list"),
        ({"type": "text", "text": "x"}, r"\['content'\]: expected a text or a list"),
        (
            [{"type": "image_url"}],
            r"\['content'\]\[0\]: .* of type 'text', got 'image_",
        ),
        (["a", 5], r"\['content'\]\[1\]: expected a text or a dict"),
        ([{"type": "text", "text": 5}], r"\['content'\]\[0\]\['text'\]: expected"),
        ([{"text": "a"}, {}], r"\['content'\]\[1\]: .* of type 'text', got None"),
    ],
    ids=stable_repr,
)
def test_content_that_is_not_text_is_refused_by_name(content, message):
    with pytest.raises(ValueError, match=message):
        render([{"role": "user", "content": content}], TEXT_ONLY)


def test_results_of_tools_may_be_json_and_content_may_be_missing():
    template = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    messages = [{"role": "tool", "content": {"sum": [1, 2.5, None]}}]
    assert render(messages, template) == '{"sum": [1, 2.5, null]}'
    messages = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert render(messages, "{{ messages[0].content is defined }}") == "False"


def test_json_is_neither_escaped_for_html_nor_reduced_to_ascii():
    text = rendered("tools and namespaces", tools=TOOLS)
    assert '"description": "Ädd & <b>"' in text
    assert text.startswith('tools:\n{"type": "function"')
    assert text.endswith("True system, user, assistant")


def test_none_values_are_omitted_and_reasoning_has_all_its_names():
    text = rendered("a macro, generation and reasoning")
    assert "named" not in text.replace("unnamed", "")
    assert "(short)" in text
    assert text.endswith("a=1;b=[2, None];0246")


@pytest.mark.huggingface
@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_renders_each_template_to_the_same_text(
    name, with_head, with_tools
):
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bundled_path("tiny-python") / "tokenizer.json"), **TOKENS
    )
    options = {
        "add_generation_prompt": with_head,
        "tools": TOOLS if with_tools else None,
    }
    want = tokenizer.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, **options
    )
    assert len(want) > 40
    assert rendered(name, **options) == want


def test_a_template_can_refuse_the_messages():
    wrong = [{"role": "assistant", "content": "me first"}]
    with pytest.raises(ValueError, match=r"refused the messages: roles must alternate"):
        render(wrong, TEMPLATES["turns that must alternate"], special_tokens=TOKENS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ lipsum.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ''['__class__'].mro() }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
        "{{ (messages | attr('__class__')).mro() }}",
        "{{ namespace(__init__=1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.__init__.__globals__ }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_cannot_reach_the_interpreter(template):
    before = json.dumps(MESSAGES)
    with pytest.raises(
        ValueError, match="chat_template: the template refused the messages"
    ):
        render(MESSAGES, template)
    assert json.dumps(MESSAGES) == before


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
        "{% endmacro %}{{ f(60) }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set x = 'a' * 10 ** 6 %}{{ x | replace('a', x) }}",
        "{% set x = 'a' * 10 ** 6 %}{{ x.replace('a', x) }}",
        "{% set x = 'a' * 10 ** 6 %}{{ x.join(([x] * 1000)) }}",
        "{% set x = 'a' * 10 ** 6 %}{{ [x] * 1000 | int | join }}"
        "{{ ([x] * 1000) | join(x) }}",
        "{{ 'x'.center(10 ** 9) }}{{ 'x' | center(10 ** 9) }}",
        "{{ 'x' | indent(10 ** 9, true) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ [1] | tojson(indent=10 ** 9) }}",
        "{% set x = 'a' * 10 ** 6 %}{% for i in range(100) %}{{ x }}{% endfor %}",
    ],
)
def test_a_template_cannot_run_forever_or_fill_the_memory(template):
    with pytest.raises(ValueError, match="chat_template: "):
        render(MESSAGES, template)


def test_a_syntax_error_is_reported_with_its_line():
    with pytest.raises(ValueError, match=r"chat_template: .* syntax error in line 2"):
        render(MESSAGES, "x\n{% for %}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages: expected a list with at least one message, got \[\]"),
        ("hello", "messages: expected a list with at least one message, got 'hello'"),
        ([{"content": "x"}], r"messages\[0\]: expected a dict with a 'role'"),
        (["x"], r"messages\[0\]: expected a dict with a 'role', got 'x'"),
    ],
)
def test_invalid_messages_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        render(messages, "{{ messages }}")


def test_a_template_receives_only_plain_values():
    @dataclasses.dataclass
    class Picture:
        pixels: bytes = b""

        def save(self) -> str:
            return "written"

    messages = [{"role": "user", "content": "", "a": Picture(), "n": np.float64(2.5)}]
    shown = render(messages, "{{ messages[0].a }} {{ messages[0].n }}")
    assert shown == "<Picture> 2.5"
    with pytest.raises(ValueError, match="refused the messages"):
        render(messages, "{{ messages[0].a.save() }}")


# Templates in folders


def folder_with(tmp_path, config, **files):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    for name, text in files.items():
        (tmp_path / name.replace("__", ".")).write_text(text, "utf-8")
    return ChatTemplates.from_folder(tmp_path)


def test_templates_are_found_where_transformers_stores_them(tmp_path):
    found = folder_with(tmp_path, {"chat_template": "A", "bos_token": "<s>"})
    assert found.choose(None, None) == "A"
    assert found.special_tokens == {"bos_token": "<s>"}
    named = [
        {"name": "default", "template": "B"},
        {"name": "tool_use", "template": "C"},
    ]
    found = folder_with(tmp_path, {"chat_template": named})
    assert found.choose(None, None) == "B"
    assert found.choose(None, TOOLS) == "C"
    assert found.choose("tool_use", None) == "C"
    assert found.choose("{{ 1 }}", None) == "{{ 1 }}"
    found = folder_with(
        tmp_path,
        {"chat_template": "A", "eos_token": {"content": "</s>", "lstrip": False}},
        chat_template__jinja="D",
        special_tokens_map__json='{"bos_token": "<b>", "eos_token": "other"}',
    )
    assert found.choose(None, None) == "D"
    assert found.special_tokens == {"bos_token": "<b>", "eos_token": "</s>"}


def test_a_missing_template_and_an_invalid_file_raise_errors(tmp_path):
    with pytest.raises(
        ValueError, match=r"chat_template: expected one in .* got none without"
    ):
        ChatTemplates.from_folder(tmp_path).choose(None, None)
    (tmp_path / "tokenizer_config.json").write_text("[1]", "utf-8")
    with pytest.raises(ValueError, match="expected a JSON object"):
        ChatTemplates.from_folder(tmp_path)


# LLM.chat


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("models") / "tiny")
    backend = byte_tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS), "utf-8")
    with LLM(folder, **SIZES) as llm:
        yield llm


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}# {{ m.role }}: {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}def {% endif %}"
)


def test_chat_generates_from_the_rendered_messages_with_one_bos(llm):
    params = SamplingParams(temperature=0.0, max_tokens=5)
    chats = [[{"role": "user", "content": text}] for text in ("add", "sort a list")]
    first, second = llm.chat(chats, params, chat_template=TEMPLATE)
    bos = llm.tokenizer.backend.token_to_id("<s>")
    assert first.prompt_token_ids.count(bos) == 1
    assert first.prompt_token_ids[0] == bos
    text = "# user: add\ndef "
    assert llm.tokenizer.decode(first.prompt_token_ids) == text
    # The tokenizer adds a BOS to plain text; the template writes its own.
    (plain,) = llm.generate([text], params)
    assert plain.prompt_token_ids == first.prompt_token_ids
    assert plain.outputs[0].token_ids == first.outputs[0].token_ids
    (alone,) = llm.chat(chats[1], params, chat_template=TEMPLATE)
    assert alone.outputs[0].token_ids == second.outputs[0].token_ids


def test_chat_without_a_template_or_a_tokenizer_is_refused(llm):
    with pytest.raises(ValueError, match="chat_template: expected one in the model"):
        llm.chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="messages: expected a list"):
        llm.chat("hello", chat_template=TEMPLATE)
    with (
        LLM(llm.model, **SIZES) as bare,
        pytest.raises(ValueError, match="messages: expected a model with a tokenizer"),
    ):
        bare.chat([{"role": "user", "content": "x"}], chat_template=TEMPLATE)


def test_a_tokenizer_of_another_kind_is_refused_with_a_way_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0b")
    with pytest.raises(
        ValueError, match=r"expected tokenizer.json, got only tokenizer.model; convert"
    ):
        Tokenizer.from_folder(tmp_path)


def test_the_limits_are_far_above_the_needs_of_long_chats():
    messages = [{"role": "user", "content": "x" * 1000}] * 1000
    text = render(messages, TEMPLATES["roles between marks"])
    assert len(text) > 1_000_000
    assert sandbox.MAX_CHARACTERS > 10 * len(text)
