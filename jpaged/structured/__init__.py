"""Structured output: regexes, choices and JSON schemas as automata over tokens.

Place on the road: requests -> [structured] -> decoding.constraints. Host only.
`regex` and `json_schema` read what the user wrote, `byte_automata` has its texts as
bytes, `token_bytes` knows the tokenizer, `compile` puts them together.
"""

from jpaged.structured.compile import compile_constraint as compile_constraint
from jpaged.structured.token_bytes import token_bytes as token_bytes
