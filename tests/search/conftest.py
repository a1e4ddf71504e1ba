"""Fixtures of the LLM's tests."""

from tests.llm.conftest import full_llm as full_llm
from tests.llm.conftest import oracle as oracle
from tests.support.tiny_llm import folder as folder
