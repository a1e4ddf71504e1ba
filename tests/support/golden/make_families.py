"""Writes families.json: what transformers computes for a small model of each family.

    python -m tests.support.golden.make_families [CASE ...]

Needs torch and transformers. Each case holds the config.json that transformers wrote,
the names and shapes of its tensors, and results of a float64 forward pass. The weights
are not stored: `checkpoints.py` makes the same ones everywhere.
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
STRIDE = 4  # of the logits that are kept
# Float32 errs by 1e-6 of the largest logit; a smaller gap could change a greedy token.
SMALLEST_GAP = 1e-4
MOST_SEEDS = 20
LEAST_TOKENS = 6  # that are different, of a greedy continuation


def prompt(length: int) -> list[int]:
    """Tokens that do not repeat early: powers of 3 modulo the prime 127."""
    return [pow(3, i + 1, 127) for i in range(length)]


def saved_by_transformers(name: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """config.json of a case, and the names and shapes of its tensors."""
    # Here and not above: pytest looks for doctests in this file too, everywhere.
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
    """Logits after prompts and greedy continuations; None where those say little."""
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
            if first - second < SMALLEST_GAP * logits.abs().max():
                return None
            tokens.append(int(logits.argmax()))
        greedy.append(tokens[len(start) :])
        if len(set(greedy[-1])) < LEAST_TOKENS:
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
        found = (case(name, seed) for seed in range(MOST_SEEDS))
        golden[name] = next(result for result in found if result is not None)
        print(name, "seed", golden[name]["seed"], flush=True)
    file.write_text(json.dumps(golden) + "\n", "utf-8")
