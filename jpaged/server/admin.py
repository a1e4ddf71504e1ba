"""Admin: pause the engine, replace its weights, read its statistics.

Pipeline: HTTP request -> [admin] -> engine's thread -> llm. Only with `allow_admin`.
"""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from jpaged.server import common
from jpaged.server.body import read_object
from jpaged.server.errors import ApiError, from_value_error, invalid, json_response
from jpaged.server.fields import Fields
from jpaged.server.settings import ServerSettings
from jpaged.serving.metrics import StepRecord
from jpaged.serving.pausing import MODES

Endpoint = Callable[[Request], Awaitable[Response]]


def admin_only(endpoint: Endpoint) -> Endpoint:
    """Return the endpoint for servers that allow it; others answer 403."""

    @functools.wraps(endpoint)
    async def guarded(request: Request) -> Response:
        if not common.settings_of(request).allow_admin:
            raise ApiError(
                403,
                "this endpoint is for administrators: start the server with "
                "--allow_admin",
                code="admin_only",
            )
        return await endpoint(request)

    return guarded


async def _fields(request: Request) -> Fields:
    """Return the fields of a body, which may be empty."""
    if request.headers.get("content-length", "0") == "0" and (
        "transfer-encoding" not in request.headers
    ):
        return Fields({})
    return Fields(await read_object(request, common.settings_of(request)))


@admin_only
async def pause(request: Request) -> Response:
    """Stop running steps: freeze open requests, wait for them, or end them."""
    fields = await _fields(request)
    mode = fields.take("mode", "keep")
    fields.finish()
    if mode not in MODES:
        expected = ", ".join(map(repr, MODES))
        raise invalid("mode", f"mode: expected one of {expected}, got {mode!r:.100}")
    bridge = common.bridge_of(request)
    if mode == "wait":
        # The engine's thread goes on meanwhile, and clients get their tokens.
        await bridge.wait_for_open()
        mode = "keep"  # of requests that came later
    await bridge.call(lambda: bridge.llm.pause(mode))
    return json_response({"status": "paused"})


@admin_only
async def resume(request: Request) -> Response:
    """Run steps again."""
    (await _fields(request)).finish()
    bridge = common.bridge_of(request)
    await bridge.call(bridge.llm.resume)
    return json_response({"status": "running"})


@admin_only
async def update_weights(request: Request) -> Response:
    """Replace the weights by those of a folder below `weights_root`."""
    settings, bridge = common.settings_of(request), common.bridge_of(request)
    fields = await _fields(request)
    path, cache = fields.text("path"), fields.take("prefix_cache", "reset")
    options = fields.take_all(["requests"])
    fields.finish()
    if cache not in ("reset", "keep"):
        raise invalid(
            "prefix_cache",
            f"prefix_cache: expected 'reset' or 'keep', got {cache!r:.100}",
        )
    folder = find_folder(path, settings)
    start = time.perf_counter()
    try:
        await bridge.call(
            lambda: bridge.llm.update_weights(folder, prefix_cache=cache, **options)
        )
    except (ValueError, TypeError) as error:
        raise from_value_error(ValueError(str(error)), {"weights": "path"}) from None
    except FileNotFoundError:
        raise invalid("path", f"path: expected a checkpoint, got {path!r:.200}") from (
            None
        )
    seconds = time.perf_counter() - start
    return json_response({"status": "updated", "seconds": seconds})


def find_folder(path: str | None, settings: ServerSettings) -> pathlib.Path:
    """Return the folder that a request names; it lies below `weights_root`.

    Raises:
      ApiError: it does not, or the server has no `weights_root`.
    """
    root = settings.weights_root
    if root is None:
        raise ApiError(
            403,
            "path: expected a server with --weights_root FOLDER, below which requests "
            "can name checkpoints; this one has none",
            param="path",
            code="no_weights_root",
        )
    if not path or "\0" in path:
        raise invalid("path", f"path: expected a folder's name, got {path!r:.200}")
    try:
        folder = (root / path).resolve()
        if folder.is_relative_to(root) and folder != root and folder.is_dir():
            return folder
    except (OSError, ValueError, RuntimeError):
        pass  # no such name, or links in a circle
    raise invalid(
        "path",
        f"path: expected a folder below the server's weights_root, got {path!r:.200}",
    )


@admin_only
async def reset_prefix_cache(request: Request) -> Response:
    """Empty the prefix cache; open requests keep their blocks."""
    (await _fields(request)).finish()
    bridge = common.bridge_of(request)
    await bridge.call(bridge.llm.reset_prefix_cache)
    return json_response({"status": "reset"})


@admin_only
async def stats(request: Request) -> Response:
    """Return `LLM.stats`, and the numbers of the server itself."""
    bridge = common.bridge_of(request)
    found = await bridge.call(bridge.llm.stats)
    return json_response(
        {
            **found,
            "num_open_sequences": bridge.num_open_sequences,
            "max_open_sequences": bridge.max_open_sequences,
            "is_paused": bridge.is_paused,
        }
    )


@admin_only
async def timeline(request: Request) -> Response:
    """Return the last steps of a replica, as a table."""
    bridge = common.bridge_of(request)
    last = _query(request, "last", 1000, 1, 65_536)
    replica = _query(request, "replica", 0, 0, 1 << 20)
    try:
        records = await bridge.call(lambda: bridge.llm.timeline(replica))
    except ValueError as error:
        raise from_value_error(error) from None
    rows = [list(record) for record in records[-last:]]
    return json_response({"columns": list(StepRecord._fields), "rows": rows})


def _query(request: Request, name: str, default: int, low: int, high: int) -> int:
    """Return an integer of the query string."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 12) or not (
        low <= int(text) <= high
    ):
        raise invalid(
            name,
            f"{name}: expected an integer from {low} to {high}, got {text!r:.100}",
        )
    return int(text)
