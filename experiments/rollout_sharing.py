"""What sharing saves in rollouts: blocks and prompt tokens, with n samples and epochs.

    python -m experiments.rollout_sharing
    python -m experiments.rollout_sharing --num_samples 1,4,16 --prompt_tokens 512

A step of RL samples n outputs for each prompt, and comes back to the same prompts in
the next epoch. For each n, three ways to ask for the samples run in one LLM:

- "shared": one request with n samples. The prompt is computed once; its blocks are
  mapped by all samples, and copied when a sample writes to the last one.
- "repeated": n requests with the same prompt, as tunix sends them. The prefix cache
  maps the whole blocks of the prompt.
- "alone": the same without prefix cache. Each prompt is computed and stored n times.

The second epoch samples again from the same weights (several updates on one batch, or
evaluation), where the prefix cache has the prompts; the third after `update_weights`,
where the prompts must be computed again, because the cached keys and values belong to
the old weights. The last line of stdout is one JSON object.

Time: about two minutes on two CPU cores, mostly for compilation.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from absl import flags

from experiments.lib import runner
from experiments.lib.runner import Report, progress
from jpaged import LLM, SamplingParams

FLAGS = flags.FLAGS
WAYS = ("shared", "repeated", "alone")


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string("model", "tiny-python", "Folder, or a model's name.")
    flags.DEFINE_list("num_samples", ["1", "4", "8"], "Samples of each prompt.")
    flags.DEFINE_integer("num_prompts", 4, "Prompts of an epoch.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 200, "Tokens of a prompt.", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 32, "Tokens of a sample.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Tokens of a block.", lower_bound=1)


def run_epoch(llm: LLM, prompts: list[list[int]], samples: int, way: str) -> Any:
    """Generates all samples; returns tokens computed, and seconds."""
    n = samples if way == "shared" else 1
    asked = [prompt for prompt in prompts for _ in range(samples // n)]
    params = [
        SamplingParams(n=n, max_tokens=FLAGS.max_tokens, ignore_eos=True, seed=i)
        for i in range(len(asked))
    ]
    before, start = llm.stats(), time.perf_counter()
    llm.generate(asked, params, progress=False)
    seconds, after = time.perf_counter() - start, llm.stats()
    generated = len(prompts) * samples * FLAGS.max_tokens
    # A sample's last token is never computed.
    decoded = generated - len(prompts) * samples
    computed = after["computed_tokens"] - before["computed_tokens"] - decoded
    return dict(prompt_tokens=computed, seconds=seconds)


def run_way(way: str, samples: int) -> dict[str, Any]:
    """Three epochs in one LLM."""
    rng = np.random.default_rng(0)
    rows = FLAGS.num_prompts * samples
    with LLM(
        FLAGS.model,
        max_num_seqs=min(rows, 64),
        max_model_len=FLAGS.prompt_tokens + FLAGS.max_tokens + 1,
        block_size=FLAGS.block_size,
        enable_prefix_caching=way != "alone",
    ) as llm:
        size = (FLAGS.num_prompts, FLAGS.prompt_tokens)
        prompts = rng.integers(3, llm.model.config.vocab_size, size).tolist()
        first = run_epoch(llm, prompts, samples, way)
        used = llm.stats()["max_used_blocks"]
        second = run_epoch(llm, prompts, samples, way)
        llm.update_weights(llm.model)
        third = run_epoch(llm, prompts, samples, way)
    return dict(max_used_blocks=used, epochs=[first, second, third])


def main(argv: list[str]) -> None:
    """Runs all ways for each number of samples."""
    del argv
    report = Report()
    with runner.user_errors("rollout_sharing"):
        for samples in runner.positive_integers("num_samples"):
            for way in WAYS:
                progress(f"{samples} samples, {way}")
                found = run_way(way, samples)
                report.details[f"{way}, n={samples}"] = found
                computed = [each["prompt_tokens"] for each in found["epochs"]]
                report.row(
                    f"{way}, n={samples}",
                    f"{found['max_used_blocks']} blocks",
                    f"prompt tokens by epoch: {computed}",
                )
            for way in WAYS[:2]:
                alone = report.details[f"alone, n={samples}"]["max_used_blocks"]
                own = report.details[f"{way}, n={samples}"]["max_used_blocks"]
                report.ratios[f"blocks, {way}/alone, n={samples}"] = own / alone
    report.last_line(runner.flag_values(__name__))


if __name__ == "__main__":
    runner.start(main, define_flags)
