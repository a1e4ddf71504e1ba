"""Constraints: fields of a request that constrain the text of its outputs.

Pipeline: fields -> [constraints] -> StructuredOutputsParams. Host only.

A constraint is `response_format` as OpenAI has it, `structured_outputs` or `guided_...`
as vLLM has them, or one of the fields `regex`, `choice` and `json`.
"""

from __future__ import annotations

import json
from typing import Any

from jpaged.params import StructuredOutputsParams
from jpaged.server.errors import from_value_error, invalid, wrong_value
from jpaged.server.fields import Fields
from jpaged.server.settings import ServerSettings

_KINDS = ("json", "regex", "choice")
_FORMATS = ("text", "json_object", "json_schema")


def read_constraint(
    fields: Fields, settings: ServerSettings
) -> tuple[StructuredOutputsParams, str] | None:
    """Return the constraint of a request and the field that has it, or None.

    Raises:
      ApiError: there are several, or one is invalid or too large.
    """
    found: list[tuple[str, str, Any]] = []  # field, kind, value
    for kind in _KINDS:
        for name in (kind, f"guided_{kind}"):
            value = fields.take(name)
            if value is not None:
                found.append((name, kind, value))
    given = fields.mapping("structured_outputs")
    unknown = sorted(set(given) - {*_KINDS, "json_object"})
    if unknown:
        raise invalid(
            "structured_outputs",
            f"structured_outputs: expected one of {', '.join(_KINDS)} and json_object, "
            f"got {unknown[0]!r:.100}",
        )
    for kind, value in given.items():
        if kind == "json_object" and value:
            found.append(("structured_outputs", "json", {"type": "object"}))
        elif kind != "json_object" and value is not None:
            found.append((f"structured_outputs.{kind}", kind, value))
    form = _response_format(fields.mapping("response_format"))
    if form is not None:
        found.append(("response_format", "json", form))
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(name for name, _, _ in found)
        field = found[1][0].partition(".")[0]
        raise invalid(field, f"{field}: expected one constraint, got {names}")
    name, kind, value = found[0]
    _check_size(name, kind, value, settings)
    try:
        return StructuredOutputsParams(**{kind: value}), name
    except ValueError as error:
        raise from_value_error(error, {kind: name}) from None


def _response_format(given: dict[str, Any]) -> Any:
    """Return the JSON schema of `response_format`, or None."""
    if not given:
        return None
    kind = given.get("type")
    if kind not in _FORMATS:
        raise invalid(
            "response_format",
            f"response_format.type: expected one of {', '.join(_FORMATS)}, got "
            f"{kind!r:.100}",
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    holder = given.get("json_schema")
    # OpenAI calls the schema `schema`; some clients send it under pydantic's name.
    schema = None
    if isinstance(holder, dict):
        schema = holder.get("schema", holder.get("json_schema"))
    if not isinstance(schema, dict | bool):
        raise wrong_value(
            "response_format",
            'an object {"name": ..., "schema": SCHEMA}',
            holder,
            "response_format.json_schema",
        )
    return schema


def _check_size(name: str, kind: str, value: Any, settings: ServerSettings) -> None:
    """Raise ApiError if a constraint is larger than the server allows."""
    if kind == "json":
        # A schema of another type is refused later.
        text = value if isinstance(value, str) else json.dumps(value)
        _limit(name, "characters", len(text), settings.max_schema_chars)
    elif kind == "regex" and isinstance(value, str):
        _limit(name, "characters", len(value), settings.max_regex_chars)
    elif kind == "choice" and isinstance(value, list):
        _limit(name, "texts", len(value), settings.max_choices)
        size = sum(len(text) for text in value if isinstance(text, str))
        _limit(name, "characters together", size, settings.max_choice_chars)


def _limit(name: str, what: str, got: int, most: int) -> None:
    if got > most:
        field = name.partition(".")[0]
        raise invalid(field, f"{name}: expected at most {most} {what}, got {got}")
