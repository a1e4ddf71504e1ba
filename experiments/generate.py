"""Generates text: prompts in, text out.

    python -m experiments.generate
    python -m experiments.generate --prompt "def area(" --prompt "import " --stream
    python -m experiments.generate --prompt_file prompts.jsonl --model FOLDER
    python -m experiments.generate --model smollm2-135m-instruct
    python -m experiments.generate --model FILE.gguf --chat --prompt "Who are you?"

Without `--prompt` and `--prompt_file`, the bundled model continues built-in prompts,
and a model with a chat template answers built-in questions. With `--chat`, each text is
asked as a user's message with the model's chat template.
Each prompt and its output are printed when the output is complete, or as it grows with
`--stream`, followed by the reason why it ended. The last line on stdout is one JSON
object: prompt_tokens, generated_tokens, tokens_per_s (of running steps), stats (of KV
memory and engine), seconds from the start of the program to the first token, versions
and device.

A prompt file has one prompt per line. If its name ends in .jsonl, each line is a JSON
object with "prompt" (text or a list of token ids), and optionally fields of
SamplingParams, or with "beam_width" of BeamSearchParams, which replace the flags:
{"prompt": "def f(", "max_tokens": 8, "structured_outputs": {"regex": "[a-z]+"}}. Empty
lines are skipped. Invalid lines are reported on stderr by file and line number, and the
others are generated.

Exit status: 0 on success. 1 if a prompt or line was invalid, after the others were
generated, or if nothing could run: an invalid flag, model or file.
"""

# ruff: noqa: E402 -- START comes before the import of jax, which takes seconds

from __future__ import annotations

import time

START = time.perf_counter()

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags
from jax.sharding import Mesh

from experiments.lib import runner
from experiments.lib.output_printer import OutputPrinter
from experiments.lib.prompt_files import PromptLine, make_params, read_lines
from jpaged.config import PREEMPTIONS
from jpaged.engine.limits import Params, num_rows
from jpaged.llm import LLM, Delta
from jpaged.outputs import RequestOutput
from jpaged.parallel.mesh import make_mesh
from jpaged.policies import POLICIES
from jpaged.text import chat

FLAGS = flags.FLAGS
BUILT_IN_PROMPTS = ("def ", "class ", "import ")
BUILT_IN_QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a short poem about the sea.",
)


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
    flags.DEFINE_string(
        "prompt_file", None, "File with one prompt per line, or JSON lines (.jsonl)."
    )
    flags.DEFINE_bool(
        "chat",
        None,
        "Ask each text as a user's message; default: only the built-in questions.",
    )
    _define_decoding_flags()
    _define_engine_flags()
    flags.DEFINE_bool("stream", False, "Print text as it grows, prompt after prompt.")
    flags.DEFINE_bool("progress", True, "Show a progress bar if stderr is a terminal.")


def _define_decoding_flags() -> None:
    """Defines the flags of requests: fields of SamplingParams and BeamSearchParams."""
    flags.DEFINE_integer("max_tokens", 48, "Most tokens of an output.")
    flags.DEFINE_float("temperature", 0.5, "Sampling temperature; 0 is greedy.")
    flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: all.")
    flags.DEFINE_float(
        "top_p", 0.95, "Sample from the fewest tokens with this total probability."
    )
    flags.DEFINE_float(
        "min_p", 0.0, "Drop tokens below this share of the largest probability."
    )
    flags.DEFINE_integer("n", 1, "Samples of each prompt; needs a temperature above 0.")
    flags.DEFINE_integer("seed", 1, "Seed for prompts that have no seed themselves.")
    flags.DEFINE_multi_string("stop", [], "Text that ends an output; may be repeated.")
    flags.DEFINE_multi_integer(
        "stop_token_id", [], "Token that ends an output, as EOS; may be repeated."
    )
    flags.DEFINE_bool("ignore_eos", False, "Continue after the model's EOS token.")
    flags.DEFINE_integer(
        "logprobs", None, "Print this many most likely tokens per position."
    )
    flags.DEFINE_integer("beam_width", 0, "Beams of beam search; 0: sample.")
    flags.DEFINE_float(
        "length_penalty",
        1.0,
        "Exponent of the length by which beam scores are divided.",
    )
    flags.DEFINE_string("regex", None, "Pattern that each whole output must match.")
    flags.DEFINE_multi_string(
        "choice", [], "Text from which outputs are chosen; may be repeated."
    )


