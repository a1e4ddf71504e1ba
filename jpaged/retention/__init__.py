"""Retention: which blocks of a sequence stay in the KV cache, as pure functions.

Pipeline: block tables, statistics -> [retention] -> the blocks that a row keeps.

A `Retention` scores the blocks of one sequence and selects those that stay. The engine
calls it at the end of the prompt and after every few tokens, drops the other blocks
from the sequence's table, and goes on over what is left; tokens keep the positions that
they had.

    llm = LLM(model, retention=retention.sink_and_window(num_sinks=4, window=1020))

Parameters are data: a request may have other numbers than the LLM
(`SamplingParams.retention`), which compiles nothing. docs/retention.md shows how to
write a method.
"""

from jpaged.retention.decisions import (
    NEVER,
    blocks_to_keep,
    blocks_to_read,
    first_observed,
    is_decision,
    mappable_tokens,
    next_decision,
)
from jpaged.retention.method import (
    OFF,
    STATISTICS,
    Retention,
    Row,
    keep_highest,
    keep_positive,
)
from jpaged.retention.methods import (
    METHODS,
    find,
    heavy_hitters,
    knorm,
    quest,
    random,
    sink_and_window,
    snapkv,
    tova,
)

__all__ = [
    "METHODS",
    "NEVER",
    "OFF",
    "STATISTICS",
    "Retention",
    "Row",
    "blocks_to_keep",
    "blocks_to_read",
    "find",
    "first_observed",
    "heavy_hitters",
    "is_decision",
    "keep_highest",
    "keep_positive",
    "knorm",
    "mappable_tokens",
    "next_decision",
    "quest",
    "random",
    "sink_and_window",
    "snapkv",
    "tova",
]
