"""Behaviour under load: full queues, clients that go away, slow readers, the end."""

import concurrent.futures
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.server.completions_test import post
from tests.server.conftest import SETTINGS, httpx, running
from tests.support.paths import ROOT

pytestmark = pytest.mark.long

LONG = {"prompt": "ab", "temperature": 0, "max_tokens": 140, "ignore_eos": True}


def connect(url, buffer_bytes=None):
    """A socket, with a buffer of that size for what it receives."""
    host, port = url.removeprefix("http://").split(":")
    found = socket.socket()
    if buffer_bytes is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    found.settimeout(20)
    found.connect((host, int(port)))
    return found


def head(size):
    lines = ["POST /v1/completions HTTP/1.1", "Host: a", f"Content-Length: {size}"]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def raw_request(url, body, buffer_bytes=None):
    """A socket that has sent a request."""
    data = json.dumps(body).encode()
    found = connect(url, buffer_bytes)
    found.sendall(head(len(data)) + data)
    return found


@pytest.fixture
def slow_steps(served, monkeypatch):
    """Slices of one step that take 15 ms: a request runs for seconds on any machine."""
    run_slice = served.llm.run_slice

    def slow(seconds: float | None = None) -> bool:
        time.sleep(0.015)
        return run_slice(0.0)

    monkeypatch.setattr(served.llm, "run_slice", slow)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_blocks_at_once(
    served, client, stream, slow_steps
):
    before = served.llm.stats()["num_finished_requests"]
    gone = raw_request(served.url, {**LONG, "prompt": ["ab"] * 10, "stream": stream})
    end = time.monotonic() + 20
    while served.client.get("/stats").json()["num_running"] == 0:
        assert time.monotonic() < end
    gone.close()
    served.wait_until_idle(3)
    # Aborted, so not finished by themselves.
    assert served.llm.stats()["num_finished_requests"] - before < 10


def test_a_full_queue_answers_429_and_serves_on(served, client):
    body = {**LONG, "prompt": ["ab"] * 20}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        posts = [
            pool.submit(served.client.post, "/v1/completions", json=body)
            for _ in range(6)
        ]
        found = [each.result() for each in posts]
    statuses = [response.status_code for response in found]
    assert set(statuses) == {200, 429}
    texts = set()
    for response in found:
        if response.status_code == 429:
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert response.json()["error"]["type"] == "rate_limit_error"
        else:
            texts |= {choice["text"] for choice in response.json()["choices"]}
    assert len(texts) == 1


def test_a_slow_reader_holds_up_no_one(served, client):
    slow = raw_request(served.url, {**LONG, "n": 1, "stream": True, "logprobs": 5})
    start = time.monotonic()
    texts = {post(client, LONG)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    assert time.monotonic() - start < 30
    data = b""
    while b"[DONE]" not in data:
        data += slow.recv(1000)
    slow.close()


def test_a_reader_that_reads_nothing_is_dropped(llm, served):
    served.wait_until_idle()
    settings = dataclasses.replace(SETTINGS, write_timeout_s=0.5)
    with running(llm, settings) as other:
        body = {**LONG, "prompt": ["ab"] * 20, "stream": True, "logprobs": 20}
        stuck = raw_request(other.url, body, buffer_bytes=2048)
        other.wait_until_idle()
        post(other.client, LONG)
        stuck.close()


def test_a_body_that_does_not_come_is_given_up(llm, served):
    served.wait_until_idle()
    settings = dataclasses.replace(SETTINGS, read_timeout_s=0.2)
    with running(llm, settings) as other:
        with connect(other.url) as slow:
            slow.sendall(head(9) + b"{")
            assert b" 408 " in slow.recv(1000)


def test_metrics_count_what_was_served(served, client):
    parser = pytest.importorskip("prometheus_client.parser")

    def scrape():
        text = client.get("/metrics").text
        found = {}
        for family in parser.text_string_to_metric_families(text):
            for sample in family.samples:
                labels = sample.labels
                key = sample.name, labels.get("finished_reason"), labels.get("le")
                found[key] = sample.value
        return found

    client.post("/reset_prefix_cache")
    before = scrape()
    post(client, {**LONG, "prompt": [[5] * 20, [5] * 20], "max_tokens": 7})
    post(client, {**LONG, "prompt": [[5] * 20], "max_tokens": 7})
    served.wait_until_idle()
    after = scrape()

    def gain(name, reason=None, le=None):
        key = f"jpaged:{name}", reason, le
        return after[key] - before.get(key, 0)

    assert gain("prompt_tokens_total") == gain("prefix_cache_queries_total") == 60
    assert gain("generation_tokens_total") == 21
    assert gain("prefix_cache_hits_total") >= 16
    assert gain("request_success_total", "length") == 3
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time",
                 "request_prefill_time", "request_decode_time"):  # fmt: skip
        assert gain(f"{name}_seconds_count") == 3
        assert gain(f"{name}_seconds_bucket", None, "+Inf") == 3
    assert gain("inter_token_latency_seconds_count") == 18
    assert gain("e2e_request_latency_seconds_sum") > 0
    assert after["jpaged:num_requests_running", None, None] == 0
    assert after["jpaged:kv_cache_usage_perc", None, None] == 0
    assert after["jpaged:num_preemptions_total", None, None] >= 0


