"""Trains a model with GRPO on a programmatic reward; the LLM generates the rollouts.

    python -m experiments.grpo
    python -m experiments.grpo --num_seeds 3 --num_steps 40 --out grpo
    python -m experiments.grpo --model smollm2-135m-instruct --lora_rank 8

One module is trained and generates. Each step: the LLM samples `--num_samples` texts
for each of `--num_prompts` prompts, which share the prompt's blocks; a Python function
scores them; `jpaged.rl` computes advantages and the loss; optax updates the weights;
and `LLM.update_weights` replaces those of the LLM, without compilation.

Tasks (`--task`): "lines" rewards lines of at most 24 characters, up to 1 for a text
whose lines are all so short; "parses" rewards a text whose complete lines are valid
Python.

It reports the mean reward of the first and last quarter of steps over seeds with the
standard error, tokens per second of the rollouts, the share of blocks and prompt tokens
that sharing saves, the gap between the log-probabilities of rollout and trainer, and
seconds of each part. With `--baseline`, transformers generates rollouts of the same
shape with the same weights in the same run, if torch is installed. The last line of
stdout is one JSON object.

Source: Shao et al. 2024 (GRPO). https://arxiv.org/abs/2402.03300

Time: about half a minute for each seed on two CPU cores with the bundled model.
Expected: the reward rises with every seed, from 0.84 to above 0.97 in 30 steps with the
default flags.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags
from flax import nnx

from experiments.lib import runner
from experiments.lib.runner import Report, progress
from jpaged import LLM, SamplingParams, rl
from jpaged.models.decoder import Decoder
from jpaged.plot import curves, style

FLAGS = flags.FLAGS
# More than a block of tokens, which all samples share.
_HEADER = "import json\nimport os\nimport re\nimport sys\nimport time\n\n\n"
PROMPTS = (
    "def ",
    "import ",
    "class ",
    "for i in ",
    "if self.",
    "    return ",
    "try:\n    ",
    "with open(",
)
_LIMIT = 24  # characters of a line, for the task "lines"


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string("model", "tiny-python", "Folder, or a model's name.")
    flags.DEFINE_enum("task", "lines", sorted(TASKS), "What is rewarded.")
    flags.DEFINE_integer("num_seeds", 1, "Training runs.", lower_bound=1)
    flags.DEFINE_integer("num_steps", 30, "Steps of a run.", lower_bound=4)
    flags.DEFINE_integer("num_prompts", 8, "Prompts of a step.", lower_bound=1)
    flags.DEFINE_integer("num_samples", 8, "Samples of a prompt.", lower_bound=2)
    flags.DEFINE_integer("max_tokens", 32, "Tokens of a sample.", lower_bound=1)
    flags.DEFINE_float(
        "learning_rate",
        None,
        "Of Adam; default: 1e-4 for all weights, 1e-3 for adapters.",
        lower_bound=0,
    )
    flags.DEFINE_float("temperature", 1.0, "Of the samples.", lower_bound=0.01)
    flags.DEFINE_integer(
        "lora_rank", 0, "Train adapters of this rank; 0 trains all.", lower_bound=0
    )
    flags.DEFINE_bool("batch_invariant", False, "Rollouts with the trainer's bits.")
    flags.DEFINE_bool("baseline", True, "Also time transformers, if it is installed.")
    flags.DEFINE_integer("seed", 0, "Seed of the first run.")
    flags.DEFINE_string("out", None, "Write OUT.csv and OUT.png.")


def short_lines(text: str) -> float:
    """1 - the share of characters beyond the limit in the text's lines."""
    beyond = sum(max(0, len(line) - _LIMIT) for line in text.split("\n"))
    return 1.0 - beyond / max(len(text), 1)


