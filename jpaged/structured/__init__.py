"""Structured output: regexes, choices and JSON schemas as automata over tokens.

Pipeline: requests -> [structured] -> decoding.constraints. Host only.

`regex` and `json_schema` build automata over bytes (`byte_automata`) from nodes and
edges (`nfa`). `token_bytes` finds the bytes of each token, and `compile` combines both
into an automaton over tokens.
"""

from jpaged.structured.compile import compile_constraint as compile_constraint
from jpaged.structured.token_bytes import token_bytes as token_bytes
