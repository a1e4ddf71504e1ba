"""Fixtures of the LLM's tests: one checkpoint, and few LLMs that share programs."""

import pytest

from jpaged.llm import LLM
from tests.support.engine import full_llm as full
from tests.support.tiny_llm import decoder as decoder
from tests.support.tiny_llm import folder as folder
from tests.support.tiny_llm import naive as naive
from tests.support.tiny_llm import plain_llm as plain_llm


@pytest.fixture(scope="session")
def full_llm(folder):
    """An LLM whose engine is compiled with all features."""
    llm = LLM(folder, **full.SIZES)
    full.grow(llm)
    return llm


@pytest.fixture(scope="session")
def oracle(full_llm):
    """What sampled and constrained requests should generate."""
    return full.Oracle(full_llm)
