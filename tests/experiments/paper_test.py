"""The runner `paper`: its numbers match other arithmetic, and small runs work."""

import csv
import dataclasses
import functools
import importlib.util
import json
import math

import numpy as np
import pytest

from experiments import paper
from experiments.lib.paper import blocks, curves, kernel, numbers
from experiments.lib.paper import report as paper_report
from experiments.lib.paper.curves import PaperRow
from experiments.lib.paper.runs import (
    CostChoice,
    PaperCase,
    PaperRun,
    run_cases,
    workload_of,
)
from tests.support.runners import run_experiment
from tests.support.step_loads import shared_profile

pytestmark = pytest.mark.long

KEYS = {"figure", "quantity", "paper", "here", "ci95", "ratio", "source", "remark"}


run = functools.partial(run_experiment, "paper")


def printed(*key):
    return numbers.PRINTED[key].low


def a_run(rate, seed, latency):
    """Return a run of which only rate, seed and latency matter."""
    fields = {field.name: 0 for field in dataclasses.fields(PaperRun)}
    return PaperRun(
        **fields | {"rate": rate, "seed": seed, "normalized_latency_s": latency}
    )


def test_printed_numbers_follow_from_the_sizes_of_the_paper():
    slots = 12 * 2**30 // (800 * 1024)
    assert slots == 15728
    most = 15728 // 2048
    assert most == printed("fig13", "sharegpt", "orca_max")
    assert most == printed("fig13", "alpaca", "orca_max")
    lost = 100 * (1 - most * 2048 / 15728)
    assert printed("fig02", "orca_max", "external") == pytest.approx(lost, abs=0.06)
    kv_kb = 2 * 5120 * 40 * 2 / 1024
    assert kv_kb == printed("fig01", "a token's keys and values, KB")
    gib = 2048 * kv_kb * 1024 / 2**30
    # "up to 1.6 GB"
    assert gib == pytest.approx(
        printed("fig01", "a request of 2,048 tokens, GB"), abs=0.05
    )


def test_each_bar_of_figure_2_adds_up_to_100_percent():
    for system in ("orca_max", "orca_pow2", "orca_oracle"):
        parts = ("token_states", "reservation", "internal", "external")
        total = sum(printed("fig02", system, part) for part in parts)
        assert total == pytest.approx(100, abs=0.15)


def test_every_printed_number_belongs_to_a_figure_and_has_a_source():
    figures = {name.removesuffix("a").removesuffix("b") for name, *_ in numbers.PRINTED}
    assert figures <= set(paper.FIGURES)
    assert all(one.low <= one.high and one.source for one in numbers.PRINTED.values())


def test_figure_18a_times_two_equal_computations(monkeypatch):
    monkeypatch.setattr(kernel, "BATCHES", (2,))
    monkeypatch.setattr(kernel, "CONTEXTS", (32,))
    figure = kernel.FIGURES["fig18a"]
    settings = paper.FigureSettings(seeds=(0,), scale=1.0, files={})
    assert figure.cases(settings) == []
    (one,) = figure.show(settings, {}).rows
    assert one.here > 0
    assert one.paper == "1.2 to 1.26"
    # A planted fault: pages of other sequences give other numbers.
    honest = kernel.attention.paged_attention
    monkeypatch.setattr(
        kernel.attention,
        "paged_attention",
        lambda q, k, v, tables, lens: honest(q, k, v, tables[::-1], lens),
    )
    with pytest.raises(AssertionError):
        figure.show(settings, {})


def test_a_sustained_rate_is_where_the_curve_crosses_the_level():
    latency = {1.0: 0.02, 2.0: 0.04, 3.0: 0.64}
    # The logarithm is linear: 0.16 is halfway between 0.04 and 0.64.
    points = list(latency.items())
    assert curves.sustained(points[::-1], 0.16) == pytest.approx(2.5)
    assert curves.sustained(points, 0.01) is None
    assert curves.sustained(points, 1.0) is None
    # A curve that falls again has crossed the level the first time.
    dented = [*points, (4.0, 0.05)]
    assert curves.sustained(dented, 0.16) == pytest.approx(2.5)


def test_ratios_compare_equal_seeds_and_have_an_interval():
    ours = [a_run(rate, seed, rate**2) for seed in (0, 1) for rate in (1, 2, 4)]
    theirs = [a_run(rate, 0, 4 * rate**2) for rate in (0.25, 1, 2)]
    theirs += [a_run(rate, 1, 16 * rate**2) for rate in (0.25, 1)]
    ratios = curves.ratio_by_seed(ours, theirs, 4.0)
    # 2 over 1; seed 1 crosses 4 halfway from 1 (at 0.25) to 16 (at 1).
    assert ratios == [pytest.approx(2 / 1), pytest.approx(2 / 0.625)]
    made = curves.make_row("fig12", "ratio", ratios, ("fig14", "beam 6"))
    assert made.here == pytest.approx(2.6)
    assert made.ratio == pytest.approx(2.6 / 2.3)
    # Student's t of one degree of freedom is a Cauchy distribution: tan(0.95 pi / 2).
    half = math.tan(0.95 * math.pi / 2) * np.std(ratios, ddof=1) / math.sqrt(2)
    assert made.ci95 == pytest.approx(half, rel=1e-3)


