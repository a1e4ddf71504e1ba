"""transformers as a peer of decode steps: its own loop over a cache that grows.

Beside the road. Imported by the process that measures it, and nowhere else.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import transformers

from jpaged.models import shapes
from jpaged.models.loading import sources


def make_model(name: str, dtype: str) -> Any:
    """A model of random weights in the shape of "random:NAME", or of a folder."""
    if sources.is_random(name):
        fields = dict(shapes.SHAPES[name.removeprefix(sources.RANDOM).lower()])
        fields.pop("architectures", None)
        config = transformers.AutoConfig.for_model(**fields)
    else:
        config = transformers.AutoConfig.from_pretrained(sources.find_folder(name))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)  # never in float32, which might not fit
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
    """Seconds of a greedy decode step at `context`, in each round of `steps` steps."""
    device = model.device
    rng = np.random.default_rng(0)
    start = context - steps // 2
    prompts = rng.integers(0, model.config.vocab_size, (rows, start))
    cache = transformers.DynamicCache()
    tokens = torch.from_numpy(prompts).to(device)
    # A prompt at a time would need another cache; pieces keep the activations small.
    for piece in tokens.split(max(1, 65536 // rows), dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    taken = []
    for _ in range(repeats + 1):
        tokens = tokens[:, -1:]
        begin = time.perf_counter()
        for _ in range(steps):
            out = model(tokens, past_key_values=cache, logits_to_keep=1)
            tokens = out.logits[:, -1:].argmax(-1)
        tokens.sum().item()  # waits
        taken.append((time.perf_counter() - begin) / steps)
        cache.crop(-steps)
    return taken[1:]
