"""The runner `generate`: its output, and its messages about invalid lines and flags."""

import json
import re

import pytest

from experiments import generate
from experiments.lib.prompt_files import read_lines
from jpaged.params import BeamSearchParams, StructuredOutputsParams
from tests.support.runners import call_experiment
from tests.support.tiny_llm import SIZES, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(folder):
    """Calls the runner: (exit status, text on stdout, its JSON, stderr)."""

    def run(*arguments):
        sizes = [f"--{name}={value}" for name, value in SIZES.items()]
        arguments = (f"--model={folder}", *sizes, *arguments)
        status, out, err = call_experiment("generate", *arguments)
        lines = out.rstrip("\n").split("\n")
        record = json.loads(lines[-1]) if status != 1 or "{" in lines[-1] else None
        return status, "\n".join(lines[:-1]), record, err

    return run


def test_outputs_follow_their_prompts_and_the_last_line_is_json(run):
    status, text, record, err = run(
        "--prompt=abc", "--prompt=hello", "--max_tokens=6", "--ignore_eos"
    )
    assert status == 0
    # At most the lines that name the kernels, and what is compiled.
    assert re.fullmatch("(jpaged: .*\n)*", err)
    first, second = sorted(text.strip().split("\n\n"))
    assert first.startswith("--- 1/2\nabc")
    assert second.startswith("--- 2/2\nhello")
    assert first.endswith("\n--- length, 6 tokens")
    assert record["prompt_tokens"] == 8
    assert record["generated_tokens"] == 12
    assert record["tokens_per_s"] > 0
    assert record["stats"]["num_free_blocks"] == 32
    assert 0 < record["first_token_s"] <= record["total_s"]
    assert record["num_requests"] == 2


def test_with_chat_texts_are_messages_and_without_prompts_questions_are_asked(
    run, folder
):
    arguments = ("--max_tokens=2", "--ignore_eos", "--temperature=0")
    status, _, _, err = run(*arguments, "--chat", "--prompt=abc")
    assert status == 1
    assert "--chat: expected a model with a chat template" in err
    template = folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}xx{{ m.content }}yy{% endfor %}")
    try:
        _, text, record, _ = run(*arguments, "--chat", "--prompt=abc")
        assert text.startswith("--- 1/1\nabc\n\n")
        assert record["prompt_tokens"] == 4 + 3
        _, _, record, _ = run(*arguments, "--prompt=abc")
        assert record["prompt_tokens"] == 3
        _, text, record, _ = run(*arguments)
        for question in generate.BUILT_IN_QUESTIONS:
            assert f"\n{question}\n\n" in text
    finally:
        template.unlink()


@pytest.mark.long
def test_prefix_caching_and_swapping_do_not_change_the_text(run):
    arguments = ("--prompt=abcdefgh", "--prompt=ijkl", "--temperature=0")
    arguments += ("--max_tokens=40", "--ignore_eos")
    _, text, record, _ = run(*arguments, "--noprefix_caching")
    assert record["stats"]["num_cached_blocks"] == 0
    swap = ("--num_blocks=16", "--preemption=swap", "--num_swap_blocks=16")
    status, again, record, _ = run(*arguments, *swap, "--policy=shortest_prompt")
    assert (status, sorted(again.split("\n"))) == (0, sorted(text.split("\n")))
    assert record["stats"]["num_swapped_blocks"] > 0
    assert record["stats"]["num_cached_blocks"] > 0


def test_a_stream_prints_the_complete_outputs_in_the_order_of_prompts(run):
    arguments = (
        *("--prompt=abc", "--prompt=de", "--n=3", "--temperature=1", "--seed=3"),
        *("--max_tokens=9", "--stop=e", "--stop_token_id=50"),
    )
    _, whole, _, _ = run(*arguments)
    _, stream, record, _ = run(*arguments, "--stream")
    assert sorted(whole.split("\n\n")) == sorted(stream.split("\n\n"))
    heads = [line for line in stream.split("\n") if "sample" in line]
    assert heads == [f"--- {i}/2, sample {j}/3" for i in (1, 2) for j in (1, 2, 3)]
    assert record["stats"]["blocks_saved_by_sharing"] >= 0


