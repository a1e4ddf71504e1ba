"""Main program of `python -m jpaged`: generate from prompts, or chat.

Pipeline: command line -> [main] -> llm -> stdout. Host only.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jpaged.cli.chat import chat
from jpaged.cli.flags import given_parameters, make_parser, open_llm
from jpaged.cli.output_printer import OutputPrinter
from jpaged.cli.prompt_files import PromptLine, make_params, read_lines
from jpaged.engine.limits import num_rows
from jpaged.llm import LLM
from jpaged.outputs import RequestOutput
from jpaged.params import BeamSearchParams

MAX_TOKENS = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
      argv: arguments without the program's name; None are those of the process.
    """
    # At a lower level jax reports every accelerator that it does not find.
    logging.getLogger("jax").setLevel(logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters that the terminal's encoding lacks must not end the program.
        sys.stdout.reconfigure(errors="backslashreplace")
    args = make_parser().parse_args(argv)
    try:
        if args.words[:1] == ["chat"] or not _has_prompts(args):
            return chat(args)
        return generate(args)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"jpaged: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\njpaged: interrupted", file=sys.stderr)
        return 130


def _has_prompts(args: argparse.Namespace) -> bool:
    given = args.words or args.prompt or args.prompt_file
    return bool(given) or not sys.stdin.isatty()


def request_lines(
    args: argparse.Namespace, defaults: dict[str, Any]
) -> list[PromptLine]:
    """Return the requests of the arguments, the files or stdin.

    Raises:
      OSError: a file cannot be read.
      ValueError: a parameter is invalid.
    """
    defaults = {"beam_width": 0, "max_tokens": MAX_TOKENS} | defaults
    params = make_params(defaults, {})
    texts = [("prompt", word) for word in args.words]
    texts += [("--prompt", text) for text in args.prompt]
    if not texts and not args.prompt_file:
        raw = sys.stdin.buffer.read()
        try:
            text = raw.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
            texts = [("stdin", text)]
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin: expected UTF-8, got {error}") from None
    lines = [
        PromptLine(f"{where} number {number}", text, params)
        for number, (where, text) in enumerate(texts, start=1)
    ]
    for path in args.prompt_file:
        lines += read_lines(pathlib.Path(path), defaults)
    return lines


def generate(args: argparse.Namespace) -> int:
    """Generate from prompts and print the outputs; returns the exit status."""
    given = given_parameters(args)
    lines = request_lines(args, given)
    if not lines:
        raise ValueError("prompt: expected at least one, got none")
    rows = sum(num_rows(line.params) for line in lines if line.params is not None)
    # An engine for fewer sequences compiles faster.
    sizes = dict(max_num_seqs=next((n for n in (1, 4, 16) if n >= rows), 64))
    llm = open_llm(args, **sizes)
    valid = []
    for line in lines:
        error = line.error or llm.check([line.prompt], line.params)[0]
        if error is None:
            valid.append(line)
        else:
            print(f"jpaged: {line.where}: {error}", file=sys.stderr)
    if valid:
        print_outputs(llm, valid, args)
    return 0 if len(valid) == len(lines) else 1


def print_outputs(llm: LLM, lines: list[PromptLine], args: argparse.Namespace) -> None:
    """Generate, and print each output when it is complete or as it grows."""
    prompts = [line.prompt for line in lines]
    params = [line.params for line in lines if line.params is not None]
    if args.json:

        def print_line(index: int, output: RequestOutput) -> None:
            print(json.dumps(_record(index, output)), flush=True)

        llm.generate(prompts, params, args.progress, on_output=print_line)
        return
    numbers = [_num_outputs(one) for one in params]
    if sum(numbers) == 1:
        _print_one(llm, prompts[0], params[0], args.stream)
        return
    printer = OutputPrinter(prompts, llm.tokenizer is not None)
    if args.stream:
        printer.print_stream(llm.stream(prompts, params), numbers)
    else:
        llm.generate(prompts, params, args.progress, on_output=printer.print_complete)


def _print_one(llm: LLM, prompt: Any, params: Any, stream: bool | None) -> None:
    """Print one output and nothing else, as it grows unless `stream` is False."""
    has_text = llm.tokenizer is not None
    if stream is None or stream:
        for delta in llm.stream([prompt], params):
            sys.stdout.write(delta.text if has_text else _ids(delta.token_ids))
            sys.stdout.flush()
    else:
        (output,) = llm.generate([prompt], params, False)
        first = output.outputs[0]
        sys.stdout.write(first.text if has_text else _ids(first.token_ids))
    print(flush=True)


def _ids(token_ids: Sequence[int]) -> str:
    return "".join(f"{token} " for token in token_ids)


def _num_outputs(params: Any) -> int:
    if isinstance(params, BeamSearchParams) and params.num_return is not None:
        return params.num_return
    return num_rows(params)


def _record(index: int, output: RequestOutput) -> dict[str, Any]:
    """Return an output as JSON."""
    return {
        "index": index,
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "outputs": [
            {
                "text": one.text,
                "token_ids": list(one.token_ids),
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
                "cumulative_logprob": one.cumulative_logprob,
                "score": one.score,
                "logprobs": one.logprobs
                and [
                    [
                        {"token_id": token, **found._asdict()}
                        for token, found in at.items()
                    ]
                    for at in one.logprobs
                ],
            }
            for one in output.outputs
        ],
    }
