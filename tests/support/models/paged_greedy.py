"""Greedy tokens of a family by the engine: prompts in chunks, decode from pages."""

import itertools

import jax.numpy as jnp

from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.models import Decoder
from jpaged.params import SamplingParams

LENGTH = 96  # prompts of 50 and 32 new tokens, in one shape
# One case of each family through the engine, blocks of all sizes in turn, and those
# whose parts differ most: compiling an engine takes seconds.
QUICK = ("gemma3_linear", "gpt2", "gpt_oss", "mistral", "qwen3_moe_mixed")
PAGED = dict(
    zip(
        (
            "llama_yarn",
            "mistral",
            "mixtral",
            "qwen2_window",
            "qwen3",
            "qwen3_moe_mixed",
            "gemma",
            "gemma2",
            "gemma3_linear",
            "phi3_longrope",
            "gpt_oss",
            "opt_350m_shape",
            "gpt2",
        ),
        itertools.cycle((16, 1, 64)),
        strict=False,
    )
)


def served(model: Decoder, prompts: list[list[int]], count: int, block_size: int):
    """Greedy tokens by the engine: prompts in chunks of 16, decoding from pages."""
    config = EngineConfig(
        num_blocks=3 * -(-LENGTH // block_size),
        block_size=block_size,
        max_num_seqs=3,
        max_model_len=LENGTH,
        max_num_batched_tokens=16,
        max_num_requests=3,
    )
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    state, _ = engine.submit(engine.init(model, config), prompts, params)
    state = engine.run(model, state, jnp.int32(1000))
    results = sorted(engine.collect(state), key=lambda result: result.arrival)
    return [result.token_ids for result in results]
