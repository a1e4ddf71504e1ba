"""Weights of a trainer on any devices reach an LLM on a mesh, as copies."""

import pytest

from tests.support.runners import on_eight_devices

pytestmark = pytest.mark.long


def test_weights_on_other_devices_are_resharded(tmp_path):
    found = on_eight_devices("engine.updates_on_eight_devices", tmp_path)
    assert found.pop("differs")
    compiled = {name: found.pop(name) for name in list(found) if "compiled" in name}
    assert set(compiled.values()) == {0}
    assert len(found) == 10
    for name, case in found.items():
        assert case == dict(tokens=True, shardings=True, shared=0), name
