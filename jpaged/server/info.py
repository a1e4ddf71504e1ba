"""Info: `/v1/models`, `/health`, `/version` and `/metrics`.

Pipeline: HTTP request -> [info] -> settings, bridge and metrics, and back.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax
from starlette.requests import Request
from starlette.responses import Response

from jpaged.server import common
from jpaged.server.errors import json_response, model_not_found, unavailable


def _model(request: Request, name: str) -> dict[str, Any]:
    llm = common.bridge_of(request).llm
    return {
        "id": name,
        "object": "model",
        "created": request.app.state.created,
        "owned_by": "jpaged",
        "root": name,
        "max_model_len": llm.config.max_model_len,
    }


async def models(request: Request) -> Response:
    """List the names of the model."""
    names = common.settings_of(request).model_names
    data = [_model(request, name) for name in names]
    return json_response({"object": "list", "data": data})


async def model(request: Request) -> Response:
    """Return one name of the model."""
    name = request.path_params["name"]
    names = common.settings_of(request).model_names
    if name not in names:
        raise model_not_found(names, name)
    return json_response(_model(request, name))


async def health(request: Request) -> Response:
    """Return status 200 if requests are served, else 503."""
    bridge = common.bridge_of(request)
    if bridge.is_broken:
        raise unavailable("the engine failed; restart the server")
    if bridge.is_draining:
        raise unavailable("the server ends")
    return json_response({"status": "paused" if bridge.is_paused else "ok"})


async def version(request: Request) -> Response:
    """Return the versions of the server and of jax."""
    return json_response(
        {"version": importlib.metadata.version("jpaged"), "jax": jax.__version__}
    )


async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    text, kind = await request.app.state.metrics.exposition(common.bridge_of(request))
    return Response(text, headers={"Content-Type": kind})
