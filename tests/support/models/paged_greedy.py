"""Greedy tokens from the engine: prompts in chunks, decoding from pages."""

import itertools

import jax.numpy as jnp

from jpaged import engine
from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.models import Decoder
from jpaged.params import SamplingParams
from tests.support.models import families

LENGTH = 96  # at least 50 prompt tokens and 32 generated ones
# Compiling an engine takes seconds, so the quick tests run only this case: it has
# windows that differ by layer, experts and sinks. The longer tests run all families.
QUICK = ("gpt_oss",)
# The last case of each family, with different block sizes.
PAGED = dict(
    zip(
        {kind: name for name, (kind, _) in families.CASES.items()}.values(),
        itertools.cycle((16, 1, 64)),
        strict=False,
    )
)


def served(
    model: Decoder, prompts: list[list[int]], count: int, block_size: int
) -> list[list[int]]:
    """`count` greedy tokens per prompt, with prompts in chunks of 16 tokens."""
    config = EngineConfig(
        num_blocks=3 * cdiv(LENGTH, block_size),
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
