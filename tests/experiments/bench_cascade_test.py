"""The cascade benchmark and the comparison of kv_dtypes, at their smallest sizes."""

import pytest

from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long


def test_the_benchmark_reports_bytes_times_and_the_model_s_ratio():
    small = ["--num_layers=1", "--head_dim=16", "--repeats=1", "--own_tokens=16"]
    small += ["--read_gb=0.01", "--gemm_size=64"]
    small += ["--num_rows=3", "--prefix_tokens=32"]
    status, stdout, stderr = call_experiment(
        "bench_cascade", "--implementations=xla,triton,reference", *small
    )
    assert status == 0, stderr
    result = last_json(stdout)
    row, failed, other = result["rows"]
    assert (row["name"], failed["name"], other["name"]) == (
        "xla",
        "triton",
        "reference",
    )
    assert failed["failed"]  # needs a GPU; the others still run
    assert other["max_difference"] == 0
    token = 2 * 4 * 16 * 4  # keys and values, KV heads, head_dim, float32
    assert row["plain_bytes"] == 3 * (32 + 16) * token
    assert row["cascade_bytes"] == (32 + 3 * 16) * token
    assert row["plain_s"] > 0
    assert row["cascade_s"] > 0
    assert row["max_difference"] < 1e-5
    # Plain attention reads 144 tokens, cascade 80 tokens and the partial results.
    read_s = token / result["read_bytes_per_s"]
    shared_s = max(32 * read_s, 4 * 3 * 12 * 16 * 32 / result["gemm_flops_per_s"])
    partials_s = 18 * 3 * 12 * 16 / result["read_bytes_per_s"]
    cascade_s = shared_s + 48 * read_s + partials_s + 7e-6
    expected = (144 * read_s + 3e-6) / cascade_s
    assert row["model_ratio"] == pytest.approx(expected)
    assert {"device", "versions", "flags"} <= result.keys()


@pytest.mark.slow
def test_kv_dtypes_are_compared_with_float32():
    status, stdout, stderr = call_experiment(
        "kv_precision", "--num_texts=1", "--length=64", "--max_tokens=4"
    )
    assert status == 0, stderr
    result = last_json(stdout)
    rows = {row["kv_dtype"]: row for row in result["rows"]}
    assert rows["float32"]["max_logprob_change"] == 0
    for name in ("int8", "fp8"):
        assert rows[name]["blocks_per_gib"] > 1.8 * rows["bfloat16"]["blocks_per_gib"]
        assert 0 < rows[name]["max_logprob_change"] < 1
    errors = [row["int8"] for row in result["grains"]]
    assert errors[0] == min(errors)
