"""The engine on pages of 8 bits: scales are copied and moved with their blocks.

The reference is a loop without pages (`oracle.naive`), whose attention reads keys and
values that this module rounds to 8 bits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import LLM, engine, load_model
from jpaged.attention import kv_cache
from jpaged.engine import snapshots
from jpaged.models import decoder, init_model
from jpaged.pages.quantised import PAGE_DTYPES, page_dtype
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.xla import pages as xla_pages
from tests.engine.compiled_program_test import MODEL, SIZES, copies_of, engine_config
from tests.support.engine import oracle
from tests.support.engine.configs import QUICKLY, OneSizeConfig
from tests.support.engine.oracle import FOREVER, naive
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

MAX_LEN = 40
# A pool in which sequences are swapped out and in, and prefixes are shared.
CONFIG = OneSizeConfig(
    num_blocks=30,
    block_size=4,
    max_num_seqs=6,
    max_model_len=MAX_LEN,
    max_num_batched_tokens=12,
    max_num_requests=40,
    max_beam_width=3,
    watermark=0.0,
    preemption="swap",
    num_swap_blocks=60,
    enable_prefix_caching=True,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    return load_model(checkpoints.write_tiny_llama(folder, num_hidden_layers=2))


def rounded(x: jax.Array, name: str) -> jax.Array:
    """Round x [..., D] to 8 bits: 127 steps, or 3 bits of mantissa down to 2**-9."""
    largest = {"int8": 127.0, "fp8": 448.0}[name]
    scale = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True) / largest, 1e-37)
    numbers = x / scale
    step = jnp.float32(1.0)
    if name == "fp8":
        exponent = jnp.floor(jnp.log2(jnp.maximum(jnp.abs(numbers), 2.0**-6)))
        step = 2.0 ** (exponent - 3)
    return jnp.round(numbers / step) * step * scale


@pytest.fixture(params=["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def kv_dtype(request):
    return request.param


def requests():
    """Greedy and sampled requests, some with a shared prefix; many more than fit."""
    rng = np.random.default_rng(0)
    header = rng.integers(0, 128, 9).tolist()
    prompts, params = [], []
    for number in range(6):
        own = rng.integers(0, 128, int(rng.integers(1, 5))).tolist()
        prompts.append(header * (number % 2) + own)
        ends = dict(max_tokens=MAX_LEN - len(prompts[-1]), ignore_eos=True)
        sampled = dict(n=1 + number // 2, seed=number)
        params.append(
            SamplingParams(**ends, **(sampled if number % 3 else {"temperature": 0.0}))
        )
    return prompts, params


def tokens_of(state) -> list[list[list[int]]]:
    found: dict[int, list] = {}
    for result in engine.collect(state):
        found.setdefault(result.arrival, []).append(result.token_ids)
    return [found[arrival] for arrival in sorted(found)]


def make_run():
    return jax.jit(
        lambda model, state, steps: engine.run.__wrapped__(model, state, steps),
        donate_argnames="state",
        compiler_options=QUICKLY,
    )


def expected_tokens(model, kv_dtype, monkeypatch):
    plain = decoder.causal_attention

    def attend(q, k, v, **options):
        return plain(q, rounded(k, kv_dtype), rounded(v, kv_dtype), **options)

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "causal_attention", attend)
        # A new function, because jax caches the program without the rounding.
        last = functools.partial(oracle._last_logits.__wrapped__)
        patch.setattr(oracle, "_last_logits", jax.jit(last))
        found = naive(model, *requests(), max_model_len=MAX_LEN)
    return [[one.tokens for one in samples] for samples in found]


def started(model, kv_dtype, config=CONFIG):
    state = engine.init(model, config, kv_dtype=kv_dtype)
    state, _ = engine.submit(state, *requests(), vocab_size=128)
    return state


def test_swaps_copies_forks_prefixes_and_snapshots_keep_the_scales(
    model, kv_dtype, monkeypatch, tmp_path
):
    want = expected_tokens(model, kv_dtype, monkeypatch)
    run = make_run()
    state = run(model, started(model, kv_dtype), jnp.int32(40))
    snapshots.save(tmp_path / "state", state)
    state = snapshots.load(tmp_path / "state", model, CONFIG, kv_dtype=kv_dtype)
    assert int(state.counters.num_steps) == 40
    state = run(model, state, jnp.int32(FOREVER))
    assert tokens_of(state) == want
    assert engine.violations(state) == []
    counters = state.counters
    for number in ("num_swapped_blocks", "num_block_copies", "num_cached_tokens"):
        assert int(getattr(counters, number)) > 0, number
    # Rounding matters here: without it, other tokens are generated.
    exact = naive(model, *requests(), max_model_len=MAX_LEN)
    assert [[one.tokens for one in samples] for samples in exact] != want


@pytest.mark.slow
def test_planted_faults_in_moving_scales_are_found(model, monkeypatch):
    want = expected_tokens(model, "int8", monkeypatch)
    copy, move = xla_pages.copy, kv_cache._move_blocks
    config = dataclasses.replace(
        CONFIG, attention="xla"
    )  # the faults are planted there

    def without_scales(pools, *args, **options):
        return (*copy(pools[:2], *args, **options), *pools[2:])

    def numbers_only(source, target, *args):
        moved = move(source, target, *args)
        return dataclasses.replace(moved, v_scale=target.v_scale)

    for module, name, fault in (
        (xla_pages, "copy", without_scales),
        (kv_cache, "_move_blocks", numbers_only),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            state = make_run()(model, started(model, "int8", config), jnp.int32(400))
        assert tokens_of(state) != want, name


@pytest.mark.slow
def test_beams_are_those_of_a_roomy_pool(model, kv_dtype):
    prompts = [[1, 2, 3, 4, 5], [9, 8], [1, 2, 3, 4, 7]]
    params = BeamSearchParams(beam_width=3, max_tokens=25, ignore_eos=True)
    roomy = dataclasses.replace(
        CONFIG, num_blocks=300, preemption="recompute", num_swap_blocks=0
    )
    found = []
    for config in (CONFIG, roomy):
        state = engine.init(model, config, kv_dtype=kv_dtype)
        state, _ = engine.submit(state, prompts, [params] * 3, vocab_size=128)
        found.append(tokens_of(make_run()(model, state, jnp.int32(FOREVER))))
    assert found[0] == found[1]


@pytest.mark.parametrize("kv_dtype", PAGE_DTYPES)
def test_a_pool_of_8_bits_is_never_copied(kv_dtype):
    model = init_model(MODEL)
    config = engine_config(SIZES[1])
    state = jax.eval_shape(lambda: engine.init(model, config, kv_dtype=kv_dtype))
    program = jax.jit(engine.step, donate_argnames="state").lower(model, state)
    program = program.compile()
    one_layer = SIZES[1] * MODEL.num_kv_heads * 16 * MODEL.head_dim
    size = kv_cache.bytes_per_block(
        num_layers=MODEL.num_layers,
        num_kv_heads=MODEL.num_kv_heads,
        block_size=16,
        head_dim=MODEL.head_dim,
        dtype=kv_dtype,
    )
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= SIZES[1] * size
    # One byte per number of a layer's keys, or the scales of its keys and values.
    assert memory.temp_size_in_bytes < one_layer
    kind = {"int8": "s8", "uint8": "u8"}[page_dtype(kv_dtype)]
    text = program.as_text()
    assert f"{kind}[{MODEL.num_layers},{SIZES[1]},{MODEL.num_kv_heads},16," in text
    assert copies_of(text, one_layer // MODEL.head_dim) == []


def test_an_llm_with_smaller_pages_has_more_blocks_in_the_same_memory(monkeypatch):
    from jpaged.serving import memory

    monkeypatch.setattr(memory, "pool_budget", lambda model, fraction: 2**20)
    sizes = dict(max_num_seqs=64, max_model_len=512)
    stats = {
        name: LLM("tiny-python", kv_dtype=name, **sizes).stats()
        for name in ("float32", "bfloat16", "int8")
    }
    head_dim = load_model("tiny-python").config.head_dim
    numbers = {name: one["num_blocks"] for name, one in stats.items()}
    for name, bytes_per_vector in (
        ("float32", 4 * head_dim),
        ("bfloat16", 2 * head_dim),
        ("int8", head_dim + 4),
    ):
        exact = numbers["float32"] * 4 * head_dim / bytes_per_vector
        assert abs(numbers[name] - exact) <= exact / numbers["float32"] + 1
        assert stats[name]["kv_bytes"] <= 2**20
