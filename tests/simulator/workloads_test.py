"""Workloads: the requests of the paper, trace files, lengths and conversations."""

import collections
import dataclasses
import gzip
import hashlib
import json
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.simulator.workloads import arrivals, lengths, traces, workload
from jpaged.simulator.workloads.lengths import Lengths
from jpaged.simulator.workloads.workload import Workload
from tests.support.step_loads import shared_data

DATA = shared_data()
needs_data = pytest.mark.skipif(
    not DATA.exists(), reason="the shared data does not exist"
)


def i32(*numbers):
    return np.array(numbers, np.int32)


def tiny(**changes):
    given = dict(
        arrivals=np.array([0.0, 0.5, 2.0]),
        prompt_lens=i32(5, 40, 3),
        output_lens=i32(2, 9, 1),
    )
    return Workload(**{**given, **changes})


# ---- the requests of the paper


def driver(rows, rate, duration, seed):
    """Run the authors' recipe unchanged: with the global generators and a list."""
    np_state, state = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    counts = np.random.poisson(rate * 0.01, size=duration * 100)  # noqa: NPY002
    times = [i * 0.01 for i, count in enumerate(counts) for _ in range(count)]
    data = [row for row in rows if sum(row) < 2048]
    while len(data) < len(times):
        data = data + data
    data = data[: len(times)]
    random.shuffle(data)
    np.random.set_state(np_state)  # noqa: NPY002
    random.setstate(state)
    return times, data


@pytest.mark.parametrize(("rate", "duration", "seed"), [(2.0, 60, 0), (30, 20, 7)])
def test_a_trace_equals_that_of_the_authors_driver(rate, duration, seed):
    rng = np.random.default_rng(1)
    rows = [tuple(map(int, row)) for row in rng.integers(1, 1500, (90, 2))]
    given = Lengths(i32(*(a for a, _ in rows)), i32(*(b for _, b in rows)))
    trace = workload.paper_trace(given, rate, duration, seed)
    times, data = driver(rows, rate, duration, seed)
    assert len(times) > 90
    np.testing.assert_array_equal(trace.arrivals, times)
    assert list(zip(trace.prompt_lens, trace.output_lens, strict=True)) == data
    num_long = sum(a + b >= 2048 for a, b in rows)
    assert 0 < trace.num_skipped <= num_long


@needs_data
def test_the_papers_file_gives_traces_with_the_known_checksums():
    checks = json.loads((DATA / "paper_trace_checks.json").read_text("utf-8"))
    given = traces.read_lengths(DATA / "sharegpt_lengths.csv")
    assert len(checks["traces"]) >= 12
    for check in checks["traces"]:
        trace = workload.paper_trace(
            given, check["rate"], check["duration_s"], check["seed"]
        )
        lines = zip(trace.arrivals, trace.prompt_lens, trace.output_lens, strict=True)
        text = "\n".join(f"{time:.2f},{a},{b}" for time, a, b in lines)
        assert len(trace) == check["num_requests"]
        assert hashlib.sha256(text.encode()).hexdigest() == check["sha256"]


def test_a_trace_does_not_touch_the_global_generators():
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    expected = np.random.random(), random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    workload.paper_trace("alpaca", 5.0, 10, seed=0)
    assert (np.random.random(), random.random()) == expected  # noqa: NPY002


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_given_mean_and_variation(cv):
    times = arrivals.gamma(rate=4.0, cv=cv, duration=20_000, seed=0)
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert times[-1] < 20_000
    # 80,000 gaps: the mean's standard error is cv / 283 of it.
    assert gaps.mean() == pytest.approx(0.25, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)
    again = arrivals.gamma(rate=4.0, cv=cv, duration=20_000, seed=0)
    np.testing.assert_array_equal(times, again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arrivals.poisson(0, 10, 0), "rate: expected a positive number, got 0"),
        (lambda: arrivals.poisson(1, float("nan"), 0), "duration: expected a positive"),
        (lambda: arrivals.poisson(1, 0.015, 0), "a multiple of 0.01 s, got 0.015"),
        (lambda: arrivals.gamma(1, -1, 10, 0), "cv: expected a number of at least 0"),
        (lambda: lengths.builtin_lengths("c4", 1, 0), "one of sharegpt, alpaca, wmt16"),
        (
            lambda: lengths.builtin_lengths("alpaca", -1, 0),
            "count: expected at least 0",
        ),
        (
            lambda: workload.paper_trace(Lengths(i32(2000), i32(48)), 5.0, 10, 0),
            "expected some below 2048 tokens",
        ),
        (
            lambda: workload.chat_rounds("alpaca", 1, 9, 0, new_conversation=2),
            "new_conversation: expected a probability, got 2",
        ),
        (
            lambda: workload.chat_rounds("alpaca", 1, 9, 0, max_prompt_len=0),
            "max_prompt_len, max_output_len: expected at least 1",
        ),
    ],
)
def test_invalid_numbers_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- lengths


