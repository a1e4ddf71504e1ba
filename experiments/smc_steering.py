"""Steering a language model by sequential Monte Carlo, beside importance sampling.

    python -m experiments.smc_steering
    python -m experiments.smc_steering --potential no_letter --letter e --strength 3
    python -m experiments.smc_steering --particles 16 --max_tokens 60 --limit 16

The target is the model's own distribution over texts times a potential: texts whose
lines have at most --limit characters, or texts without a letter, where each character
too much costs --strength in log-potential. `jpaged.decoding.smc` draws particles from
the model, weights them, and resamples where few carry the weight: a resampling is a
fork of block tables, and shared blocks are copied when they are written. Importance
sampling is the same algorithm with threshold 0. Both estimate the normaliser, the mean
of the potential over the model's texts: the method whose estimates scatter less over
--num_runs seeds, and whose effective sample size is larger, knows more about the target
from the same number of tokens.

All runs of both methods are requests of one engine and share one compiled step.
The last line on stdout is one JSON object.

Source: Lew et al. 2023, https://arxiv.org/abs/2306.03081
Time: about a minute on two CPU cores, most of it for compiling. Expected, with the
default flags: an effective sample size of about 5 of 8 particles, and of little more
than 1 for importance sampling, whose log-normaliser is too low in most runs, by 4 in
the median. Of the estimates' exponentials both have the right mean.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.lib.timing import Report, progress
from jpaged import engine
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.decoding import DecodingAlgorithm, smc
from jpaged.decoding.smc import Potential, SMCState
from jpaged.models import Decoder, load_model
from jpaged.models.loading import sources
from jpaged.params import AlgorithmParams
from jpaged.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The runner's flags; only its own process has them, so runners can be imported."""
    flags.DEFINE_string("prompt", "def ", "What the particles continue.")
    flags.DEFINE_string("model", "tiny-python", "Folder, or a bundled model's name.")
    flags.DEFINE_enum("potential", "short_lines", ["short_lines", "no_letter"], "Aim.")
    flags.DEFINE_integer("limit", 24, "Characters of a line.", lower_bound=1)
    flags.DEFINE_string("letter", "e", "What no_letter does without; one character.")
    flags.DEFINE_float(
        "strength", 0.5, "Log-potential that a character too much costs."
    )
    flags.DEFINE_integer("particles", 8, "Rows of a run.", lower_bound=1)
    flags.DEFINE_float("threshold", 0.5, "Share of the rows below which they resample.")
    flags.DEFINE_integer("max_tokens", 32, "Tokens of a particle.", lower_bound=1)
    flags.DEFINE_integer("num_runs", 8, "Seeds of each method.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the first run.")


