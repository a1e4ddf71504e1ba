"""Command: starts the server from a command line.

Pipeline: command line -> [command] -> LLM, app and uvicorn.

Options that are not listed here are arguments of `jpaged.LLM`, by their names:
`--max_num_seqs 128`, `--policy priority`. Values are read as JSON where they are JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from jpaged.llm import LLM
from jpaged.parallel.mesh import make_mesh
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.server.app import create_app
from jpaged.server.bridge import EngineBridge
from jpaged.server.settings import ServerSettings
from jpaged.validation import integer

LOGGER = logging.getLogger("jpaged.server")
KEY_VARIABLE = "JPAGED_API_KEY"
# Python's thread switch interval. With the default, the engine's thread can wait 5 ms
# for a thread that writes responses.
_SWITCH_S = 2e-4
_LIMITS = (
    "max_open_sequences",
    "max_body_bytes",
    "max_prompts",
    "max_n",
    "drain_s",
    "slice_s",
)
# Arguments of LLM that have no value on a command line.
_NOT_OPTIONS = ("self", "model", "mesh")
# What `--warm_up` compiles, by name.
WARM_UPS: dict[str, list[Any]] = {
    "greedy": [SamplingParams(temperature=0)],
    "sampling": [SamplingParams(temperature=1, top_p=0.9)],
    "logprobs": [SamplingParams(temperature=0, logprobs=1, prompt_logprobs=1)],
    "beams": [BeamSearchParams(beam_width=4, max_tokens=16)],
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the server's own options."""
    found = argparse.ArgumentParser(
        prog="python -m jpaged.server",
        description="An OpenAI-compatible server. Further options are arguments of "
        "jpaged.LLM by their names, for example --max_num_seqs 128.",
        allow_abbrev=False,
    )
    found.add_argument("--model", required=True, help="the model, as for jpaged.LLM")
    found.add_argument("--host", default="127.0.0.1", help="address to listen on")
    found.add_argument("--port", type=int, default=8000, help="0: a free one")
    found.add_argument(
        "--served_model_name",
        action="append",
        help="name of the model in requests; can be repeated; default: --model",
    )
    found.add_argument(
        "--api_key",
        action="append",
        help=f"key that requests must send; can be repeated; default: {KEY_VARIABLE}",
    )
    found.add_argument(
        "--allow_admin",
        action="store_true",
        help="serve /pause, /resume, /update_weights, /reset_prefix_cache, /stats and "
        "/timeline",
    )
    found.add_argument("--weights_root", help="folder of weights for /update_weights")
    found.add_argument(
        "--allowed_origin",
        action="append",
        default=[],
        help="origin of web pages that may call the server; can be repeated",
    )
    found.add_argument("--chat_template", help="file with a chat template")
    found.add_argument("--tensor_parallel", type=int, default=1, help="devices")
    found.add_argument(
        "--warm_up",
        action="append",
        choices=list(WARM_UPS),
        default=[],
        help="compile this before the first request; can be repeated",
    )
    for name in _LIMITS:
        kind = float if name.endswith("_s") else int
        found.add_argument(f"--{name}", type=kind, help="see jpaged.server.settings")
    levels = ("critical", "error", "warning", "info", "debug")
    found.add_argument("--log_level", type=str.lower, default="info", choices=levels)
    return found


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the server's options, and the arguments of the LLM.

    Names can be written with "-" in place of "_".

    Raises:
      SystemExit: an option is unknown or has no value.
    """
    argv = [_with_underscores(word) for word in argv]
    own = parser()
    options, rest = own.parse_known_args(argv)
    arguments: dict[str, Any] = {}
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        # LLM says itself which names it does not know, before it loads anything.
        if not word.startswith("--") or name in _NOT_OPTIONS or not name:
            own.error(
                f"unknown option {word!r}: expected an option of the server (--help), "
                "or an argument of jpaged.LLM"
            )
        if not has_value and (not rest or rest[0].startswith("--")):
            arguments[name] = True  # a flag, such as vLLM's --trust-remote-code
            continue
        arguments[name] = _value(value if has_value else rest.pop(0))
    return options, arguments


def _with_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _value(text: str) -> Any:
    """Return a value as JSON, or as the text itself.

    >>> [_value(text) for text in ("16", "True", "none", "fcfs")]
    [16, True, None, 'fcfs']
    """
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def settings_of(options: argparse.Namespace) -> ServerSettings:
    """Return the settings that the options describe."""
    names = options.served_model_name
    if names is None:
        is_path = pathlib.Path(options.model).exists()
        names = [
            pathlib.Path(options.model).resolve().name if is_path else options.model
        ]
    keys = options.api_key
    if keys is None:
        keys = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
    limits = {name: getattr(options, name) for name in _LIMITS}
    root = options.weights_root
    return ServerSettings(
        model_names=tuple(names),
        api_keys=tuple(keys),
        allow_admin=options.allow_admin,
        weights_root=None if root is None else pathlib.Path(root),
        allowed_origins=tuple(options.allowed_origin),
        **{name: value for name, value in limits.items() if value is not None},
    )


class Server(uvicorn.Server):
    """Uvicorn, which drains the engine after SIGTERM and ends with status 0.

    Args:
      config: uvicorn's settings.
      bridge: the engine.
      drain_s: time for open requests to end; then they are aborted.
    """

    def __init__(self, config: uvicorn.Config, bridge: EngineBridge, drain_s: float):
        super().__init__(config)
        self._bridge = bridge
        self._drain_s = drain_s

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal to end."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(min(before, _SWITCH_S))
        try:
            await super().serve(sockets)
        finally:
            sys.setswitchinterval(before)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no further requests, and wait for those that are open."""
        # The base class waits for responses, and aborted requests have one too.
        draining = asyncio.create_task(self._bridge.drain(self._drain_s))
        await super().shutdown(sockets)
        draining.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM; the base class raises them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> None:
    """Start the server, and serve until SIGTERM or SIGINT."""
    options, arguments = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(levelname)s: %(message)s"
    )
    try:
        settings = settings_of(options)
        integer("port", options.port, low=0, high=65_535)
        template = None
        if options.chat_template is not None:
            template = pathlib.Path(options.chat_template).read_text("utf-8")
        if integer("tensor_parallel", options.tensor_parallel, low=1) > 1:
            arguments["mesh"] = make_mesh(tensor=options.tensor_parallel)
        llm = LLM(options.model, **arguments)
        if options.warm_up:
            llm.warm_up([each for name in options.warm_up for each in WARM_UPS[name]])
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"jpaged.server: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    app = create_app(llm, settings, chat_template=template)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level=options.log_level,
        timeout_graceful_shutdown=int(settings.drain_s) + 10,
        server_header=False,
    )
    if options.host not in ("127.0.0.1", "localhost", "::1") and not settings.api_keys:
        LOGGER.warning(
            "serving on %s without --api_key: everyone who reaches this address can "
            "use the model",
            options.host,
        )
    Server(config, app.state.bridge, settings.drain_s).run()
    llm.close()
