"""The runner `sharing`: its lengths, its counts, and its smallest run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import sharing
from experiments.lib import request_lengths, runner
from experiments.lib.request_lengths import RequestLength
from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.kv import block_manager
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long

SIZES = ("--num_requests=3", "--max_num_seqs=4", "--num_blocks=300")
run = functools.partial(call_experiment, "sharing", *SIZES)


@pytest.mark.parametrize(
    ("dataset", "num_input", "num_output"),
    [("alpaca", 19.31, 58.45), ("sharegpt", 161.31, 337.99)],
)
def test_the_tables_have_the_means_of_the_paper_s_figure_11(
    dataset, num_input, num_output
):
    lengths = request_lengths.table_lengths(dataset, 150, seed=0)
    means = np.mean(lengths, axis=0)
    np.testing.assert_allclose(means, [num_input, num_output], rtol=0.01)
    assert max(map(sum, lengths)) < request_lengths.MAX_LEN
    first, last = lengths[:50], lengths[-50:]
    assert first != last
    assert sorted(first) == sorted(last)


def test_parallel_sampling_saves_the_blocks_that_its_lengths_imply():
    """With one request, all samples share the full blocks of the prompt from the first
    token on, and the last partial block until they write to it."""
    width, num_input, num_output = 3, 37, 20
    config = EngineConfig(
        num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64, max_num_requests=4,
        max_model_len=64,
    )  # fmt: skip
    lengths = [RequestLength(num_input, num_output)]
    request = sharing.requests_of(lengths, "parallel", width, 0)
    state, _ = sharing.run_requests(sharing.scaled_model(1.0, 0), config, *request)
    # The first sample computes the prompt. The others map its blocks, recompute the
    # prompt's last token in the next step, and therefore end one step later.
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


def test_the_smallest_run_writes_table_figure_and_json(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is missing")
    path = tmp_path / "figure.png"
    trace = tmp_path / "lengths.csv"
    trace.write_text(
        "row,input_tokens,output_tokens\n0,20,5\n1,3000,9\n2,7,9\n3,33,3\n4,1,1\n"
    )
    status, out, err = run(f"--trace={trace}", "--widths=2", f"--plot={path}")
    assert status == 0
    assert "warning: --num_requests is 3; with fewer than 50" in err
    record = last_json(out)
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


@pytest.mark.parametrize("methods", [["parallel"], ["parallel", "beam"]])
@pytest.mark.parametrize(("num_requests", "width"), [(10, 2), (1, 2), (1, 1)])
def test_the_request_table_is_large_enough_for_any_number_of_requests(
    methods, num_requests, width
):
    known = set(flags.FLAGS)
    try:
        sharing.define_flags()
        arguments = [f"--num_requests={num_requests}"]
        runner.parse(["sharing", *arguments])
        config = sharing.sharing_config([width], methods)
        least = num_requests * width * (2 if "beam" in methods else 1)
        assert config.max_num_requests >= max(least, config.num_rows)
    finally:
        for flag in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, flag)


def test_a_request_larger_than_the_pool_is_refused():
    config = EngineConfig(num_blocks=2, max_num_seqs=4, max_num_requests=4)
    with pytest.raises(ValueError, match="blocks"):
        sharing.check_fits(config, [RequestLength(30, 5)], "parallel", 2, seed=0)


def test_a_larger_factor_concentrates_the_next_token_distribution():
    tokens = jnp.array([[1, 2, 3, 4]])
    best = [
        float(
            jax.nn.softmax(sharing.scaled_model(scale, 0)(tokens)).max(axis=-1).mean()
        )
        for scale in (1.0, 50.0)
    ]
    assert best[0] < 0.01
    assert best[1] > 0.2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--widths=2,x", "--widths: expected integers of at least 1"),
        ("--widths=5", "max_beam_width: expected at most max_num_seqs"),
        ("--trace=nowhere.csv", "nowhere.csv"),
        ("--num_requests=0", "flag --num_requests=0"),
    ],
)
def test_an_invalid_flag_is_refused(argument, message):
    status, out, err = run(argument)
    assert status == 1
    assert message in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "input_tokens,output_tokens\n5,5\n2000,48\n",
            "got 1 in .*; lower --num_requests",
        ),
        ("input,output_tokens\n5,5\n", "expected integers in the columns input_tokens"),
        ("input_tokens,output_tokens\n5,x\n", "expected integers in the columns"),
    ],
)
def test_an_invalid_trace_is_refused(text, message, tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        request_lengths.trace_lengths(path, 2, seed=0)


def test_the_share_while_requests_wait_is_the_mean_of_those_steps():
    config = EngineConfig(
        num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64, max_num_requests=16,
        max_model_len=64,
    )  # fmt: skip
    lengths = [RequestLength(33, 20)] * 4
    request = sharing.requests_of(lengths, "parallel", 4, 0)
    state, share = sharing.run_requests(sharing.scaled_model(1.0, 0), config, *request)
    assert not bool(engine.has_work(state))
    # Except in the first steps, the 4 samples share 2 of their 3 blocks.
    assert 0.4 < share < 0.5