@pytest.mark.parametrize(
    ("name", "prompt_mean", "output_mean"),
    # Kwon et al. 2023, figure 11.
    [("sharegpt", 161.31, 337.99), ("alpaca", 19.31, 58.45)],
)
def test_built_in_sampledhave_the_means_of_the_paper(name, prompt_mean, output_mean):
    sampled = lengths.builtin_lengths(name, 200_000, seed=0)
    # Standard errors here are below 0.4 %.
    assert sampled.prompt_lens.mean() == pytest.approx(prompt_mean, rel=0.02)
    assert sampled.output_lens.mean() == pytest.approx(output_mean, rel=0.02)
    assert (sampled.prompt_lens + sampled.output_lens < 2048).all()


@pytest.mark.parametrize(
    ("name", "prefix"), [("wmt16-1shot", 80), ("wmt16-5shot", 341)]
)
def test_translations_have_a_prefix_and_outputs_as_long_as_the_sentence(name, prefix):
    sampled = lengths.builtin_lengths(name, 20_000, seed=0)
    sentences = sampled.prompt_lens - prefix
    assert sentences.min() >= 1
    assert sentences.mean() == pytest.approx(28.6, rel=0.02)
    assert sampled.output_lens.mean() == pytest.approx(36.4, rel=0.02)
    assert np.corrcoef(sentences, sampled.output_lens)[0, 1] > 0.8


