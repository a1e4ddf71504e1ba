"""Steers a language model by sequential Monte Carlo and by importance sampling.

    python -m experiments.smc_steering
    python -m experiments.smc_steering --potential no_letter --letter e --strength 3
    python -m experiments.smc_steering --particles 16 --max_tokens 60 --limit 16

The target distribution is the model's distribution over texts times a potential. The
potential prefers texts whose lines have at most `--limit` characters, or texts without
a letter; each excess character costs `--strength` in log-potential.
`jpaged.decoding.smc` samples particles from the model, weights them, and resamples when
few particles have most of the weight. A resampling is a fork of block tables; shared
blocks are copied when they are written. Importance sampling is the same algorithm with
threshold 0.

Both methods estimate the normaliser, the mean of the potential over the model's texts.
The better method has estimates that vary less over `--num_runs` seeds and a larger
effective sample size, with the same number of tokens.

All runs of both methods are requests of one engine and share one compiled step. The
last line on stdout is one JSON object.

Source: Lew et al. 2023, https://arxiv.org/abs/2306.03081

Time: about a minute on two CPU cores, mostly for compilation. Expected with the default
flags: an effective sample size of about 5 of 8 particles. For importance sampling it is
little more than 1, and the log-normaliser is too low in most runs, by 4 in the median.
The exponentials of the estimates have the right mean with both methods.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.lib import runner
from experiments.lib.runner import Report, progress
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
    """Defines the runner's flags."""
    flags.DEFINE_string("prompt", "def ", "Text that the particles continue.")
    flags.DEFINE_string("model", "tiny-python", "Folder, or a bundled model's name.")
    flags.DEFINE_enum(
        "potential",
        "short_lines",
        ["short_lines", "no_letter"],
        "What texts should be.",
    )
    flags.DEFINE_integer(
        "limit", 24, "Most characters of a line, for short_lines.", lower_bound=1
    )
    flags.DEFINE_string("letter", "e", "The character to avoid, for no_letter.")
    flags.DEFINE_float(
        "strength", 0.5, "Cost of each excess character in log-potential."
    )
    flags.DEFINE_integer(
        "particles", 8, "Particles of a run, each one batch row.", lower_bound=1
    )
    flags.DEFINE_float(
        "threshold",
        0.5,
        "Resample if the effective size is below this share of the particles.",
    )
    flags.DEFINE_integer("max_tokens", 32, "Most tokens of a particle.", lower_bound=1)
    flags.DEFINE_integer(
        "num_runs", 8, "Runs of each method, each with another seed.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Seed of the first run.")


