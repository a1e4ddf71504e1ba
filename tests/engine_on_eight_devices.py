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
import numpy as np
from families_test import write_case

from jpaged import LLM, engine, load_model, make_mesh, snapshots
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


# Saved after 12 steps on one mesh and gone on with on another: (config, from, to).
MOVES = {
    "2 to one": ("recompute", {"tensor": 2}, None),
    "one to 8": ("recompute", None, {"tensor": 8}),
    "8 to 2": ("recompute", {"tensor": 8}, {"tensor": 2}),
    "one to 4, swapping": ("swap", None, {"tensor": 4}),
}
SAVED_AFTER = np.int32(12)


def requests(config: str) -> list:
    last = BEAMS if config == "beams" else GREEDY
    return [GREEDY, DRAWN, last, GREEDY]


def begun(model, config: str, mesh) -> engine.EngineState:
    state = engine.init(model, CONFIGS[config], mesh=mesh)
    return engine.submit(state, PROMPTS, requests(config))[0]


def run(model, state: engine.EngineState) -> tuple[list, engine.EngineState]:
    """The tokens of everybody, and the state at the end."""
    state = engine.run(model, state, np.iinfo(np.int32).max)
    return [result.token_ids for result in engine.collect(state)], state


def moved(folder: pathlib.Path, models: list, move: tuple, alone: tuple) -> dict:
    """A run that began with one model, on its mesh, and ended with another."""
    config, *sizes = move
    meshes = [size and make_mesh(**size) for size in sizes]
    state = engine.run(models[0], begun(models[0], config, meshes[0]), SAVED_AFTER)
    snapshots.save(folder, state)
    loaded = snapshots.load(folder, models[1], mesh=meshes[1])
    num_swapped = int(loaded.counters.num_swapped_blocks)
    tokens, state = run(models[1], loaded)
    return {
        "is_equal": tokens == alone[0],
        "num_swapped": num_swapped,
        # What was not computed again.
        "computed": int(state.counters.num_tokens),
        "computed_alone": int(alone[1].counters.num_tokens),
        "violations": engine.violations(state),
    }


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
    models = {}
    for name, (family, config, sizes) in CASES.items():
        if (family, config) not in alone:
            model = models.setdefault((family, None), load_model(paths[family]))
            alone[family, config] = run(model, begun(model, config, None))
        tokens, before = alone[family, config]
        mesh = make_mesh(**sizes)
        model = load_model(paths[family], mesh=mesh)
        models[family, mesh.shape["tensor"]] = model
        got, state = run(model, begun(model, config, mesh))
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
    for name, move in MOVES.items():
        pair = [models["llama", size and size["tensor"]] for size in move[1:]]
        one = alone["llama", move[0]]
        found[name] = moved(folder / name.replace(" ", "_"), pair, move, one)
    found["LLM"] = with_llm(paths["llama"])
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