def test_a_number_within_a_range_has_the_ratio_one():
    key = ("fig12", "sharegpt", "orca_max")
    found = [curves.make_row("fig12", "", [x], key).ratio for x in (1.35, 5, 16)]
    assert found == [pytest.approx(0.5), 1.0, pytest.approx(2.0)]


def test_a_seed_without_a_number_is_reported():
    one = curves.make_row("fig12", "ratio", [None, 2.0], None, "why")
    assert (one.here, one.ci95, one.paper, one.ratio) == (2.0, None, None, None)
    assert one.remark == "why; none for 1 of 2 seeds"
    none = curves.make_row("fig12", "ratio", [None], ("fig14", "beam 6"))
    assert (none.here, none.ratio, none.paper) == (None, None, "2.3")
    assert "| ratio | 2.3 | none |" in "\n".join(paper_report.table([none]))


def test_small_blocks_make_swapping_slower_but_not_recomputing():
    times = {size: blocks.recompute_and_swap_s(size) for size in (1, 16, 256)}
    assert len({again for again, _ in times.values()}) == 1
    swaps = [swap for _, swap in times.values()]
    assert swaps == sorted(swaps, reverse=True)
    # Twice 256 tokens of 800 KiB at 32 GB/s, and 80 copies per block of 6 us each.
    expected = 2 * (256 * 800 * 1024 / 32e9 + 16 * 80 * 6e-6)
    assert times[16][1] == pytest.approx(expected, rel=1e-4)


def test_a_curve_gets_further_rates_until_it_crosses_its_levels():
    case = PaperCase(
        system="orca_max",
        model="opt-13b",
        requests="sharegpt",
        rates=(0.8,),
        duration=200.0,
        seeds=(0,),
        levels=(0.05, 0.3),
    )
    runs = run_cases([case, case])[case]
    latency = {one.rate: one.normalized_latency_s for one in runs}
    assert len(latency) == len(runs) > 2
    assert min(latency.values()) <= 0.05 < 0.3 < max(latency.values())
    for one in runs:
        assert one.num_requests == len(workload_of(case, one.rate, 0))
        parts = (one.token_states, one.reservation, one.internal, one.external)
        assert sum(parts) == pytest.approx(1, rel=1e-5)


@pytest.fixture(scope="module")
def figure_2(tmp_path_factory):
    """Return arguments, folder and rows of a tiny figure 2."""
    folder = tmp_path_factory.mktemp("first")
    arguments = ("--figure=fig01,fig02", "--scale=0.02", "--seeds=0,1")
    status, out, err = run(*arguments, f"--out={folder}")
    assert status == 0, err
    assert "curves" in err
    return arguments, folder, json.loads(out.rstrip().split("\n")[-1])


def test_a_small_run_writes_tables_figures_and_the_report(figure_2):
    _, folder, rows = figure_2
    assert all(set(row) == KEYS == set(PaperRow.__dataclass_fields__) for row in rows)
    by_name = {row["quantity"]: row for row in rows if row["figure"] == "fig02"}
    external = by_name["Orca (Max): external, %"]
    assert external["paper"] == "8.9"
    assert external["here"] == pytest.approx(100 * (1 - 7 * 2048 / 15728), abs=0.05)
    assert external["ratio"] == pytest.approx(external["here"] / 8.9)
    assert by_name["vLLM (the engine): token_states, %"]["here"] > 90
    with (folder / "fig02.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["quantity"] for row in table] == list(by_name)
    with (folder / "fig02_runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert {(one["system"], one["seed"]) for one in runs} == {
        (system, seed)
        for system in ("vllm", "orca_max", "orca_pow2", "orca_oracle")
        for seed in "01"
    }
    report = (folder / "REPORT.md").read_text("utf-8")
    assert "| Orca (Max): external, % | 8.9 | 8.85 |" in report
    assert "a100-40g" in report
    if importlib.util.find_spec("matplotlib") is not None:
        assert (folder / "fig02.png").stat().st_size > 1000
        assert "fig02.png" in report


def test_lengths_of_a_file_are_used_and_skipped_ones_are_reported(tmp_path):
    lines = ["input_tokens,output_tokens", "100,50", "2000,48", "100,0", "100,50"]
    path = tmp_path / "lengths.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    status, out, err = run(
        f"--sharegpt={path}", "--figure=fig11", "--seeds=0", f"--out={tmp_path}"
    )
    assert status == 0, err
    rows = {row["quantity"]: row for row in json.loads(out.rstrip().split("\n")[-1])}
    assert rows["sharegpt: mean output, tokens"]["here"] == 50
    assert rows["sharegpt: mean input, tokens"]["here"] == 100
    made = paper.with_skipped(
        paper.FigureContent([], []),
        [dataclasses.replace(a_run(1, 0, 1), num_skipped=2)],
    )
    assert ": 2, with 2,048 tokens or more" in made.remarks[0]


