"""Profiles reproduce their measurements, and errors name file, line and column."""

import csv
import gzip
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.simulator.costs.chips import find_chip
from jpaged.simulator.costs.profile_files import (
    Curve,
    read_attention,
    read_dense,
    read_per_sequence,
)
from jpaged.simulator.costs.profiles import Profile, logits_by_roofline
from jpaged.simulator.costs.served_models import served_model
from jpaged.simulator.costs.tables import Grid, grid_of_rows
from jpaged.simulator.costs.transfers import Transfers
from tests.support.step_loads import shared_profile, step_load

LLAMA = served_model("llama-3.1-8b")  # 32 layers
CALL = jax.jit(lambda model, *where: model(*where))


def at(grid, *where):
    return float(CALL(grid, *map(jnp.float32, where)))


def test_a_grid_interpolates_and_extrapolates_linearly():
    axes = [np.array([1.0, 2.0, 8.0]), np.array([0.0, 10.0])]
    values = np.array([[1.0, 3.0], [2.0, 5.0], [4.0, 9.0]])
    grid = Grid.of(axes, values)
    for (i, x), (j, y) in itertools.product(enumerate(axes[0]), enumerate(axes[1])):
        assert at(grid, x, y) == pytest.approx(values[i, j])
    assert at(grid, 5, 5) == pytest.approx((2 + 5 + 4 + 9) / 4)
    assert at(grid, 0, 0) == 1  # below the first point
    assert at(grid, 14, 0) == pytest.approx(4 + 6 * (4 - 2) / 6)
    assert grid.measured == ((1.0, 8.0), (0.0, 10.0))


def test_falling_values_stay_constant_after_the_last_point():
    grid = Grid.of([np.array([1.0, 2.0])], np.array([5.0, 3.0]))
    assert at(grid, 9) == 3
    alone = Grid.of([np.array([4.0])], np.array([7.0]))
    assert [at(alone, x) for x in (0, 4, 40)] == [7, 7, 7]


def test_missing_values_are_interpolated_or_extrapolated():
    columns = [np.array([0.0, 0, 0, 2, 2]), np.array([0.0, 1, 2, 0, 2])]
    grid = grid_of_rows(columns, np.array([1.0, 2, 3, 5, 9]))
    assert at(grid, 2, 1) == pytest.approx(7)
    # Nothing was measured at (2, 2): it is extrapolated along both axes.
    corner = grid_of_rows([np.array([0.0, 0, 2]), np.array([0.0, 2, 0])], np.ones(3))
    assert at(corner, 2, 2) == 1
    with pytest.raises(ValueError, match="at least one measurement"):
        Grid.of([np.array([1.0])], np.array([np.nan]))


@given(x=st.floats(0, 40), y=st.floats(0, 40), data=st.data())
def test_a_grid_of_rising_values_rises(x, y, data):
    steps = data.draw(st.lists(st.floats(0, 5), min_size=12, max_size=12))
    values = np.cumsum(np.cumsum(np.reshape(steps, (3, 4)), 0), 1)
    grid = Grid.of([np.array([1.0, 2, 9]), np.array([1.0, 3, 5, 6])], values)
    here = at(grid, x, y)
    assert at(grid, x + 1, y) >= here - 1e-4 * abs(here)
    assert at(grid, x, y + 1) >= here - 1e-4 * abs(here)


WIDE = (
    "tp,num_tokens,emb_ms,attn_pre_proj_ms,add_ms\n1,1,5,1,0.5\n1,4,6,4,0.8\n2,1,9,9,9"
)
SEPARATE = (
    "phase,batch_size,prefill_chunk,kv_cache_len,time_us\n"
    "decode,1,0,10,2\ndecode,1,0,20,4\ndecode,4,0,10,5\ndecode,4,0,20,9\n"
    "prefill,1,8,0,3\nprefill,1,16,0,7\nprefill,1,8,16,6\nprefill,1,16,16,11\n"
)
ROWS = "layer,sequences,time_us\nlm_head,1,10\nlm_head,8,80\nsampler,1,1\nsampler,8,8\n"


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def profile(tmp_path):
    return Profile.of(
        LLAMA,
        name="small",
        dense=read_dense(write(tmp_path, "dense.csv", WIDE)),
        attention=read_attention(write(tmp_path, "attention.csv", SEPARATE)),
        logits=read_per_sequence(write(tmp_path, "rows.csv", ROWS)),
        transfers=Transfers(1.0, 2.0, 3.0),
        step_s=0.25,
    )


