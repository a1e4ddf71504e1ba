"""The main job: prompts in, text out.

    python -m experiments.generate
    python -m experiments.generate --prompt "def area(" --prompt "import " --stream
    python -m experiments.generate --prompt_file prompts.jsonl --model FOLDER

Without --prompt and --prompt_file the bundled model continues a built-in prompt. Each
prompt is printed with its continuation as soon as that has ended, or with --stream as
it grows; then what ended it. The last line on stdout is one JSON object: prompt_tokens,
generated_tokens, tokens_per_s (of running steps), stats (of the KV memory and the
engine), seconds to the first token since the program started, versions and device.

A prompt file has a prompt on each line; or, if its name ends in .jsonl, on each line a
JSON object with "prompt" (text or a list of token ids) and, where a line differs from
the flags, any fields of SamplingParams, or with "beam_width" of BeamSearchParams:
{"prompt": "def f(", "max_tokens": 8, "structured_outputs": {"regex": "[a-z]+"}}. Empty
lines are skipped. A line that is wrong is reported on stderr by file and number, and
the others are generated.

Exit status: 0, or 1 where a prompt or line was wrong, which is after the others were
generated; also 1 where nothing could run: a wrong flag, model or file.
"""

from __future__ import annotations

import time

START = time.perf_counter()  # before jax is imported, which takes its time

import dataclasses  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from jpaged.config import PREEMPTIONS  # noqa: E402
from jpaged.engine.limits import Params, num_rows  # noqa: E402
from jpaged.llm import LLM, Delta  # noqa: E402
from jpaged.outputs import CompletionOutput, RequestOutput  # noqa: E402
from jpaged.parallel.mesh import make_mesh  # noqa: E402
from jpaged.params import BeamSearchParams, SamplingParams, StructuredOutputsParams  # noqa: E402
from jpaged.policies import POLICIES  # noqa: E402

FLAGS = flags.FLAGS
_PARAMS = (SamplingParams, BeamSearchParams)
BUILT_IN_PROMPTS = ("def ", "class ", "import ")


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_multi_string("prompt", [], "A prompt; repeat the flag for several.")
    flags.DEFINE_string("prompt_file", None, "A prompt a line, or JSON lines (.jsonl).")
    flags.DEFINE_string(
        "model",
        "tiny-python",
        "Folder in Hugging Face layout, or a bundled model's name.",
    )
    flags.DEFINE_integer("max_tokens", 48, "Most tokens to generate for a prompt.")
    flags.DEFINE_float("temperature", 0.5, "0 takes the most likely token each time.")
    flags.DEFINE_integer("top_k", 0, "Sample among the k most likely tokens; 0: all.")
    flags.DEFINE_float("top_p", 0.95, "Sample among the fewest tokens of this mass.")
    flags.DEFINE_float(
        "min_p", 0.0, "Drop tokens below this share of the likeliest one's."
    )
    flags.DEFINE_integer("n", 1, "Samples of each prompt; needs a temperature above 0.")
    flags.DEFINE_integer(
        "seed", 1, "Of the samples: prompts without a seed of their own."
    )
    flags.DEFINE_multi_string("stop", [], "Text that ends an output; may be repeated.")
    flags.DEFINE_multi_integer(
        "stop_token_id", [], "Token that ends an output, as EOS."
    )
    flags.DEFINE_bool("ignore_eos", False, "Go on after the model's end-of-text token.")
    flags.DEFINE_integer(
        "logprobs", None, "Print this many likeliest tokens a position."
    )
    flags.DEFINE_integer("beam_width", 0, "Beam search with so many beams; 0: sample.")
    flags.DEFINE_float("length_penalty", 1.0, "Of beams: score is by length ** this.")
    flags.DEFINE_string("regex", None, "What each output must match, as a whole.")
    flags.DEFINE_multi_string("choice", [], "Outputs to choose from; repeat the flag.")
    flags.DEFINE_integer(
        "num_speculative_tokens", 0, "Tokens guessed ahead in a step; 0: none."
    )
    flags.DEFINE_string(
        "draft_model", None, "A smaller model that guesses; without, the text so far."
    )
    flags.DEFINE_enum("quantization", None, ["int8"], "Of the weights; default: none.")
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "Of the weights."
    )
    flags.DEFINE_integer("block_size", 16, "Tokens per KV block.")
    flags.DEFINE_integer("num_blocks", None, "KV blocks; default: what memory holds.")
    flags.DEFINE_integer(
        "max_num_seqs", None, "Sequences that run at once; default: all, up to 64."
    )
    flags.DEFINE_integer("max_model_len", None, "Most tokens of prompt and output.")
    flags.DEFINE_integer(
        "max_num_batched_tokens",
        None,
        "Tokens of one step; default: by need, up to 512.",
    )
    flags.DEFINE_enum("policy", "fcfs", sorted(POLICIES), "Who is admitted first.")
    flags.DEFINE_multi_float("policy_parameters", [], "A weight each, of 'weighted'.")
    flags.DEFINE_integer("tensor", 1, "Devices that share each matrix.", lower_bound=1)
    flags.DEFINE_integer("expert", 1, "Devices that share the experts.", lower_bound=1)
    flags.DEFINE_integer("data", 1, "Replicas of the model.", lower_bound=1)
    flags.DEFINE_bool(
        "prefix_caching", True, "Keep blocks of ended prompts for those that begin so."
    )
    flags.DEFINE_enum(
        "preemption",
        "recompute",
        PREEMPTIONS,
        "What becomes of a sequence when blocks run out.",
    )
    flags.DEFINE_integer(
        "num_swap_blocks", 0, "KV blocks in the host's memory, for --preemption=swap."
    )
    flags.DEFINE_bool("stream", False, "Print text as it grows, prompt after prompt.")
    flags.DEFINE_bool("progress", True, "A bar on stderr, where that is a terminal.")