def _define_engine_flags() -> None:
    """Defines the flags of the model and the engine."""
    flags.DEFINE_string(
        "model",
        "tiny-python",
        "Folder in Hugging Face layout, GGUF file, hub id, name or random:NAME.",
    )
    flags.DEFINE_enum("quantization", None, ["int8"], "Of the weights; default: none.")
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "Of the weights."
    )
    flags.DEFINE_integer(
        "num_speculative_tokens", 0, "Tokens drafted per step; 0: none."
    )
    flags.DEFINE_string(
        "draft_model", None, "Smaller model that drafts; default: prompt lookup."
    )
    flags.DEFINE_integer("block_size", 16, "Tokens per KV block.")
    flags.DEFINE_integer(
        "num_blocks", None, "KV blocks; default: as many as fit into memory."
    )
    flags.DEFINE_integer(
        "max_num_seqs",
        None,
        "Sequences that run at once; default: all requested ones, up to 64.",
    )
    flags.DEFINE_integer(
        "max_model_len", None, "Most tokens of prompt and output together."
    )
    flags.DEFINE_integer(
        "max_num_batched_tokens",
        None,
        "Token budget of a step; default: as the prompts need, up to 512.",
    )
    flags.DEFINE_enum(
        "policy", "fcfs", sorted(POLICIES), "Order in which requests are admitted."
    )
    flags.DEFINE_multi_float(
        "policy_parameters", [], "Weight of the policy 'weighted'; repeat for each."
    )
    flags.DEFINE_integer("tensor", 1, "Devices that share each matrix.", lower_bound=1)
    flags.DEFINE_integer("expert", 1, "Devices that share the experts.", lower_bound=1)
    flags.DEFINE_integer("data", 1, "Replicas of the model.", lower_bound=1)
    flags.DEFINE_bool(
        "prefix_caching", True, "Keep blocks of finished requests for shared prefixes."
    )
    flags.DEFINE_enum(
        "preemption",
        "recompute",
        PREEMPTIONS,
        "How a preempted sequence gets its keys and values back.",
    )
    flags.DEFINE_integer(
        "num_swap_blocks", 0, "KV blocks in host memory, for --preemption=swap."
    )


def flag_params() -> dict[str, Any]:
    """The decoding flags as fields of SamplingParams and BeamSearchParams."""
    names = ("n", "temperature", "top_k", "top_p", "min_p", "max_tokens", "stop")
    beams = ("beam_width", "length_penalty")
    names = (*names, *beams, "ignore_eos", "logprobs")
    fields = {name: getattr(FLAGS, name) for name in names}
    fields["stop_token_ids"] = FLAGS.stop_token_id
    given = {"regex": FLAGS.regex, "choice": FLAGS.choice or None}
    given = {name: value for name, value in given.items() if value is not None}
    return fields | ({"structured_outputs": given} if given else {})


def all_lines() -> list[PromptLine]:
    """The requests of the flags and the prompt file.

    Raises:
      OSError: The prompt file cannot be read.
      ValueError: A flag is invalid.
    """
    defaults = flag_params()
    params = make_params(defaults, {})
    prompts = list(FLAGS.prompt)
    if not prompts and FLAGS.prompt_file is None:
        prompts = list(BUILT_IN_PROMPTS)
    lines = [
        PromptLine(f"--prompt number {number}", prompt, params)
        for number, prompt in enumerate(prompts, start=1)
    ]
    if FLAGS.prompt_file is not None:
        lines += read_lines(pathlib.Path(FLAGS.prompt_file), defaults)
    if FLAGS.stream and any(
        getattr(line.params, "logprobs", None) is not None for line in lines
    ):
        raise ValueError(
            "--stream: expected requests without logprobs, which a stream does not "
            "print, got some with logprobs"
        )
    return lines


def make_llm(lines: list[PromptLine]) -> LLM:
    """Builds the engine of the flags, no larger than the lines need.

    An engine for fewer sequences compiles faster.
    """
    max_num_seqs, num_tokens = FLAGS.max_num_seqs, FLAGS.max_num_batched_tokens
    if max_num_seqs is None:
        params = [line.params for line in lines if line.params is not None]
        num_samples = sum(map(num_rows, params))
        max_num_seqs = next((n for n in (1, 4, 8, 16, 32) if n >= num_samples), 64)
    if num_tokens is None:
        # Except for special tokens, a token is at least one byte of text.
        # A prompt that is not valid text is refused later, with its file and line.
        texts = (str(line.prompt).encode("utf-8", "surrogatepass") for line in lines)
        num_bytes = sum(len(text) + 4 for text in texts)
        sizes = (n for n in (32, 64, 128, 256) if n >= num_bytes)
        num_tokens = max(next(sizes, 512), max_num_seqs)
    names = ("model", "dtype", "block_size", "num_blocks", "max_model_len", "policy")
    return LLM(
        **{name: getattr(FLAGS, name) for name in (*names, "seed", "quantization")},
        policy_parameters=FLAGS.policy_parameters,
        mesh=_mesh(),
        enable_prefix_caching=FLAGS.prefix_caching,
        preemption=FLAGS.preemption,
        num_swap_blocks=FLAGS.num_swap_blocks,
        speculative_config=_speculative_config(),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=num_tokens,
    )


def _mesh() -> Mesh | None:
    """The devices of the flags; None for one device."""
    if FLAGS.tensor == FLAGS.expert == FLAGS.data == 1:
        return None
    return make_mesh(tensor=FLAGS.tensor, data=FLAGS.data, expert=FLAGS.expert)