def token_texts(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """The text of each token; special tokens have none."""
    return [tokenizer.decode([token]) for token in range(vocab_size)]


def short_lines(
    texts: list[str], prompt: str, limit: int, strength: float
) -> tuple[Potential, Any]:
    """A potential on the characters of lines beyond `limit`, and its first state.

    The state is the length of the current line, including the prompt's part.

    Args:
      texts: The text of each token.
      prompt: The prompt.
      limit: Most characters of a line.
      strength: Cost of each excess character in log-potential.
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
    """A potential on the number of times that a letter occurs, and its empty state."""
    counts = [text.lower().count(letter) for text in texts]
    costs = -strength * jnp.array(counts, jnp.float32)
    return lambda state, token: (state, costs[token]), ()


@dataclasses.dataclass(frozen=True)
class ParticleRun:
    """The particles of one request, their weights and the estimate."""

    token_ids: list[list[int]]
    weights: np.ndarray  # f32[S]
    log_normaliser: float
    num_resamplings: int

    @property
    def effective_size(self) -> float:
        """Effective sample size: 1 / the sum of the squared weights."""
        total = float(np.sum(self.weights**2))
        return 1.0 / total if total else 0.0


def steering_config(
    prompt: list[int],
    methods: dict[str, DecodingAlgorithm],
    stop_token_ids: tuple[int, ...],
) -> EngineConfig:
    """An engine for all runs of all methods, of which up to 32 rows run at once."""
    num_rows = FLAGS.particles
    num_sequences = num_rows * FLAGS.num_runs * len(methods)
    max_len = len(prompt) + FLAGS.max_tokens
    max_num_seqs = max(num_rows, min(num_sequences, 32))
    return EngineConfig(
        num_blocks=max_num_seqs * cdiv(max_len, 16),
        max_num_seqs=max_num_seqs,
        max_model_len=max_len,
        max_num_batched_tokens=max(max_num_seqs, 64),
        max_num_requests=max(num_sequences, max_num_seqs),
        max_num_stop_ids=max(1, len(stop_token_ids)),
        algorithms=tuple((algorithm, num_rows) for algorithm in methods.values()),
    )


def run_methods(
    model: Decoder,
    prompt: list[int],
    methods: dict[str, DecodingAlgorithm],
    stop_token_ids: tuple[int, ...],
) -> tuple[dict[str, list[ParticleRun]], dict[str, int], float]:
    """Runs all methods with all seeds.

    Args:
      model: The model.
      prompt: Token ids of the prompt.
      methods: The algorithms by name.
      stop_token_ids: Tokens that end a particle.

    Returns:
      The runs of each method; the engine's counters; seconds, including compilation.
    """
    config = steering_config(prompt, methods, stop_token_ids)
    num_runs = FLAGS.num_runs
    params = [
        AlgorithmParams(
            algorithm,
            FLAGS.particles,
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
    runs: dict[str, list[ParticleRun]] = {name: [] for name in methods}
    for number in range(len(params)):
        kind, name = number // num_runs, list(methods)[number // num_runs]
        # A request's state is stored at the index of its first sequence.
        leader = seq_indices[number][0]
        own: SMCState = jax.tree.map(lambda x, at=leader: x[at], state.states[kind])
        runs[name].append(
            ParticleRun(
                outputs[number],
                np.asarray(own.weights),
                float(own.log_normaliser),
                int(own.num_resamplings),
            )
        )
    names = ("num_steps", "num_generated", "num_block_copies", "num_preemptions")
    return runs, {n: int(getattr(state.counters, n)) for n in names}, seconds


def report_method(
    report: Report, name: str, runs: list[ParticleRun], tokenizer: Tokenizer
) -> None:
    """Prints the particles of a method's first run by weight, and all runs' figures."""
    print(f"\n{name}, run 1: weight and text", flush=True)
    first = runs[0]
    for index in np.argsort(-first.weights, kind="stable"):
        text = tokenizer.decode(first.token_ids[index])
        print(f"{first.weights[index]:8.4f}  {text!r}")
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


def load_texts() -> tuple[Decoder, Tokenizer, list[str]]:
    """Loads the model of the flags, its tokenizer, and the text of each token.

    Raises:
      OSError: The model cannot be read.
      ValueError: The model is invalid or has no tokenizer.
    """
    folder = sources.find_checkpoint(FLAGS.model)
    model, tokenizer = load_model(folder), Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise ValueError(f"--model: expected a folder with a tokenizer, got {folder}")
    return model, tokenizer, token_texts(tokenizer, model.config.vocab_size)


def make_potential(texts: list[str]) -> tuple[Potential, Any]:
    """The potential of the flags and its first state."""
    if FLAGS.potential == "short_lines":
        return short_lines(texts, FLAGS.prompt, FLAGS.limit, FLAGS.strength)
    return no_letter(texts, FLAGS.letter, FLAGS.strength)


def main(argv: list[str]) -> None:
    """Runs both methods and prints the results."""
    del argv
    with runner.user_errors("smc_steering"):
        if len(FLAGS.letter) != 1:
            raise ValueError(f"--letter: expected one character, got {FLAGS.letter!r}")
        model, tokenizer, texts = load_texts()
        potential, initial = make_potential(texts)
        stop = tuple(model.config.eos_token_ids)
        methods = {
            name: smc(potential, initial, threshold=threshold, stop_token_ids=stop)
            for name, threshold in (("smc", FLAGS.threshold), ("importance", 0.0))
        }
        progress("compiling and running the engine")
        prompt = tokenizer.encode(FLAGS.prompt)
        runs, counters, seconds = run_methods(model, prompt, methods, stop)
    report = Report()
    for name, mine in runs.items():
        report_method(report, name, mine, tokenizer)
    report.details["counters"] = counters
    report.details["seconds"] = seconds
    report.last_line(runner.flag_values(__name__))


if __name__ == "__main__":
    runner.start(main, define_flags, argument_flag="prompt")
