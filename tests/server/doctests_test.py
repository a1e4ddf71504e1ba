"""Examples in the server's docstrings; without the extra it cannot be imported."""

import doctest
import importlib
import pkgutil

import pytest

import jpaged.server

NAMES = [
    f"jpaged.server.{module.name}"
    for module in pkgutil.iter_modules(jpaged.server.__path__)
    if module.name != "__main__"
]


def test_examples_in_docstrings_are_true():
    found = 0
    for name in NAMES:
        result = doctest.testmod(importlib.import_module(name))
        assert result.failed == 0, name
        found += result.attempted
    assert found >= 3


@pytest.mark.parametrize("name", NAMES)
def test_a_module_says_where_it_is_in_the_pipeline(name):
    assert "Pipeline: " in (importlib.import_module(name).__doc__ or "")