def _speculative_config() -> dict[str, Any] | None:
    number, draft = FLAGS.num_speculative_tokens, FLAGS.draft_model
    if draft is not None and not number:
        raise ValueError(
            "--num_speculative_tokens: expected above 0 with --draft_model, got 0"
        )
    if not number:
        return None
    model = {} if draft is None else {"model": draft}
    return {"num_speculative_tokens": number, **model}


def valid_lines(llm: LLM, lines: list[PromptLine]) -> list[PromptLine]:
    """The lines that can run; the others are reported on stderr."""
    valid = []
    for line in lines:
        error = line.error
        if error is None:
            (error,) = llm.check([line.prompt], line.params)
        if error is None:
            valid.append(line)
        else:
            print(f"{line.where}: {error}", file=sys.stderr)
    return valid


def as_chats(llm: LLM, lines: list[PromptLine]) -> list[PromptLine]:
    """The lines with the chat template of the model, if the flags ask for it.

    Raises:
      ValueError: `--chat` is set and the model has no chat template.
    """
    is_built_in = not FLAGS.prompt and FLAGS.prompt_file is None
    if FLAGS.chat is False or (FLAGS.chat is None and not is_built_in):
        return lines
    if not _has_template(llm):
        if FLAGS.chat:
            raise ValueError(
                f"--chat: expected a model with a chat template, got {FLAGS.model!r}"
            )
        return lines
    if is_built_in:
        pairs = zip(lines, BUILT_IN_QUESTIONS, strict=True)
        lines = [dataclasses.replace(line, prompt=text) for line, text in pairs]
    return [_as_chat(llm, line) if line.error is None else line for line in lines]


def _has_template(llm: LLM) -> bool:
    folder = None if llm.tokenizer is None else llm.tokenizer.folder
    if folder is None:
        return False
    return "default" in chat.ChatTemplates.from_folder(folder).templates


def _as_chat(llm: LLM, line: PromptLine) -> PromptLine:
    """The line with the token ids of a conversation of one message."""
    if not isinstance(line.prompt, str):
        return line
    try:
        (prompt,) = chat.chat_prompts(
            llm.tokenizer,
            [{"role": "user", "content": line.prompt}],
            chat_template=None,
            add_generation_prompt=True,
            tools=None,
        )
    except ValueError as error:
        return dataclasses.replace(line, error=str(error))
    return dataclasses.replace(line, prompt=prompt, shown=f"{line.prompt}\n\n")


def generate_and_print(llm: LLM, lines: list[PromptLine]) -> float | None:
    """Generates and prints all outputs; returns the time of the first token."""
    prompts = [line.prompt for line in lines]
    params = [line.params for line in lines if line.params is not None]
    shown = [line.prompt if line.shown is None else line.shown for line in lines]
    printer = OutputPrinter(shown, llm.tokenizer is not None)
    first_s = []
    start = time.perf_counter()
    if not FLAGS.stream:

        def on_output(index: int, output: RequestOutput) -> None:
            assert output.metrics is not None
            first_s.append(start + output.metrics["first_token_s"])
            printer.print_complete(index, output)

        llm.generate(prompts, params, FLAGS.progress, on_output=on_output)
        return min(first_s, default=None)

    def timed() -> Iterator[Delta]:
        for delta in llm.stream(prompts, params):
            first_s.append(time.perf_counter())
            yield delta

    printer.print_stream(timed(), list(map(_num_outputs, params)))
    return min(first_s, default=None)


def _num_outputs(params: Params) -> int:
    chosen = getattr(params, "num_return", None)
    return num_rows(params) if chosen is None else chosen


def generation_summary(
    llm: LLM, num_requests: int, num_wrong: int, first_s: float | None
) -> dict[str, Any]:
    """The record of the last line.

    Args:
      llm: The engine.
      num_requests: Requests that ran.
      num_wrong: Requests that were invalid.
      first_s: Time of the first token, or None.
    """
    stats = llm.stats()
    return {
        "prompt_tokens": stats["prompt_tokens"],
        "generated_tokens": stats["generated_tokens"],
        "tokens_per_s": stats["tokens_per_s"],
        "first_token_s": None if first_s is None else first_s - START,
        "total_s": time.perf_counter() - START,
        "num_requests": num_requests,
        "num_wrong": num_wrong,
        "model": FLAGS.model,
        "dtype": llm.model.config.dtype,
        "stats": stats,
    }


def main(argv: list[str]) -> int:
    """Generates, prints, and returns the exit status."""
    del argv
    with runner.user_errors("generate"):
        lines = all_lines()
        llm = make_llm(lines)
        lines = as_chats(llm, lines)
    valid = valid_lines(llm, lines)
    num_wrong = len(lines) - len(valid)
    try:
        first_s = generate_and_print(llm, valid)
        runner.print_json(generation_summary(llm, len(valid), num_wrong, first_s))
    except KeyboardInterrupt:
        print("\ngenerate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, for example `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 1 if num_wrong else 0


if __name__ == "__main__":
    runner.start(main, define_flags, argument_flag="prompt")
