"""Structured output: regexes, choices and JSON schemas as automata over tokens.

Pipeline: requests -> [structured] -> decoding.constraints. Host only.

`json_schema` converts a schema to a regex, and `regex` converts a regex to an automaton
over bytes (`byte_automata`). `token_bytes` finds the bytes of each token, and `compile`
combines both into an automaton over tokens.
"""

from jpaged.structured.compile import compile_constraint as compile_constraint
from jpaged.structured.token_bytes import token_bytes as token_bytes
