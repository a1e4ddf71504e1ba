"""Measures the time to the first token, and where it goes.

    python -m experiments.bench_startup
    python -m experiments.bench_startup --model sizes --max_num_seqs 32
    python -m experiments.bench_startup --features greedy,sampling,logprobs,beams

Three processes make the same calls, one for each of `--features`, with `--num_prompts`
random prompts. The first one has an empty folder for compiled programs, and the second
one has what the first one stored there. Their rows are seconds and processor seconds
since the start of the process: `import` of jpaged and jax, `load` of the model and
creation of the engine, the `first token`, the end of each call, and the last program
that was compiled beside the run.

The third process compiles one program after another, without a cache. Each row has the
seconds to trace, lower and compile a program, processor seconds, and lines of optimised
HLO, which depend on no machine. `helper functions` are small ones that jit compiles, to
submit requests for example. The reference is what a researcher writes in an afternoon:
one decode step with unrolled layers and a contiguous cache
(`experiments/lib/baseline.py`), for models of Llama's shape.

Time: half a minute for the bundled model. The last line on stdout is one JSON object.
"""

# ruff: noqa: E402 -- START comes before the import of jax, which takes seconds

from __future__ import annotations

import time

START = time.perf_counter()

import resource
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.lib import baseline, processes, random_model, runner
from jpaged import compilation_cache
from jpaged.engine.limits import Params
from jpaged.llm import LLM
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.serving.compiled import CompiledPrograms, CompileRecord, Program

FLAGS = flags.FLAGS
CASES = ("empty cache", "filled cache")
_PARTS = "one by one"
_HIT_EVENT = "/jax/compilation_cache/cache_hits"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"temperature": 1.0},
    "filters": {"temperature": 1.0, "top_p": 0.9},
    "logprobs": {"logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "rules": {"repetition_penalty": 1.1},
    "beams": {"beam_width": 2},
}


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string(
        "model",
        "tiny-python",
        "Folder, bundled name, random:NAME, or 'sizes' for a Llama with random weights "
        "of the sizes of --hidden_size and others.",
    )
    random_model.define_flags()
    flags.DEFINE_string("dtype", "auto", "dtype of the weights.")
    flags.DEFINE_integer("max_num_seqs", 8, "Rows of the engine.", lower_bound=1)
    flags.DEFINE_integer(
        "max_num_batched_tokens", 64, "Token budget of a step.", lower_bound=1
    )
    flags.DEFINE_integer(
        "max_model_len", None, "Tokens of the longest sequence; default: the model's."
    )
    flags.DEFINE_integer("num_prompts", 3, "Prompts of each call.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 4, "Tokens of each prompt.", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 48, "Tokens of each output.", lower_bound=1)
    flags.DEFINE_list(
        "features", ["greedy"], f"The calls, in order, of {', '.join(FEATURES)}."
    )
    flags.DEFINE_float("limit_s", 1800, "Time limit of a process, in seconds.")
    flags.DEFINE_string("alone", None, "Internal: what this process measures.")
    flags.DEFINE_string("cache", None, "Internal: its folder for compiled programs.")


def params_of(feature: str) -> Params:
    """Parameters of a call that uses one feature."""
    fields: dict[str, Any] = FEATURES[feature] | {"max_tokens": FLAGS.max_tokens}
    if "beam_width" in fields:
        return BeamSearchParams(**fields)
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **fields})