def test_the_same_seeds_give_the_same_bytes(figure_2, tmp_path):
    arguments, folder, rows = figure_2
    # In two processes this time; the results must not depend on it.
    status, out, err = run(*arguments, "--jobs=2", f"--out={tmp_path}")
    assert status == 0, err
    assert json.loads(out.rstrip().split("\n")[-1]) == rows
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--figure=fig99", "figure: expected some of all, fig01"),
        ("--seeds=0,0", "seeds: expected distinct integers, got '0,0'"),
        ("--seeds=x", "seeds: expected distinct integers, got 'x'"),
        ("--sharegpt=/nowhere.csv", "sharegpt: expected a file, got /nowhere.csv"),
        ("--decoding_factor=2", "decoding_factor: expected --step_fit, whose"),
        ("--step_fit=/nowhere.json", "step_fit: expected a file, got /nowhere.json"),
    ],
)
def test_an_invalid_flag_is_reported_before_anything_runs(argument, said, tmp_path):
    out = f"--out={tmp_path / 'none'}"
    status, out, err = run("--figure=fig01", *argument.split(), out)
    assert (status, out) == (1, "")
    assert said in err
    assert not (tmp_path / "none").exists()


# A step of prompts takes 2 ms and a step of decoding rows 11.2 ms, of any size.
FITS = {
    "facebook/opt-13b": {
        "1": {
            "prefill": [2.0, 0.0, 0.0],
            "decoding_smallbs": [11.2, 0.0, 0.0],
            "decoding_largebs": [11.2, 0.0, 0.0],
            "decoding_large_small_bs_threshold": 1000,
        }
    }
}


def test_measured_steps_replace_the_roofline(tmp_path):
    path = tmp_path / "fits.json"
    path.write_text(json.dumps({"vllm": FITS}))
    # 6 ms of a decoding step are device time and become 3; with host time, 8.2.
    cost = CostChoice(str(path), decoding=0.5)
    case = PaperCase("vllm", "opt-13b", "alpaca", (0.01,), 900.0, (0,), cost=cost)
    (alone,) = run_cases([case])[case]
    workload = workload_of(case, 0.01, 0)
    outputs = workload.output_lens
    expected = np.mean((2e-3 + 8.2e-3 * (outputs - 1)) / outputs)
    assert alone.normalized_latency_s == pytest.approx(expected, rel=1e-3)
    status, out, err = run(
        "--figure=fig12:sharegpt:opt-175b", f"--step_fit={path}", f"--out={tmp_path}"
    )
    assert (status, out) == (1, "")
    assert "step_fit: model: " in err
    assert "expected one of facebook/opt-13b in" in err
    assert "got 'facebook/opt-175b'" in err
    said = "\n".join(paper_report.constants(["opt-13b"], cost))
    assert "Steps take as long as vLLM's in fits.json" in said
    assert "takes as long as two steps" in said


@pytest.mark.slow
def test_figure_13_matches_the_paper_with_measured_steps():
    """No number was fitted to the paper: vLLM's steps on A100-80GB, by DistServe's
    published fit, and the two chips' bandwidths, 2,039 and 1,555 GB/s."""
    cost = CostChoice(
        str(shared_profile("a100_80g_opt_fitted_step_times.json")), 2039 / 1555
    )
    cases = {
        (requests, system): PaperCase(
            system,
            "opt-13b",
            requests,
            (rate,),
            900.0,
            (0, 1),
            lengths_file=str(shared_profile(f"../{requests}_lengths.csv")),
            cost=cost,
        )
        for requests, rate in (("sharegpt", 2.0), ("alpaca", 30.0))
        for system in ("vllm", "orca_max", "orca_pow2", "orca_oracle")
    }
    found = run_cases(list(cases.values()), jobs=2)
    for key, case in cases.items():
        here = np.mean([one.mean_batched_requests for one in found[case]])
        assert here == pytest.approx(printed("fig13", *key), rel=0.1), key
