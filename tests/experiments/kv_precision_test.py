"""The runner `kv_precision` on a model with latent pages, which have no values."""

import types

import pytest

from experiments import kv_precision
from tests.models.families_test import write_case

pytestmark = pytest.mark.long


def test_granularities_of_latent_pages_are_compared(tmp_path, monkeypatch):
    folder = write_case(tmp_path / "model", "deepseek_v2")
    given = types.SimpleNamespace(model=str(folder), num_texts=1, length=32)
    monkeypatch.setattr(kv_precision, "FLAGS", given)
    found = {row["scale_for_each"]: row for row in kv_precision.granularity_rows()}
    assert set(found) == set(kv_precision.GRANULARITIES)
    for row in found.values():
        assert 0 < row["int8"] < 0.1
        assert 0 < row["fp8"] < 0.2
    assert found["token and head"]["int8"] < found["all"]["int8"]
