"""Runs tasks of lm-evaluation-harness with a decoding method of jpaged.

    python -m experiments.evaluate --tasks my_task --include_path tasks/
    python -m experiments.evaluate --tasks my_task --include_path tasks/ \
        --decoding beam --decoding_options '{"beam_width": 4}'

Tasks with log-probabilities (multiple choice, perplexity) score the model itself.
Generation tasks decode with `--decoding`; `--decoding_options` are its parameters:

- greedy: as the task says. Options are those of SamplingParams, for all.
- sampling: temperature 1 unless given: {"temperature": 0.7, "top_p": 0.9}.
- beam: {"beam_width": 4, "length_penalty": 1.0}.
- NAME: an algorithm of `jpaged.decoding`, such as diverse_beam_search or
  stochastic_beam_search, or MODULE:NAME for one of your own. The options are its
  arguments, and num_rows. It gets max_tokens and stop_token_ids if it has them. The
  first output is the answer.

A task is a name of the harness, if its data can be downloaded, or a YAML file below
--include_path, whose data can be local (docs/server.md has an example). The last line
has all results. Needs the extra `lm_eval`.

Time: that of the task. Expected: the results of lm_eval's own `hf` model for the same
checkpoint, with greedy decoding.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from experiments.lib import runner
from experiments.lib.runner import print_json
from jpaged import decoding
from jpaged.llm import LLM
from jpaged.params import AlgorithmParams, BeamSearchParams, SamplingParams

FLAGS = flags.FLAGS
Params = SamplingParams | BeamSearchParams | AlgorithmParams
BUILTIN = ("greedy", "sampling", "beam")


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string("model", "tiny-python", "The model, as for jpaged.LLM.")
    flags.DEFINE_string("dtype", "auto", "Its dtype.")
    flags.DEFINE_list("tasks", [], "Names of tasks.")
    flags.DEFINE_string("include_path", None, "Folder with the YAML files of tasks.")
    flags.DEFINE_string("decoding", "greedy", "How generation tasks decode.")
    flags.DEFINE_string("decoding_options", "{}", "Its options, a JSON object.")
    flags.DEFINE_integer("num_fewshot", None, "Examples in each prompt.", lower_bound=0)
    flags.DEFINE_integer("limit", None, "Documents per task.", lower_bound=1)
    flags.DEFINE_bool("apply_chat_template", False, "Render prompts as conversations.")
    flags.DEFINE_integer("max_length", None, "Tokens of a window.", lower_bound=2)
    flags.DEFINE_integer("max_num_seqs", 32, "Rows of the engine.", lower_bound=1)
    flags.DEFINE_string("speculative_config", None, "As for jpaged.LLM, JSON.")
    flags.DEFINE_integer("seed", 0, "Seed of sampling.")
    flags.DEFINE_string("out", None, "File for all samples, JSON.")


def json_object(flag: str, text: str) -> dict[str, Any]:
    """The object in a flag.

    Raises:
      ValueError: it is not a JSON object.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--{flag}: expected JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--{flag}: expected a JSON object, got {text!r:.80}")
    return found


def find_algorithm(name: str) -> Callable[..., Any]:
    """The function that builds a decoding algorithm.

    Raises:
      ValueError: there is none of this name.
    """
    module_name, _, own = name.rpartition(":")
    try:
        module = importlib.import_module(module_name) if module_name else decoding
    except ImportError as error:
        raise ValueError(f"--decoding: {error}") from error
    found = getattr(module, own, None)
    if not callable(found):
        expected = ", ".join(BUILTIN)
        raise ValueError(
            f"--decoding: expected {expected}, a function of jpaged.decoding or "
            f"MODULE:NAME, got {name!r}"
        )
    return found


