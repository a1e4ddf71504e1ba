"""Body: reads the JSON object of a request, with limits on size, depth and time.

Pipeline: HTTP request -> [body] -> fields. Host only.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from jpaged.server.errors import ApiError, invalid
from jpaged.server.settings import ServerSettings

MAX_DEPTH = 64  # arrays and objects in one another
_SMALL = 65_536  # bytes of a body that is parsed without another thread


async def read_object(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """Return the JSON object in the body of a request.

    Raises:
      ApiError: the body is too large (413), came too slowly (408), or is not a JSON
        object in UTF-8 without NaN, lone surrogates or deep nesting (400).
    """
    data = await _read(request, settings)
    if len(data) <= _SMALL:
        return parse_object(data)
    return await asyncio.to_thread(parse_object, data)


async def _read(request: Request, settings: ServerSettings) -> bytes:
    most = settings.max_body_bytes
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise _too_large(most)
    data = bytearray()
    try:
        async with asyncio.timeout(settings.read_timeout_s):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise _too_large(most)
    except TimeoutError:
        raise ApiError(
            408,
            f"body: expected within {settings.read_timeout_s:g} s, got a part of it",
            headers={"Connection": "close"},
        ) from None
    return bytes(data)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"body: expected at most {most} bytes, got more; send fewer prompts at once",
        code="body_too_large",
        headers={"Connection": "close"},
    )


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`.

    >>> parse_object(b'{"n": 1}')
    {'n': 1}

    Raises:
      ApiError: see `read_object`.
    """
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid(None, f"body: expected UTF-8, got {error}") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # also integers of thousands of digits
        raise invalid(None, f"body: expected JSON, got {error}") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise invalid(None, f"body: expected a JSON object, got a {kind}")
    # A body without escapes has no surrogates, and one with few brackets is not deep.
    if b"\\u" in data or data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check(found)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not a JSON number")


def _too_deep() -> ApiError:
    return invalid(
        None,
        f"body: expected at most {MAX_DEPTH} arrays and objects in one another, got "
        "more",
    )


def _check(body: dict[str, Any]) -> None:
    """Raise ApiError if the body is too deep or has a lone surrogate."""
    todo: list[tuple[Any, int, str | None]] = [(body, 1, None)]
    while todo:
        value, depth, name = todo.pop()
        if isinstance(value, str):
            _check_text(value, name)
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise _too_deep()
            if isinstance(value, list):
                # Numbers need no check, and there can be a million of them.
                items = [(name, item) for item in value if not _is_number(item)]
            else:
                items = [(name or key, item) for key, item in value.items()]
                for key in value:
                    _check_text(key, name)
            todo += [(item, depth + 1, where) for where, item in items]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _check_text(text: str, name: str | None) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = ascii(text[error.start])
        where = "body" if name is None else ascii(name)[1:-1]
        raise invalid(
            name if name is None or name.isascii() else None,
            f"{where}: expected text without lone surrogates, got {shown}",
        ) from None
