"""App: the ASGI application of an LLM.

Pipeline: HTTP client -> [app] -> endpoints -> bridge -> llm, and back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from jpaged.llm import LLM
from jpaged.server import admin, chat, completions, info, tokens
from jpaged.server.bridge import EngineBridge
from jpaged.server.errors import HANDLERS
from jpaged.server.metrics import ServerMetrics
from jpaged.server.middleware import Guard
from jpaged.server.settings import ServerSettings

ROUTES = [
    Route("/v1/completions", completions.endpoint, methods=["POST"]),
    Route("/v1/chat/completions", chat.endpoint, methods=["POST"]),
    Route("/v1/models", info.models, methods=["GET"]),
    Route("/v1/models/{name:path}", info.model, methods=["GET"]),
    Route("/tokenize", tokens.tokenize, methods=["POST"]),
    Route("/detokenize", tokens.detokenize, methods=["POST"]),
    Route("/tokenizer_info", tokens.tokenizer_info, methods=["GET"]),
    Route("/health", info.health, methods=["GET"]),
    Route("/version", info.version, methods=["GET"]),
    Route("/metrics", info.metrics, methods=["GET"]),
    Route("/pause", admin.pause, methods=["POST"]),
    Route("/resume", admin.resume, methods=["POST"]),
    Route("/update_weights", admin.update_weights, methods=["POST"]),
    Route("/reset_prefix_cache", admin.reset_prefix_cache, methods=["POST"]),
    Route("/stats", admin.stats, methods=["GET"]),
    Route("/timeline", admin.timeline, methods=["GET"]),
]


def create_app(
    llm: LLM,
    settings: ServerSettings | None = None,
    *,
    chat_template: str | None = None,
) -> Starlette:
    """Return the ASGI application that serves an LLM.

    The application runs the engine in a thread of its own from its start to its end
    (ASGI's lifespan). Nothing else may use the LLM meanwhile. At its end, requests that
    still run have `settings.drain_s` to end.

    Args:
      llm: the LLM.
      settings: names, keys and limits.
      chat_template: source or name of a chat template; None is the model's own.
    """
    settings = ServerSettings() if settings is None else settings
    metrics = ServerMetrics(settings.model_names[0])
    bridge = EngineBridge(
        llm, settings.max_open_sequences, metrics.finished, settings.slice_s
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        bridge.start()
        try:
            yield
        finally:
            await bridge.drain(settings.drain_s)
            await bridge.stop()

    # Guard comes first, so that it counts all responses.
    paths = [route.path for route in ROUTES]
    middleware = [
        Middleware(Guard, settings=settings, metrics=metrics, paths=paths),
    ]
    if settings.allowed_origins:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            ),
        )
    app = Starlette(
        routes=ROUTES,
        middleware=middleware,
        exception_handlers=dict(HANDLERS),
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.bridge = bridge
    app.state.metrics = metrics
    app.state.chat_template = chat_template
    app.state.created = int(time.time())
    return app
