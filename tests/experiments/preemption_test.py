"""The runner `preemption`: its swaps are lossless, and its smallest run."""

import csv

import jax
import numpy as np
import pytest

from experiments import preemption
from jpaged.kv import block_manager
from jpaged.models import ModelConfig
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long

TINY = {
    "block_sizes": "2",
    "contexts": "24",
    "chunk": 8,
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 32,
    "requests": 3,
    "prompt_len": 4,
    "output_len": 20,
    "pool_tokens": 40,
    "max_num_seqs": 3,
    "repeats": 1,
}


def run(**flags):
    """Calls the runner at tiny sizes: (exit status, stdout, stderr)."""
    given = [f"--{name}={value}" for name, value in (TINY | flags).items()]
    return call_experiment("preemption", *given)


def test_the_timed_sequence_is_complete_after_swapping():
    sizes = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_position_embeddings=64,
    )
    contender = preemption.swapping(sizes, block_size=4, context=18, seed=3)
    device, host, cache, host_cache = contender.run(*contender.prepare())
    assert block_manager.violations(device) == []
    assert int(device.context_lens[0]) == 18
    assert int((np.asarray(device.ref_counts) > 0).sum()) == 5
    assert not np.asarray(host.ref_counts).any()
    assert jax.tree.leaves(host_cache)[0].sharding.memory_kind == "pinned_host"
    assert jax.tree.leaves(cache)[0].shape == jax.tree.leaves(host_cache)[0].shape


def test_the_smallest_run_reports_and_writes_its_figures(tmp_path):
    pytest.importorskip("matplotlib")
    status, out, err = run(out=tmp_path / "figure")
    assert status == 0, err
    assert sum("swapping" in line for line in out.splitlines()[:-1]) == 3
    found = last_json(out)
    figures = found["details"]["figures"]
    ways = {(one["part"], one["block_size"], one["way"]) for one in figures}
    assert ways == {
        (part, size, way)
        for size in (2,)
        for part, way in [
            ("one", "recompute"),
            ("one", "swap"),
            ("load", "recompute"),
            ("load", "swap"),
            ("load", "no_preemption"),
        ]
    }
    assert len(found["ratios"]) == 2
    for one in figures:
        assert one["median_ms"] > 0
        if one["part"] == "load":
            assert one["num_tokens"] == 3 * 20
            assert (one["num_preemptions"] > 0) == (one["way"] != "no_preemption")
            assert (one["num_swapped_blocks"] > 0) == (one["way"] == "swap")
    # Swapped sequences are not recomputed.
    tokens = {
        (one["block_size"], one["way"]): one["computed_tokens"] for one in figures
    }
    assert tokens[2, "swap"] == tokens[2, "no_preemption"] < tokens[2, "recompute"]
    text = (tmp_path / "figure.csv").read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [float(row["median_ms"]) for row in rows] == [
        one["median_ms"] for one in figures
    ]
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(block_sizes="4,none"), "--block_sizes: expected integers of at least 1"),
        (dict(parts="two"), "--parts: expected some of"),
        (
            dict(pool_tokens=23),
            "--pool_tokens: expected at least --prompt_len + --output_len",
        ),
    ],
)
def test_an_invalid_flag_is_refused(flags, message):
    status, _, err = run(**flags)
    assert status == 1
    assert message in err
    assert "Traceback" not in err