def seconds(model, *rows, **more):
    return float(CALL(model, step_load(*rows, size=16, **more)))


def test_a_step_is_the_sum_of_the_tables_over_all_layers(profile):
    # One row after 10 tokens: 32 layers of 1 ms + 2 x 0.5 ms + 2 us; 5 ms; 11 us.
    expected = 32 * (2e-3 + 2e-6) + 5e-3 + 11e-6 + 0.25
    assert seconds(profile, (1, 11)) == pytest.approx(expected, rel=1e-6)
    # A chunk of 8 after 16 tokens, and four rows after 10 and 20 tokens. The file ends
    # at 4 tokens, so that 12 tokens are extrapolated.
    rows = [(8, 24), (1, 11), (1, 11), (1, 21), (1, 21)]
    dense = (32 * (4 + 1.6) + 6) + (12 - 4) / 3 * (32 * (5.6 - 2) + 1)
    expected = dense * 1e-3 + 32 * (6e-6 + 7e-6) + 55e-6 + 0.25
    assert seconds(profile, *rows) == pytest.approx(expected, rel=1e-5)


def test_several_chunks_count_as_one_with_as_many_pairs(profile):
    four = seconds(profile, *[(4, 4)] * 4, num_logits=0)
    one = seconds(profile, (8, 8), num_logits=0)
    tokens = profile.tokens
    assert four - at(tokens, 16) == pytest.approx(one - at(tokens, 8), abs=1e-6)


def test_transfers_add_up_and_an_idle_step_takes_no_time(profile):
    assert seconds(profile) == 0
    moved = seconds(profile, copied=1, swapped=1, pieces=1)
    assert moved == pytest.approx(1 + 2 + 3 + 0.25)


def test_a_run_outside_the_measured_range_raises(profile):
    profile.check_range(max_tokens=4, max_context=17, max_rows=4)
    for arguments, message in (
        (
            (5, 17, 4),
            r"max_tokens: expected at most 4 tokens of a step, .* 'small' .*, got 5",
        ),
        ((4, 18, 4), r"max_context: expected at most 17 tokens of a prompt, .* got 18"),
        ((4, 17, 5), r"max_rows: expected at most 4 rows that decode, .* got 5"),
    ):
        tokens, context, rows = arguments
        with pytest.raises(ValueError, match=message):
            profile.check_range(max_tokens=tokens, max_context=context, max_rows=rows)


def test_mixed_attention_includes_steps_with_only_rows_or_only_chunks(tmp_path):
    text = (
        "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
        "0,0,1,10,2\n0,0,2,10,3\n8,0,0,0,5\n8,16,0,0,6\n"
        "8,0,1,10,7\n8,16,1,10,8\n8,0,2,10,9\n8,16,2,10,10\n"
    )
    profile = Profile.of(
        LLAMA,
        name="mixed",
        dense=read_dense(write(tmp_path, "dense.csv", WIDE)),
        attention=read_attention(write(tmp_path, "mixed.csv", text)),
        logits=Curve(np.array([1.0]), np.array([0.0]), ""),
        transfers=Transfers.none(),
    )

    def attention_us(*rows):
        tokens = sum(query for query, _ in rows)
        whole = seconds(profile, *rows) - at(profile.tokens, tokens)
        return whole / 32 * 1e6

    assert attention_us((1, 11)) == pytest.approx(2, abs=0.01)
    assert attention_us((8, 24)) == pytest.approx(6, abs=0.1)
    assert attention_us((8, 24), (1, 11), (1, 11)) == pytest.approx(10, abs=0.1)
    assert attention_us((4, 4), (1, 11)) == pytest.approx((2 + 7) / 2, abs=0.1)


