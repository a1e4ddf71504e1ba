"""README.md and docs/: their Python blocks, commands and transcripts are run.

A fenced block tagged `python` is executed; the blocks of one file share a namespace.
In a block tagged `bash` or `console`, a line `python -m experiments.NAME ...` is run
with this Python. In `console`, the lines after the command (`$ `) must be its output:
`...` matches anything within a line, and a line `...` matches any lines.

    <!-- not run: reason -->

directly above a block skips it. Its Python must still parse, and the flags of its
commands must still exist.
"""

import dataclasses
import difflib
import doctest
import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import jax
import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.long

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
SECONDS_PER_COMMAND = 300
# Commands of transcripts that are run as other commands.
MAKE_RUNS = {"make demo": "python -m experiments.generate"}

NOT_RUN = re.compile(r"<!--\s*not run:?(?P<reason>.*?)-->", re.DOTALL)
FENCE = re.compile(
    r"(?:(?P<comment><!--(?:(?!-->).)*-->)[ \t]*\n\s*)?"
    r"^(?P<indent>[ \t]*)```(?P<tag>\w*)[^\n]*\n(?P<body>.*?)^[ \t]*```[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
EXPERIMENT = re.compile(r"python3? -m experiments\.(?P<name>\w+)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its position, its language and text, and why it is not run."""

    where: str
    line: int
    tag: str
    text: str
    not_run: str | None = None


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line of a block, and in a transcript the output that is shown."""

    block: Block
    line: str
    shown: str | None = None

    def __str__(self) -> str:
        """The position of the line, and the line."""
        return f"{self.block.where}:{self.block.line}: {self.line}"


def blocks_in(text: str, where: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    found = []
    for match in FENCE.finditer(text):
        reason = NOT_RUN.fullmatch(match["comment"] or "")
        found.append(
            Block(
                where,
                text.count("\n", 0, match.start("body")),
                match["tag"],
                textwrap.dedent(match["body"]),
                reason and reason["reason"].strip(),
            )
        )
    return found


def commands_in(block: Block) -> list[Command]:
    r"""The command lines of a bash block (joined at `\`) or of a transcript (`$ `)."""
    if block.tag == "bash":
        lines = block.text.replace("\\\n", " ").splitlines()
        return [
            Command(block, line.strip())
            for line in lines
            if line.strip() and not line.lstrip().startswith("#")
        ]
    if block.tag == "console":
        parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
        heads = [re.match(r"(?:[^\n]*\\\n)*[^\n]*", part)[0] for part in parts]
        return [
            Command(block, head.replace("\\\n", " "), part[len(head) + 1 :])
            for head, part in zip(heads, parts, strict=True)
        ]
    return []


DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    # A name with "_" is a build, or parts of notebooks, which are run as notebooks.
    if not any(part.startswith("_") for part in path.relative_to(ROOT).parts)
}
BLOCKS = [
    block for where, text in DOCUMENTS.items() for block in blocks_in(text, where)
]
COMMANDS = [command for block in BLOCKS for command in commands_in(block)]


def pattern_of(shown: str) -> str:
    r"""A regular expression for the output that a transcript shows.

    >>> bool(re.fullmatch(pattern_of("a ... b\n...\nend\n"), "a 1 b\nx\ny\nend\n"))
    True
    """
    lines = [
        r"(?:[^\n]*\n)*?"
        if line.strip() == "..."
        else "[^\n]*".join(map(re.escape, line.rstrip().split("..."))) + r"[ \t]*\n"
        for line in shown.rstrip("\n").splitlines()
    ]
    return "".join(lines) + r"\s*"


def run_command(line: str, cwd: pathlib.Path) -> tuple[str, str]:
    """Runs a documented command line in a shell, with this Python, for a limited time.

    Args:
      line: the command line.
      cwd: a temporary folder, so that no document writes into the checkout.

    Returns:
      What it prints; and how it failed, or an empty string.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    python = shlex.quote(sys.executable)
    line = EXPERIMENT.sub(rf"{python} -m experiments.\g<name>", line)
    try:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            capture_output=True,
            text=True,
            timeout=SECONDS_PER_COMMAND,
        )
    except subprocess.TimeoutExpired:
        return "", f"not finished after {SECONDS_PER_COMMAND} s"
    if done.returncode:
        return done.stdout, f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout, ""


def difference(shown: str, printed: str) -> str:
    """Empty if the output matches the transcript, else a diff."""
    if not printed.endswith("\n"):
        printed += "\n"
    if re.fullmatch(pattern_of(shown), printed):
        return ""
    lines = difflib.unified_diff(
        shown.splitlines(), printed.splitlines(), "shown", "printed", n=1, lineterm=""
    )
    return "\n".join(lines)


# Prints a dict of runner -> output of its `--helpfull`. One process imports what all
# runners need, and a fork of it runs each of them: their flags would be in conflict.
HELP_OF_RUNNERS = """
import contextlib, io, json, os, runpy, sys, tempfile
import jpaged, absl.app

texts = {}
for name in sys.argv[1:]:
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 1)
            sys.argv = [name, "--helpfull"]
            try:
                runpy.run_module("experiments." + name, run_name="__main__")
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        texts[name] = file.read()
json.dump(texts, sys.stdout)
"""


@functools.cache
def help_of_runners() -> dict[str, str]:
    """The output of `--helpfull` of all runners in commands that are not run."""
    commands = [command.line for command in COMMANDS if command.block.not_run]
    names = {match["name"] for match in map(EXPERIMENT.search, commands) if match}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HELP_OF_RUNNERS, *sorted(names)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS_PER_COMMAND,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def flags_of(experiment: str) -> frozenset[str]:
    """The names of all flags of a runner."""
    found = flags_listed(help_of_runners()[experiment])
    assert found, f"experiments.{experiment} has no flags, or it does not exist"
    return found


def flags_listed(text: str) -> frozenset[str]:
    """The names of flags in a help text of absl, including short and negated names.

    >>> sorted(flags_listed("  -p,--prompt: a prompt\\n  --[no]progress: a bar"))
    ['noprogress', 'p', 'progress', 'prompt']
    """
    lines = re.findall(r"^\s*(?:-(\w),)?--(\[no\])?(\w+):", text, re.MULTILINE)
    names = {short for short, _, _ in lines} | {name for _, _, name in lines}
    negated = {f"no{name}" for _, negatable, name in lines if negatable}
    return frozenset((names | negated) - {""})


def flags_used(line: str) -> set[str]:
    """The names of flags in a command line, before the first pipe or redirection."""
    words = shlex.split(re.split(r"[|>;]|&&", line)[0], comments=True)
    return {
        re.sub(r"^--?|=.*$", "", word)
        for word in words[words.index("-m") + 2 :]
        if re.match(r"--?[a-zA-Z]", word)
    }


@pytest.mark.parametrize("where", DOCUMENTS)
def test_python_blocks_run(where, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    # A document may set the level; it is set back at the end.
    caplog.set_level("INFO", logger="jpaged")
    # optax relies on JAX's usual promotion, which users have.
    with jax.numpy_dtype_promotion("standard"):
        run_blocks(where)


def run_blocks(where):
    """Run the Python blocks of a document one after another."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in BLOCKS:
        if block.where != where or block.tag != "python":
            continue
        at = f"{where}:{block.line}"
        if block.text.lstrip().startswith(">>>"):
            example = doctest.DocTestParser().get_doctest(
                block.text, namespace, at, where, block.line
            )
            if block.not_run is None:
                runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
                failed = runner.run(example, clear_globs=False).failed
                assert failed == 0, f"{at}: see the report above"
                namespace = example.globs
            continue
        # The blank lines make tracebacks show the line of the document.
        code = compile("\n" * block.line + block.text, where, "exec")
        if block.not_run is None:
            exec(code, namespace)


@pytest.mark.parametrize("where", DOCUMENTS)
def test_documented_commands_run_and_print_the_shown_output(where, tmp_path):
    wrong = []
    for command in COMMANDS:
        line = MAKE_RUNS.get(command.line, command.line)
        block = command.block
        if block.where == where and block.not_run is None and EXPERIMENT.search(line):
            printed, problem = run_command(line, tmp_path)
            if not problem and (command.shown or "").strip():
                problem = difference(command.shown, printed)
            if problem:
                wrong.append(f"{command}\n{problem}")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("where", DOCUMENTS)
def test_skipped_commands_have_a_reason_and_use_existing_flags(where):
    for block in BLOCKS:
        if block.where == where and block.not_run is not None:
            assert block.not_run, f"{where}:{block.line}: `not run:` needs a reason"
    for command in COMMANDS:
        match = EXPERIMENT.search(command.line)
        if command.block.where == where and command.block.not_run and match:
            unknown = flags_used(command.line) - flags_of(match["name"])
            assert not unknown, f"{command}: no such flag: {sorted(unknown)}"


@pytest.mark.parametrize("where", DOCUMENTS)
def test_documented_make_targets_and_linked_files_exist(where):
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    for command in COMMANDS:
        if command.block.where == where and command.line.startswith("make "):
            words = shlex.split(command.line, comments=True)[1:]
            named = {word for word in words if "=" not in word and word[0] != "-"}
            assert named <= targets, f"{command}: the Makefile has {sorted(targets)}"
    # Links in code blocks are text; anchors and web pages are not files.
    prose = FENCE.sub("", DOCUMENTS[where])
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
        if ":" not in link:
            assert (ROOT / where).parent.joinpath(link).exists(), f"{where}: {link}"


def test_make_demo_runs_the_command_that_its_transcripts_are_compared_with():
    for target, runs in MAKE_RUNS.items():
        recipe = rf"^{target.removeprefix('make ')}: env\n\t@\$\(RUN\)(.*)\n\n"
        found = re.search(recipe, MAKEFILE, re.MULTILINE)
        assert found, target
        without_model = found[1].replace(" $(if $(MODEL),--model $(MODEL))", "")
        assert f"python{without_model}" == runs


SAMPLE = """\
Text, then a command:

```bash
pip install jpaged   # not an experiment
JAX_PLATFORMS=cpu python -m experiments.generate \\
    --prompt "def --x" --max_tokens=4 | tail -n 1
```

<!-- not run: an hour -->

```python
1 +
```

1. a list

   ```console
   $ python -m experiments.a
   first
   $ make demo
   ```
"""


def test_blocks_and_commands_of_a_sample_are_found():
    bash, python, console = blocks_in(SAMPLE, "sample.md")
    assert [bash.line, python.line, console.line] == [3, 11, 17]
    assert (bash.not_run, python.not_run, console.not_run) == (None, "an hour", None)
    assert python.text == "1 +\n"
    pip, generate = commands_in(bash)
    assert pip.line.startswith("pip install")
    assert flags_used(generate.line) == {"prompt", "max_tokens"}
    assert [(c.line, c.shown) for c in commands_in(console)] == [
        ("python -m experiments.a", "first\n"),
        ("make demo", ""),
    ]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nb\n", "a\nc\n", False),
        ("a\n", "a\nb\n", False),
        ("12.3 tok/s: ... ms\n", "12.3 tok/s: 7 ms\n", True),
        ("x ... y\n", "x \n y\n", False),
        ("{... 3, ...}\n", '{"a": 3, "b": 4}\n', True),
        ("a\n...\nz\n", "a\nz\n", True),
        ("a\n...\nz\n", "a\n1\n2\nz\n", True),
        ("a.c\n", "abc\n", False),
    ],
)
def test_an_ellipsis_matches_and_other_text_must_be_equal(shown, printed, same):
    assert (difference(shown, printed) == "") == same


def test_a_command_that_fails_or_prints_other_output_is_reported(tmp_path):
    assert run_command("echo hello", tmp_path) == ("hello\n", "")
    printed, problem = run_command("echo hello; echo why >&2; exit 3", tmp_path)
    assert (printed, problem) == ("hello\n", "exit code 3\nwhy\n")
    assert "-hullo\n+hello" in difference("hullo\n", "hello\n")