@needs_data
@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_built_in_sampledhave_the_quantiles_of_the_file(name):
    given = traces.read_lengths(DATA / f"{name}_lengths.csv", skip_empty=True)
    short = given.prompt_lens.astype(int) + given.output_lens < 2048
    sampled = lengths.builtin_lengths(name, 100_000, seed=1)
    shares = [0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
    for field in ("prompt_lens", "output_lens"):
        expected = np.quantile(getattr(given, field)[short], shares)
        found = np.quantile(getattr(sampled, field), shares)
        np.testing.assert_allclose(found, expected, rtol=0.12, atol=1.5)


def test_the_seed_decides_the_lengths():
    one, same, other = (lengths.builtin_lengths("alpaca", 50, s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.output_lens, same.output_lens)
    assert (one.output_lens != other.output_lens).any()


# ---- workloads


def test_a_workload_changes_its_samples_its_beams_or_its_size():
    three = tiny()
    assert three.num_samples.tolist() == [1, 1, 1]
    assert three.beam_widths.tolist() == [0, 0, 0]
    many = three.with_beams(4).with_samples(6)
    assert many.num_samples.tolist() == [6, 6, 6]
    assert many.beam_widths.tolist() == [0, 0, 0]
    beams = many.with_beams(4)
    assert beams.num_samples.tolist() == [1, 1, 1]
    assert beams.beam_widths.tolist() == [4, 4, 4]
    assert len(beams.head(2)) == 2
    assert beams.head(2).beam_widths.tolist() == [4, 4]
    assert len(beams.head(9)) == 3


def test_requests_over_the_limit_are_skipped_and_counted():
    short = tiny().limited(8)
    assert short.prompt_lens.tolist() == [5, 3]
    assert short.arrivals.tolist() == [0.0, 2.0]
    assert short.num_skipped == 1
    shorter = short.limited(4)
    assert shorter.prompt_lens.tolist() == [3]  # 3 + 1 tokens fit exactly
    assert shorter.skipped == {
        "more than 8 tokens in all": 1,
        "more than 4 tokens in all": 1,
    }
    assert tiny().limited(49).num_skipped == 0


def test_only_whole_pieces_of_a_shared_prefix_are_shared():
    # The paper's 341 tokens: 21 blocks of 16, 336 tokens.
    long = Workload(np.zeros(2), i32(341, 400), i32(1, 1))
    shared = long.with_shared_prefix(341)
    assert shared.content_size == 16
    assert shared.contents.shape == (2, 21)
    np.testing.assert_array_equal(shared.contents[0], shared.contents[1])
    assert shared.prompt_lens.tolist() == [341, 400]
    assert shared.limited(401).contents.shape == (2, 21)
    with pytest.raises(ValueError, match="prompt_lens is 341 at index 0"):
        long.with_shared_prefix(342)
    with pytest.raises(ValueError, match="prompts that already share"):
        shared.with_shared_prefix(16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arrivals=[0.0, -1.0, 2.0]), "arrivals: .*got -1.0 at index 1"),
        (
            dict(arrivals=[0.0, 2.0, 1.0]),
            "sorted seconds, got 1.0 after 2.0 at index 2",
        ),
        (dict(arrivals=[0.0, np.nan, 1.0]), "arrivals: .*got nan at index 1"),
        (dict(prompt_lens=i32(1, 0, 1)), "prompt_lens: .*got 0 at index 1"),
        (dict(output_lens=i32(1, 1)), "output_lens: expected 3 numbers.*got 2"),
        (dict(output_lens=[1.0, 1.5, 2.0]), "output_lens: .*float64"),
        (dict(num_samples=i32(1, 1, 0)), "num_samples: .*got 0 at index 2"),
        (
            dict(num_samples=i32(1, 2, 1), beam_widths=i32(0, 4, 0)),
            "num_samples: expected 1 where beam_widths is not 0, got 2 at index 1",
        ),
        (dict(contents=i32(1, 1, 1)), "contents: expected integers of shape"),
        (dict(contents=np.array([[-1, 3], [1, 2], [1, -1]])), "at index 0"),
        (dict(contents=np.array([[1, 3], [1, 2], [1, -7]])), "at index 2"),
        (
            # The prompt of 3 tokens has one piece of 4.
            dict(contents=np.array([[1, 2], [1, 2], [1, 2]]), content_size=4),
            "at most the 3 tokens.*at index 2",
        ),
        (dict(content_size=0), "content_size: expected at least 1"),
    ],
)
def test_an_invalid_workload_names_the_argument_and_the_index(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


# ---- files


@st.composite
def requests(draw):
    """Return rows of sorted times in ms, two lengths, and ids of pieces of 4 tokens."""
    count = draw(st.integers(1, 20))
    times = sorted(
        draw(st.lists(st.integers(0, 10**6), min_size=count, max_size=count))
    )
    rows = []
    for time in times:
        prompt = draw(st.integers(1, 40))
        ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=-(-prompt // 4)))
        rows.append((time, prompt, draw(st.integers(1, 3000)), ids))
    return rows


@given(requests(), st.booleans(), st.booleans())
def test_trace_files_are_read_as_they_were_written(
    tmp_path_factory, rows, is_gzipped, in_seconds
):
    folder = tmp_path_factory.mktemp("traces")
    ending = ".gz" if is_gzipped else ""
    opened = gzip.open if is_gzipped else open
    table = folder / f"trace.csv{ending}"
    with opened(table, "wt", encoding="utf-8") as file:
        file.write("row,output_tokens,timestamp_s,input_tokens\n")
        for row, (time, prompt, output, _) in enumerate(rows):
            file.write(f"{row},{output},{time / 1000},{prompt}\n")
    lines = folder / f"trace.jsonl{ending}"
    with opened(lines, "wt", encoding="utf-8") as file:
        for time, prompt, output, ids in rows:
            when = {"arrival_s": time / 1000} if in_seconds else {"timestamp": time}
            fields = {"input_length": prompt, "output_length": output, "hash_ids": ids}
            file.write(json.dumps({**when, **fields}) + "\n\n")

    first = traces.read_trace(table)
    reader = traces.read_vllm_run if in_seconds else traces.read_mooncake
    second = reader(lines, content_size=4)
    for found in (first, second):
        np.testing.assert_allclose(found.arrivals, [r[0] / 1000 for r in rows])
        assert found.prompt_lens.tolist() == [r[1] for r in rows]
        assert found.output_lens.tolist() == [r[2] for r in rows]
    assert first.contents is None
    ids = [[one for one in row if one >= 0] for row in second.contents.tolist()]
    assert ids == [r[3] for r in rows]
    only_lengths = traces.read_lengths(table)
    assert only_lengths.output_lens.tolist() == [r[2] for r in rows]


CSV = "timestamp_s,input_tokens,output_tokens\n"
GOOD = '{"timestamp": 5, "input_length": 9, "output_length": 2, "hash_ids": [1]}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "input_tokens\n5\n",
            "expected a column output_tokens in line 1 of .*a.csv",
        ),
        ("a.csv", "", "column input_tokens, output_tokens in line 1"),
        ("a.csv", CSV + "0,5,5\n1,5,0\n", "output_tokens, got 0 in line 3 of .*a.csv"),
        ("a.csv", CSV + "0,5,5\n1,-5,2\n", "input_tokens, got '-5' in line 3"),
        ("a.csv", CSV + "0,5,5\n1,5,many\n", "got 'many' in line 3"),
        ("a.csv", CSV + "0,5,5.5\n", "got '5.5' in line 2"),
        (
            "a.csv",
            CSV + "0,5\n",
            "expected 3 fields, one for each column, got 2 in line 2",
        ),
        ("a.csv", CSV + "0,5,5\n-1,5,5\n", "timestamp_s, got '-1' in line 3"),
        ("a.csv", CSV + "0,5,5\nnan,5,5\n", "timestamp_s, got 'nan' in line 3"),
        ("a.csv", CSV + "2,5,5\n1,5,5\n", "timestamp_s 1 in line 3 of .*, after 2"),
        ("a.csv", CSV, "expected requests, got none in .*a.csv"),
        (
            "a.jsonl",
            GOOD + "{\n",
            "trace: expected JSON, got .* in line 2 of .*a.jsonl",
        ),
        ("a.jsonl", GOOD + "[1]\n", "expected JSON with .*line 2 of .*a.jsonl"),
        ("a.jsonl", GOOD + GOOD.replace("5", "4"), "timestamp 4 in line 2.*, after 5"),
        (
            "a.jsonl",
            GOOD.replace("timestamp", "time"),
            "expected timestamp, got .* in line 1",
        ),
        (
            "a.jsonl",
            GOOD.replace("output_", "answer_"),
            "expected output_length, got .* in line 1",
        ),
        ("a.jsonl", GOOD.replace("9", "0"), "at most 0 hash_ids, .* got 1 in line 1"),
        (
            "a.jsonl",
            GOOD.replace("9", '"9"'),
            "expected JSON with an integer input_len",
        ),
        ("a.jsonl", GOOD.replace(": 2", ": 0"), "output_length, got 0 in line 1"),
        (
            "a.jsonl",
            GOOD.replace("[1]", "[1, 2]"),
            "at most 1 hash_ids, .* got 2 in line 1",
        ),
        ("a.jsonl", GOOD.replace("5", "NaN"), "for timestamp, got nan in line 1"),
        ("a.jsonl", "\n", "expected requests, got none in .*a.jsonl"),
        ("a.txt", "", "expected a file .csv or .jsonl"),
    ],
)
def test_an_invalid_file_names_the_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        traces.read_trace(path)


