"""The GPU suite at tiny sizes on a CPU, and the aims computed from its rows."""

import json
import re
import sys
import time

import pytest

from experiments.lib import gpu_aims
from experiments.lib.processes import run_limited
from tests.support.runners import call_experiment, last_json


@pytest.mark.long
def test_all_stages_run_and_the_results_are_written(tmp_path):
    status, stdout, stderr = call_experiment("gpu_suite", f"--out={tmp_path}", "--tiny")
    assert status == 0, stderr
    found = last_json(stdout)
    ended = {stage["name"]: stage["ended"] for stage in found["stages"]}
    assert ended == dict.fromkeys(
        (
            "tests",
            "attention",
            "decode",
            "block sizes",
            "cascade",
            "pages of 8 bits",
        ),
        "whole",
    )
    assert re.search(r"\d+ skipped", found["stages"][0]["printed"][-1])
    for stage in found["stages"][1:]:
        assert stage["result"]["rows"]
        assert not [row for row in stage["result"]["rows"] if "failed" in row]
    assert json.loads((tmp_path / "gpu_suite.json").read_text("utf-8")) == found
    text = (tmp_path / "results.md").read_text("utf-8")
    assert text.startswith(f"## cpu cpu, {found['date']}")
    for stage in found["stages"]:
        assert "\n".join(stage["printed"]) in text
    here = {line["aim"]: line["here"] for line in found["aims"]}
    assert float(here["copy_blocks, share of copying"]) > 0
    assert here["FlashInfer's time / ours, minimum"] == "not measured"


def test_an_unknown_stage_is_refused():
    status, stdout, stderr = call_experiment("gpu_suite", "--stages=all")
    assert (status, stdout) == (1, "")
    assert re.search("--stages: expected some of tests, attention.* got 'all'", stderr)


def test_a_process_stopped_at_its_limit_keeps_its_output():
    code = "import time\nprint('first', flush=True)\ntime.sleep(60)\nprint('last')"
    shown = []
    begin = time.monotonic()
    ended = run_limited([sys.executable, "-c", code], 1.0, show=shown.append)
    assert time.monotonic() - begin < 30
    assert (ended.status, ended.stdout, shown) == (None, "first\n", ["first"])


def attention_row(name, seconds, rows=16, kv_bytes=5e8, **more):
    case = dict(rows=rows, context=8192, block_size=16)
    share = kv_bytes / seconds / 4e12
    row = dict(name=name, seconds=seconds, kv_bytes=kv_bytes, share=share)
    return row | case | more


def test_aims_are_computed_from_the_relevant_rows():
    rows = [
        attention_row("triton", 2e-4),
        attention_row("mosaic_gpu", 1.25e-4),  # 500 MB at 4 TB/s take 125 us
        attention_row("mosaic_gpu", 1e-6, rows=1, kv_bytes=3e7),  # too few bytes
        attention_row("xla", 1e-6),  # not a GPU kernel
        attention_row("flashinfer", 1.5e-4),
        attention_row("flashinfer", 0.8e-6, rows=1, kv_bytes=3e7),
        dict(name="write_kv/triton", share=0.7, moved_bytes=1e6, block_size=16)
        | {"seconds": 1.0},
        dict(name="mosaic_gpu", failed="out of memory"),
    ]
    blocks = [attention_row("triton", s, block_size=b) for s, b in ((1, 16), (1.2, 64))]
    cascade = [
        dict(name=name, num_rows=rows, prefix_tokens=prefix, ratio=here, model_ratio=to)
        for name, rows, prefix, here, to in (
            ("triton", 4, 1024, 0.1, 0.9),
            ("triton", 16, 4096, 3.0, 4.0),
            ("triton", 64, 4096, 8.0, 8.0),
            ("mosaic_gpu", 16, 4096, 4.0, 4.0),
            ("mosaic_gpu", 64, 4096, 4.0, 8.0),
        )
    ]
    stages = [
        {"name": "attention", "result": {"rows": rows}},
        {"name": "block sizes", "result": {"rows": blocks}},
        {"name": "cascade", "result": {"rows": cascade}},
        {"name": "decode", "result": None},
    ]
    found = [(line["here"], line["of"]) for line in gpu_aims.aims(stages)]
    assert found == [
        ("1.00", "mosaic_gpu, 500 MB"),
        ("0.80", "mosaic_gpu, 1 rows of 8192"),
        ("1.20", "triton"),
        ("0.75", "triton, 16 rows, prefix 4096"),
        ("0.70", "write_kv/triton, 1 MB"),
        ("not measured", ""),
        ("not measured", ""),
        ("not measured", ""),
    ]