@dataclasses.dataclass(frozen=True)
class Line:
    """A request, and where it comes from."""

    where: str
    prompt: Any
    params: Params | None  # None where it is wrong
    error: str | None = None


def flag_params() -> dict[str, Any]:
    """The flags of decoding as fields of SamplingParams and BeamSearchParams."""
    names = ("n", "temperature", "top_k", "top_p", "min_p", "max_tokens", "stop")
    beams = ("beam_width", "length_penalty")
    names = (*names, *beams, "ignore_eos", "logprobs")
    fields = {name: FLAGS[name].value for name in names}
    fields["stop_token_ids"] = FLAGS.stop_token_id
    given = {"regex": FLAGS.regex, "choice": FLAGS.choice or None}
    given = {name: value for name, value in given.items() if value is not None}
    return fields | ({"structured_outputs": given} if given else {})


def make_params(fields: dict[str, Any], own: dict[str, Any]) -> Params:
    """The parameters of a request; `own` are its fields, `fields` those of the flags.

    Raises:
      ValueError: a value is wrong, or a line's own fields do not go together.
    """
    known = {cls: [f.name for f in dataclasses.fields(cls)] for cls in _PARAMS}
    chosen = fields | own
    cls = BeamSearchParams if chosen["beam_width"] else SamplingParams
    if unknown := sorted(set(own) - {*known[cls], "beam_width"}):
        kind = " of beam search" if cls is BeamSearchParams else ""
        raise ValueError(
            f"{unknown[0]}: no such parameter{kind}; wanted some of "
            f"{', '.join(known[cls])}"
        )
    chosen = {name: value for name, value in chosen.items() if name in known[cls]}
    if isinstance(structured := chosen.get("structured_outputs"), dict):
        chosen["structured_outputs"] = StructuredOutputsParams(**structured)
    if isinstance(bias := chosen.get("logit_bias"), dict):
        # JSON has no keys but strings.
        chosen["logit_bias"] = {
            int(token) if str(token).isdigit() else token: value
            for token, value in bias.items()
        }
    return cls(**chosen)


