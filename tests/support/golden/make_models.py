"""Write models.json: results of transformers for the cases of `checkpoints.py`.

    python -m tests.support.golden.make_models

Needs torch and transformers. The weights are not stored: `checkpoints.py` generates the
same ones on every machine. Logits are those of a float64 forward pass.
"""

import json
import pathlib
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
from tests.support.models import checkpoints  # noqa: E402

PROMPT_LENGTHS = (1, 5, 50)
NUM_GREEDY = 32


def prompt(length: int) -> list[int]:
    """Tokens with a long period: powers of 3 modulo the prime 127."""
    return [pow(3, i + 1, 127) for i in range(length)]


def case(name: str) -> dict[str, Any]:
    """Logits after the last token of each prompt, and a greedy continuation."""
    # Imported here because pytest imports this file to look for doctests.
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_case(folder, name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64
        ).eval()

    def last_logits(tokens: list[int]) -> list[float]:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1].tolist()

    prompts = [prompt(length) for length in PROMPT_LENGTHS]
    tokens = list(prompts[1])
    for _ in range(NUM_GREEDY):
        logits = last_logits(tokens)
        tokens.append(logits.index(max(logits)))
    return {
        "transformers": transformers.__version__,
        "prompts": prompts,
        "last_logits": [[float(f"{x:.8g}") for x in last_logits(p)] for p in prompts],
        "greedy": tokens[-NUM_GREEDY:],
    }


if __name__ == "__main__":
    golden = {name: case(name) for name in checkpoints.CASES}
    (HERE / "models.json").write_text(json.dumps(golden) + "\n", "utf-8")