def test_attention_scales_with_heads_and_bandwidth(tmp_path):
    times = read_attention(write(tmp_path, "a.csv", SEPARATE))
    other = times.for_heads(queries=2.0, keys=4.0)
    is_prompt = times.chunks > 0
    assert np.array_equal(other.rows[~is_prompt], times.rows[~is_prompt] / 4)
    assert np.array_equal(other.seconds[is_prompt], 2 * times.seconds[is_prompt])
    slow = times.at_bandwidth(0.5)
    # The shortest time, 2 us, is not reading; the rest takes twice as long.
    np.testing.assert_allclose(slow.seconds[~is_prompt] * 1e6, [2, 6, 8, 16])
    assert np.array_equal(slow.seconds[is_prompt], times.seconds[is_prompt])
    with pytest.raises(ValueError, match="keys: expected more than 0"):
        times.for_heads(queries=1.0, keys=0.0)


def test_bandwidth_changes_reading_but_not_computing(tmp_path):
    text = "num_tokens,attn_pre_proj_ms,mlp_act_ms\n1,1,1\n64,1,2\n512,8,9\n"
    times = read_dense(write(tmp_path, "d.csv", text))
    slow = times.at_bandwidth(0.5).operations
    np.testing.assert_allclose(slow["attn_pre_proj"] * 1e3, [2, 2, 8])
    np.testing.assert_allclose(slow["mlp_act"] * 1e3, [1, 3, 17])
    fast = times.at_bandwidth(4.0).operations
    np.testing.assert_allclose(fast["attn_pre_proj"] * 1e3, [0.25, 1, 8])


def test_a_layer_has_two_all_reduces(tmp_path):
    dense = read_dense(write(tmp_path, "dense.csv", WIDE))
    curve = Curve(np.array([8192.0, 65536.0]), np.array([1e-3, 8e-3]), "reduce.csv")
    more = {
        "dense": dense,
        "attention": read_attention(write(tmp_path, "a.csv", SEPARATE)),
        "logits": Curve(np.array([1.0]), np.array([0.0]), ""),
        "transfers": Transfers.none(),
        "name": "two",
    }
    two = Profile.of(LLAMA, all_reduce=curve, **more)
    one = Profile.of(LLAMA, **more)
    difference = at(two.tokens, 1) - at(one.tokens, 1)
    assert difference == pytest.approx(2 * 32 * 1e-3, rel=1e-5)  # 4096 x 2 bytes
    short = Curve(curve.x[:1], curve.seconds[:1], "reduce.csv")
    with pytest.raises(ValueError, match="32768 bytes, which 4 tokens send, got 8192"):
        Profile.of(LLAMA, all_reduce=short, **more)


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (read_dense, "", "expected a header and rows"),
        (read_dense, "num_tokens,emb_ms\n1,x", "line 2, column emb_ms: .* got 'x'"),
        (read_dense, "num_tokens,emb_ms\n1,-1", "line 2, column emb_ms: .* at least 0"),
        (read_dense, "num_tokens,emb_ms\n1,2,3", "line 2: expected 2 fields, got 3"),
        (read_dense, "emb_ms\n1", "line 1: expected a column num_tokens"),
        (read_dense, "num_tokens,warp_ms\n1,1", "got 'warp'"),
        (
            read_dense,
            "tp,num_tokens,emb_ms\n2,1,1",
            "tensor_parallel: .* of 2 .* got 1",
        ),
        (read_dense, "layer,tokens,time_us\no_proj,1,1\nrope,2,1", "o_proj at every"),
        (read_per_sequence, "layer,sequences,time_us\nrope,1,1", "got rope"),
        (read_attention, "phase,time_ms\nwarm,1", "column phase: .* got 'warm'"),
        (read_attention, "phase,time_ms\ndecode,1", "phase prefill, got none"),
        (read_attention, "prefill_chunk\n1", "a column time_ms or time_us"),
    ],
)
def test_errors_in_a_file_name_the_line_and_the_column(tmp_path, reader, text, message):
    with pytest.raises(ValueError, match=message):
        reader(write(tmp_path, "bad.csv", text))


