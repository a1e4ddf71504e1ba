"""`python -m jpaged`: what is written to stdout and stderr, files, and the chat."""

import io
import json
import os
import signal
import sys

import pytest

from jpaged.cli import chat as cli_chat
from jpaged.cli.main import main
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged.serving import batcher
from tests.support.signals import ctrl_c as ctrl_c
from tests.support.tiny_llm import SIZES, write_folder

pytestmark = pytest.mark.long

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content[:9] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
FLAGS = [f"--{name}={value}" for name, value in SIZES.items() if name != "max_num_seqs"]
GREEDY = ["--temperature=0", "--max-tokens=6", "--ignore_eos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_folder(tmp_path_factory.mktemp("models") / "tiny")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Calls the program: (exit status, stdout, stderr)."""

    def run(*arguments, stdin=None):
        text = io.BytesIO(b"" if stdin is None else stdin)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(text))
        status = main([f"--model={folder}", *FLAGS, *arguments])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def expected(folder):
    llm = LLM(folder, **SIZES)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    return lambda text: llm.generate([text], params, False)[0].outputs[0].text


@pytest.mark.parametrize("way", ["word", "flag", "stdin", "file", "no stream"])
def test_one_prompt_prints_the_text_of_its_output_and_nothing_else(
    run, expected, way, tmp_path
):
    file = tmp_path / "prompts.txt"
    file.write_text("hello\n")
    arguments = {
        "word": ["hello"],
        "flag": ["--prompt", "hello"],
        "stdin": [],
        "file": ["--prompt_file", str(file)],
        "no stream": ["hello", "--no-stream"],
    }[way]
    status, out, err = run(*arguments, *GREEDY, stdin=b"hello\n")
    assert (status, out) == (0, expected("hello") + "\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("stdin", [b"\xef\xbb\xbfhello\n", b"hello\r\n"])
def test_stdin_may_have_a_byte_order_mark_and_lines_of_windows(run, expected, stdin):
    assert run(*GREEDY, stdin=stdin)[:2] == (0, expected("hello") + "\n")


def test_characters_that_the_encoding_of_stdout_lacks_are_escaped(run, monkeypatch):
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    status, _, err = run("a\N{SNOWMAN}", "b", *GREEDY)
    stdout.flush()
    assert (status, err.count("codec")) == (0, 0)
    assert b"a\\u2603" in written.getvalue()


def test_several_outputs_follow_their_prompts_or_are_lines_of_json(run, expected):
    status, out, _ = run("hello", "abc", *GREEDY)
    assert status == 0
    for number, prompt in enumerate(("hello", "abc"), start=1):
        assert f"--- {number}/2\n{prompt}{expected(prompt)}\n--- length" in out
    status, out, _ = run("hello", "abc", *GREEDY, "--json", "--logprobs=1")
    records = sorted(map(json.loads, out.splitlines()), key=lambda one: one["index"])
    assert [one["prompt"] for one in records] == ["hello", "abc"]
    assert [one["outputs"][0]["text"] for one in records] == [
        expected("hello"),
        expected("abc"),
    ]
    assert records[0]["outputs"][0]["logprobs"][0][0]["rank"] == 1


def test_invalid_prompts_are_reported_by_place_and_the_others_run(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        '{"prompt": "abc", "max_tokens": 2, "ignore_eos": true}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "abc", "max_token": 3}',
        "[" * 100_000,
        '{"prompt": 5}',
    ]
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    status, out, err = run("--prompt-file", str(file), "--prompt", "a\udcff", "--json")
    assert status == 1
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 2
    reports = [line for line in err.splitlines() if line.startswith("jpaged: ")]
    for where, reason in (
        ("--prompt number 1", "surrogate"),
        (f"{file}:2", "surrogate"),
        (f"{file}:3", "max_token"),
        (f"{file}:4", "nested too deeply"),
        (f"{file}:5", "expected a text or token ids"),
    ):
        assert any(where in line and reason in line for line in reports), where


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello", "--temperature=-1"], "temperature: expected"),
        (["hello", "--block-size=0"], "block_size: expected"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["hello", "--gpu-memory-utilization=2"], "memory_fraction: expected"),
        (["chat", "hello"], "chat: expected no prompts"),
        (["chat", "--n=2"], "--n: expected none in a chat"),
        (["chat", "--temperature=-1"], "temperature: expected"),
    ],
)
def test_what_cannot_run_is_one_line_on_stderr(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("jpaged: ")
    assert message in err
    assert err.count("\n") == 1


def test_help_names_modes_parameters_and_arguments_of_llm(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("chat", "--prompt-file", "--temperature", "--max-model-len", "stdin"):
        assert word in text
    for name in ("kv-dtype", "gpu-memory-utilization", "tensor-parallel-size"):
        assert f"--{name}" in text


def test_a_chat_keeps_its_history(run, monkeypatch):
    questions = []
    answer = cli_chat.Conversation.answer

    def seen(self, question):
        answer(self, question)
        questions.append([message["content"] for message in self.messages])

    monkeypatch.setattr(cli_chat.Conversation, "answer", seen)
    stdin = (
        b"one\n\ntwo \\\nmore\n/undo\nthree\n/new\nfour\n"
        + b"x" * 90
        + b"\n/exit\nno\n"
    )
    status, out, _ = run("chat", *GREEDY, "--system=be", stdin=stdin)
    assert status == 0
    answers = out.splitlines()
    assert len(answers) == 5
    assert questions[0] == ["be", "one", answers[0]]
    assert questions[1] == ["be", "one", answers[0], "two \nmore", answers[1]]
    assert questions[2] == ["be", "one", answers[0], "three", answers[2]]
    assert questions[3] == ["be", "four", answers[3]]
    assert len(questions) == 5


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_an_answer_and_keeps_the_chat(run, monkeypatch):
    run_slice, count = batcher.Batcher.run_slice, []

    def interrupted(self):
        count.append(1)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return run_slice(self)

    monkeypatch.setattr(batcher.Batcher, "run_slice", interrupted)
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    arguments = ["--temperature=0", "--max-tokens=30", "--ignore-eos"]
    status, out, err = run("chat", *arguments, stdin=b"one\ntwo\n")
    assert status == 0
    assert "(interrupted)" in err
    first, second = out.splitlines()
    assert len(first) < len(second)


def test_without_a_template_a_chat_says_what_is_missing(run, folder):
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    try:
        status, out, err = run("chat", stdin=b"hello\n")
    finally:
        template.write_text(text)
    assert (status, out) == (1, "")
    assert "chat_template: expected one in the model's folder" in err
