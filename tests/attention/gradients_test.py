"""Gradients through paged attention: q, pages and sinks, with blocks that rows share.

They are compared with jax.grad of dense attention on keys and values gathered by numpy,
and for some entries with finite differences of the float64 oracle.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import load_model
from jpaged.attention import paged_attention, write_kv
from jpaged.pages.quantised import quantise
from tests.support.attention import oracle
from tests.support.attention.oracle import Case, make_case

pytestmark = pytest.mark.long

# Float32 sums of some hundred products, relative to the largest entry.
TOLERANCE = 2e-5
LENGTHS = [40, 0, 17, 33, 70]
CHUNKS = [5, 0, 1, 33, 40]
CASES = {
    "decode": (None, {}),
    "chunks": (CHUNKS, {}),
    "window": (CHUNKS, {"sliding_window": 20}),
    "cap and sinks": (CHUNKS, {"logits_soft_cap": 1.5, "sinks": True}),
    "scaled decode with sinks": (None, {"scale": 0.4, "sinks": True}),
}


def case_of(queries, **options) -> tuple[Case, dict]:
    case = make_case(LENGTHS, queries, shared_blocks=2, num_padding=2, head_dim=8)
    if options.pop("sinks", False):
        options["sinks"] = np.linspace(-1, 1, 4).astype(np.float32)
    return case, options


def pulls(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of outputs and log-sum-exps in the loss."""
    rng = np.random.default_rng(3)
    out = rng.standard_normal(case.q.shape).astype(np.float32)
    lse = rng.standard_normal(case.q.shape[:2]).astype(np.float32)
    _, expected_lse = oracle.attention(case)
    return out, np.where(np.isneginf(expected_lse), 0.0, lse).astype(np.float32)


def paged_loss(case: Case, implementation: str, **options):
    pull_out, pull_lse = pulls(case)
    fixed = dict(block_tables=case.block_tables)
    if case.query_start_loc is not None:
        fixed["query_start_loc"] = case.query_start_loc
    fixed = {name: jnp.asarray(value) for name, value in fixed.items()}

    def loss(arrays, context_lens=case.context_lens):
        out, lse = paged_attention(
            **arrays,
            **fixed,
            context_lens=jnp.asarray(context_lens),
            **options,
            return_lse=True,
            implementation=implementation,
        )
        lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return jnp.sum(out * pull_out) + jnp.sum(lse * pull_lse)

    return loss


