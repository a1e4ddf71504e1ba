"""Counts the steps of greedy decoding with trees of drafts, beside chains of drafts.

    python -m experiments.draft_trees
    python -m experiments.draft_trees --branches 1,2,4,8 --num_drafts 4 --max_tokens 128

A chain of drafts is the continuation of the last earlier occurrence of the last tokens,
as prompt lookup drafts it. A tree has the continuations of several earlier occurrences,
which one step verifies together: each branch is a row that maps the blocks of the text
(`block_manager.fork`), and the branch with the most accepted drafts is kept. So a tree
needs no mask, but tokens common to several branches are computed once per branch.

The model generates a greedy text after each prompt. The text determines the drafts at
each position and how many of them are accepted. The table has, for each number of
branches, tokens per step of the model, and drafts that a step verifies, as rows and as
nodes of a tree with a mask.

The last line on stdout is one JSON object. Time: half a minute on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from experiments.lib import runner
from experiments.lib.runner import Report
from jpaged.llm import LLM
from jpaged.params import SamplingParams

FLAGS = flags.FLAGS
PROMPTS = ("def ", "class ", "import ", "for i in ", "    return ", "if __name__")
MAX_NGRAM = 3


class Steps(NamedTuple):
    """Counts of decoding one text, or several."""

    num_tokens: int
    num_steps: int
    num_row_tokens: int  # drafts that rows verify
    num_nodes: int  # drafts that a tree with a mask verifies


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string("model", "tiny-python", "Folder, or a bundled model's name.")
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
    flags.DEFINE_list("branches", ["1", "2", "4", "8"], "Branches of the trees.")
    flags.DEFINE_integer("num_drafts", 4, "Tokens of a branch.", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 96, "Tokens of each text.", lower_bound=2)


def drafts(known: Sequence[int], branches: int, size: int) -> list[tuple[int, ...]]:
    """Return different continuations of earlier occurrences of the last tokens.

    Those of longer n-grams come first, and among these the latest occurrences.

    Args:
      known: the tokens so far.
      branches: the largest number of continuations.
      size: the largest length of a continuation.

    >>> drafts([5, 6, 7, 8, 5, 6, 9, 5, 6], 2, 2)
    [(9, 5), (7, 8)]
    """
    found: dict[tuple[int, ...], None] = {}
    for ngram in range(min(MAX_NGRAM, len(known) - 1), 0, -1):
        last = list(known[-ngram:])
        for end in range(len(known) - 1, ngram - 1, -1):
            if list(known[end - ngram : end]) == last:
                found.setdefault(tuple(known[end : end + size]))
            if len(found) == branches:
                return list(found)
    return list(found)


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def count_steps(
    prompt: Sequence[int], text: Sequence[int], branches: int, size: int
) -> Steps:
    """Count the steps that generate `text`: each accepts drafts, and adds a token."""
    done = num_steps = rows = nodes = 0
    while done < len(text):
        tree = drafts([*prompt, *text[:done]], branches, size)
        accepted = max((num_common(one, text[done:]) for one in tree), default=0)
        rows += sum(map(len, tree))
        nodes += len({one[:i] for one in tree for i in range(1, len(one) + 1)})
        done += min(accepted + 1, len(text) - done)
        num_steps += 1
    return Steps(len(text), num_steps, rows, nodes)


def main(argv: list[str]) -> None:
    """Generates the texts, and prints a table."""
    del argv
    report, found = Report(), {}
    with runner.user_errors("draft_trees"):
        branches = runner.positive_integers("branches")
        prompts = list(FLAGS.prompt or PROMPTS)
        longest = max(len(prompt.encode()) for prompt in prompts)
        length = longest + FLAGS.max_tokens + 8
        llm = LLM(FLAGS.model, max_num_seqs=8, max_model_len=length)
        greedy = SamplingParams(
            temperature=0.0, max_tokens=FLAGS.max_tokens, ignore_eos=True
        )
        outputs = llm.generate(prompts, greedy, progress=False)
    for number in branches:
        each = [
            count_steps(
                one.prompt_token_ids, one.outputs[0].token_ids, number, FLAGS.num_drafts
            )
            for one in outputs
        ]
        total = Steps(*(sum(column) for column in zip(*each, strict=True)))
        found[number] = {
            "tokens_per_step": total.num_tokens / total.num_steps,
            "row_tokens_per_step": total.num_row_tokens / total.num_steps,
            "nodes_per_step": total.num_nodes / total.num_steps,
        }
        row = found[number]
        report.row(
            f"{number} branches",
            f"{row['tokens_per_step']:.2f} tokens per step",
            f"verifies {row['row_tokens_per_step']:.1f} drafts as rows",
            f"{row['nodes_per_step']:.1f} as nodes of a tree",
        )
    report.details["branches"] = {str(number): row for number, row in found.items()}
    report.last_line(runner.flag_values(__name__))


if __name__ == "__main__":
    runner.start(main, define_flags)