def parses(text: str) -> float:
    """1 if the complete lines of a text are valid Python, and not only blank."""
    lines, _, _ = text.rpartition("\n")
    try:
        return float(bool(ast.parse(lines).body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0


TASKS: dict[str, Callable[[str], float]] = {"lines": short_lines, "parses": parses}


class Step(NamedTuple):
    """What a training step measured."""

    reward: float
    mean_length: float
    gap: float  # mean |trainer - rollout| of log-probabilities
    tokens: int
    rollout_s: float
    train_s: float
    update_s: float


class Trainer:
    """GRPO of a decoder, or of adapters of its weights."""

    def __init__(self, model: Decoder, key: jax.Array):
        self._graph, self._base = nnx.split(model)
        self._alpha = 2.0 * FLAGS.lora_rank
        if FLAGS.lora_rank:
            self.params: Any = rl.init_adapters(model, key, FLAGS.lora_rank)
        else:
            self.params = self._base
        rate = FLAGS.learning_rate
        if rate is None:
            rate = 1e-3 if FLAGS.lora_rank else 1e-4
        clip = optax.clip_by_global_norm(1.0)
        self._optimizer = optax.chain(clip, optax.adam(rate))
        self._state = self._optimizer.init(self.params)

    def _model(self, params: Any, base: Any) -> Decoder:
        if not FLAGS.lora_rank:
            return nnx.merge(self._graph, params)
        return rl.add_adapters(nnx.merge(self._graph, base), params, self._alpha)

    @functools.partial(jax.jit, static_argnums=0)
    def _step(
        self, params: Any, base: Any, state: Any, batch: Any, advantages: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            model = self._model(params, base)
            logprobs = rl.token_logprobs(
                model, batch.tokens, batch.segments, temperature=FLAGS.temperature
            )
            weights = rl.token_weights(logprobs, batch.logprobs, batch.mask)
            found = rl.grpo_loss(
                logprobs,
                jax.lax.stop_gradient(logprobs),
                advantages,
                batch.mask,
                weights=weights,
                how="token",
            )
            gap = rl.mismatch(logprobs, batch.logprobs, batch.mask).mean_abs
            return found.loss, gap

        gradient, gap = jax.grad(loss, has_aux=True)(params)
        # optax relies on implicit promotion.
        with jax.numpy_dtype_promotion("standard"):
            change, state = self._optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, gap

    def step(self, batch: rl.TrainingBatch, advantages: np.ndarray) -> float:
        """Updates the parameters; returns the gap of the log-probabilities."""
        arrays = _Arrays(batch.tokens, batch.segment_ids, batch.mask, batch.logprobs)
        self.params, self._state, gap = self._step(
            self.params, self._base, self._state, arrays, batch.per_token(advantages)
        )
        return float(gap)

    def send(self, llm: LLM) -> float:
        """Gives the LLM the parameters; returns the seconds."""
        start = time.perf_counter()
        alpha = self._alpha if FLAGS.lora_rank else None
        llm.update_weights(self.params, lora_alpha=alpha)
        return time.perf_counter() - start


class _Arrays(NamedTuple):
    tokens: np.ndarray
    segments: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray


def make_llm() -> LLM:
    """The LLM of the flags, with space for all samples of a step."""
    rows = FLAGS.num_prompts * FLAGS.num_samples
    return LLM(
        FLAGS.model,
        dtype="float32",
        max_num_seqs=min(rows, 64),
        max_model_len=FLAGS.max_tokens + 32,
        logprobs_mode="processed",
        batch_invariant=FLAGS.batch_invariant,
    )


def run_step(llm: LLM, trainer: Trainer, seed: int) -> Step:
    """Rollouts, rewards, a training step and the new weights."""
    params = [
        SamplingParams(
            n=FLAGS.num_samples,
            temperature=FLAGS.temperature,
            max_tokens=FLAGS.max_tokens,
            seed=seed * FLAGS.num_prompts + i,
        )
        for i in range(FLAGS.num_prompts)
    ]
    prompts = [_HEADER + PROMPTS[i % len(PROMPTS)] for i in range(FLAGS.num_prompts)]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=False)
    generated = time.perf_counter()
    rewards = np.array(
        [
            [TASKS[FLAGS.task](prompt + sample.text) for sample in output.outputs]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
    )
    rollouts = rl.rollouts_of(outputs)
    batch = rl.pad(rollouts, FLAGS.max_tokens + 32)
    advantages = np.asarray(rl.dr_grpo_advantages(rewards)).ravel()
    gap = trainer.step(batch, advantages)
    trained = time.perf_counter()
    lengths = [len(each.tokens) for each in rollouts]
    return Step(
        reward=float(rewards.mean()),
        mean_length=float(np.mean(lengths)),
        gap=gap,
        tokens=sum(lengths),
        rollout_s=generated - start,
        train_s=trained - generated,
        update_s=trainer.send(llm),
    )


def train(llm: LLM, model: Decoder, seed: int) -> list[Step]:
    """One run from the model's weights."""
    llm.update_weights(model)
    trainer = Trainer(model, jax.random.key(seed))
    steps = []
    for number in range(FLAGS.num_steps):
        steps.append(run_step(llm, trainer, seed * 1_000_003 + number))
        if number % 5 == 0 or number + 1 == FLAGS.num_steps:
            progress(f"seed {seed}, step {number}: reward {steps[-1].reward:.3f}")
    return steps


def transformers_tokens_per_s(model: Decoder, prompt_tokens: int) -> float | None:
    """Tokens per second of transformers' `generate`; None without torch."""
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        return None
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    from jpaged.models import save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rows = FLAGS.num_prompts * FLAGS.num_samples
    # As long as the prompts of the rollouts, whose tokens matter little.
    size = (FLAGS.num_prompts, prompt_tokens)
    tokens = torch.randint(3, model.config.vocab_size, size)
    options = dict(
        do_sample=True,
        top_k=0,
        num_return_sequences=FLAGS.num_samples,
        max_new_tokens=FLAGS.max_tokens,
        min_new_tokens=FLAGS.max_tokens,
        pad_token_id=0,
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        peer.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        times.append(time.perf_counter() - start)
    return rows * FLAGS.max_tokens / min(times[1:])


def report_runs(report: Report, runs: Sequence[Sequence[Step]], llm: LLM) -> None:
    """Prints the figures of all runs."""
    rewards = np.array([[step.reward for step in run] for run in runs])
    quarter = max(1, FLAGS.num_steps // 4)
    first, last = rewards[:, :quarter].mean(1), rewards[:, -quarter:].mean(1)
    error = np.std(last - first, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else 0
    late = [step for run in runs for step in run[1:]]
    rate = sum(s.tokens for s in late) / sum(s.rollout_s for s in late)
    seconds = {
        name: float(np.median([getattr(step, name) for step in late]))
        for name in ("rollout_s", "train_s", "update_s")
    }
    stats = llm.stats()
    report.tokens_per_s["rollout"] = rate
    report.details |= dict(
        rewards=rewards.tolist(),
        reward_first=float(first.mean()),
        reward_last=float(last.mean()),
        gain_standard_error=float(error),
        seconds=seconds,
        logprob_gap=float(np.mean([step.gap for step in late])),
        mean_lengths=[float(run[-1].mean_length) for run in runs],
        blocks_saved_by_sharing=stats["blocks_saved_by_sharing"],
        prefix_hit_ratio=stats["prefix_hit_ratio"],
        num_weight_updates=llm.weights_version,
        num_compilations=stats["num_compilations"],
    )
    gain = f"gain {(last - first).mean():.3f}"
    if len(runs) > 1:
        gain += f" +- {error:.3f} over {len(runs)} seeds"
    report.row(
        "reward, first and last quarter",
        f"{last.mean():.3f}",
        f"{first.mean():.3f} at first",
        gain,
    )
    report.row("rollouts, tokens/s", f"{rate:.0f}")
    report.row("blocks saved by sharing", f"{stats['blocks_saved_by_sharing']:.0%}")
    report.row("gap of log-probabilities", f"{report.details['logprob_gap']:.1e}")
    for name, value in seconds.items():
        report.row(f"a step's {name[:-2]}", f"{value * 1e3:.0f} ms")


def write_results(runs: Sequence[Sequence[Step]]) -> None:
    """Writes the rewards of all runs as CSV, and their mean as a figure."""
    rows = [
        (seed, number, *step)
        for seed, run in enumerate(runs)
        for number, step in enumerate(run)
    ]
    runner.write_csv(f"{FLAGS.out}.csv", ["seed", "step", *Step._fields], rows)
    points = [(n, step.reward) for run in runs for n, step in enumerate(run)]
    figure, panels = style.new_figure()
    label = f"reward ({FLAGS.task}), mean of {len(runs)} seeds"
    curves.lines(panels[0, 0], {"GRPO": points}, x_label="step", y_label=label)
    style.save(figure, f"{FLAGS.out}.png")


def main(argv: list[str]) -> None:
    """Trains with each seed and prints the results."""
    del argv
    with runner.user_errors("grpo", ImportError):
        if FLAGS.out:
            style.pyplot()
        llm = make_llm()
    model = nnx.clone(llm.model)
    runs = [train(llm, model, FLAGS.seed + i) for i in range(FLAGS.num_seeds)]
    report = Report()
    report_runs(report, runs, llm)
    assert llm.tokenizer is not None
    prompt_tokens = len(llm.tokenizer.encode(_HEADER + PROMPTS[0]))
    llm.close()
    peer = transformers_tokens_per_s(model, prompt_tokens) if FLAGS.baseline else None
    if peer is not None:
        report.tokens_per_s["transformers"] = peer
        ratio = report.tokens_per_s["rollout"] / peer
        report.ratios["rollout/transformers"] = ratio
        report.row("transformers, tokens/s", f"{peer:.0f}", "", f"{ratio:.1f} times")
    report.last_line(runner.flag_values(__name__))
    if FLAGS.out:
        write_results(runs)


if __name__ == "__main__":
    runner.start(main, define_flags)
