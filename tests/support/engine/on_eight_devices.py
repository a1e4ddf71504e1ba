"""Engines on meshes of 8 virtual CPU devices, for `tests/engine/mesh_test.py`.

One process for all of it, because the number of devices is set before jax starts. Run
it with an empty folder; the last line of its output is one JSON object.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import pathlib
import re
import sys
from unittest import mock

import jax
import numpy as np

from jpaged import LLM, engine, load_model, make_mesh
from jpaged.config import EngineConfig, Speculation
from jpaged.engine import forward, snapshots
from jpaged.kv import shared_prefix
from jpaged.models.loading import checkpoint
from jpaged.params import BeamSearchParams, SamplingParams
from tests.models.families_test import write_case
from tests.support.models import checkpoints

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
# A tight pool: four sequences of full length need 4 x 8 blocks.
CONFIGS = {
    "recompute": EngineConfig(**SIZES, enable_prefix_caching=True),
    "swap": EngineConfig(**SIZES, preemption="swap", num_swap_blocks=12),
    "beams": EngineConfig(
        **SIZES | {"num_blocks": 40, "max_num_requests": 16}, max_beam_width=3
    ),
    "drafts": EngineConfig(**SIZES, speculation=Speculation("model", num_tokens=2)),
    "cascade": EngineConfig(**SIZES, enable_prefix_caching=True, cascade=True),
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=18, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=14, ignore_eos=True)
UNSEEDED = SamplingParams(temperature=1.0, max_tokens=9, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
PROMPTS = [[3, 5, 7, 9, 11, 2], [4, 6, 8], [3, 5, 7, 9, 11, 2, 8, 1], [12, 13]]
CASES = {
    # (model, config, mesh)
    "2 devices": ("llama", "recompute", {"tensor": 2}),
    "8 devices, 2 kv heads": ("llama", "recompute", {"tensor": 8}),
    "4 devices, swapping": ("llama", "swap", {"tensor": 4}),
    "2 devices, beams": ("llama", "beams", {"tensor": 2}),
    "experts on 2 x 2": ("mixtral", "recompute", {"tensor": 2, "expert": 2}),
    "latents on 2 x 2": ("deepseek_v3", "recompute", {"tensor": 2, "expert": 2}),
    "4 devices, words first": ("tied", "recompute", {"tensor": 4}),
    "2 replicas, swapping": ("llama", "swap", {"data": 2, "tensor": 2}),
    "2 replicas, drafts": ("llama", "drafts", {"data": 2, "tensor": 2}),
    "2 replicas, cascade": ("llama", "cascade", {"data": 2, "tensor": 2}),
}

# Saved after 12 steps on one mesh and continued on another: (config, from, to).
MOVES = {
    "2 to one": ("recompute", {"tensor": 2}, None),
    "one to 8": ("recompute", None, {"tensor": 8}),
    "8 to 2": ("recompute", {"tensor": 8}, {"tensor": 2}),
    "one to 4, swapping": ("swap", None, {"tensor": 4}),
}
SAVED_AFTER = np.int32(12)


def requests(config: str) -> list:
    last = BEAMS if config == "beams" else GREEDY
    return [GREEDY, SAMPLED, last, GREEDY]


def scheduled(model, config: str, mesh) -> engine.EngineState:
    """Submit all requests; a second replica gets all but the last, and ends sooner."""
    state = engine.init(model, CONFIGS[config], mesh=mesh)
    state, _ = engine.submit(state, PROMPTS, requests(config))
    if mesh is not None and mesh.shape["data"] == 2:
        short = PROMPTS[:-1], requests(config)[:-1]
        state, _ = engine.submit(state, *short, replica=1)
    return state


def run(model, state: engine.EngineState) -> tuple[list, engine.EngineState]:
    """The tokens of all requests, and the state at the end."""
    state = engine.run(model, state, np.iinfo(np.int32).max)
    return [result.token_ids for result in engine.collect(state)], state


def moved(folder: pathlib.Path, models: list, move: tuple, alone: tuple) -> dict:
    """Start a run with one model on its mesh, and continue it with another."""
    config, *sizes = move
    meshes = [size and make_mesh(**size) for size in sizes]
    state = engine.run(models[0], scheduled(models[0], config, meshes[0]), SAVED_AFTER)
    snapshots.save(folder, state)
    loaded = snapshots.load(folder, models[1], mesh=meshes[1])
    num_swapped = int(loaded.counters.num_swapped_blocks)
    tokens, state = run(models[1], loaded)
    return {
        "is_equal": tokens == alone[0],
        "num_swapped": num_swapped,
        # Equal if no page was recomputed.
        "computed": int(state.counters.num_tokens),
        "computed_alone": int(alone[1].counters.num_tokens),
        "violations": engine.violations(state),
    }


def collectives(model, state) -> dict[str, int]:
    """Collectives of the compiled step by kind, and its temporaries in bytes."""
    step = jax.jit(engine.step, donate_argnums=1)
    compiled = step.lower(model, state).compile()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    sent = re.findall(rf" ({kinds})\(.*replica_groups=(.*?), \w+=", compiled.as_text())
    analysis = compiled.memory_analysis()
    return {
        "counts": collections.Counter(kind for kind, _ in sent),
        "groups": sorted({re.sub(r"^mesh\[.*\] ", "", group) for _, group in sent}),
        "temporaries": analysis.temp_size_in_bytes,
    }


def measure(model, case: str, tokens: list, draft: pathlib.Path) -> dict:
    """Measurements of a case of CASES; `tokens` are those of one device."""
    _, config, sizes = CASES[case]
    mesh = make_mesh(**sizes)
    if config == "drafts":
        model = engine.DraftedModel(model, load_model(draft, mesh=mesh))
    got, state = run(model, scheduled(model, config, mesh))
    if sizes.get("data") == 2:
        tokens = tokens + tokens[:-1]
    pages, counters = state.cache.k_pages, state.counters
    found = {
        "is_equal": got == tokens,
        "num_tokens": sum(map(len, got)),
        "preemptions": int(counters.num_preemptions.sum()),
        "swapped": int(counters.num_swapped_blocks.sum()),
        "drafts": [int(counters.num_drafts.sum()), int(counters.num_accepted.sum())],
        "steps": counters.num_steps.tolist(),
        "on_device": list(pages.addressable_shards[0].data.shape),
        "violations": engine.violations(state),
    }
    if case in ("2 devices", "2 replicas, swapping"):
        more = dataclasses.replace(CONFIGS["recompute"], num_blocks=512)
        roomy = engine.init(model, more, mesh=mesh)
        found["roomy_collectives"] = collectives(model, roomy)
        # Otherwise each program compiles once more for a state that a program returned.
        where = shardings(roomy)
        roomy, _ = engine.submit(roomy, PROMPTS[:1], GREEDY)
        found["stays"] = shardings(roomy) == where
    if case == "2 devices":
        found["collectives"] = collectives(model, state)
    if case == "2 replicas, swapping":
        found["refusals"] = [
            refusal(engine.submit, state, PROMPTS, GREEDY, replica=2),
            refusal(snapshots.save, draft / "snapshot", state),
            refusal(snapshots.load, draft / "snapshot", model, mesh=mesh),
        ]
    return found


def shardings(state) -> list:
    return [array.sharding for array in jax.tree.leaves(state)]


def refusal(function, *args, **options) -> str:
    try:
        function(*args, **options)
    except ValueError as error:
        return str(error)
    return "not refused"


def with_cascade(function, *args) -> dict:
    """Call `function` with cascade attention for every shared block; count these."""
    find_shared_prefix, most = shared_prefix.find_shared_prefix, []

    def find_all(*tables):
        found = find_shared_prefix(*tables, min_prefix_tokens=1, min_saved_tokens=1)
        jax.debug.callback(lambda n: most.append(int(n)), found.num_blocks.max())
        return found

    with mock.patch.object(forward.shared_prefix, "find_shared_prefix", find_all):
        found = function(*args)
    jax.effects_barrier()
    return found | {"most_shared_blocks": max(most)}


def with_llm(folder: pathlib.Path) -> dict:
    """An LLM on 2 replicas of 2 devices, and one on a single device."""
    sizes = dict(num_blocks=24, block_size=4, max_num_seqs=3, max_model_len=48)
    sizes |= dict(max_num_batched_tokens=16, seed=7, check_invariants=True)
    prompts = [*PROMPTS, [7, 7, 7], [3, 5, 7, 9, 11]]
    params = [GREEDY, SAMPLED, BEAMS, UNSEEDED, UNSEEDED, SAMPLED]
    texts = []
    for mesh in (None, make_mesh(data=2, tensor=2)):
        llm = LLM(folder, mesh=mesh, **sizes)
        outputs = llm.generate(prompts, params, progress=False)
        outputs += llm.generate(prompts, params, progress=False)
        texts.append([[o.token_ids for o in out.outputs] for out in outputs])
    found = {"is_equal": texts[0] == texts[1]}
    found["num_outputs"] = sum(map(len, texts[1]))
    each, total = llm.replica_stats(), llm.stats()
    found["steps"] = [one["num_steps"] for one in each]
    found["is_sum"] = all(
        sum(one[name] for one in each) == total[name]
        for name in ("num_blocks", "num_free_blocks", "num_steps", "computed_tokens")
    )
    found["timelines"] = [len(llm.timeline(replica)) for replica in range(2)]
    found["refusal"] = refusal(llm.timeline, 2)
    return found | live(llm, texts[1])


def live(llm: LLM, texts: list) -> dict:
    """Pinned prefixes, and live requests that finish or are aborted, on replicas."""
    found = {}
    # Of 21 tokens, the five whole blocks are cached.
    long = list(range(20, 41))
    llm.generate([long], GREEDY, progress=False)
    outputs = llm.generate([[*long, n] for n in range(3)], GREEDY, progress=False)
    found["cached"] = [out.metrics["num_cached_tokens"] for out in outputs]
    with llm.pin(PROMPTS[0][:5]) as prefix:
        seq_indices = llm._host.pinned[0].seq_indices
        found["pinned_in"] = [n // llm.config.max_num_requests for n in seq_indices]
        pinned = llm.generate([prefix.prompt([2])] * 2, GREEDY, progress=False)
        found["is_pinned_equal"] = all(
            out.outputs[0].token_ids == texts[0][0] for out in pinned
        )
    first, aborted = (llm.submit(PROMPTS[0], GREEDY) for _ in range(2))
    aborted.abort()
    found["reasons"] = [
        request.output().outputs[0].finish_reason for request in (first, aborted)
    ]
    found["is_live_equal"] = first.output().outputs[0].token_ids == texts[0][0]

    async def follow() -> list[int]:
        stream = llm.astream(PROMPTS[0], GREEDY)
        return [token async for delta in stream for token in delta.token_ids]

    async def follow_all() -> list[list[int]]:
        return await asyncio.gather(*(follow() for _ in range(3)))

    found["is_streamed_equal"] = asyncio.run(follow_all()) == [texts[0][0]] * 3
    llm.reset_prefix_cache()
    found["left"] = [
        llm.stats()["num_blocks"] - llm.stats()["num_free_blocks"],
        int((llm.config.max_num_requests - llm._host.empty_entries).sum()),
    ]
    return found


@contextlib.contextmanager
def as_on_tpus(is_wanted: bool):
    """Load models with the output weights in the order that TPUs use."""

    def words_first(config):
        return dataclasses.replace(config, vocab_first=True)

    if not is_wanted:
        yield
        return
    with mock.patch.object(checkpoint, "as_stored", words_first):
        yield


def main(folder: pathlib.Path) -> None:
    paths = {
        "llama": checkpoints.write_tiny_llama(folder / "llama", **GQA),
        "mixtral": write_case(folder, "mixtral"),
        "deepseek_v3": write_case(folder / "deepseek", "deepseek_v3"),
        "tied": checkpoints.write_tiny_llama(
            folder / "tied", **GQA, tie_word_embeddings=True
        ),
    }
    # The target's first layer: some of its drafts are accepted.
    draft = checkpoints.write_tiny_llama(folder / "draft", **GQA, num_hidden_layers=1)
    alone, found = {}, {}
    models = {name: load_model(path) for name, path in paths.items()}
    for name, (family, config, sizes) in CASES.items():
        # Neither drafts nor cascade attention change a token.
        plain = "recompute" if config in ("drafts", "cascade") else config
        if (family, plain) not in alone:
            model = models[family]
            alone[family, plain] = run(model, scheduled(model, plain, None))
        with as_on_tpus("words first" in name):
            model = models[name] = load_model(paths[family], mesh=make_mesh(**sizes))
        args = model, name, alone[family, plain][0], draft
        found[name] = (
            with_cascade(measure, *args) if config == "cascade" else measure(*args)
        )
    of = {2: "2 devices", 8: "8 devices, 2 kv heads", 4: "4 devices, swapping"}
    for name, move in MOVES.items():
        pair = [models[of[size["tensor"]] if size else "llama"] for size in move[1:]]
        one = alone["llama", move[0]]
        found[name] = moved(folder / name.replace(" ", "_"), pair, move, one)
    found["LLM"] = with_llm(paths["llama"])
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
