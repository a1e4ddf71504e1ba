"""Fixtures of the tests of serving: the tiny checkpoint and its LLM."""

from tests.support.tiny_llm import decoder as decoder
from tests.support.tiny_llm import folder as folder
from tests.support.tiny_llm import plain_llm as plain_llm
