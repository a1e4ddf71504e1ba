"""Write families.json: results of transformers for a small model of each family.

    python -m tests.support.golden.make_families [CASE ...]

Needs torch and transformers. Each case has the config.json that transformers writes,
the names and shapes of its tensors, and results of a float64 forward pass. The weights
are not stored: `checkpoints.py` generates the same ones on every machine.
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
from tests.support.models import (  # noqa: E402
    checkpoints,
    families,
)

PROMPT_LENGTHS = (1, 5, 50)
NUM_GREEDY = 32
STRIDE = 4  # every 4th logit is stored
# Smallest accepted gap between the two best logits, relative to the largest logit. The
# float32 error is 1e-6, so that it cannot change a greedy token.
MIN_GAP = 1e-4
MAX_SEEDS = 20
MIN_DISTINCT_TOKENS = 6  # in a greedy continuation


def prompt(length: int) -> list[int]:
    """Tokens with a long period: powers of 3 modulo the prime 127."""
    return [pow(3, i + 1, 127) for i in range(length)]


def saved_by_transformers(name: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """config.json of a case, and the names and shapes of its tensors."""
    # Imported here because pytest imports this file to look for doctests.
    import safetensors.numpy
    import transformers

    kind, changes = families.CASES[name]
    config = transformers.AutoConfig.for_model(kind, **families.SIZES[kind] | changes)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        path = pathlib.Path(folder)
        written = json.loads((path / "config.json").read_text("utf-8"))
        stored = safetensors.numpy.load_file(path / "model.safetensors")
    return written, {key: list(array.shape) for key, array in sorted(stored.items())}


def case(name: str, seed: int) -> dict[str, Any] | None:
    """Results for a seed; None if the greedy continuations have ties or repeat."""
    import torch
    import transformers

    config, shapes = saved_by_transformers(name)
    has_experts = families.has_experts(families.CASES[name][0])
    options = {"experts_implementation": "eager"} if has_experts else {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_shapes(folder, config, shapes, seed=seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, **options
        ).eval()

    def last_logits(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1]

    prompts = [prompt(length) for length in PROMPT_LENGTHS]
    greedy = []
    for start in prompts:
        tokens = list(start)
        for _ in range(NUM_GREEDY):
            logits = last_logits(tokens)
            (first, second), _ = torch.topk(logits, 2)
            if first - second < MIN_GAP * logits.abs().max():
                return None
            tokens.append(int(logits.argmax()))
        greedy.append(tokens[len(start) :])
        if len(set(greedy[-1])) < MIN_DISTINCT_TOKENS:
            return None
    return {
        "transformers": transformers.__version__,
        "config": config,
        "shapes": shapes,
        "seed": seed,
        "prompts": prompts,
        "last_logits": [
            [float(f"{x:.7g}") for x in last_logits(p)[::STRIDE].tolist()]
            for p in prompts
        ],
        "greedy": greedy,
    }


if __name__ == "__main__":
    file = HERE / "families.json"
    golden = json.loads(file.read_text("utf-8")) if sys.argv[1:] else {}
    for name in sys.argv[1:] or families.CASES:
        found = (case(name, seed) for seed in range(MAX_SEEDS))
        golden[name] = next(result for result in found if result is not None)
        print(name, "seed", golden[name]["seed"], flush=True)
    file.write_text(json.dumps(golden) + "\n", "utf-8")