class Milestones:
    """Seconds since the start of the process, on the clock and of its processors."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def reach(self, name: str) -> None:
        """Notes a milestone, at its first time."""
        now = time.perf_counter() - START, time.process_time()
        self.found.setdefault(name, now)


class SerialPrograms(CompiledPrograms[Any]):
    """Compiles one program after another, and measures the stages of each.

    Args:
      events: from `compile_events`; those of the programs are removed.

    Attributes:
      rows: what was measured.
    """

    def __init__(self, events: list[tuple[str, float]]) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self._events = events

    def start(self, key: Any, program: Any) -> None:
        """Compiles a program unless it is known."""
        super().start(key, program)
        self.wait([key])

    def _compile(self, program: Program) -> Any:
        donated, number = tuple(program.donated), len(self._events)
        jitted = jax.jit(program.function, donate_argnums=donated)
        compiled, row = compile_stages(program.name, jitted, program)
        del self._events[number:]
        self.rows.append(row)
        traced_s = row["trace_s"] + row["lower_s"]
        self.records.append(CompileRecord(program.name, traced_s, row["compile_s"]))
        return compiled


def compile_stages(
    name: str, jitted: Any, program: Program, **static: Any
) -> tuple[Any, dict[str, Any]]:
    """Compiles a function; returns it and a row of the table.

    Args:
      name: Of the row.
      jitted: The function.
      program: Its arguments and compiler options.
      **static: Its static arguments.
    """
    times, processor = [time.perf_counter()], time.process_time()

    def lap(result: Any) -> Any:
        times.append(time.perf_counter())
        return result

    lowered = lap(lap(jitted.trace(*program.args, **static)).lower())
    compiled = lap(lowered.compile(program.options))
    processor = time.process_time() - processor
    trace_s, lower_s, compile_s = np.diff(times).tolist()
    row = {"name": name, "trace_s": trace_s, "lower_s": lower_s}
    row |= {"compile_s": compile_s, "processor_s": processor}
    return compiled, row | {"hlo_lines": (compiled.as_text() or "").count("\n")}


def compile_events() -> list[tuple[str, float]]:
    """Returns a list that gets a name and the seconds of each later compilation."""
    found: list[tuple[str, float]] = []

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        if event == _COMPILE_EVENT:
            found.append((str(details.get("fun_name", "?")), duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def make_llm() -> LLM:
    """Creates the engine of the flags."""
    names = ("dtype", "max_num_seqs", "max_model_len")
    model = FLAGS.model
    if model == "sizes":
        model = random_model.make_random_model(FLAGS.max_model_len or 1024, seed=0)
    return LLM(
        model,
        **{name: getattr(FLAGS, name) for name in names},
        max_num_batched_tokens=max(FLAGS.max_num_batched_tokens, FLAGS.max_num_seqs),
    )


def make_calls(llm: LLM, milestones: Milestones) -> None:
    """Makes a call for each feature; waits for programs compiled beside them."""
    shape = (FLAGS.num_prompts, FLAGS.prompt_tokens)
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, llm.model.config.vocab_size, shape).tolist()
    for feature in FLAGS.features:
        for _ in llm.stream(prompts, params_of(feature)):
            milestones.reach("first token")
        milestones.reach(f"call: {feature}")
    compiled = llm._open_host().runner.compiled
    compiled.wait(compiled.keys(is_started=True))
    milestones.reach("all compiled")


def run_case() -> None:
    """Measures the calls as a user makes them, in this process."""
    milestones = Milestones()
    milestones.reach("import")
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == _HIT_EVENT:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    jax.config.update("jax_compilation_cache_dir", FLAGS.cache)
    name = "jax_persistent_cache_min_compile_time_secs"
    jax.config.update(name, compilation_cache.LEAST_COMPILE_S)
    llm = make_llm()
    milestones.reach("load")
    make_calls(llm, milestones)
    records = llm._open_host().runner.compiled.records
    processes.send_result(
        {
            "milestones": milestones.found,
            "programs": [record._asdict() for record in records],
            "waited_s": llm.stats()["compile_s"],
            "max_resident_bytes": _max_resident_bytes(),
            "num_cache_hits": len(hits),
        }
    )


def _max_resident_bytes() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def run_parts() -> None:
    """Compiles one program after another, and the reference, in this process."""
    jax.config.update("jax_enable_compilation_cache", False)
    events = compile_events()
    llm = make_llm()
    compiled = SerialPrograms(events)
    llm._open_host().runner._stepper.compiled = compiled
    make_calls(llm, Milestones())
    slowest = sorted(events, key=lambda event: event[1], reverse=True)[:5]
    helpers = {
        "number": len(events),
        "compile_s": sum(seconds for _, seconds in events),
        "slowest": dict(slowest),
    }
    result = {"programs": compiled.rows, "helpers": helpers}
    processes.send_result(result | {"reference": reference(llm)})


def reference(llm: LLM) -> dict[str, Any]:
    """A row for the plain decode step, or the reason why there is none."""
    try:
        weights, shape = baseline.weights_of(llm.model)
    except ValueError as error:
        return {"left_out": str(error)}
    rows, config = FLAGS.max_num_seqs, llm.model.config
    size = (rows, config.num_kv_heads, llm.config.max_model_len, config.head_dim)
    pages: Any = (jax.ShapeDtypeStruct(size, config.dtype),) * config.num_layers
    ints: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    slot: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = baseline.StaticBatch(pages, pages, ints, slot, ints)
    program = Program("reference", baseline.step, (weights, state))
    name = f"reference: a plain decode step of {rows} rows"
    return compile_stages(name, baseline.step, program, shape=shape)[1]


def print_case(name: str, result: dict[str, Any]) -> None:
    """Prints the milestones of a process."""
    if "failed" in result:
        print(f"{name:<38}{result['failed']}", flush=True)
        return
    for milestone, (seconds, processor) in result["milestones"].items():
        print(f"{f'{name}: {milestone}':<38}{seconds:>9.2f}{processor:>9.2f}")
    print(
        f"{f'{name}: waited for programs':<38}{result['waited_s']:>9.2f}         "
        f"  {len(result['programs'])} programs, "
        f"{result['max_resident_bytes'] / 1e9:.2f} GB resident at most",
        flush=True,
    )


def print_parts(result: dict[str, Any]) -> None:
    """Prints a row for each program."""
    names = [row["name"] for row in result.get("programs", [])]
    width = max(map(len, [*names, "reference: a plain decode step of 32 rows"])) + 1
    heads = ("trace s", "lower s", "compile s", "proc. s", "HLO lines")
    print(f"\n{_PARTS:<{width}}" + "".join(f"{head:>11}" for head in heads))
    if "failed" in result:
        print(result["failed"])
        return
    helpers = result["helpers"]
    for row in [*result["programs"], result["reference"]]:
        if "left_out" in row:
            print(f"reference: left out: {row['left_out']}")
            continue
        times = (row[name] for name in ("trace_s", "lower_s", "compile_s"))
        cells = "".join(f"{seconds:>11.2f}" for seconds in times)
        cells += f"{row['processor_s']:>11.2f}{row['hlo_lines']:>11,}"
        print(f"{row['name']:<{width}}{cells}")
    label = f"{helpers['number']} helper functions"
    slowest = ", ".join(f"{name} {s:.2f}" for name, s in helpers["slowest"].items())
    print(f"{label:<{width}}{helpers['compile_s']:>33.2f}")
    print(f"the slowest of them: {slowest}")


def ratios(cases: dict[str, Any], parts: dict[str, Any]) -> dict[str, float]:
    """Processor seconds with an empty cache, over the reference's, by milestone."""
    plain = parts.get("reference", {}).get("processor_s")
    milestones = cases[CASES[0]].get("milestones", {})
    if plain is None:
        return {}
    return {name: processor / plain for name, (_, processor) in milestones.items()}


