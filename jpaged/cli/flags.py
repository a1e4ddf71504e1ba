"""Flags of `python -m jpaged`: prompts, request parameters, and the arguments of LLM.

Pipeline: command line -> [flags] -> parameters and LLM. Host only.
"""

from __future__ import annotations

import argparse
from typing import Any

from jpaged.engine_args import EngineArgs, FlexibleArgumentParser
from jpaged.llm import LLM

DESCRIPTION = """\
Generate text from prompts, or chat with a model in the terminal.

  python -m jpaged "def area("                  one prompt
  python -m jpaged --prompt-file prompts.jsonl  a prompt per line
  echo "def area(" | python -m jpaged           a prompt from stdin
  python -m jpaged chat --model FOLDER          a conversation

Only results are written to stdout. With several outputs, each follows its prompt. Exit
status: 0; 1 if a prompt was invalid or nothing could run; 130 after Ctrl-C.
"""
_FLAG = argparse.BooleanOptionalAction
# Fields of SamplingParams and BeamSearchParams: type and description.
_PARAMETERS: dict[str, tuple[Any, str]] = {
    "n": (int, "outputs of each prompt; needs a temperature above 0"),
    "temperature": (float, "0 is greedy decoding"),
    "top_k": (int, "sample from the k most probable tokens; 0: all"),
    "top_p": (float, "sample from the fewest tokens with this total probability"),
    "min_p": (float, "drop tokens below this share of the largest probability"),
    "repetition_penalty": (float, "above 1: fewer repetitions"),
    "presence_penalty": (float, "above 0: fewer tokens that the output has"),
    "frequency_penalty": (float, "above 0: fewer tokens that the output has often"),
    "min_tokens": (int, "fewest tokens before an output may end"),
    "logprobs": (int, "with --json: most probable tokens per position"),
    "beam_width": (int, "beams of beam search, in place of sampling"),
    "length_penalty": (float, "exponent of the length that divides beams' scores"),
}


def make_parser() -> FlexibleArgumentParser:
    """Return the parser of all flags."""
    parser = FlexibleArgumentParser(
        prog="python -m jpaged",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="chat | PROMPT",
        help="chat, or prompts; without any, stdin is the prompt, and in a terminal a "
        "chat starts",
    )
    _add_input_flags(parser.add_argument_group("prompts and results"))
    _add_parameter_flags(parser.add_argument_group("request parameters"))
    EngineArgs.add_cli_args(parser.add_argument_group("arguments of jpaged.LLM"))
    return parser


def _add_input_flags(group: Any) -> None:
    group.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be repeated"
    )
    group.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a prompt per line, or with .jsonl an object per line: "
        '{"prompt": "def f(", "max_tokens": 8}; may be repeated',
    )
    group.add_argument(
        "--json", action="store_true", help="print each output as a line of JSON"
    )
    group.add_argument(
        "--stream", action=_FLAG, default=None, help="print text as it grows"
    )
    group.add_argument(
        "--progress", action=_FLAG, default=True, help="bars on stderr, in a terminal"
    )
    group.add_argument("--system", metavar="TEXT", help="chat: the system message")
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="chat: a template in place of the model's",
    )


def _add_parameter_flags(group: Any) -> None:
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="most tokens of an output; default: 128, and 1024 in a chat",
    )
    for name, (kind, text) in _PARAMETERS.items():
        metavar = "N" if kind is int else "X"
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="ends an output; may be repeated",
    )
    group.add_argument(
        "--stop-token-id", action="append", type=int, metavar="N", help="as EOS does"
    )
    group.add_argument("--ignore-eos", action="store_true", help="continue after EOS")
    group.add_argument("--regex", metavar="PATTERN", help="that each output matches")
    group.add_argument(
        "--choice", action="append", metavar="TEXT", help="outputs are one of these"
    )
    group.add_argument("--json-schema", metavar="JSON", help="that each output matches")


def given_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return the request parameters that are given, as fields of SamplingParams."""
    names = {name: name for name in (*_PARAMETERS, "max_tokens", "stop")}
    names["stop_token_id"] = "stop_token_ids"
    found = {
        field: getattr(args, name)
        for name, field in names.items()
        if getattr(args, name) is not None
    }
    if args.ignore_eos:
        found["ignore_eos"] = True
    kinds = {"regex": args.regex, "choice": args.choice, "json": args.json_schema}
    constraint = {kind: value for kind, value in kinds.items() if value is not None}
    return found | ({"structured_outputs": constraint} if constraint else {})


def open_llm(args: argparse.Namespace, **defaults: Any) -> LLM:
    """Create the LLM of the arguments; `defaults` replace those that are LLM's own."""
    arguments = vars(EngineArgs.from_cli_args(args))
    unset = vars(make_parser().parse_args([]))
    for name, value in defaults.items():
        if arguments[name] == unset[name]:
            arguments[name] = value
    return LLM(**arguments)
