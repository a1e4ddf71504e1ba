"""The table of tile sizes: which entry is used, and that every entry is valid."""

import dataclasses
import json

import jax
import pytest

from experiments import tune_attention
from experiments.lib.attention.cases import Shape
from experiments.tune_attention import CANDIDATES
from jpaged.attention.backends import find_backend
from jpaged.pages import tuned
from jpaged.pages.tuned import Entry
from jpaged.xla import chunks
from tests.support.attention.cases import attend, check, decode_case, ragged_case
from tests.support.runners import run_experiment


def sizes_of(name: str) -> set[str]:
    tile_sizes = find_backend(name).tile_sizes
    assert tile_sizes is not None
    return {field.name for field in dataclasses.fields(tile_sizes())}


def test_the_first_entry_that_fits_is_used(monkeypatch):
    exact = Entry("triton", "NVIDIA H200", {"tokens": 32}, 128, 4, 16, 2, "2026")
    any_shape = Entry("triton", "NVIDIA", {"tokens": 16})
    other = Entry("xla", "NVIDIA", {})
    monkeypatch.setattr(tuned, "TABLE", [other, exact, any_shape])
    assert tuned.find_entry("triton", "NVIDIA H200 SXM", 128, 4, 16, 2) is exact
    for shape in ((64, 4, 16, 2), (128, 8, 16, 2), (128, 4, 32, 2), (128, 4, 16, 4)):
        assert tuned.find_entry("triton", "NVIDIA H200", *shape) is any_shape
    assert tuned.find_entry("triton", "cpu", 128, 4, 16, 2) is None


def test_sizes_of_an_entry_replace_the_default_sizes(monkeypatch):
    entry = Entry("xla", "cpu", {"decode_rows": 5}, 64, 2, 16, 2)
    monkeypatch.setattr(tuned, "TABLE", [entry])
    pages = jax.ShapeDtypeStruct((9, 4, 16, 64), "bfloat16")
    found = tuned.tiles("xla", chunks.TILES, 8, pages)
    assert found == dataclasses.replace(chunks.TILES, decode_rows=5)
    assert tuned.tiles("xla", chunks.TILES, 4, pages) == chunks.TILES


@pytest.mark.parametrize("entry", tuned.TABLE, ids=str)
def test_entries_set_only_sizes_that_exist(entry):
    assert entry.sizes.keys() <= sizes_of(entry.implementation)


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_are_sizes_that_exist(name):
    assert CANDIDATES[name].keys() <= sizes_of(name)


@pytest.mark.parametrize("make", [decode_case, ragged_case])
def test_sizes_for_gpus_give_the_same_numbers(make, monkeypatch):
    entry = tuned.find_entry("xla", "NVIDIA H200", 64, 7, 16, 2)
    monkeypatch.setattr(tuned, "TABLE", [entry._replace(device="cpu")])
    attend.clear_cache()  # programs compiled with other tiles are not used
    case, options = make("window_300")
    check(case, "xla", **options)
    attend.clear_cache()


def test_a_row_has_the_sizes_that_were_best_in_the_second_measurement():
    shape = Shape(8, 256, 12, 4, 64, 16, "float32")

    def sizes(of_first, of_best):
        first, best = {}, {"decode_rows": 32}
        tries = [(first, 9), (best, of_best), ({"decode_rows": 64}, 9)]
        tries += [(first, of_first), (best, 8), (first, 9), (best, 8)]
        found = [{"sizes": one, "seconds": seconds} for one, seconds in tries]
        row = tune_attention.row_of("xla", shape, [*found, {"failed": "no time"}])
        entry = eval(row.rstrip(","), {"Entry": Entry})
        assert entry[3:7] == (64, 3, 16, 4)
        return entry.sizes

    assert sizes(8, 7) == {"decode_rows": 32}
    assert sizes(7.1, 7) == {}  # the first is as fast when it is measured again


@pytest.mark.long
def test_the_runner_prints_its_tries_and_a_row_of_the_table():
    status, stdout, stderr = run_experiment(
        "tune_attention",
        "--implementations=xla,triton",
        "--rows=2",
        "--contexts=20",
        "--repeats=1",
        "--round_s=0.001",
    )
    assert status == 0, stderr
    found = json.loads(stdout.splitlines()[-1])
    assert found["left_out"] == {"triton": "needs a GPU"}
    tried = [one["sizes"] for one in found["tries"]["xla"]]
    assert tried[0] == {}
    assert {"decode_rows": 4} in tried
    assert tried[-2] == {}  # measured again, alternating with the best
    assert all(one["seconds"] > 0 for one in found["tries"]["xla"])
    (row,) = found["rows"]
    entry = eval(row.rstrip(","), {"Entry": Entry})
    assert entry[:2] == ("xla", "cpu")
    assert entry[3:7] == (64, 3, 16, 4)
    assert entry.sizes in tried
    assert "tune_attention" in entry.measured
