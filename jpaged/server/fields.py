"""Fields: the fields of a request's body, each read once and checked.

Pipeline: body -> [fields] -> completions, chat and others. Host only.

A field that nothing reads is refused, so that no option is ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from jpaged import validation
from jpaged.server.errors import (
    from_value_error,
    invalid,
    model_not_found,
    wrong_value,
)
from jpaged.server.settings import ServerSettings


class Fields:
    """The fields of a body that have not been read. null counts as absent.

    Args:
      body: the body, or an object in one of its fields.
      parent: the field that has the object; errors are errors of that field.
    """

    def __init__(self, body: Mapping[str, Any], parent: str | None = None):
        self._prefix = "" if parent is None else f"{parent}."
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field's value."""
        self._known.add(name)
        return self._left.pop(name, default)

    def take_all(self, names: Iterable[str]) -> dict[str, Any]:
        """Return those of some fields that are present."""
        names = list(names)
        self._known.update(names)
        return {name: self._left.pop(name) for name in names if name in self._left}

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a field that is true or false."""
        path = self._prefix + name
        return checked(validation.flag, path, self.take(name, default))

    def integer(
        self, name: str, default: int | None, low: int, high: int | None = None
    ) -> int | None:
        """Return an integer in [low, high]."""
        value = self.take(name, default)
        if value is None:
            return None
        return checked(validation.integer, name, value, low, high)

    def mapping(self, name: str) -> dict[str, Any]:
        """Return an object; an empty one if it is absent."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise wrong_value(name, "an object", value)
        return value

    def text(self, name: str) -> str | None:
        """Return a text."""
        value = self.take(name)
        return None if value is None else checked(validation.text, name, value)

    def labels(self) -> None:
        """Accept what clients send for the records of a hosted service.

        These fields have no influence on a result anywhere.
        """
        self.take_all(
            ["metadata", "safety_identifier", "prompt_cache_key", "request_id"]
        )
        for name, expected in (("store", (False,)), ("service_tier", _TIERS)):
            value = self.take(name, expected[0])
            if value not in expected:
                raise invalid(
                    name,
                    f"{name}: expected {' or '.join(map(repr, expected))}, got "
                    f"{value!r:.100}: this server has nothing else",
                )

    def finish(self) -> None:
        """Raise ApiError if a field was not read."""
        if not self._left:
            return
        name = next(iter(self._left))
        shown = self._prefix + ascii(name[:100])[1:-1]
        close = difflib.get_close_matches(name[:100], sorted(self._known), 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise invalid(
            shown if not self._prefix else self._prefix[:-1],
            f"{shown}: expected no such field; {hint}docs/server.md lists the fields",
            "unknown_field",
        )


_TIERS = ("auto", "default")


def checked(check: Any, *arguments: Any) -> Any:
    """Call a check of `jpaged.validation`; its error names the field."""
    try:
        return check(*arguments)
    except ValueError as error:
        raise from_value_error(error) from None


def check_model(fields: Fields, settings: ServerSettings) -> None:
    """Raise ApiError unless the body names this model or none."""
    name = fields.take("model", settings.model_names[0])
    if not isinstance(name, str):
        raise wrong_value("model", "a text", name)
    if name not in settings.model_names:
        raise model_not_found(settings.model_names, name)