def test_skip_empty_skips_and_counts_requests_without_tokens(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(CSV + "0,5,0\n1,6,7\n2,0,1\n", "utf-8")
    found = traces.read_trace(path, skip_empty=True)
    assert found.prompt_lens.tolist() == [6]
    assert found.num_skipped == 2
    given = traces.read_lengths(path, skip_empty=True)
    assert (len(given), given.skipped) == (1, {"a length of 0": 2})
    trace = workload.paper_trace(given, 5.0, 10, 0)
    assert trace.num_skipped == 2


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "prompt_mean", "output_mean"),
    # Published with the files.
    [
        ("azure_conv_2023.csv", 16495, 1182.9, 200.91),
        ("azure_code_2023.csv", 8068, 2041.72, 27.64),
        ("mooncake_synthetic.jsonl.gz", 3134, 13913.8, 172.74),
        ("vllm_runs/workload_sharegpt300_llama31.jsonl.gz", 300, 857.46, None),
    ],
)
def test_recorded_traces_have_the_known_counts_and_means(
    name, count, prompt_mean, output_mean
):
    trace = traces.read_trace(DATA / name)
    assert len(trace) == count
    assert trace.prompt_lens.mean() == pytest.approx(prompt_mean, abs=0.05)
    if output_mean is not None:
        assert trace.output_lens.mean() == pytest.approx(output_mean, abs=0.01)


# ---- conversations


def test_the_prompt_of_a_round_contains_the_previous_rounds():
    # Every round adds 10 + 5 tokens, so the length of a prompt is its round.
    given = Lengths(i32(10), i32(5))
    rounds = workload.chat_rounds(given, 20.0, 50, 0, max_prompt_len=70)
    numbers, rest = np.divmod(rounds.prompt_lens - 10, 15)
    is_cut = rounds.prompt_lens == 70
    assert not rest[~is_cut].any()
    assert (rounds.output_lens == 5).all()
    counts = collections.Counter(numbers[~is_cut].tolist())
    # Half of the rounds are first ones; no round is more frequent than the one before.
    assert counts[0] / len(rounds) == pytest.approx(0.5, abs=0.05)
    assert sorted(counts.values(), reverse=True) == [
        counts[n] for n in range(len(counts))
    ]
    always = workload.chat_rounds(given, 20.0, 50, 0, new_conversation=1.0)
    assert (always.prompt_lens == 10).all()
    one = workload.chat_rounds(given, 20.0, 5, 0, new_conversation=0.0)
    expected = [min(10 + 15 * n, 1024) for n in range(len(one))]
    assert one.prompt_lens.tolist() == expected
    assert expected[-1] == 1024


def test_an_answer_is_cut_before_it_becomes_part_of_prompts():
    given = Lengths(i32(10), i32(1500))
    one = workload.chat_rounds(
        given, 20.0, 5, 0, new_conversation=0.0, max_output_len=7, max_prompt_len=40
    )
    assert set(one.output_lens.tolist()) == {7}
    assert one.prompt_lens[:3].tolist() == [10, 27, 40]
    assert statistics.mean(one.prompt_lens[3:].tolist()) == 40


def test_workloads_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().content_size = 3
