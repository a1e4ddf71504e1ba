"""Computes whether a model fits on a mesh of chips, before you rent the chips.

    python -m experiments.plan --model llama-3-70b --chip h100 --tensor 4

Prints the bytes on a chip (weights, temporaries, pages), the number of tokens whose
keys and values fit, what a decode step sends between chips, and its time by the
simulator's roofline. The last line of the output is one JSON object with the same
numbers.

Takes seconds and needs no accelerator. `jpaged.simulator.plan` says what is exact and
what is estimated; `experiments.compile_tpu` asks the TPU's compiler.

Expected: 141.1 GB of bfloat16 weights for llama-3-70b, 35.3 GB on each of four chips.
"""

import dataclasses
import os
from typing import Any

from absl import flags

from experiments.lib import runner
from jpaged import retention
from jpaged.models import ModelConfig
from jpaged.models.loading import checkpoint, sources
from jpaged.models.shapes import random_config
from jpaged.simulator.costs.chips import find_chip
from jpaged.simulator.plan import plan_mesh

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string(
        "model", "llama-3-8b", "Name of a shape, or a Hugging Face folder."
    )
    flags.DEFINE_string("chip", "h100", "Name in jpaged.simulator.costs.chips.CHIPS.")
    flags.DEFINE_integer("tensor", 1, "Chips that share each matrix.")
    flags.DEFINE_integer("expert", 1, "Chips that share the experts.")
    flags.DEFINE_integer("data", 1, "Replicas of the model.")
    flags.DEFINE_integer("block_size", 16, "Tokens per block.")
    flags.DEFINE_integer("max_num_seqs", 64, "Rows of a step.")
    flags.DEFINE_integer("max_num_batched_tokens", 512, "Token budget of a step.")
    flags.DEFINE_integer("context", 1024, "Tokens of each row in the predicted step.")
    flags.DEFINE_float("memory_fraction", 0.9, "Share of a chip's memory to use.")
    flags.DEFINE_enum(
        "retention", None, list(retention.METHODS), "Method of jpaged.retention."
    )


def find_model_config(name: str) -> ModelConfig:
    """Sizes of a model, by name or from the config of a folder or GGUF file.

    Raises:
      ValueError: No shape has this name, or config.json is not supported.
      FileNotFoundError: The folder does not exist or has no config.json.
    """
    if os.path.exists(name) or name in sources.named_models():
        return checkpoint.load_config(name)
    if os.sep in name:
        raise FileNotFoundError(
            f"--model: expected a folder or GGUF file that exists, got {name}"
        )
    return random_config(name)


def has_key_extremes(config: ModelConfig, num_chips: int) -> bool:
    """Whether the method of `--retention` stores the extremes of each block's keys.

    Raises:
      ValueError: The engine refuses the method for this model or mesh.
    """
    if FLAGS.retention is None:
        return False
    if num_chips > 1 or any(window is not None for window in config.windows):
        raise ValueError(
            "--retention: expected none with several chips or with sliding windows, "
            f"got {FLAGS.retention}"
        )
    return retention.METHODS[FLAGS.retention]().only_reads


def main(argv: list[str]) -> None:
    """Plans the mesh of the flags and prints the plan."""
    del argv
    names = ("tensor", "expert", "data", "block_size", "max_num_seqs")
    names += ("max_num_batched_tokens", "context", "memory_fraction")
    options: dict[str, Any] = {name: getattr(FLAGS, name) for name in names}
    with runner.user_errors("plan"):
        config, chip = find_model_config(FLAGS.model), find_chip(FLAGS.chip)
        chips = options["tensor"] * options["expert"] * options["data"]
        plan = plan_mesh(
            config, chip, has_key_extremes=has_key_extremes(config, chips), **options
        )
    print(f"{FLAGS.model} on {chips} x {chip.name}, on each chip:")
    for name in ("weight_bytes", "temporary_bytes", "page_bytes", "available_bytes"):
        print(f"  {name:16} {getattr(plan, name) / 1e9:9.2f} GB")
    print(f"KV tokens of a replica: {plan.kv_tokens:,}")
    for kind, each in plan.collectives.items():
        print(f"{each['count']} x {kind} of {each['bytes']:,} bytes per decode step")
    if plan.step_s is None:
        print("Does not fit: use more chips, or larger ones.")
    else:
        print(f"Predicted decode step: {1e3 * plan.step_s:.2f} ms")
    result = {"model": FLAGS.model, "chip": chip.name, **options}
    result["retention"] = FLAGS.retention
    runner.print_json({**result, **dataclasses.asdict(plan)})


if __name__ == "__main__":
    runner.start(main, define_flags)