def test_invalid_lines_of_a_file_are_reported_and_the_others_are_generated(
    run, tmp_path
):
    path = tmp_path / "prompts.jsonl"
    lines = [
        '{"prompt": "abc", "max_tokens": 3, "ignore_eos": true}',
        '{"prompt": "abc"',
        "",
        '{"prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": true}',
        '{"prompt": "abc", "max_token": 3}',
        '{"prompt": "abc", "temperature": -1}',
        '{"text": "abc"}',
        '{"prompt": ""}',
        '{"prompt": [300]}',
        '{"prompt": "abc", "allowed_token_ids": [300]}',
    ]
    path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    status, text, record, err = run(f"--prompt_file={path}")
    assert status == 1
    assert record["generated_tokens"] == 5
    assert (record["num_requests"], record["num_wrong"]) == (2, 8)
    assert "5 6 7 -> " in text
    lines = err.strip().split("\n")
    reports = [line for line in lines if not line.startswith("jpaged: ")]
    expected = {
        2: "delimiter",
        5: "parameter: expected one of n, temperature",
        6: "temperature: ",
        7: 'line: expected a JSON object with "prompt"',
        8: "expected at least one token",
        9: "got 300",
        10: "allowed_token_ids: ",
        11: "can't decode byte 0xff",
    }
    for report, (number, reason) in zip(reports, expected.items(), strict=True):
        assert report.startswith(f"{path}:{number}: ")
        assert reason in report


def test_a_text_file_has_one_prompt_per_line(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("abc\r\n\n" + "x" * 70 + "\nde\n", "utf-8")
    status, text, record, err = run(f"--prompt_file={path}", "--max_tokens=2")
    assert status == 1
    assert record["num_requests"] == 2
    assert "\nabc" in text
    assert err.startswith(f"{path}:3: prompt: expected fewer than max_model_len (64)")


@pytest.mark.long
def test_logprobs_are_printed(run):
    _, text, _, _ = run("--prompt=abc", "--max_tokens=3", "--logprobs=3")
    lines = text.strip().split("\n")[-3:]
    assert all(line.count(", ") >= 1 and "-" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "temperature: "),
        (["--n=2", "--temperature=0"], "n: "),
        (["--block_size=0"], "block_size: "),
        (["--max_model_len=1000"], "max_model_len: expected at most"),
        (["--model=nowhere"], "model: "),
        (["--prompt_file=nowhere.txt"], "nowhere.txt"),
        (["--stream", "--logprobs=1"], "--stream: expected requests without logprobs"),
        (["--draft_model=tiny"], "--num_speculative_tokens: expected above 0"),
    ],
)
def test_a_request_that_cannot_run_is_refused_in_one_line(run, arguments, message):
    status, text, record, err = run(*arguments)
    assert status == 1
    assert text == ""
    assert record is None
    assert err.startswith("generate: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temprature=1"], "Unknown command line flag 'temprature'"),
        (["--max_tokens=many"], "flag --max_tokens=many"),
    ],
)
def test_an_invalid_flag_is_named(run, arguments, message):
    status, text, _, err = run(*arguments)
    assert (status, text) == (1, "")
    assert message in err


def test_the_docstring_explains_files_and_exit_status():
    for word in (".jsonl", "Exit status", "first token", "--prompt", "--stream"):
        assert word in generate.__doc__


def test_lines_may_request_beams_and_structured_output(tmp_path):
    fields = {
        "n": 1,
        "temperature": 0.5,
        "max_tokens": 9,
        "beam_width": 0,
        "length_penalty": 1.0,
    }
    path = tmp_path / "lines.jsonl"
    path.write_text(
        '{"prompt": "a", "beam_width": 2, "early_stopping": "never"}\n'
        '{"prompt": "b", "structured_outputs": {"choice": ["x", "y"]}}\n'
        '{"prompt": "c", "logit_bias": {"7": 1.5}}\n'
        '{"prompt": "d", "beam_width": 2, "top_k": 3}\n'
        '{"prompt": "e", "structured_outputs": {"regex": "x", "choice": ["x"]}}\n'
    )
    beams, choice, bias, mixed, both = read_lines(path, fields)
    assert beams.params == BeamSearchParams(2, 9, early_stopping="never")
    assert choice.params.structured_outputs == StructuredOutputsParams(
        choice=["x", "y"]
    )
    assert choice.params.max_tokens == 9
    assert bias.params.logit_bias == {7: 1.5}
    assert "beam search parameter: expected one of" in mixed.error
    assert "got 'top_k'" in mixed.error
    assert "exactly one of regex, choice and json" in both.error
