"""The TPU's kernels in TPU interpret mode.

Attention is compared with the float64 oracle, and page updates with numpy, bit for bit.
In this mode uninitialised memory is NaN. The cases also set everything to NaN that must
not be read. `tpu_compile_test` compiles the same kernels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jpaged import LLM, attention, engine
from jpaged.attention import kv_cache
from jpaged.config import EngineConfig
from jpaged.engine import forward
from jpaged.kv import shared_prefix
from jpaged.models import ModelConfig, init_model
from jpaged.pages import tuned
from jpaged.pallas.tpu import windows as tpu_windows
from jpaged.pallas.tpu.plan import TpuTiles
from jpaged.params import SamplingParams
from tests.support.attention import oracle
from tests.support.attention.oracle import Case, make_case, relative_errors
from tests.support.attention.prefix_cases import GROUPS, OWN_TOKENS, QUERIES, group_case

pytestmark = pytest.mark.long

# As in `tests/attention/attention_test.py`.
TOLERANCES = {"float32": 1e-5, "bfloat16": 4e-3}
LSE_TOLERANCE = 1e-4
# Tiles so small that a few tokens need several tiles.
SMALL = TpuTiles(query_rows=32, tokens=32, kv_heads=2)


@pytest.fixture(autouse=True)
def _interpreted():
    with pltpu.force_tpu_interpret_mode():
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tuned, "tiles", lambda *_: SMALL)


def stored(case: Case) -> Case:
    """Return the case with pages as TPUs store them.

    Tokens of small heads are side by side; heads that do not divide 128 are padded with
    zeros.
    """
    *first, _, head_dim = case.k_pages.shape
    fill = 0 if 128 % head_dim == 0 else -head_dim % 128
    width = ((0, 0),) * 3 + ((0, fill),)

    def page(pages):
        return np.pad(pages, width).reshape(*first, -1, max(head_dim + fill, 128))

    return dataclasses.replace(
        case, k_pages=page(case.k_pages), v_pages=page(case.v_pages)
    )


def run(case: Case, **options):
    arrays = jax.tree.map(jnp.asarray, oracle.arrays(case))
    # A new function for each call, so that no program with other tiles is used.
    call = functools.partial(
        attention.paged_attention,
        implementation="mosaic_tpu",
        return_lse=True,
        **options,
    )
    return jax.jit(call)(**arrays)


def check(case: Case, **options) -> None:
    device = dict(options)
    if "sinks" in options:
        device["sinks"] = jnp.asarray(options["sinks"])
    out, lse = run(stored(case), **device)
    tolerance = TOLERANCES[case.k_pages.dtype.name]
    oracle.check_result(case, out, lse, tolerance, LSE_TOLERANCE, **options)


SINKS = np.linspace(-2.0, 3.0, 14).astype(np.float32)
# heads, head_dim, block_size, dtype, options
SHAPES = {
    "one_group": ((3, 3), 80, 16, "float32", {}),
    "groups_of_4": ((8, 2), 128, 16, "bfloat16", {}),
    "one_key": ((16, 1), 256, 64, "bfloat16", {"sliding_window": 50}),
    "blocks_of_128": ((4, 2), 128, 128, "float32", {"logits_soft_cap": 2.0}),
    "everything": (
        (14, 2),
        64,
        32,
        "float32",
        dict(sinks=SINKS, sliding_window=17, logits_soft_cap=2.0, scale=0.2),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_decode_equals_the_oracle_at_every_length(name, small_tiles):
    heads, head_dim, size, dtype, options = SHAPES[name]
    lengths = [0, 1, size - 1, size, size + 1, 0, 2 * size + 5]
    case = make_case(
        lengths, heads=heads, head_dim=head_dim, block_size=size, dtype=dtype
    )
    check(case, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_decode_rows_and_empty_rows_equal_the_oracle(name, small_tiles):
    heads, head_dim, size, dtype, options = SHAPES[name]
    #          decode, chunk after context, empty, fresh prompt, decodes, chunk
    contexts = [47, size + 9, 0, 17, size, 40, 1, 50]
    queries = [1, 9, 0, 17, 1, 0, 1, 21]
    case = make_case(
        contexts,
        queries,
        heads=heads,
        head_dim=head_dim,
        block_size=size,
        dtype=dtype,
        num_padding=5,
    )
    case.q[50:] = np.nan
    check(case, **options)


def test_default_tiles_equal_the_oracle():
    check(make_case([540, 0, 33], [40, 0, 1], heads=(8, 2), head_dim=128))
    check(make_case([540, 0, 33], heads=(8, 2), head_dim=128, shared_blocks=2))


def test_a_step_of_empty_rows_returns_zeros():
    for queries in (None, [0, 0, 0]):
        case = make_case([0, 0, 0], queries, num_padding=4, head_dim=128)
        out, lse = run(case)
        assert (np.asarray(out) == 0).all()
        assert np.isneginf(lse).all()


def test_a_traced_layer_and_window_equal_that_layer_alone(small_tiles):
    case = make_case([5, 33, 0, 16], [1, 20, 0, 3], head_dim=128)
    k_pages, v_pages = np.full((2, 3, *case.k_pages.shape), np.nan, np.float32)
    k_pages[1], v_pages[1] = case.k_pages, case.v_pages
    all_layers = dataclasses.replace(case, k_pages=k_pages, v_pages=v_pages)
    want, _ = run(case, sliding_window=9)
    options = {"layer": jnp.int32(1), "sliding_window": jnp.int32(9)}
    got, _ = run(all_layers, **options)
    np.testing.assert_array_equal(got, want)


def test_released_blocks_in_front_of_the_window_are_not_read(small_tiles):
    case = make_case([5, 100, 0, 150], [1, 20, 0, 1], head_dim=128)
    check(oracle.without_front(case, 9), sliding_window=9)


def test_float32_queries_read_bfloat16_pages():
    case = make_case([40, 7], dtype="bfloat16", head_dim=128)
    check(dataclasses.replace(case, q=case.q.astype(np.float32)))


def shifted_table(case: Case) -> Case:
    return dataclasses.replace(case, block_tables=np.roll(case.block_tables, 1, axis=0))


def one_key_less(case: Case) -> Case:
    return dataclasses.replace(case, context_lens=case.context_lens - 1)


@pytest.mark.parametrize("fault", [shifted_table, one_key_less])
def test_a_planted_fault_exceeds_the_tolerance(fault):
    case = make_case([33, 64], [3, 1], head_dim=128, dtype="bfloat16")
    got, _ = run(fault(case))
    want, _ = oracle.attention(case)
    errors = relative_errors(got, want)
    assert not (errors < TOLERANCES["bfloat16"]).all(axis=1).any()


# ---- shared prefixes

SHARED = {
    "decode": ((32, 2), "bfloat16", None, {}),
    "chunks": (
        (14, 2),
        "float32",
        QUERIES,
        dict(sinks=SINKS, sliding_window=50, logits_soft_cap=2.0),
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_prefixes_equal_the_oracle(name, small_tiles):
    heads, dtype, queries, options = SHARED[name]
    sizes = dict(heads=heads, dtype=dtype, queries=queries)
    case, shared = group_case(GROUPS, OWN_TOKENS, **sizes)
    device = {k: jnp.asarray(v) if k == "sinks" else v for k, v in options.items()}
    out, lse = run(case, shared_prefix=shared, **device)
    want = case, out, lse, TOLERANCES[dtype], LSE_TOLERANCE
    oracle.check_result(*want, **options)


# ---- write_kv, copy_blocks: bit for bit


def some(*shape: int, seed: int, dtype: str) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(oracle.DTYPES[dtype])


def mosaic(function, **options):
    return jax.jit(functools.partial(function, implementation="mosaic_tpu", **options))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("chunk_bytes", [2**20, 8 * 4 * 256])
def test_write_kv_writes_exactly_the_named_slots(dtype, chunk_bytes, monkeypatch):
    monkeypatch.setattr(tpu_windows, "_CHUNK_BYTES", chunk_bytes)
    pages = [some(2, 6, 2, 32, 128, seed=s, dtype=dtype) for s in (0, 1)]
    new = [some(40, 2, 128, seed=s, dtype=dtype) for s in (2, 3)]
    new[0][0, 0, 0] = -0.0
    # A chunk of a prompt across two blocks, single tokens, and skipped slots.
    slots = [191, -1, 7, 64, -9, 192, 100, *range(20, 50), 101, 0, 2**31 - 1]
    got = mosaic(attention.write_kv)(
        *map(jnp.asarray, (*pages, *new, np.array(slots, np.int32))), layer=jnp.int32(1)
    )
    for want, values, result in zip(pages, new, got, strict=True):
        for token, slot in enumerate(slots):
            if 0 <= slot < 192:
                want[1, slot // 32, :, slot % 32] = values[token]
        assert np.asarray(result).tobytes() == want.tobytes()


def test_write_kv_pads_heads_that_do_not_divide_128():
    pages = jnp.ones((2, 1, 16, 128), jnp.bfloat16)
    new = jnp.asarray(some(1, 1, 80, seed=0, dtype="float32"))
    got, _ = mosaic(attention.write_kv)(pages, pages, new, new, jnp.array([17]))
    np.testing.assert_array_equal(got[1, 0, 1, :80], new[0, 0].astype(jnp.bfloat16))
    assert (np.asarray(got[1, 0, 1, 80:]) == 0).all()
    assert (
        np.asarray(got).sum(dtype=np.float64)
        - np.asarray(got[1, 0, 1]).sum(dtype=np.float64)
    ) == 31 * 128


@pytest.mark.parametrize("layer", [None, 1])
def test_copy_blocks_copies_exactly_the_named_blocks(layer):
    pages = [some(2, 8, 2, 16, 128, seed=s, dtype="bfloat16") for s in (0, 1)]
    src, dst = [3, -1, 0, 3, 5, -1], [1, 2, 7, 6, -1, -1]
    got = mosaic(attention.copy_blocks, layer=layer)(
        *map(jnp.asarray, pages), jnp.array(src), jnp.array(dst)
    )
    for want, result in zip(pages, got, strict=True):
        for one in want if layer is None else want[layer : layer + 1]:
            for source, target in ((3, 1), (0, 7), (3, 6)):
                one[target] = one[source]
        assert np.asarray(result).tobytes() == want.tobytes()


# ---- unsupported calls

WRONG = {
    "k_pages: expected bfloat16, float32, int8, .* got float16": {"dtype": "float16"},
    "k_pages: expected a block_size of a multiple of 16, got 8": {"block_size": 8},
    "k_pages: expected a head_dim of 16, 32 or 64 .* got 80": {"head_dim": 80},
    "k_pages: .* block_size of 16 or a multiple of 32 for a head_dim of 32, got 48": {
        "head_dim": 32,
        "block_size": 48,
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_an_unsupported_call_raises_and_names_another_backend(message):
    case = make_case([5, 9], **({"head_dim": 128} | WRONG[message]))
    with pytest.raises(
        ValueError, match=r"cannot serve this \('xla' can\): " + message
    ):
        run(case)


def test_tables_larger_than_the_scalar_memory_and_traced_scales_raise():
    case = make_case([5, 9], head_dim=128, spare_columns=120_000)
    with pytest.raises(ValueError, match="block_tables: expected at most 229376"):
        run(case)
    with pytest.raises(ValueError, match="scale: expected a Python number"):
        run(make_case([5], head_dim=128), scale=jnp.float32(1.0))


# ---- in the engine

TINY = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=64,
    hidden_act="silu",
    rms_norm_eps=1e-5,
)


def check_engine(prompts, max_tokens, **sizes) -> engine.EngineState:
    """Check that an engine's greedy tokens are the model's; return its last state."""
    model = init_model(ModelConfig.from_hf(TINY))
    fixed = dict(max_model_len=64, max_num_requests=8, attention="mosaic_tpu")
    config = EngineConfig(**fixed, **sizes)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    state, _ = engine.submit(engine.init(model, config), prompts, params)
    assert state.cache.k_pages.shape[2:] == (2, 8, 128)  # two tokens in a row
    state = engine.run(model, state)
    results = engine.collect(state)
    assert [len(result.token_ids) for result in results] == [max_tokens] * len(prompts)
    for result in results:
        prompt = prompts[result.arrival]
        tokens = [*prompt, *result.token_ids]
        logits = model(jnp.array([tokens + [0] * (64 - len(tokens))]))[0]
        best = np.asarray(jnp.argmax(logits, axis=-1))
        assert best[len(prompt) - 1 : len(tokens) - 1].tolist() == result.token_ids
    return state


def test_an_engine_that_reads_shared_prefixes_once_generates_the_models_tokens(
    monkeypatch,
):
    find_shared_prefix, shared = shared_prefix.find_shared_prefix, []

    def find_all(*tables):
        found = find_shared_prefix(*tables, min_prefix_tokens=1, min_saved_tokens=1)
        jax.debug.callback(lambda n: shared.append(int(n)), found.num_blocks.max())
        return found

    monkeypatch.setattr(forward.shared_prefix, "find_shared_prefix", find_all)
    # Chunks of prompts, a prompt that waits for a row, and two with a common prefix.
    prompts = [list(range(5, 40)), [*range(5, 39), 1, 2], [7] * 17, [1, 2, 3]]
    sizes = dict(num_blocks=16, max_num_seqs=3, max_num_batched_tokens=16)
    check_engine(prompts, 4, cascade=True, enable_prefix_caching=True, **sizes)
    jax.effects_barrier()
    assert 2 in shared


def test_bytes_per_block_include_the_padding_of_heads():
    sizes = dict(num_layers=2, num_kv_heads=3, block_size=16, dtype="bfloat16")
    for head_dim, bytes_per_head in ((64, 128), (80, 256), (128, 256), (130, 512)):
        size = kv_cache.bytes_per_block(
            head_dim=head_dim, implementation="mosaic_tpu", **sizes
        )
        assert size == 2 * 2 * 3 * 16 * bytes_per_head


def test_an_llm_without_a_tpu_raises():
    with pytest.raises(
        ValueError, match=r"attention: .* got 'mosaic_tpu', which needs a TPU"
    ):
        LLM("random:opt-125m", attention="mosaic_tpu")
