"""The attention benchmark: correct outputs are timed, wrong ones are refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib.attention import cases, contenders, page_updates
from experiments.lib.attention.cases import AttentionShape
from experiments.lib.attention.page_updates import PageUpdate
from jpaged import attention
from tests.support.runners import call_experiment, last_json

SHAPE = AttentionShape(
    rows=3,
    context=37,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    block_size=8,
    dtype="float32",
)


@pytest.mark.parametrize(
    "name",
    [
        "reference",
        "xla",
        "cpu",
        "jax_contiguous",
        "torch_sdpa",
        "torch_flex",
        "transformers_paged",
    ],
)
@pytest.mark.filterwarnings("default")  # warnings of torch
def test_contenders_return_the_expected_output(name):
    build, reason = contenders.CONTENDERS[name]
    if reason():
        pytest.skip(reason())
    case = cases.make_case(SHAPE)
    out, run = build(case)
    assert out.shape == (3, 4, 16)
    assert cases.relative_error(case, out) < 1e-6
    run(2)


def test_the_expected_output_is_a_softmax_over_the_sequence_s_pages():
    case = cases.make_case(SHAPE)
    pages = case.pages(case.keys)
    # Query head 3 of row 1 reads KV head 1; the table has the block of each token.
    size, table = SHAPE.block_size, case.block_tables[1]
    keys = [pages[table[i // size], 1, i % size] for i in range(SHAPE.context)]
    np.testing.assert_array_equal(keys, case.keys[1, :, 1])
    scores = np.array([case.q[1, 3].astype(float) @ k for k in keys]) / 4
    weights = np.exp(scores) / np.exp(scores).sum()
    expected = weights @ case.values[1, :, 1]
    np.testing.assert_allclose(cases.expected_output(case)[1, 3], expected, rtol=1e-12)


def test_a_contender_with_wrong_output_is_not_timed(monkeypatch):
    build, reason = contenders.CONTENDERS["xla"]

    def wrong(case):
        out, run = build(case)
        return out * 1.001, run

    monkeypatch.setitem(contenders.CONTENDERS, "xla", (wrong, reason))
    with pytest.raises(
        ValueError, match=r"output: expected .* got 1\.0e-03; xla is not"
    ):
        contenders.measure_shape("xla", SHAPE, repeats=1, least_s=0.001)


@pytest.mark.long
def test_the_runner_reports_a_row_for_each_size():
    status, stdout, stderr = call_experiment(
        "bench_attention",
        "--contenders=xla,mosaic_tpu,write_kv/xla,copy_blocks/xla,copy_blocks/triton",
        "--updates=5",
        "--rows=1,2",
        "--contexts=20",
        "--repeats=1",
        "--round_s=0.01",
        "--read_gb=0.01",
    )
    assert status == 0, stderr
    found = last_json(stdout)
    attention, updates = found["rows"][:2], found["rows"][2:]
    assert [(row["name"], row["rows"]) for row in attention] == [("xla", 1), ("xla", 2)]
    for row in attention:
        # Per row: 2 x 20 tokens x 4 KV heads x 64 x 4 bytes.
        assert row["kv_bytes"] == row["rows"] * 2 * 20 * 4 * 64 * 4
        assert row["bytes_per_s"] == pytest.approx(row["kv_bytes"] / row["seconds"])
        share = row["bytes_per_s"] / found["read_bytes_per_s"]
        assert row["share"] == pytest.approx(share)
    assert found["left_out"] == {
        "mosaic_tpu": "needs a TPU",
        "copy_blocks/triton": "needs a GPU",
    }
    # Keys and values of 5 tokens and of 5 blocks of 16 are read and written.
    sizes = {row["name"]: row["moved_bytes"] for row in updates}
    token = 2 * 2 * 5 * 4 * 64 * 4
    assert sizes == {"write_kv/xla": token, "copy_blocks/xla": 16 * token}
    for row in updates:
        share = row["moved_bytes"] / row["seconds"] / found["copy_bytes_per_s"]
        assert row["share"] == pytest.approx(share)


@pytest.mark.parametrize("name", ["write_kv", "copy_blocks"])
def test_an_update_with_wrong_pages_is_not_timed(name, monkeypatch):
    update = PageUpdate(
        name, 5, num_kv_heads=2, head_dim=16, block_size=8, dtype="float32"
    )
    call = getattr(attention, name)

    def wrong(k_pages, v_pages, *args, **options):
        k_pages, v_pages = call(k_pages, v_pages, *args, **options)
        return k_pages, v_pages.at[-1, -1, -1, -1].add(1)

    monkeypatch.setattr(attention, name, wrong)
    with pytest.raises(ValueError, match=f"pages: expected .* not timing {name}"):
        page_updates.measure_update(f"{name}/xla", update, 1, 1, 0.001)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_8_bit_pages_are_compared_with_their_dequantised_values(kv_dtype):
    shape = dataclasses.replace(SHAPE, kv_dtype=kv_dtype)
    assert shape.kv_bytes == 2 * 3 * 37 * 2 * (16 + 4)
    found = contenders.measure_shape("xla", shape, repeats=1, least_s=0.001)
    assert found["error"] < 1e-5
    with pytest.raises(ValueError, match="kv_dtype: expected auto"):
        contenders.measure_shape("torch_sdpa", shape, repeats=1, least_s=0.001)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--contenders=fast", "--contenders: expected some of .* got 'fast'"),
        ("--rows=0", "--rows: expected integers of at least 1"),
        ("--num_heads=5", "--num_heads: expected a multiple of --num_kv_heads"),
    ],
)
def test_invalid_flags_are_refused_before_anything_is_measured(flag, message):
    status, stdout, stderr = call_experiment("bench_attention", flag)
    assert status == 1
    assert stdout == ""
    assert re.search(message, stderr)


def test_repeat_runs_the_given_number_of_numbered_repetitions():
    def body(index, state):
        count, total = state
        return count + 1, total + index

    run = jax.jit(lambda loops: cases.repeat(loops, body, (jnp.int32(0), jnp.int32(0))))
    for loops in (0, 2, 16, 61):
        assert [int(x) for x in run(loops)] == [loops, loops * (loops - 1) // 2]
