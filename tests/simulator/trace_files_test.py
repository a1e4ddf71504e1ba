"""Trace files as other programs write them, and damaged ones."""

import gzip

import numpy as np
import pytest

from jpaged.simulator.workloads.lengths import Lengths
from jpaged.simulator.workloads.traces import (
    read_lengths,
    read_mooncake,
    read_trace,
)
from jpaged.simulator.workloads.workload import Workload

ROWS = "0.5,10,20\n1.5,30,40\n"
MOONCAKE = (
    '{"timestamp": 500, "input_length": 10, "output_length": 20, "hash_ids": [1]}\n'
)


@pytest.mark.parametrize(
    "header",
    [
        "timestamp_s,input_tokens,output_tokens",
        "\ufefftimestamp_s,input_tokens,output_tokens",
        "Timestamp_s,Input_Tokens,OUTPUT_TOKENS",
        " timestamp , input tokens , output tokens ",
        "Timestamp,Request tokens,Response tokens",  # BurstGPT
        "TIMESTAMP,ContextTokens,GeneratedTokens",  # Azure
        "arrived_at,num_prefill_tokens,num_decode_tokens",  # Vidur
        "arrival_s,prompt_tokens,completion_tokens",
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_usual_headers_keep_the_arrival_times(header, suffix, tmp_path):
    file = tmp_path / f"trace{suffix}"
    text = f"{header}\n{ROWS}".encode()
    file.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    workload = read_trace(file)
    assert isinstance(workload, Workload)
    assert workload.arrivals.tolist() == [0.5, 1.5]
    assert workload.prompt_lens.tolist() == [10, 30]
    assert workload.output_lens.tolist() == [20, 40]


def test_dates_become_seconds_from_the_first_row(tmp_path):
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:16:50.9951690,396,109\n"
    )
    workload = read_trace(file)
    assert isinstance(workload, Workload)
    np.testing.assert_allclose(workload.arrivals, [0, 64.314579], atol=2e-6)
    file.write_text(file.read_text() + "70,1,1\n")
    with pytest.raises(ValueError, match=r"expected a date like .* got '70' in line 4"):
        read_trace(file)


def test_the_exact_name_has_precedence_over_an_alias(tmp_path):
    file = tmp_path / "trace.csv"
    header = "timestamp,timestamp_s,input_tokens,output_tokens,prompt_len"
    file.write_text(f"{header}\n9,0.5,10,20,7\n")
    workload = read_trace(file)
    assert isinstance(workload, Workload)
    assert workload.arrivals.tolist() == [0.5]
    assert workload.prompt_lens.tolist() == [10]


def test_a_byte_order_mark_before_json_is_no_part_of_it(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text("\ufeff" + MOONCAKE, "utf-8")
    workload = read_trace(file)
    assert isinstance(workload, Workload)
    assert workload.arrivals.tolist() == [0.5]
    file.write_text("\ufeff" + MOONCAKE.replace("timestamp", "arrival_s"), "utf-8")
    workload = read_trace(file)
    assert isinstance(workload, Workload)
    assert workload.arrivals.tolist() == [500]


CSV = b"input_tokens,output_tokens\n" + b"".join(
    b"%d,%d\n" % (1 + n * n % 997, 1 + n * 7 % 991) for n in range(5000)
)
NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.csv.gz", gzip.compress(CSV)[:9000], "expected a whole gzip file, .*line"),
        ("a.csv.gz", gzip.compress(CSV)[:-4], r"expected a whole gzip file.*line 5001"),
        ("a.csv.gz", CSV, "expected a whole gzip file, .*after line 0 of"),
        ("a.csv.gz", b"", "expected a column input_tokens, output_tokens in line 1"),
        ("a.csv", b"", "expected a column .* in line 1 of .*, got nothing"),
        ("a.csv", b"input_tokens,output_tokens\n", "expected requests, got none in"),
        ("a.csv", CSV.decode().encode("utf-16"), r"expected UTF-8 text.*after line 0"),
        ("a.csv", CSV + b"\xff,3\n", "expected UTF-8 text, got other bytes after line"),
        (
            "a.csv",
            b"input_tokens,output_tokens\n1,2\n" + b"1" * 200_000 + b",3\n",
            "expected a row of a CSV file, got an error in line 3 of .*field larger",
        ),
        (
            "a.csv",
            b"input_tokens,output_tokens,output_tokens\n1,2,3\n",
            "expected one column output_tokens in line 1 of .*, got output_tokens, out",
        ),
        (
            "a.csv",
            b"prompt_len,input_length,output_tokens\n1,2,3\n",
            "expected one column input_tokens in line 1 .* got prompt_len, input_le",
        ),
        (
            "a.csv",
            b"timestamp_ms,input_tokens,output_tokens\n1,2,3\n",
            "expected arrival times in seconds in a column timestamp_s .*timestamp_ms",
        ),
        (
            "a.csv",
            b"input_tokens,output_tokens\n1,2\n1\n",
            r"2 fields.*got 1 in line 3",
        ),
        ("a.csv", b"input_tokens,output_tokens\n1,2,3\n", r"2 fields.*3 in line 2"),
        ("a.csv", b"input_tokens,output_tokens\n1_0,2\n", r"got '1_0' in line 2"),
        ("a.csv", b"input_tokens,output_tokens\n-1,2\n", r"got '-1' in line 2"),
        ("a.csv", b"input_tokens,output_tokens\nnan,2\n", r"got 'nan' in line 2"),
        ("a.csv", b"input_tokens,output_tokens\n1,1e999\n", r"'1e999' in line 2"),
        (
            "a.csv",
            b"timestamp,input_tokens,output_tokens\ninf,2,3\n",
            "expected a number of at least 0 for timestamp_s, got 'inf' in line 2",
        ),
        ("a.jsonl", NESTED.encode(), r"expected JSON, got .* in line 1 of"),
        ("a.jsonl", b"", "expected requests, got none in"),
        ("a.jsonl", MOONCAKE.encode("utf-16"), "expected UTF-8 text.*after line 0"),
        (
            "a.jsonl",
            MOONCAKE.replace("500", "NaN").encode(),
            "expected a number of at least 0 for timestamp, got nan in line 1",
        ),
        (
            "a.jsonl",
            MOONCAKE.replace('"input', '"timestamp": 7, "input').encode(),
            "'timestamp' occurs twice",
        ),
        ("a.jsonl.gz", b"\x1f\x8b", "expected a whole gzip file, .*after line 0 of"),
    ],
)
def test_a_damaged_file_is_refused_with_file_and_line(
    name, contents, message, tmp_path
):
    file = tmp_path / name
    file.write_bytes(contents)
    with pytest.raises(ValueError, match=message) as raised:
        read_trace(file)
    assert str(file) in str(raised.value)


def test_the_readers_of_one_format_refuse_the_same_files(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(CSV)
    with pytest.raises(ValueError, match="expected a whole gzip file"):
        read_lengths(tmp_path / "a.csv.gz")
    (tmp_path / "a.jsonl").write_text(NESTED)
    with pytest.raises(ValueError, match="expected JSON"):
        read_mooncake(tmp_path / "a.jsonl")


def test_a_table_without_times_has_lengths_only(tmp_path):
    (tmp_path / "a.csv").write_bytes(CSV)
    lengths = read_trace(tmp_path / "a.csv")
    assert isinstance(lengths, Lengths)
    assert len(lengths) == 5000
