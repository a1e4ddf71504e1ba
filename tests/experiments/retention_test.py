"""The runner `retention`: forced perplexity equals the model's own, and its figure."""

import numpy as np
import pytest

from experiments import retention as runner
from jpaged import LLM
from tests.support.runners import call_experiment, last_json

pytestmark = pytest.mark.long


def test_the_runner_measures_methods_beside_a_cache_that_keeps_all(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "retention.png"
    status, out, _ = call_experiment(
        "retention",
        "--methods=random,quest",
        "--shares=0.5,1.0",
        "--length=64",
        "--num_texts=2",
        "--num_needles=2",
        f"--plot={plot}",
    )
    assert status == 0
    rows = last_json(out)["rows"]
    found = {(row["method"], row["share"]): row for row in rows}
    assert set(found) == {("all", 1.0)} | {
        (name, share) for name in ("random", "quest") for share in (0.5, 1.0)
    }
    whole = found["all", 1.0]
    for name in ("random", "quest"):
        np.testing.assert_allclose(
            found[name, 1.0]["perplexity"], whole["perplexity"], rtol=1e-5
        )
        assert found[name, 0.5]["perplexity"] != whole["perplexity"]
    assert plot.stat().st_size > 5000

    with LLM("tiny-python", max_num_seqs=1, max_model_len=64) as llm:
        texts = runner.held_out_texts(llm, 64, 2)
        assert llm.tokenizer is not None
        own = llm.model(np.array(texts))
    own = own - np.log(np.exp(own).sum(-1, keepdims=True))
    nats = [
        -own[i, t - 1, token]
        for i, text in enumerate(texts)
        for t, token in enumerate(text)
        if t >= 64 // 4
    ]
    np.testing.assert_allclose(np.exp(np.mean(nats)), whole["perplexity"], rtol=1e-4)
