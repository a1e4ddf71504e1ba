"""The engine's compiled program updates pages in place and never copies them.

The programs are compiled for two sizes of the pool and do not run, so the pools can be
large.
"""

import math
import re

import jax
import pytest

from jpaged import engine
from jpaged.attention import kv_cache
from jpaged.config import EngineConfig, Speculation
from jpaged.decoding.constraints import AutomataSizes
from jpaged.decoding.rule_arrays import RuleSizes
from jpaged.models import ModelConfig, init_model

pytestmark = pytest.mark.long

SIZES = (4096, 16384)
MODEL = ModelConfig.from_hf(
    dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        hidden_act="silu",
        rms_norm_eps=1e-5,
    )
)


def engine_config(num_blocks: int) -> EngineConfig:
    return EngineConfig(
        num_blocks=num_blocks,
        block_size=16,
        max_num_seqs=2,
        max_model_len=64,
        max_num_batched_tokens=16,
        max_num_requests=8,
        # All features of a step.
        num_logprobs=2,
        prompt_logprobs=True,
        max_num_prefixes=1,
        max_beam_width=2,
        rules=RuleSizes(num_bias=1, num_bad_words=1, bad_word_len=2, num_allowed=64),
        automata=AutomataSizes(64, 1, 2, 2, 2),
        speculation=Speculation("prompt_lookup", num_tokens=2),
    )


def bytes_of_blocks(num_blocks: int, dtype: str = "float32") -> int:
    return num_blocks * kv_cache.bytes_per_block(
        num_layers=MODEL.num_layers,
        num_kv_heads=MODEL.num_kv_heads,
        block_size=16,
        head_dim=MODEL.head_dim,
        dtype=dtype,
    )


@pytest.fixture(scope="module")
def programs():
    """The compiled programs of `run` at both sizes."""
    model = init_model(MODEL)

    def abstract(num_blocks: int):
        return jax.eval_shape(lambda: engine.init(model, engine_config(num_blocks)))

    return {size: engine.run.lower(model, abstract(size)).compile() for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_the_pool_is_donated_and_returned_in_the_same_memory(size, programs):
    memory = programs[size].memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_of_blocks(size)


@pytest.mark.parametrize("size", SIZES)
def test_no_temporary_is_as_large_as_the_pages_of_one_layer(size, programs):
    memory = programs[size].memory_analysis()
    one_array = bytes_of_blocks(size) // (2 * MODEL.num_layers)
    assert memory.temp_size_in_bytes < one_array


def test_a_single_step_does_not_copy_a_bfloat16_pool():
    model = init_model(MODEL, dtype="bfloat16")
    state = jax.eval_shape(lambda: engine.init(model, engine_config(SIZES[1])))
    step = jax.jit(engine.step, donate_argnames="state")
    memory = step.lower(model, state).compile().memory_analysis()
    pool = bytes_of_blocks(SIZES[1], "bfloat16")
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool // (2 * MODEL.num_layers)


def test_temporaries_grow_with_the_pool_only_by_bookkeeping(programs):
    small, large = (
        programs[size].memory_analysis().temp_size_in_bytes for size in SIZES
    )
    # Some int32 arrays of the block manager have one entry per block.
    assert large - small <= 16 * 4 * (SIZES[1] - SIZES[0])


def copies_of(text: str, least: int) -> list[str]:
    """Lines of the compiled text that copy an array of at least `least` numbers."""
    found = []
    for line in text.splitlines():
        copied = re.search(r"= \(?\w+\[([\d,]*)\].* copy(-start)?\(", line)
        if copied and math.prod(
            map(int, copied[1].split(",") if copied[1] else [])
        ) >= (least):
            found.append(line.strip())
    return found


@pytest.mark.parametrize("size", SIZES)
def test_the_compiled_text_copies_no_pages(size, programs):
    text = programs[size].as_text()
    one_layer = size * MODEL.num_kv_heads * 16 * MODEL.head_dim
    assert f"f32[{MODEL.num_layers},{size},{MODEL.num_kv_heads},16," in text
    assert copies_of(text, one_layer) == []


def test_a_program_that_copies_the_pages_is_found():
    pages = jax.ShapeDtypeStruct((64, 2, 16, 8), "float32")

    def update(pages):
        return pages.at[3].set(1.0)

    # Without donation, the update needs separate memory.
    keeping = jax.jit(update).lower(pages).compile()
    assert copies_of(keeping.as_text(), 64 * 2 * 16 * 8)
    assert keeping.memory_analysis().alias_size_in_bytes == 0
    donating = jax.jit(update, donate_argnums=0).lower(pages).compile()
    assert copies_of(donating.as_text(), 64 * 2 * 16 * 8) == []
    assert donating.memory_analysis().alias_size_in_bytes == 4 * 64 * 2 * 16 * 8