def read_lines(path: pathlib.Path, fields: dict[str, Any]) -> list[Line]:
    """The requests of a prompt file; `fields` are the defaults of their parameters.

    Raises:
      OSError: the file cannot be read.
    """
    is_json = path.suffix == ".jsonl"
    lines = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}:{number}"
        if not raw.strip():
            continue
        try:
            text = raw.decode("utf-8").removesuffix("\r")
            prompt, own = _parse(text) if is_json else (text, {})
            lines.append(Line(where, prompt, make_params(fields, own)))
        except (ValueError, TypeError) as error:
            lines.append(Line(where, None, None, str(error)))
    return lines


def _parse(text: str) -> tuple[Any, dict[str, Any]]:
    """The prompt of a JSON line, and its own sampling parameters."""
    request = json.loads(text)
    if not isinstance(request, dict) or "prompt" not in request:
        raise ValueError(f'wanted a JSON object with "prompt", got {text:.60}')
    prompt = request.pop("prompt")
    return prompt, request


class Printer:
    """Prints outputs on stdout, whole or as they grow."""

    def __init__(self, prompts: list[Any], has_text: bool):
        self._prompts = prompts
        self._has_text = has_text  # else token ids are printed

    def whole(self, index: int, output: RequestOutput) -> None:
        """Prints a finished request."""
        for completion in output.outputs:
            self._head(index, completion.index, len(output.outputs))
            text, token_ids = completion.text, completion.token_ids
            self._write(text if self._has_text else _ids(token_ids))
            self._foot(completion.finish_reason, len(completion.token_ids))
            if completion.logprobs is not None:
                self._logprobs(completion)

    def stream(self, deltas: Iterable[Delta], num_samples: list[int]) -> None:
        """Prints outputs as they grow, one by one; others wait for their turn."""
        order = [(i, j) for i, n in enumerate(num_samples) for j in range(n)]
        waiting: dict[tuple[int, int], list[Delta]] = {key: [] for key in order}
        num_tokens = 0
        turn = iter(order)
        current = self._next_head(turn, num_samples)
        for delta in deltas:
            waiting[delta.request, delta.sample].append(delta)
            while current is not None and waiting[current]:
                part = waiting[current].pop(0)
                num_tokens += len(part.token_ids)
                self._write(part.text if self._has_text else _ids(part.token_ids))
                if part.finish_reason is not None:
                    self._foot(part.finish_reason, num_tokens)
                    num_tokens = 0
                    current = self._next_head(turn, num_samples)

    def _next_head(self, turn: Iterator[tuple[int, int]], num_samples: list[int]):
        current = next(turn, None)
        if current is not None:
            self._head(*current, num_samples[current[0]])
        return current

    def _head(self, index: int, sample: int, num_samples: int) -> None:
        which = f"{index + 1}/{len(self._prompts)}"
        if num_samples > 1:
            which += f", sample {sample + 1}/{num_samples}"
        prompt = self._prompts[index]
        self._write(f"--- {which}\n")
        self._write(prompt if isinstance(prompt, str) else f"{_ids(prompt)}-> ")

    def _foot(self, reason: str | None, num_tokens: int) -> None:
        self._write(f"\n--- {reason}, {num_tokens} tokens\n\n")

    def _logprobs(self, output: CompletionOutput) -> None:
        for token, likely in zip(output.token_ids, output.logprobs or [], strict=True):
            entries = (
                f"{name} {found.decoded_token or ''!r} {found.logprob:.3f}"
                for name, found in likely.items()
            )
            self._write(f"{token}: {', '.join(entries)}\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _ids(token_ids: Any) -> str:
    return "".join(f"{token} " for token in token_ids)


def make_llm(lines: list[Line]) -> LLM:
    """The model and engine that the flags ask for, no larger than the lines need.

    An engine for few sequences compiles sooner.
    """
    max_num_seqs, num_tokens = FLAGS.max_num_seqs, FLAGS.max_num_batched_tokens
    if max_num_seqs is None:
        params = [line.params for line in lines if line.params is not None]
        num_samples = sum(map(num_rows, params))
        max_num_seqs = next((n for n in (1, 4, 8, 16, 32) if n >= num_samples), 64)
    if num_tokens is None:
        # A token is at least a byte of text, special ones aside.
        num_bytes = sum(len(str(line.prompt).encode()) + 4 for line in lines)
        sizes = (n for n in (32, 64, 128, 256) if n >= num_bytes)
        num_tokens = max(next(sizes, 512), max_num_seqs)
    names = ("model", "dtype", "block_size", "num_blocks", "max_model_len", "policy")
    return LLM(
        **{name: FLAGS[name].value for name in (*names, "seed", "quantization")},
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
    """The devices of the flags; None is one."""
    if FLAGS.tensor == FLAGS.expert == FLAGS.data == 1:
        return None
    return make_mesh(tensor=FLAGS.tensor, data=FLAGS.data, expert=FLAGS.expert)


def _speculative_config() -> dict[str, Any] | None:
    number, draft = FLAGS.num_speculative_tokens, FLAGS.draft_model
    if draft is not None and not number:
        raise ValueError("draft_model: wanted --num_speculative_tokens above 0 with it")
    if not number:
        return None
    model = {} if draft is None else {"model": draft}
    return {"num_speculative_tokens": number, **model}


def all_lines() -> list[Line]:
    """The requests that the flags ask for.

    Raises:
      OSError, ValueError: no such prompt file, or a wrong flag.
    """
    fields = flag_params()
    params = make_params(fields, {})
    prompts = list(FLAGS.prompt)
    if not prompts and FLAGS.prompt_file is None:
        prompts = list(BUILT_IN_PROMPTS)
    lines = [
        Line(f"--prompt number {number}", prompt, params)
        for number, prompt in enumerate(prompts, start=1)
    ]
    if FLAGS.prompt_file is not None:
        lines += read_lines(pathlib.Path(FLAGS.prompt_file), fields)
    if FLAGS.stream and any(
        getattr(line.params, "logprobs", None) is not None for line in lines
    ):
        raise ValueError("logprobs: not printed with --stream; leave out one of them")
    return lines


def sift(llm: LLM, lines: list[Line]) -> list[Line]:
    """The lines that can run; the others are reported on stderr."""
    good = []
    for line in lines:
        error = line.error
        if error is None:
            (error,) = llm.check([line.prompt], line.params)
        if error is None:
            good.append(line)
        else:
            print(f"{line.where}: {error}", file=sys.stderr)
    return good


def run(llm: LLM, lines: list[Line]) -> float | None:
    """Generates and prints; gives the time of the first token."""
    prompts = [line.prompt for line in lines]
    params = [line.params for line in lines if line.params is not None]
    printer = Printer(prompts, llm.tokenizer is not None)
    first_s = []
    start = time.perf_counter()
    if not FLAGS.stream:

        def show(index: int, output: RequestOutput) -> None:
            first_s.append(start + output.metrics["first_token_s"])
            printer.whole(index, output)

        llm.generate(prompts, params, FLAGS.progress, on_output=show)
        return min(first_s, default=None)

    def timed() -> Iterator[Delta]:
        for delta in llm.stream(prompts, params):
            first_s.append(time.perf_counter())
            yield delta

    printer.stream(timed(), list(map(_num_outputs, params)))
    return min(first_s, default=None)


def _num_outputs(params: Params) -> int:
    chosen = getattr(params, "num_return", None)
    return num_rows(params) if chosen is None else chosen


def summary(
    llm: LLM, num_requests: int, num_wrong: int, first_s: float | None
) -> dict[str, Any]:
    """What the last line says."""
    stats = llm.stats()
    device = jax.devices()[0]
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
        "device": f"{device.platform} {device.device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "stats": stats,
    }


def main(argv: list[str]) -> int:
    """Reads flags, prints."""
    # jax tells at this level which accelerators it did not find.
    logging.getLogger("jax").setLevel(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"a prompt needs its flag: --prompt {argv[1]!r}")
    try:
        lines = all_lines()
        llm = make_llm(lines)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    good = sift(llm, lines)
    num_wrong = len(lines) - len(good)
    try:
        first_s = run(llm, good)
        print(json.dumps(summary(llm, len(good), num_wrong, first_s)), flush=True)
    except KeyboardInterrupt:
        print("\ngenerate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 1 if num_wrong else 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