def main(argv: list[str]) -> int:
    """Measures all processes and prints the results."""
    del argv
    processes.share_accelerator()
    with runner.user_errors("bench_startup"):
        runner.some_of("features", FLAGS.features, list(FEATURES))
        if FLAGS.alone is not None:
            run_parts() if FLAGS.alone == _PARTS else run_case()
            return 0
    print(f"{'since the start of the process':<38}{'seconds':>9}{'proc. s':>9}")
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (*CASES, _PARTS):
            runner.progress(f"measuring: {name}")
            own = [*sys.argv[1:], f"--alone={name}", f"--cache={folder}"]
            (cases[name],) = processes.results_of(
                "bench_startup", own, 1, FLAGS.limit_s
            )
            if name != _PARTS:
                print_case(name, cases[name])
    parts = cases.pop(_PARTS)
    print_parts(parts)
    found = ratios(cases, parts)
    for name, times in found.items():
        print(f"{CASES[0]}, proc. s over the reference's: {name:<20}{times:>7.1f}")
    given = {name: FLAGS[name].value for name in _GIVEN}
    result = {"cases": cases, "parts": parts, "ratios": found, "flags": given}
    runner.print_json(result)
    return int(any("failed" in case for case in [*cases.values(), parts]))


_GIVEN = (
    *("model", "dtype", "max_num_seqs", "max_num_batched_tokens", "max_model_len"),
    *("num_prompts", "prompt_tokens", "max_tokens", "features"),
)


if __name__ == "__main__":
    runner.start(main, define_flags)
