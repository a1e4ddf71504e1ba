"""What README.md and docs/ show is run: Python blocks, commands and transcripts.

A fenced block tagged `python` is executed; the blocks of one file share a namespace.
In a block tagged `bash` or `console`, a line `python -m experiments.NAME ...` is run
with this Python, and in `console` what follows its `$ ` must be what it prints. There
`...` stands for anything on a line, and a line of nothing but `...` for any lines.

    <!-- not run: why -->

directly above a block leaves it out; its Python must still parse, and the flags of its
commands must still exist.
"""

import dataclasses
import difflib
import doctest
import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.long

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
SECONDS_PER_COMMAND = 300
# A transcript may show the command that a reader types first.
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
    """A fenced block: where it stands, its language and text, and why it is not run."""

    where: str
    line: int
    tag: str
    text: str
    not_run: str | None = None


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line of a block, and in a transcript what it is said to print."""

    block: Block
    line: str
    shown: str | None = None

    def __str__(self) -> str:
        """Names the test, and says where the line stands."""
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
    if path.exists()
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
    """What a documented command line prints, and what is wrong with how it ended.

    It is run by a shell, with this Python in place of its own, for a limited time.

    The folder is temporary, so that no document writes into the checkout.
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
    """Empty if the output is as the transcript shows it, else a diff for the reader."""
    if not printed.endswith("\n"):
        printed += "\n"
    if re.fullmatch(pattern_of(shown), printed):
        return ""
    lines = difflib.unified_diff(
        shown.splitlines(), printed.splitlines(), "shown", "printed", n=1, lineterm=""
    )
    return "\n".join(lines)


@functools.cache
def flags_of(experiment: str) -> frozenset[str]:
    """The names of all flags of a runner, from its own `--helpfull`."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{experiment}", "--helpfull"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS_PER_COMMAND,
    )
    found = flags_listed(done.stdout)
    assert found, f"experiments.{experiment} has no flags\n{done.stderr[-4000:]}"
    return found


def flags_listed(text: str) -> frozenset[str]:
    """The names that a help text of absl gives, short and negated ones among them.

    >>> sorted(flags_listed("  -p,--prompt: a prompt\\n  --[no]progress: a bar"))
    ['noprogress', 'p', 'progress', 'prompt']
    """
    lines = re.findall(r"^\s*(?:-(\w),)?--(\[no\])?(\w+):", text, re.MULTILINE)
    names = {short for short, _, _ in lines} | {name for _, _, name in lines}
    negated = {f"no{name}" for _, negatable, name in lines if negatable}
    return frozenset((names | negated) - {""})


def flags_used(line: str) -> set[str]:
    """The names of the flags in a command line, up to the first pipe or redirection."""
    words = shlex.split(re.split(r"[|>;]|&&", line)[0], comments=True)
    return {
        re.sub(r"^--?|=.*$", "", word)
        for word in words[words.index("-m") + 2 :]
        if re.match(r"--?[a-zA-Z]", word)
    }


@pytest.mark.parametrize("where", DOCUMENTS)
def test_python_blocks_run(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
        # Blank lines before it make a traceback name the line of the document.
        code = compile("\n" * block.line + block.text, where, "exec")
        if block.not_run is None:
            exec(code, namespace)


@pytest.mark.parametrize("where", DOCUMENTS)
def test_documented_commands_run_and_print_what_is_shown(where, tmp_path):
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
def test_commands_that_are_not_run_say_why_and_use_flags_that_exist(where):
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
    # A link in a block of code is text, and an anchor or a web page is not a file.
    prose = FENCE.sub("", DOCUMENTS[where])
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
        if ":" not in link:
            assert (ROOT / where).parent.joinpath(link).exists(), f"{where}: {link}"


def test_make_demo_is_the_command_that_transcripts_of_it_are_compared_with():
    for target, runs in MAKE_RUNS.items():
        recipe = rf"^{target.removeprefix('make ')}: env\n\t@\$\(RUN\)(.*)\n\n"
        found = re.search(recipe, MAKEFILE, re.MULTILINE)
        assert found, target
        assert f"python{found[1]}" == runs


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
def test_a_transcript_matches_only_where_it_says_so(shown, printed, same):
    assert (difference(shown, printed) == "") == same


def test_a_command_that_fails_or_prints_something_else_is_reported(tmp_path):
    assert run_command("echo hello", tmp_path) == ("hello\n", "")
    printed, problem = run_command("echo hello; echo why >&2; exit 3", tmp_path)
    assert (printed, problem) == ("hello\n", "exit code 3\nwhy\n")
    assert "-hullo\n+hello" in difference("hullo\n", "hello\n")
