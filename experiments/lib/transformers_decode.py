"""Decode steps of transformers: its greedy loop over a growing cache.

Only the process that measures transformers imports this module.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from jpaged.models import shapes
from jpaged.models.loading import sources


def make_torch_model(name: str, dtype: str) -> Any:
    """Initialises a model with random weights.

    Args:
      name: "random:NAME", or a folder or GGUF file that gives the sizes.
      dtype: dtype of the weights.
    """
    if sources.is_random(name):
        fields = dict(shapes.SHAPES[name.removeprefix(sources.RANDOM).lower()])
        fields.pop("architectures", None)
        config = transformers.AutoConfig.for_model(**fields)
    else:
        path = sources.find_checkpoint(name)
        file = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if file else path
        config = transformers.AutoConfig.from_pretrained(folder, **file)
        config.quantization_config = None  # the weights are random, not those of a file
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)  # the weights might not fit in float32
    try:
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa"
            )
    finally:
        torch.set_default_dtype(before)
    return model.to(kind).eval()


@torch.inference_mode()
def step_seconds(
    model: Any, rows: int, context: int, steps: int, repeats: int
) -> list[float]:
    """Times greedy decode steps.

    Args:
      model: From `make_torch_model`.
      rows: Batch size.
      context: Context length at the middle of the timed steps.
      steps: Steps per round.
      repeats: Rounds.

    Returns:
      Seconds per step in each round.
    """
    device = model.device
    rng = np.random.default_rng(0)
    start = context - steps // 2
    prompts = rng.integers(0, model.config.vocab_size, (rows, start))
    cache = transformers.DynamicCache()
    tokens = torch.from_numpy(prompts).to(device)
    # Pieces of the prompts keep the activations small.
    for piece in tokens.split(max(1, 65536 // rows), dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    taken = []
    for _ in range(repeats + 1):
        tokens = tokens[:, -1:]
        begin = time.perf_counter()
        for _ in range(steps):
            out = model(tokens, past_key_values=cache, logits_to_keep=1)
            tokens = out.logits[:, -1:].argmax(-1)
        tokens.sum().item()  # waits for the result
        taken.append((time.perf_counter() - begin) / steps)
        cache.crop(-steps)
    return taken[1:]