def test_pausing_freezes_requests(served, client, slow_steps):
    expected = post(client, LONG)["choices"][0]["text"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, client, LONG)
        while served.client.get("/stats").json()["num_running"] == 0:
            pass
        assert client.post("/pause", json={"mode": "keep"}).status_code == 200
        steps = client.get("/stats").json()["num_steps"]
        assert client.get("/health").json() == {"status": "paused"}
        time.sleep(0.3)
        assert client.get("/stats").json()["num_steps"] == steps
        assert not answer.done()
        assert client.post("/resume").status_code == 200
        assert answer.result(30)["choices"][0]["text"] == expected


def test_statistics_and_the_timeline(client):
    post(client, {**LONG, "max_tokens": 5})
    found = client.get("/timeline?last=3").json()
    assert found["columns"][0] == "step"
    steps = [row[0] for row in found["rows"]]
    assert steps[-1] == client.get("/stats").json()["num_steps"] - 1
    assert steps == list(range(steps[0], steps[0] + 3))
    assert client.get("/timeline?last=x").status_code == 400
    assert client.get("/timeline?replica=9").status_code == 400


def test_weights_come_only_from_below_the_root(llm, served, folder, tmp_path):
    served.wait_until_idle()
    root = tmp_path / "weights"
    root.mkdir()
    (root / "link").symlink_to(folder)
    (root / "empty").mkdir()
    settings = dataclasses.replace(SETTINGS, weights_root=root)
    with running(llm, settings) as other:
        for path in ("..", "/etc", "link", "nothing", "", "a\x00b", "empty/../..", 5):
            found = other.client.post("/update_weights", json={"path": path})
            assert found.status_code == 400, path
            assert found.json()["error"]["param"] == "path"
    found = served.client.post("/update_weights", json={"path": "step_1"})
    assert found.json()["error"]["code"] == "no_weights_root"


@pytest.fixture(scope="module")
def command(folder):
    """A server that a command started; its process, its URL and the rest of stderr."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "jpaged.server", "--model", str(folder)),
            *("--port", "0", "--max-num-seqs", "4", "--num_blocks=64"),
            *("--max_num_batched_tokens", "32", "--block_size", "4"),
            *("--max_model_len", "160", "--drain_s", "20"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JPAGED_API_KEY": "secret"},
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "running on" in line:
            break
    else:
        pytest.fail("".join(lines))
    url = line.split("running on ")[1].split()[0]
    # Nothing else reads the pipe, which would fill.
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    yield process, url, lines
    process.kill()
    process.wait()
    reader.join()
    process.stderr.close()


def test_sigterm_lets_open_requests_end(command):
    process, url, lines = command
    headers = {"authorization": "Bearer secret"}
    with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
        alone = post(client, LONG)["choices"][0]["text"]
        body = {**LONG, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            text, is_ended = "", False
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if not is_ended:
                        process.send_signal(signal.SIGTERM)
                        is_ended = True
    assert text == alone
    assert process.wait(30) == 0
    assert "Traceback" not in "".join(lines)
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny-python", "--max_num_sqs", "4"], "max_num_sqs"),
        (["--model", "tiny-python", "4"], "unknown option"),
        (["--model", "tiny-python", "--max_num_seqs"], "got True (bool)"),
        (
            ["--model", "tiny-python", "--enforce-eager"],
            "enforce_eager: expected False",
        ),
        (["--model", "tiny-python", "--log_level", "loud"], "invalid choice: 'loud'"),
        (["--model", "tiny-python", "--port", "70000"], "port: expected an integer"),
        (["--model", "tiny-python", "--tensor_parallel", "0"], "tensor_parallel: "),
        (["--model", "tiny-python", "--max_num_seqs", "x"], "max_num_seqs: expected"),
        (["--model", "/nothing"], "/nothing"),
        (["--model", "tiny-python", "--max_n", "0"], "max_n: expected"),
        (["--model", "tiny-python", "--weights_root", "/nothing"], "weights_root"),
    ],
)
def test_wrong_options_end_before_the_server_starts(arguments, message, capsys):
    from jpaged.server.command import main

    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = str(caught.value) + capsys.readouterr().err
    assert message in said
    assert caught.value.code != 0
