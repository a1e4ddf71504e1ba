"""The engine on latent pages: its tokens are those of the plain forward pass.

latent_test compares the plain forward pass with naive attention in numpy.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM, BeamSearchParams, SamplingParams, engine, load_model
from jpaged.attention import backends
from jpaged.config import EngineConfig
from jpaged.engine import snapshots
from jpaged.models import init_model
from jpaged.serving import construction
from tests.models.families_test import write_case
from tests.support.models import checkpoints

SIZES = dict(block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)
SHARED = np.random.default_rng(1).integers(3, 120, 13).tolist()
PROMPTS = [
    SHARED + np.random.default_rng(seed).integers(3, 120, 5 + seed).tolist()
    for seed in range(5)
]
COUNT = 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
apply = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense layer and one with experts; fewer layers compile faster."""
    path = write_case(tmp_path_factory.mktemp("engine") / "latent", "deepseek_v3")
    config = json.loads((path / "config.json").read_text("utf-8"))
    text = json.dumps(config | {"num_hidden_layers": 2})
    (path / "config.json").write_text(text, "utf-8")
    tensors = checkpoints.read_tensors(path)
    kept = {name: tensors[name] for name in tensors if "layers.2." not in name}
    checkpoints.write_tensors(path, kept)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def expected(model):
    """Greedy tokens of the prompts, from the plain forward pass."""
    return [greedy(model, prompt, COUNT) for prompt in PROMPTS]


def logprobs(model, tokens: list[int]) -> np.ndarray:
    """Log-probabilities f32[T, V], through one program for all lengths."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(apply(model, jnp.asarray(padded)))[0, : len(tokens)]


def greedy(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logprobs(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def beams(model, prompt: list[int], width: int, count: int) -> list[list[int]]:
    """The beams of a search in which no token ends a sequence, best first."""
    running = [(0.0, list(prompt))]
    for _ in range(count):
        found = [
            (score + float(each), [*tokens, token])
            for score, tokens in running
            for token, each in enumerate(logprobs(model, tokens)[-1])
        ]
        running = sorted(found, reverse=True)[:width]
    return [tokens[len(prompt) :] for _, tokens in running]


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[each.token_ids for each in output.outputs] for output in outputs]


@pytest.mark.long
def test_swapping_samples_beams_and_prefixes_change_no_token(folder, model, expected):
    samples = dataclasses.replace(GREEDY, n=2, temperature=1.0, top_k=1)
    with LLM(
        folder,
        **SIZES,
        num_blocks=18,
        preemption="swap",
        num_swap_blocks=64,
        check_invariants=True,
    ) as llm:
        params = [GREEDY, GREEDY, GREEDY, samples, BEAMS]
        outputs = tokens_of(llm.generate(PROMPTS, params, progress=False))
        again = tokens_of(llm.generate(PROMPTS[:1], GREEDY, progress=False))
        stats = llm.stats()
    assert outputs[:3] == [[each] for each in expected[:3]]
    assert outputs[3] == [expected[3]] * 2
    assert outputs[4] == beams(model, PROMPTS[4], 3, 8)
    assert again == [[expected[0]]]
    assert stats["num_preemptions"] > 0
    assert stats["num_swapped_blocks"] > 0
    assert stats["prefix_hit_ratio"] > 0.2
    # 18 blocks of 4 tokens in 2 layers, 20 numbers of 4 bytes each.
    assert stats["kv_bytes"] == 18 * 4 * 2 * 20 * 4


@pytest.mark.long
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_xla_with_recomputation_and_shared_reads(folder, model, expected, kv_dtype):
    params = dataclasses.replace(GREEDY, logprobs=1)
    with LLM(
        folder,
        **SIZES,
        num_blocks=24,
        attention="xla",
        cascade=True,
        kv_dtype=kv_dtype,
    ) as llm:
        outputs = llm.generate(PROMPTS, params, progress=False)
        stats = llm.stats()
    assert stats["num_preemptions"] > 0
    size = 20 * 4 if kv_dtype == "float32" else 20 + 4
    assert stats["kv_bytes"] == 24 * 4 * 2 * size
    if kv_dtype == "float32":
        assert tokens_of(outputs) == [[each] for each in expected]
        return
    errors = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        found = output.outputs[0].token_ids
        want = logprobs(model, prompt + found)[len(prompt) - 1 : -1]
        got = output.outputs[0].cumulative_logprob / COUNT
        errors.append(abs(got - np.mean(want[np.arange(COUNT), found])))
    assert 1e-6 < max(errors) < 0.05


@pytest.mark.long
def test_speculation_with_a_latent_draft_changes_no_token(folder, expected):
    with LLM(
        folder,
        **SIZES | {"max_num_seqs": 1},
        speculative_config={"model": folder, "num_speculative_tokens": 3},
    ) as llm:
        outputs = tokens_of(llm.generate(PROMPTS[:2], GREEDY, progress=False))
        # The draft is the model itself, so every guess is accepted.
        assert llm.stats()["acceptance_rate"] == 1
    assert outputs == [[each] for each in expected[:2]]


@pytest.mark.long
def test_a_saved_engine_continues_with_its_latents(model, expected, tmp_path):
    config = EngineConfig(num_blocks=64, max_num_requests=4, **SIZES)
    state, _ = engine.submit(engine.init(model, config), PROMPTS[:3], GREEDY)
    state = engine.run(model, state, jnp.int32(12))
    snapshots.save(tmp_path / "saved", state)
    loaded = snapshots.load(tmp_path / "saved", model)
    assert loaded.cache.v_pages is None
    np.testing.assert_array_equal(loaded.cache.k_pages, state.cache.k_pages)
    loaded = engine.run(model, loaded, jnp.int32(1000))
    results = sorted(engine.collect(loaded), key=lambda result: result.arrival)
    assert [result.token_ids for result in results] == expected[:3]


def test_a_backend_without_latents_is_refused_before_the_weights_are_read(
    folder, monkeypatch
):
    without = functools.partial(dataclasses.replace, serves_latents=False)
    changed = tuple(
        without(each) if each.name == "reference" else each
        for each in backends.BACKENDS
    )
    monkeypatch.setattr(backends, "BACKENDS", changed)
    monkeypatch.setattr(construction, "load_model", None)
    with pytest.raises(
        ValueError,
        match=r"attention: expected None or a backend that serves .*'reference'",
    ):
        LLM(folder, attention="reference")


def test_batch_invariance_is_refused(model):
    dense = dataclasses.replace(model.config, num_experts=0, routing=None)
    with pytest.raises(ValueError, match=r"batch_invariant: .* latent attention"):
        LLM(init_model(dense), batch_invariant=True, max_model_len=16, num_blocks=4)
