"""Argument names: a suggestion for unknown names, a translation for other libraries'.

Pipeline: user -> [names] -> LLM and parameters. Host only.

Scripts that were written for vLLM or transformers pass arguments by their names there.
A name with an equal meaning is translated. Any other name raises an error that says
what to use instead, or suggests the nearest known name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class")


class UnknownArgumentError(TypeError, ValueError):
    """An argument that does not exist; the message suggests the nearest name.

    It is a TypeError, as for any function, and a ValueError, as for all other invalid
    arguments of jpaged.
    """


class Foreign(NamedTuple):
    """An argument of another library.

    Attributes:
      equal: values that have the effect of leaving the argument out.
      ours: the argument here with the same meaning; None if there is none.
      convert: converts a value to that of `ours`.
      instead: what to do instead; the end of the error message.
      same_as: an argument here; a value equal to its own changes nothing either.
    """

    equal: tuple[Any, ...] = ()
    ours: str | None = None
    convert: Callable[[Any], Any] | None = None
    instead: str = ""
    same_as: str | None = None


def absent(*equal: Any, instead: str) -> Foreign:
    """Return an argument without an equal here, except for some values."""
    return Foreign(equal, instead=instead)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the nearest known name, or "".

    >>> suggestion("max_token", ["min_tokens", "max_tokens", "seed"])
    "; did you mean 'max_tokens'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown_argument(call: str, name: str, known: Iterable[str]) -> Exception:
    """Return the error for an argument that does not exist."""
    known = list(known)
    hint = suggestion(name, known) or f"; expected some of {', '.join(known)}"
    return UnknownArgumentError(f"{call}: unknown argument {name!r}{hint}")


def translated(
    call: str,
    given: Mapping[str, Any],
    own: Iterable[str],
    foreign: Mapping[str, Foreign],
) -> dict[str, Any]:
    """Return the arguments of a call under their names here.

    Args:
      call: the function or class, for messages.
      given: the arguments of the call by name.
      own: names of the function's arguments.
      foreign: arguments of other libraries.

    Raises:
      UnknownArgumentError: an argument has neither an own nor a foreign name.
      ValueError: a foreign argument has no equal here, or is given twice.
    """
    own = list(own)
    found = {name: value for name, value in given.items() if name in own}
    for name, value in given.items():
        if name in own:
            continue
        if name not in foreign:
            raise unknown_argument(call, name, [*own, *foreign])
        known = foreign[name]
        equals = known.equal
        if known.same_as is not None and known.same_as in given:
            equals = (*equals, given[known.same_as])
        if any(_is_same(value, equal) for equal in equals):
            continue
        if known.ours is None:
            raise ValueError(_refusal(call, name, value, known))
        if known.ours in found:
            raise ValueError(
                f"{call}: expected one of {name} and {known.ours}, which are the same, "
                "got both"
            )
        found[known.ours] = value if known.convert is None else known.convert(value)
    return found


def _refusal(call: str, name: str, value: Any, known: Foreign) -> str:
    advice = f"; {known.instead}" if known.instead else ""
    if not known.equal:
        return f"{name}: {call} has no such argument{advice}"
    expected = " or ".join(map(repr, known.equal))
    return f"{name}: expected {expected}, got {value!r:.80}{advice}"


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values are equal; an array equals nothing, and 1 is not True."""
    if isinstance(value, bool) != isinstance(other, bool):
        return False
    try:
        return bool(value == other)
    except (TypeError, ValueError):  # an array of several elements
        return False


def checked_names(
    call: str,
    foreign: Mapping[str, Foreign] | None = None,
    prepare: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> Callable[[Function], Function]:
    """Decorate a function whose keyword arguments may have foreign names.

    Args:
      call: name of the function for messages.
      foreign: arguments of other libraries.
      prepare: converts arguments that `foreign` cannot express, before the others.
    """
    names = foreign or {}

    def decorate(function: Function) -> Function:
        own = [
            name for name in inspect.signature(function).parameters if name != "self"
        ]
        is_method = "self" in inspect.signature(function).parameters

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            kwargs = prepare(kwargs)
            if not own_names.issuperset(kwargs):
                kwargs = translated(call, kwargs, own, names)
                given = own[: len(args) - is_method]
                for name in set(given) & set(kwargs):
                    raise ValueError(f"{call}: expected {name} once, got it twice")
            return function(*args, **kwargs)

        own_names = frozenset(own)
        return checked  # pyright: ignore[reportReturnType]

    return decorate


def checked_fields(
    foreign: Mapping[str, Foreign] | None = None,
) -> Callable[[type[Class]], type[Class]]:
    """Decorate a dataclass whose constructor accepts foreign names.

    Setting an attribute that does not exist raises AttributeError with a suggestion.
    Setting one that exists notes that the object has to be checked again, see
    `rechecked`.

    Args:
      foreign: arguments of other libraries.
    """

    def decorate(cls: type[Class]) -> type[Class]:
        own = [name for name in inspect.signature(cls).parameters]
        set_attribute = cls.__setattr__

        def checked_set(self: Any, name: str, value: Any) -> None:
            if name not in own and not name.startswith("_"):
                hint = suggestion(name, own)
                raise AttributeError(f"{cls.__name__} has no attribute {name!r}{hint}")
            set_attribute(self, name, value)
            object.__setattr__(self, "_is_checked", False)

        initialise = checked_names(cls.__name__, foreign)(cls.__init__)
        setattr(cls, "__init__", initialise)  # noqa: B010
        setattr(cls, "__setattr__", checked_set)  # noqa: B010
        return cls

    return decorate


def rechecked(record: Any) -> Any:
    """Return a record of `checked_fields`, or a checked copy if attributes were set.

    Raises:
      ValueError: an attribute has an invalid value.
    """
    if getattr(record, "_is_checked", True):
        return record
    return dataclasses.replace(record)


def either(call: str, **values: Any) -> Any:
    """Return the value of an argument that has two names, or None.

    Raises:
      ValueError: both are given.
    """
    given = [value for value in values.values() if value is not None]
    if len(given) > 1:
        names = " and ".join(values)
        raise ValueError(
            f"{call}: expected one of {names}, which are the same, got both"
        )
    return given[0] if given else None


@contextlib.contextmanager
def errors_of(call: str) -> Iterator[None]:
    """Begin the message of a ValueError with the name of the call."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{call}: {error}") from error