def dense_loss(case: Case, **options):
    """Return the same loss with gathered keys and values and a plain softmax."""
    pull_out, pull_lse = pulls(case)
    _, num_kv_heads, block_size, head_dim = case.k_pages.shape
    scale = options.get("scale", head_dim**-0.5)
    slots = np.zeros((len(case.q), max(LENGTHS)), int)
    mask = np.zeros(slots.shape, bool)
    for row, query, num_visible in oracle._queries(case):
        for position in range(num_visible):
            block = case.block_tables[row, position // block_size]
            slots[query, position] = block * block_size + position % block_size
        first = max(0, num_visible - options.get("sliding_window", 10**6))
        mask[query, first:num_visible] = True

    def tokens(pages):  # [T, most, K, D]
        return pages.transpose(0, 2, 1, 3).reshape(-1, num_kv_heads, head_dim)[slots]

    def loss(arrays):
        q = arrays["q"].reshape(len(case.q), num_kv_heads, -1, head_dim)
        keys, values = tokens(arrays["k_pages"]), tokens(arrays["v_pages"])
        scores = scale * jnp.einsum("xkgd,xtkd->xkgt", q, keys, precision="highest")
        if cap := options.get("logits_soft_cap"):
            scores = cap * jnp.tanh(scores / cap)
        scores = jnp.where(mask[:, None, None, :], scores, -1e30)
        lowest = jnp.full((1, 1, 1, 1), -1e30)
        sinks = arrays["sinks"].reshape(1, -1, 2, 1) if "sinks" in arrays else lowest
        sinks = jnp.broadcast_to(sinks, (*scores.shape[:3], 1))
        lse = jax.nn.logsumexp(jnp.concatenate([scores, sinks], axis=-1), axis=-1)
        weights = jnp.exp(scores - lse[..., None])
        out = jnp.einsum("xkgt,xtkd->xkgd", weights, values, precision="highest")
        # The weights are zero, and finite, for a query that sees no token.
        seen = mask.any(axis=1)
        out = out.reshape(case.q.shape) * np.where(seen[:, None, None], pull_out, 0)
        return jnp.sum(out) + jnp.sum(lse.reshape(pull_lse.shape) * pull_lse)

    return loss


def arrays_of(case: Case, options: dict) -> dict[str, jax.Array]:
    arrays = {name: getattr(case, name) for name in ("q", "k_pages", "v_pages")}
    if "sinks" in options:
        arrays["sinks"] = options.pop("sinks")
    return {name: jnp.asarray(value) for name, value in arrays.items()}


def worst(got: dict, expected: dict) -> float:
    """Return the largest difference, relative to the largest entry of a gradient."""
    return max(
        float(np.abs(np.asarray(got[name]) - np.asarray(expected[name])).max())
        / float(np.abs(np.asarray(expected[name])).max())
        for name in expected
    )


@pytest.fixture(scope="module")
def dense_gradients():
    found = {}
    for name, (queries, options) in CASES.items():
        case, options = case_of(queries, **options)
        arrays = arrays_of(case, options)
        finite = {key: jnp.nan_to_num(value) for key, value in arrays.items()}
        found[name] = jax.jit(jax.grad(dense_loss(case, **options)))(finite)
    return found


@pytest.mark.parametrize(
    ("implementation", "name"),
    [*(("xla", name) for name in CASES), ("reference", "cap and sinks")],
)
def test_gradients_equal_those_of_dense_attention(
    implementation, name, dense_gradients
):
    queries, options = CASES[name]
    case, options = case_of(queries, **options)
    arrays = arrays_of(case, options)  # NaN in every slot that no row owns
    loss = paged_loss(case, implementation, **options)
    got = jax.jit(jax.grad(loss))(arrays)
    assert worst(got, dense_gradients[name]) < TOLERANCE
    # Slots that no query sees have a gradient of exactly 0.
    unused = np.isnan(case.k_pages)
    assert (np.asarray(got["k_pages"])[unused] == 0).all()


def test_gradients_equal_finite_differences_of_the_oracle():
    case, options = case_of(CHUNKS, logits_soft_cap=1.5, sinks=True)
    sinks = options["sinks"]
    arrays = arrays_of(case, options)
    got = jax.jit(jax.grad(paged_loss(case, "xla", **options)))(arrays)
    pull_out, pull_lse = pulls(case)
    values = {name: np.asarray(x).astype(np.float64) for name, x in arrays.items()}

    def loss(values) -> float:
        changed = dataclasses.replace(
            case, **{name: values[name] for name in ("q", "k_pages", "v_pages")}
        )
        out, lse = oracle.attention(changed, sinks=values["sinks"], **options)
        lse = np.where(np.isneginf(lse), 0.0, lse)
        return float((out * pull_out).sum() + (lse * pull_lse).sum())

    assert sinks.shape == (4,)
    shared = int(case.block_tables[0, 0])
    own = int(case.block_tables[4, 3])
    for name, index in (
        ("q", (3, 1, 2)),
        ("q", (40, 3, 0)),
        ("k_pages", (shared, 1, 5, 3)),
        ("v_pages", (shared, 0, 2, 7)),
        ("k_pages", (own, 0, 1, 1)),
        ("sinks", (2,)),
    ):
        ends = []
        for step in (1e-6, -1e-6):
            moved = {key: value.copy() for key, value in values.items()}
            moved[name][index] += step
            ends.append(loss(moved))
        expected = (ends[0] - ends[1]) / 2e-6
        largest = float(np.abs(np.asarray(got[name])).max())
        assert abs(float(got[name][index]) - expected) < TOLERANCE * largest


def test_a_shared_block_gets_the_sum_and_a_fault_is_found(dense_gradients):
    case, options = case_of(None)
    arrays = arrays_of(case, options)
    gradient = jax.jit(jax.grad(paged_loss(case, "xla")))
    got = gradient(arrays, case.context_lens)
    shared = int(case.block_tables[0, 0])
    assert (case.block_tables[[0, 2, 3, 4], 0] == shared).all()
    total = np.zeros_like(case.k_pages[shared])
    for row in (0, 2, 3, 4):
        lens = np.where(np.arange(5) == row, case.context_lens, 0).astype(np.int32)
        total += np.asarray(gradient(arrays, lens)["v_pages"])[shared]
    np.testing.assert_allclose(got["v_pages"][shared], total, atol=1e-5)
    fault = gradient(arrays, case.context_lens - 1)
    assert not worst(fault, dense_gradients["decode"]) < 100 * TOLERANCE


def test_gradients_of_stacked_bfloat16_pages_have_their_shape_and_dtype():
    case, _ = case_of(None)
    k_pages, v_pages = (jnp.asarray(x) for x in (case.k_pages, case.v_pages))
    stacked = [jnp.stack([x * 0, x]).astype(jnp.bfloat16) for x in (k_pages, v_pages)]
    tables, lens = jnp.asarray(case.block_tables), jnp.asarray(case.context_lens)

    def loss(k_pages, v_pages, layer=None):
        q = jnp.asarray(case.q)
        out = paged_attention(q, k_pages, v_pages, tables, lens, layer=layer)
        return jnp.sum(out**2)

    got = jax.grad(loss, argnums=(0, 1))(*stacked, layer=1)
    expected = jax.grad(loss, argnums=(0, 1))(*(x[1] for x in stacked))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert (np.asarray(one[0]) == 0).all()
        np.testing.assert_array_equal(one[1], other)


def test_arguments_without_a_gradient_raise_an_error_that_names_them():
    case, _ = case_of(None)
    arrays = arrays_of(case, {})
    tables, lens = jnp.asarray(case.block_tables), jnp.asarray(case.context_lens)
    wide = jnp.zeros((2, 1, 16, 128)), jnp.zeros((2, 1, 128))

    def scaled(scale):
        return paged_attention(
            **arrays, block_tables=tables, context_lens=lens, scale=scale
        ).sum()

    with pytest.raises(ValueError, match=r"scale: expected to be differ.* got scale"):
        jax.grad(scaled)(jnp.float32(0.3))

    def quantised(values):
        pages = jnp.zeros((3, 2, 16, 8), jnp.int8)
        scale = jnp.ones((3, 2, 16))
        slots = jnp.arange(4, dtype=jnp.int32)
        pools = write_kv(
            pages, pages, values, values, slots, k_scale=scale, v_scale=scale
        )
        ones = jnp.ones((1, 2, 8)), *pools[:2], jnp.zeros((1, 1), jnp.int32)
        scales = dict(k_scale=pools[2], v_scale=pools[3])
        return paged_attention(*ones, jnp.array([4], jnp.int32), **scales).sum()

    with pytest.raises(ValueError, match="k_scale: expected to be differentiated by q"):
        jax.grad(quantised)(jnp.ones((4, 2, 8)))

    def on_tpu(q):
        tables, lens = jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
        return paged_attention(
            q, wide[0], wide[0], tables, lens, implementation="mosaic_tpu"
        ).sum()

    with pytest.raises(
        ValueError, match=r"'mosaic_tpu' has no gradient \('reference' and"
    ):
        jax.grad(on_tpu)(wide[1])


def test_queries_have_gradients_over_quantised_pages():
    case, _ = case_of(None)
    values = jnp.nan_to_num(jnp.asarray(case.k_pages))
    numbers, scale = quantise(values, "int8")
    exact = numbers.astype(jnp.float32) * scale[..., None]
    fixed = jnp.asarray(case.block_tables), jnp.asarray(case.context_lens)

    def loss(q, pages, **scales):
        return jnp.sum(paged_attention(q, pages, pages, *fixed, **scales) ** 2)

    q = jnp.asarray(case.q)
    got = jax.grad(loss)(q, numbers, k_scale=scale, v_scale=scale)
    np.testing.assert_allclose(got, jax.grad(loss)(q, exact), atol=1e-5)


def test_a_prefix_learned_in_its_pages_lowers_the_loss_of_the_bundled_model():
    model = load_model("tiny-python")
    config = model.config
    block_size, num_prefix = 8, 8
    text = jnp.arange(60, 84, dtype=jnp.int32) % config.vocab_size
    length = text.shape[0]
    # Block 0 is the learned prefix. The text of each row is in blocks of its own.
    tables = jnp.array([[0, 1, 2, 3], [0, 4, 5, 6]], jnp.int32)
    lens = jnp.full(2, num_prefix + length, jnp.int32)
    starts = jnp.array([0, length, 2 * length], jnp.int32)
    tokens = jnp.concatenate([text, text[::-1]])
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), 2) + num_prefix
    slots = jnp.arange(8, 32, dtype=jnp.int32)
    slots = jnp.concatenate([slots, slots + length])

    def loss(prefix):
        def attend(layer, q, k, v):
            pages = [
                jnp.concatenate([one[layer][None], jnp.zeros((6, *one.shape[1:]))])
                for one in prefix
            ]
            pages = write_kv(*pages, k, v, slots)
            return paged_attention(
                q,
                *pages,
                tables,
                lens,
                query_start_loc=starts,
                **model.attention_options(layer),
            )

        logits = model.logits(model.trunk(tokens, positions, attend))
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        following = jnp.concatenate([text[1:], text[:1], text[::-1][1:], text[-1:]])
        return -jnp.mean(jnp.take_along_axis(logprobs, following[:, None], axis=1))

    shape = (config.num_layers, config.num_kv_heads, block_size, config.head_dim)
    keys = jax.random.split(jax.random.key(0))
    prefix = [0.1 * jax.random.normal(key, shape) for key in keys]
    step = jax.jit(jax.value_and_grad(loss))
    losses = []
    for _ in range(12):
        value, gradient = step(prefix)
        losses.append(float(value))
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in gradient))
        prefix = [p - 2.0 * g / norm for p, g in zip(prefix, gradient, strict=True)]
    assert losses[-1] < losses[0] - 0.25  # 5.67 to 5.35 nats per token
