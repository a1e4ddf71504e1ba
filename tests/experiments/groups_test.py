"""The runner `groups`: blocks of rows beside counts by hand."""

import pytest

from experiments import groups
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long


def test_gpt_oss_needs_half_of_one_table_and_a_window(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "groups.png"
    flags = ("--models=gpt-oss-20b", "--contexts=64,1024,4096", f"--plot={plot}")
    status, out, err = call_experiment("groups", *flags)
    assert (status, err) == (0, "")
    assert plot.stat().st_size > 1000
    rows = {row["context"]: row for row in last_json(out)["rows"]}
    # 12 of 24 layers have a window of 128 tokens; a page has 16 tokens of 8 heads of 64
    # numbers of 2 bytes, keys and values.
    page = 2 * 8 * 64 * 2 * 16 / 2**20
    for context, row in rows.items():
        assert row["one_table"] == 24 * page * context / 16
        seen = min(context, 128)
        expected = 12 * page * (context + seen) / 16
        assert row["groups"] == row["vllm"] == row["transformers"] == expected
        assert row["arithmetic"] == 12 * page * (context + min(context, 127)) / 16
        chunk = min(context, 512 + 128)
        assert row["peak"] == 12 * page * (context + chunk) / 16


def test_the_model_with_padding_is_gemma_3_27b():
    config = groups.find_model("gemma-3-27b")
    sizes = groups.measure(config, 8192, 16, 512)
    page = 2 * 16 * 128 * 2 * 16 / 2**20
    blocks = 8192 // 16 + 6 * (1024 // 16)  # 6 groups for 52 layers
    assert sizes["groups"] == sizes["vllm"] == 10 * page * blocks
    assert sizes["transformers"] == page * (10 * 512 + 52 * 64)
