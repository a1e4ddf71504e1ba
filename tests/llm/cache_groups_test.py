"""`LLM(cache_groups=...)`: all features together give the tokens of one table."""

import numpy as np
import pytest

from jpaged import LLM, BeamSearchParams, SamplingParams
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import init_model
from jpaged.serving import memory

pytestmark = pytest.mark.long

SIZES = dict(
    block_size=4,
    num_blocks=56,
    max_num_seqs=6,
    max_model_len=192,
    max_num_batched_tokens=16,
    check_invariants=True,
)
OPTIONS = {
    "floats": dict(preemption="swap", num_swap_blocks=10, cascade=True),
    "int8": dict(kv_dtype="int8", speculative_config={"method": "ngram"}),
}


def window_model(full_layers, window=16):
    return init_model(
        ModelConfig(
            architecture="LlamaForCausalLM",
            vocab_size=64,
            hidden_size=16,
            num_layers=4,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=16,
            max_position_embeddings=256,
            sliding_window=window,
            full_layers=full_layers,
            initializer_range=0.5,
        )
    )


def outputs(llm: LLM) -> list:
    """Tokens of a mixed load, with a pinned prefix and prompts that share a prefix."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, n).tolist() for n in (5, 40, 90, 17, 60)]
    pinned = llm.pin(prompts[2][:30])
    prompts += [[*prompts[2][:80], 1, 2, 3], [*prompts[2][:30], 7]]
    greedy = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    params = [
        SamplingParams(temperature=0.0, max_tokens=60, prompt_logprobs=1),
        SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=50),
        BeamSearchParams(3, 24, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=3, max_tokens=70),
        *[greedy] * 3,
    ]
    found = [llm.generate(prompts, params), llm.generate(prompts[::-1], params[::-1])]
    pinned.release()
    return [
        [one.token_ids for one in output.outputs] for call in found for output in call
    ]


@pytest.mark.parametrize(("full_layers", "options"), [((), "int8"), ((0, 2), "floats")])
def test_tokens_of_all_features_are_those_of_one_table(options, full_layers):
    model, found, stats = window_model(full_layers), [], []
    for cache_groups in (False, True):
        llm = LLM(model, **SIZES, **OPTIONS[options], cache_groups=cache_groups)
        found.append(outputs(llm))
        stats.append(llm.stats())
        llm.close()
    assert found[0] == found[1]
    one_table, groups = stats
    assert one_table["kv_bytes"] == groups["kv_bytes"]
    assert one_table["kv_bytes_single_table"] == one_table["max_used_kv_bytes"]
    assert groups["max_used_kv_bytes"] < groups["kv_bytes_single_table"]
    assert groups["num_preemptions"] < one_table["num_preemptions"]
    # Blocks in front of a window are evicted earlier, and prompts come again.
    assert groups["prefix_hit_ratio"] > 0.5 * one_table["prefix_hit_ratio"]


def test_sizes_and_groups_follow_from_the_model_and_the_memory(monkeypatch):
    sizes = dict(block_size=16, max_num_seqs=2, max_num_batched_tokens=16)
    model = window_model((0, 2))
    llm = LLM(model, **sizes)
    # 16 blocks of the full group; 16 + 14 tokens at any offset in the other.
    assert llm.config.num_blocks == 2 * (16 + 3)
    assert llm.config.group_windows == (None, 16)
    assert "group_windows=(None, 16)" in repr(llm)
    assert "off" in repr(LLM(model, cache_groups=False, **sizes))
    # Too little memory for one row, and for sequences that are longer than the window.
    block = memory.block_bytes(model.config, 16, "float32", num_layers=2)
    for budget, blocks, length in ((10 * block, 10, 112), (2 * block, 1, 16)):
        monkeypatch.setattr(memory, "pool_budget", lambda *_, size=budget: size)
        llm = LLM(model, **sizes)
        assert (llm.config.num_blocks, llm.config.max_model_len) == (blocks, length)
    assert llm.config.group_windows == (None,)
    assert len(llm.generate([[1, 2, 3]])[0].outputs[0].token_ids) == 13
