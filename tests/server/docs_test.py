"""docs/server.md: its examples run against a server; its dashboard and its tables."""

import json
import re
import subprocess

import pytest

from jpaged.llm import LLM
from jpaged.server.metrics import COUNTERS, GAUGES, HISTOGRAMS
from jpaged.server.settings import ServerSettings
from tests.docs.docs_test import blocks_in
from tests.server.conftest import Running
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "server.md").read_text("utf-8")
URL = "http://127.0.0.1:8000"
OURS = "tests/server runs it against a server"
BLOCKS = [
    block for block in blocks_in(TEXT, "server.md") if block.not_run in (None, OURS)
]
TEMPLATE = "{% for m in messages %}# {{ m.content }}{{ '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def documented():
    """A server with the bundled model and a chat template."""
    llm = LLM(
        "tiny-python",
        max_num_seqs=8,
        num_blocks=128,
        max_num_batched_tokens=64,
        max_model_len=256,
    )
    settings = ServerSettings(model_names=("tiny-python",), allow_admin=True, drain_s=2)
    found = Running(llm, settings, TEMPLATE)
    yield found
    found.stop()


@pytest.mark.long
def test_python_examples_run(documented):
    pytest.importorskip("openai")
    namespace = {}
    count = 0
    for block in BLOCKS:
        if block.tag == "python":
            exec(block.text.replace(URL, documented.url), namespace)
            count += 1
    assert count >= 5
    documented.wait_until_idle()


@pytest.mark.long
def test_curl_examples_run(documented):
    count = 0
    for block in BLOCKS:
        for line in re.findall(r"curl (?:\\\n|[^\n']|'[^']*')+", block.text):
            command = line.replace("curl", "curl --fail-with-body")
            done = subprocess.run(
                ["bash", "-c", command.replace(URL, documented.url)],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            assert "error" not in json.loads(done.stdout)
            count += 1
    assert count == 4


def test_the_dashboard_asks_for_metrics_that_exist():
    dashboard = json.loads((ROOT / "docs" / "server" / "grafana.json").read_text())
    text = " ".join(
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    )
    asked = set(re.findall(r"jpaged:(\w+)", text))
    exist = {*GAUGES, *(f"{name}_total" for name in COUNTERS)}
    exist |= {f"{name}_bucket" for name in HISTOGRAMS}
    exist |= {"request_success_total", "http_responses_total"}
    assert asked <= exist
    assert len(asked) > 12


def test_the_page_names_the_metrics_and_the_limits():
    settings = ServerSettings()
    for number in (
        settings.max_prompts,
        settings.max_n,
        settings.max_stop,
        settings.max_logit_bias,
        settings.max_schema_chars,
        settings.max_regex_chars,
    ):
        assert f"{number:,}" in TEXT
    for name in (*GAUGES, *COUNTERS, *list(HISTOGRAMS)[:6]):
        assert name in TEXT or name == "engine_up", name
