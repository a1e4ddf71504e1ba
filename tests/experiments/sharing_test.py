"""The runner `sharing`: its lengths, what it counts, and its smallest run."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sharing
from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.kv import block_manager
from tests.support.runners import run_experiment

pytestmark = pytest.mark.long

SIZES = ("--num_requests=3", "--max_num_seqs=4", "--num_blocks=300")
run = functools.partial(run_experiment, "sharing", *SIZES)


@pytest.mark.parametrize(
    ("dataset", "num_input", "num_output"),
    [("alpaca", 19.31, 58.45), ("sharegpt", 161.31, 337.99)],
)
def test_the_tables_have_the_means_of_the_paper_s_figure_11(
    dataset, num_input, num_output
):
    lengths = sharing.table_lengths(dataset, 150, seed=0)
    means = np.mean(lengths, axis=0)
    np.testing.assert_allclose(means, [num_input, num_output], rtol=0.01)
    assert max(map(sum, lengths)) < sharing.MAX_LEN
    first, last = lengths[:50], lengths[-50:]
    assert first != last
    assert sorted(first) == sorted(last)


def test_parallel_sampling_saves_what_its_lengths_say():
    """One request alone: full blocks of the prompt are shared by all from the first
    token on, the last partial one until the samples write to it."""
    width, num_input, num_output = 3, 37, 20
    config = EngineConfig(
        num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64, max_num_requests=4,
        max_model_len=64,
    )  # fmt: skip
    lengths = [sharing.Length(num_input, num_output)]
    request = sharing.requests_of(lengths, "parallel", width, 0)
    state, _ = sharing.replay(sharing.make_model(1.0, 0), config, *request)
    # The first sample computes the prompt. The others map its blocks, compute the
    # prompt's last token again in the next step, and so end a step later.
    shares = []
    for step in range(num_output + 1):
        lens = [num_input + step] * (step < num_output)
        lens += [num_input + step - 1] * (width - 1) * (step > 0)
        blocks = sum(-(-length // 16) for length in lens)
        shares.append((len(lens) - 1) * (num_input // 16) / blocks)
    assert int(state.counters.num_steps) == len(shares)
    np.testing.assert_allclose(state.counters.saved_share, sum(shares), rtol=1e-5)
    assert int(state.counters.num_block_copies) == width - 1
    assert int(block_manager.num_free_blocks(state.blocks)) == 64


def test_it_prints_a_table_a_figure_and_a_line_of_json(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is missing")
    path = tmp_path / "figure.png"
    trace = tmp_path / "lengths.csv"
    trace.write_text(
        "row,input_tokens,output_tokens\n0,20,5\n1,3000,9\n2,7,9\n3,33,3\n4,1,1\n"
    )
    status, out, _ = run(f"--trace={trace}", "--widths=2", f"--plot={path}")
    assert status == 0
    record = json.loads(out.rstrip().split("\n")[-1])
    runs = record["details"]["runs"]
    got = [(r["dataset"], r["method"], r["width"], r["weight_scale"]) for r in runs]
    assert got == [
        ("lengths", "parallel", 2, 1.0),
        ("lengths", "beam", 2, 1.0),
        ("lengths", "beam", 2, 50.0),
    ]
    assert all(0 < r["saved_percent"] < 50 for r in runs)
    assert all(r["paper_percent"] is None for r in runs)
    assert path.stat().st_size > 1000
    assert "lengths: mean tokens" in out
    assert jax.devices()[0].platform in record["device"]


def test_a_request_that_the_pool_could_never_hold_is_refused():
    config = EngineConfig(num_blocks=2, max_num_seqs=4, max_num_requests=4)
    with pytest.raises(ValueError, match="blocks"):
        sharing.check_fits(config, [sharing.Length(30, 5)], "parallel", 2, seed=0)


def test_a_larger_factor_makes_the_model_surer_of_its_next_token():
    tokens = jnp.array([[1, 2, 3, 4]])
    best = [
        float(jax.nn.softmax(sharing.make_model(scale, 0)(tokens)).max(axis=-1).mean())
        for scale in (1.0, 50.0)
    ]
    assert best[0] < 0.01
    assert best[1] > 0.2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--widths=2,x", "widths: wanted numbers of at least 1"),
        ("--widths=5", "max_beam_width: expected at most max_num_seqs"),
        ("--trace=nowhere.csv", "nowhere.csv"),
        ("--num_requests=0", "flag --num_requests=0"),
    ],
)
def test_a_wrong_flag_is_said_in_one_line(argument, message):
    status, out, err = run(argument)
    assert status == 1
    assert message in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input_tokens,output_tokens\n5,5\n2000,48\n", "has 1; lower --num_requests"),
        ("input,output_tokens\n5,5\n", "wanted integers in the columns input_tokens"),
        ("input_tokens,output_tokens\n5,x\n", "wanted integers in the columns"),
    ],
)
def test_a_trace_that_cannot_be_used_is_refused(text, message, tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        sharing.trace_lengths(path, 2, seed=0)


def test_the_share_while_requests_wait_is_a_mean_of_the_steps_before_they_are_gone():
    config = EngineConfig(
        num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64, max_num_requests=16,
        max_model_len=64,
    )  # fmt: skip
    lengths = [sharing.Length(33, 20)] * 4
    request = sharing.requests_of(lengths, "parallel", 4, 0)
    state, share = sharing.replay(sharing.make_model(1.0, 0), config, *request)
    assert not bool(engine.has_work(state))
    # Of 3 blocks each of 4 samples shares 2 with the others, but for the first steps.
    assert 0.4 < share < 0.5
