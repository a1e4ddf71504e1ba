"""What `mesh_engine_test.py` reads: engines on meshes of 8 virtual CPU devices.

One process for everything, since the devices are chosen before jax starts. Run with an
empty folder; the last line of its output is one JSON object.
"""

import collections
import json
import pathlib
import re
import sys

import checkpoints
import jax
from families_test import write_case

from jpaged import LLM, engine, load_model, make_mesh
from jpaged.config import EngineConfig
from jpaged.requests import BeamSearchParams, SamplingParams

# 8 query heads read 2 kv heads: on 8 devices each is stored four times.
GQA = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
SIZES = dict(
    num_blocks=14,
    block_size=4,
    max_num_seqs=4,
    max_model_len=48,
    max_num_batched_tokens=16,
    max_num_requests=8,
    max_num_stop_ids=1,
)
# Tight: everybody at full length needs 4 x 8 blocks.
CONFIGS = {
    "recompute": EngineConfig(**SIZES, enable_prefix_caching=True),
    "swap": EngineConfig(**SIZES, preemption="swap", num_swap_blocks=12),
    "beams": EngineConfig(
        **SIZES | {"num_blocks": 40, "max_num_requests": 16}, max_beam_width=3
    ),
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=18, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=14, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
PROMPTS = [[3, 5, 7, 9, 11, 2], [4, 6, 8], [3, 5, 7, 9, 11, 2, 8, 1], [12, 13]]
CASES = {
    # (model, config, mesh)
    "2 devices": ("llama", "recompute", {"tensor": 2}),
    "8 devices, 2 kv heads": ("llama", "recompute", {"tensor": 8}),
    "4 devices, swapping": ("llama", "swap", {"tensor": 4}),
    "2 devices, beams": ("llama", "beams", {"tensor": 2}),
    "experts on 2 x 2": ("mixtral", "recompute", {"tensor": 2, "expert": 2}),
}


def requests(config: str) -> list:
    last = BEAMS if config == "beams" else GREEDY
    return [GREEDY, DRAWN, last, GREEDY]


def run(model, config: str, mesh) -> tuple[list, engine.EngineState]:
    """The tokens of everybody, and the state at the end."""
    state = engine.init(model, CONFIGS[config], mesh=mesh)
    state, _ = engine.submit(state, PROMPTS, requests(config))
    state = engine.run(model, state)
    return [result.token_ids for result in engine.collect(state)], state


def collectives(model, state) -> dict[str, int]:
    """How many of each kind the compiled step has, and its temporaries in bytes."""
    step = jax.jit(engine.step, donate_argnums=1)
    compiled = step.lower(model, state).compile()
    kinds = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("
    found = collections.Counter(re.findall(kinds, compiled.as_text()))
    analysis = compiled.memory_analysis()
    return dict(found) | {"temporaries": analysis.temp_size_in_bytes}


def with_llm(folder: pathlib.Path) -> dict:
    """The host's shell on 4 devices and on one, and what it refuses."""
    sizes = dict(num_blocks=16, block_size=4, max_num_seqs=1, max_model_len=48)
    texts = []
    for mesh in (None, make_mesh(tensor=4)):
        llm = LLM(folder, mesh=mesh, max_num_batched_tokens=16, **sizes)
        outputs = llm.generate(PROMPTS[0], GREEDY, progress=False)
        texts.append(outputs[0].outputs[0].token_ids)
    found = {"is_equal": texts[0] == texts[1], "num_tokens": len(texts[0])}
    try:
        LLM(folder, mesh=make_mesh(tensor=2, data=2), **sizes)
    except ValueError as error:
        found["refusal"] = str(error)
    return found


def main(folder: pathlib.Path) -> None:
    paths = {
        "llama": checkpoints.write_tiny_llama(folder / "llama", **GQA),
        "mixtral": write_case(folder, "mixtral"),
    }
    alone, found = {}, {}
    for name, (family, config, sizes) in CASES.items():
        if (family, config) not in alone:
            alone[family, config] = run(load_model(paths[family]), config, None)
        tokens, before = alone[family, config]
        mesh = make_mesh(**sizes)
        model = load_model(paths[family], mesh=mesh)
        got, state = run(model, config, mesh)
        pages = state.cache.k_pages
        found[name] = {
            "is_equal": got == tokens,
            "num_tokens": sum(map(len, tokens)),
            "preemptions": int(before.counters.num_preemptions),
            "swapped": int(before.counters.num_swapped_blocks),
            "on_device": list(pages.addressable_shards[0].data.shape),
            "violations": engine.violations(state),
        }
        if name == "2 devices":
            found[name]["collectives"] = collectives(model, state)
            more = engine.init(
                model,
                EngineConfig(**SIZES | {"num_blocks": 512}, enable_prefix_caching=True),
                mesh=mesh,
            )
            found[name]["roomy_collectives"] = collectives(model, more)
    found["LLM"] = with_llm(paths["llama"])
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