def params_maker(
    name: str, options: Mapping[str, Any], eos_token_ids: tuple[int, ...]
) -> Callable[[SamplingParams], Params]:
    """The function that maps a task's parameters to those of a decoding method.

    Args:
      name: The method, see above.
      options: Its options.
      eos_token_ids: The model's EOS tokens.

    Raises:
      ValueError: The method does not exist.
    """
    fields = {"temperature": 1.0, **options} if name == "sampling" else dict(options)

    def changed(params: SamplingParams) -> Params:
        names = [field.name for field in dataclasses.fields(params)]
        known = {name: getattr(params, name) for name in names}
        return SamplingParams(**known | fields)

    def beams(params: SamplingParams) -> Params:
        return BeamSearchParams(**{"max_tokens": params.max_tokens, **fields})

    if name in ("greedy", "sampling"):
        return changed
    if name == "beam":
        return beams
    build = find_algorithm(name)
    names = inspect.signature(build).parameters
    num_rows = int(fields.pop("num_rows", 1))

    # A program is compiled for each algorithm, so equal ones are shared.
    @functools.lru_cache
    def algorithm(max_tokens: int) -> Any:
        given = {"max_tokens": max_tokens, "stop_token_ids": eos_token_ids}
        given = {key: value for key, value in given.items() if key in names}
        return build(**given, **fields)

    def algorithms(params: SamplingParams) -> Params:
        most = params.max_tokens
        assert most is not None
        return AlgorithmParams(algorithm(most), num_rows=num_rows, max_tokens=most)

    return algorithms


def evaluate() -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs the tasks of the flags; returns the results and the samples.

    Raises:
      ValueError: A flag is invalid, or the extra is not installed.
    """
    if not FLAGS.tasks:
        raise ValueError("--tasks: expected at least one task, got none")
    options = json_object("decoding_options", FLAGS.decoding_options)
    speculative = FLAGS.speculative_config
    if speculative is not None:
        speculative = json_object("speculative_config", speculative)
    if FLAGS.decoding not in BUILTIN:
        find_algorithm(FLAGS.decoding)
    try:
        lm_eval: Any = importlib.import_module("lm_eval")
        tasks: Any = importlib.import_module("lm_eval.tasks")
        ours: Any = importlib.import_module("jpaged.evals.lm_eval")
    except ImportError as error:
        raise ValueError(
            f'{error}: install the extra: pip install "jpaged[lm_eval]"'
        ) from error
    llm = LLM(
        FLAGS.model,
        dtype=FLAGS.dtype,
        max_num_seqs=FLAGS.max_num_seqs,
        speculative_config=speculative,
        seed=FLAGS.seed,
    )
    make = params_maker(FLAGS.decoding, options, tuple(llm.model.config.eos_token_ids))
    make(SamplingParams())  # checks the options
    model = ours.JPagedLM(
        llm, make_params=make, max_length=FLAGS.max_length, seed=FLAGS.seed
    )
    found: Any = lm_eval.simple_evaluate(
        model=model,
        tasks=FLAGS.tasks,
        task_manager=tasks.TaskManager(include_path=FLAGS.include_path),
        num_fewshot=FLAGS.num_fewshot,
        limit=FLAGS.limit,
        apply_chat_template=FLAGS.apply_chat_template,
        bootstrap_iters=0,
    )
    assert found is not None
    return found["results"], found.get("samples", {})


def main(argv: list[str]) -> None:
    """Runs the tasks and prints their results."""
    del argv
    with runner.user_errors("evaluate", TypeError, KeyError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness
        results, samples = evaluate()
        for task, values in results.items():
            for name, value in values.items():
                if isinstance(value, float):
                    print(f"{task:<30}{name:<34}{value:.6g}")
        if FLAGS.out is not None:
            text = json.dumps(samples, default=str)
            pathlib.Path(FLAGS.out).write_text(text, "utf-8")
    plain = json.loads(json.dumps(results, default=str))
    print_json({"results": plain, "flags": runner.flag_values(__name__)})


if __name__ == "__main__":
    runner.start(main, define_flags)