def test_gzipped_files_are_read_and_broken_or_absent_ones_raise(tmp_path):
    path = tmp_path / "dense.csv.gz"
    path.write_bytes(gzip.compress(WIDE.encode()))
    assert read_dense(path).tokens.tolist() == [1, 4]
    path.write_bytes(gzip.compress(WIDE.encode())[:30])
    with pytest.raises(ValueError, match="expected a CSV or one gzipped"):
        read_dense(path)
    with pytest.raises(FileNotFoundError):
        read_dense(tmp_path / "absent.csv")


def test_logits_are_required_and_the_roofline_computes_them(tmp_path):
    dense = read_dense(write(tmp_path, "dense.csv", WIDE))
    attention = read_attention(write(tmp_path, "a.csv", SEPARATE))
    with pytest.raises(ValueError, match=r"logits: expected times, got none"):
        Profile.of(
            LLAMA,
            name="x",
            dense=dense,
            attention=attention,
            transfers=Transfers.none(),
        )
    chip = find_chip("a100-80g")
    curve = logits_by_roofline(LLAMA, chip)
    reads = 128256 * 4096 * 2 / (2039e9 * 0.77)
    assert curve.seconds[0] == pytest.approx(reads)
    flops = 2 * 4096 * 128256 * 4096 / (312e12 * 0.75)
    assert curve.seconds[-1] == pytest.approx(flops)


def rows_of(path):
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
    with opened as file:
        return list(csv.DictReader(file))


def test_a_measured_profile_reproduces_its_rows():
    """RTX PRO 6000, Llama-3.1-8B: two grids in one file."""
    names = ("dense.csv", "attention.csv.gz", "per_sequence.csv")
    dense, attention, per_row = (
        shared_profile(f"rtxpro6000_llama31_8b_{name}") for name in names
    )
    profile = Profile.of(
        LLAMA,
        name="rtx-pro-6000",
        dense=read_dense(dense),
        attention=read_attention(attention),
        logits=read_per_sequence(per_row),
        transfers=Transfers.none(),
    )
    profile.check_range(max_tokens=2048, max_context=16384, max_rows=256)
    rows = rows_of(attention)
    both = profile.attention.both
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    sample = np.random.default_rng(0).permutation(len(rows))[:300]
    where = jnp.array([[float(rows[i][name]) for name in columns] for i in sample])
    found = jax.jit(jax.vmap(lambda point: both(*point)))(where)
    expected = [32e-6 * float(rows[i]["time_us"]) for i in sample]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # One token: 32 layers of all operations, with two norms; embedding and last norm.
    at_one = {
        row["layer"]: float(row["time_us"])
        for row in rows_of(dense)
        if row["tokens"] == "1"
    }
    once = at_one.pop("embedding") + at_one.pop("final_layernorm")
    layer = sum(at_one.values()) + at_one["layernorm"]
    assert at(profile.tokens, 1) == pytest.approx((32 * layer + once) * 1e-6, rel=1e-5)


def test_the_efficiency_of_the_a100_matches_its_profile():
    path = shared_profile("a100_h5120_f13824_llama13b_geometry_dense_ms.csv")
    chip, params = find_chip("a100-80g"), 4 * 5120**2 + 3 * 5120 * 13824
    dense = read_dense(path)
    products = sum(t for name, t in dense.operations.items() if name.endswith("_proj"))
    by_tokens = dict(zip(dense.tokens.tolist(), products.tolist(), strict=True))
    read = 2 * params / by_tokens[1] / chip.memory_bytes_per_s
    computed = 2 * params * 2048 / by_tokens[2048] / chip.flops_per_s
    assert read == pytest.approx(chip.efficiency.read_share, abs=0.01)
    assert computed == pytest.approx(chip.efficiency.matmul_share, abs=0.01)
