"""Middleware: keys, origins, and the count of responses; before any endpoint.

Pipeline: HTTP client -> [middleware] -> endpoints. Host only.
"""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jpaged.server.errors import ApiError, bug
from jpaged.server.metrics import ServerMetrics
from jpaged.server.settings import ServerSettings

LOGGER = logging.getLogger("jpaged.server")
OPEN_PATHS = ("/health",)  # need no key: load balancers ask them


class Guard:
    """Refuses requests without a key or from unknown web pages; counts responses.

    Args:
      app: the application behind it.
      settings: keys and origins.
      metrics: counts responses.
      paths: paths of the server's endpoints, for the count.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        metrics: ServerMetrics,
        paths: Collection[str],
    ):
        self._app = app
        self._keys = [key.encode("utf-8") for key in settings.api_keys]
        self._origins = settings.allowed_origins
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        shown = path if path in self._paths else "other"
        request_id = uuid.uuid4().hex

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._metrics.count_response(shown, message["status"])
            await send(message)

        error = self._refusal(Headers(scope=scope), path)
        if error is not None:
            await error.response()(scope, receive, counted)
            return
        await self._serve(scope, receive, counted)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application; a bug of it is logged and not shown."""
        is_started = False

        async def noted(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            LOGGER.exception("unexpected error")
            if not is_started:
                await bug().response()(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        """Return why a request is refused, or None."""
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            if "*" not in self._origins:
                return ApiError(
                    403,
                    "web pages of this origin may not call the server; start it with "
                    "--allowed_origin",
                    code="origin_not_allowed",
                )
        if not self._keys or path in OPEN_PATHS:
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        is_known = [hmac.compare_digest(given, key) for key in self._keys]
        if kind.lower() == "bearer" and any(is_known):
            return None
        return ApiError(
            401,
            "expected the header 'Authorization: Bearer KEY' with a key of this "
            "server, got none or another one",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