def token_texts(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Each token's text by itself; special ones have none."""
    return [tokenizer.decode([token]) for token in range(vocab_size)]


def short_lines(
    texts: list[str], prompt: str, limit: int, strength: float
) -> tuple[Potential, Any]:
    """A potential on characters of lines beyond `limit`, and its first state.

    The state is the length of the line so far, the prompt's part included.
    """
    parts = [text.split("\n") for text in texts]
    first = jnp.array([len(part[0]) for part in parts], jnp.int32)
    last = jnp.array([len(part[-1]) for part in parts], jnp.int32)
    between = [sum(max(0, len(line) - limit) for line in part[1:-1]) for part in parts]
    inner_excess = jnp.array(between, jnp.int32)
    has_end = jnp.array([len(part) > 1 for part in parts])

    def excess(length: jax.Array) -> jax.Array:
        return jnp.maximum(length - limit, 0)

    def potential(length: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        full = length + first[token]
        after = jnp.where(has_end[token], last[token], full)
        new = excess(full) - excess(length)
        new += jnp.where(has_end[token], inner_excess[token] + excess(last[token]), 0)
        return after, -strength * new.astype(jnp.float32)

    return potential, jnp.int32(len(prompt.split("\n")[-1]))


def no_letter(texts: list[str], letter: str, strength: float) -> tuple[Potential, Any]:
    """A potential on the number of times that a letter comes; it needs no state."""
    counts = [text.lower().count(letter) for text in texts]
    costs = -strength * jnp.array(counts, jnp.float32)
    return lambda state, token: (state, costs[token]), ()


@dataclasses.dataclass(frozen=True)
class Run:
    """The particles of one request and what they are worth."""

    token_ids: list[list[int]]
    weights: np.ndarray  # f32[S]
    log_normaliser: float
    num_resamplings: int

    @property
    def effective_size(self) -> float:
        """Particles of equal weight that would be worth as much."""
        total = float(np.sum(self.weights**2))
        return 1.0 / total if total else 0.0


def run_all(
    model: Decoder,
    prompt: list[int],
    methods: dict[str, DecodingAlgorithm],
    stop_token_ids: tuple[int, ...],
) -> tuple[dict[str, list[Run]], dict[str, int], float]:
    """Of each method its runs; the engine's counters; seconds with compiling."""
    num_rows, num_runs = FLAGS.particles, FLAGS.num_runs
    num_sequences = num_rows * num_runs * len(methods)
    max_len = len(prompt) + FLAGS.max_tokens
    max_num_seqs = max(num_rows, min(num_sequences, 32))
    config = EngineConfig(
        num_blocks=max_num_seqs * cdiv(max_len, 16),
        max_num_seqs=max_num_seqs,
        max_model_len=max_len,
        max_num_batched_tokens=max(max_num_seqs, 64),
        max_num_requests=max(num_sequences, max_num_seqs),
        max_num_stop_ids=max(1, len(stop_token_ids)),
        algorithms=tuple((algorithm, num_rows) for algorithm in methods.values()),
    )
    params = [
        AlgorithmParams(
            algorithm,
            num_rows,
            FLAGS.max_tokens,
            ignore_eos=True,
            stop_token_ids=stop_token_ids,
            seed=FLAGS.seed + number,
        )
        for algorithm in methods.values()
        for number in range(num_runs)
    ]
    begin = time.perf_counter()
    state = engine.init(model, config)
    state, seq_indices = engine.submit(
        state, [prompt] * len(params), params, vocab_size=model.config.vocab_size
    )
    state = jax.block_until_ready(engine.run(model, state, jnp.int32(2**30)))
    seconds = time.perf_counter() - begin
    outputs: dict[int, list[list[int]]] = {}
    for result in engine.collect(state):
        outputs.setdefault(result.arrival, []).append(result.token_ids)
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    for number in range(len(params)):
        kind, name = number // num_runs, list(methods)[number // num_runs]
        # A request's state lies at the place of its first sequence.
        leader = seq_indices[number][0]
        own: SMCState = jax.tree.map(lambda x, at=leader: x[at], state.states[kind])
        runs[name].append(
            Run(
                outputs[number],
                np.asarray(own.weights),
                float(own.log_normaliser),
                int(own.num_resamplings),
            )
        )
    names = ("num_steps", "num_generated", "num_block_copies", "num_preemptions")
    return runs, {n: int(getattr(state.counters, n)) for n in names}, seconds


def show(report: Report, name: str, runs: list[Run], tokenizer: Tokenizer) -> None:
    """The particles of a method's first run, the heaviest first; all runs in sum."""
    print(f"\n{name}, run 1: weight and text", flush=True)
    first = runs[0]
    for at in np.argsort(-first.weights, kind="stable"):
        text = tokenizer.decode(first.token_ids[at])
        print(f"{first.weights[at]:8.4f}  {text!r}")
    estimates = np.array([run.log_normaliser for run in runs])
    sizes = [run.effective_size for run in runs]
    resamplings = [run.num_resamplings for run in runs]
    report.details[name] = {
        "log_normalisers": estimates.tolist(),
        "effective_sizes": sizes,
        "num_resamplings": resamplings,
    }
    report.row(
        f"{name}: log-normaliser",
        f"{np.median(estimates):.2f}",
        f"{estimates.min():.2f} to {estimates.max():.2f} in {len(runs)} runs",
        f"effective size {np.mean(sizes):.1f} of {len(first.weights)}, "
        f"{np.mean(resamplings):.1f} resamplings",
    )


def main(argv: list[str]) -> int:
    """Reads flags, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"a prompt needs its flag: --prompt {argv[1]!r}")
    try:
        if len(FLAGS.letter) != 1:
            raise ValueError(f"letter: wanted one character, got {FLAGS.letter!r}")
        is_bundled = FLAGS.model in sources.bundled_models()
        folder = sources.bundled_path(FLAGS.model) if is_bundled else FLAGS.model
        model, tokenizer = load_model(folder), Tokenizer.from_folder(folder)
        if tokenizer is None:
            raise ValueError(f"model: wanted a folder with a tokenizer, got {folder}")
        texts = token_texts(tokenizer, model.config.vocab_size)
        if FLAGS.potential == "short_lines":
            potential, initial = short_lines(
                texts, FLAGS.prompt, FLAGS.limit, FLAGS.strength
            )
        else:
            potential, initial = no_letter(texts, FLAGS.letter, FLAGS.strength)
        stop = tuple(model.config.eos_token_ids)
        methods = {
            name: smc(potential, initial, threshold=threshold, stop_token_ids=stop)
            for name, threshold in (("smc", FLAGS.threshold), ("importance", 0.0))
        }
        progress("compiling and running the engine")
        prompt = tokenizer.encode(FLAGS.prompt)
        runs, counters, seconds = run_all(model, prompt, methods, stop)
    except (ValueError, OSError) as error:
        print(f"smc_steering: {error}", file=sys.stderr)
        return 1
    report = Report()
    for name, mine in runs.items():
        show(report, name, mine, tokenizer)
    report.details["counters"] = counters
    report.details["seconds"] = seconds
    found = FLAGS.get_key_flags_for_module(__name__)
    report.last_line({flag.name: flag.value for flag in found})
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main)
