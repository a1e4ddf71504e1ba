"""Errors: what clients get for requests that cannot be served, in OpenAI's form.

Pipeline: any part of the server -> [errors] -> HTTP response. Host only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from jpaged import validation

_MOST_CHARS = 4000  # of a message; messages can quote what the client sent
_PARAM = re.compile(
    r"(?:prompts\[\d+\]: )?([a-z_][a-z0-9_]*)(?:\.[a-z_]+|\[[^\]]*\])*"
    r"(?: key|/[^:]*)?:"
)
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """An error that the client gets.

    Args:
      status: HTTP status.
      message: what was expected, what was got and how to mend it.
      param: field of the body.
      code: short name of the error, for programs.
      headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message[:_MOST_CHARS]
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's API does."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """Return the error as a response."""
        return json_response(self.body(), self.status, self.headers)


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a JSON response; the text is ASCII, so any string can be sent."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(text, status, headers, "application/json")


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """Return the error for a field with a wrong value; `message` begins with it."""
    return ApiError(400, message, param=param, code=code)


def wrong_value(
    param: str, expected: str, got: Any, name: str | None = None
) -> ApiError:
    """Return the error for a value of another kind; `name` is that of a part of it."""
    return invalid(param, str(validation.error(name or param, expected, got)))


def model_not_found(names: Sequence[str], got: str) -> ApiError:
    """Return the error for a name that the model does not have."""
    return ApiError(
        404,
        f"model: expected {' or '.join(map(repr, names))}, got {got!r:.200}",
        param="model",
        code="model_not_found",
    )


def from_value_error(error: ValueError, known: Mapping[str, str] = {}) -> ApiError:
    """Return the error for an argument that the LLM refuses.

    Args:
      error: its message begins with the name of an argument.
      known: fields of the body, or paths in them, by names of arguments, if these
        differ.
    """
    message = str(error)
    match = _PARAM.match(message)
    param = match[1] if match else None
    if param is not None and param in known:
        message = message.replace(param, known[param], 1)
        param = known[param].partition(".")[0]
    code = "context_length_exceeded" if "max_model_len" in message else None
    return invalid(param, message, code)


def queue_full(most: int, retry_after_s: int) -> ApiError:
    """Return the error for a request that finds too many others."""
    return ApiError(
        429,
        f"the server has {most} open sequences, as many as it accepts; try again in "
        f"{retry_after_s} s",
        code="queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def unavailable(message: str, retry_after_s: int = 5) -> ApiError:
    """Return the error for a server that cannot serve at the moment."""
    return ApiError(
        503,
        message,
        code="unavailable",
        headers={"Retry-After": str(retry_after_s)},
    )


def bug() -> ApiError:
    """Return the error after an unexpected exception, which only the log shows."""
    message = "an unexpected error occurred; the server's log has the details"
    return ApiError(500, message, code="internal_error")


# Handlers of exceptions, for starlette.


async def on_api_error(request: Request, error: Exception) -> Response:
    """Return an ApiError as a response."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Return an error of starlette's router: no such path, or another method."""
    assert isinstance(error, HTTPException)
    message = {
        404: "no such endpoint; docs/server.md lists the endpoints",
        405: f"method {request.method!r:.20} is not allowed for this endpoint",
    }.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Answer a client that went away while it sent its request; it gets nothing."""
    return Response(status_code=400)


HANDLERS: Mapping[Any, Any] = {
    ApiError: on_api_error,
    HTTPException: on_http_error,
    ClientDisconnect: on_disconnect,
}
