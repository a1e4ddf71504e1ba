"""Fixtures of the server's tests: one LLM, one server on a free port, and clients."""

import contextlib
import json
import pathlib
import threading
import time

import pytest

pytest.importorskip("starlette", reason="needs the extra `server`")
pytest.importorskip("uvicorn", reason="needs the extra `server`")
pytest.importorskip("prometheus_client", reason="needs the extra `server`")
httpx = pytest.importorskip("httpx", reason="needs httpx")

import uvicorn  # noqa: E402

from jpaged.llm import LLM  # noqa: E402
from jpaged.server.app import create_app  # noqa: E402
from jpaged.server.command import Server  # noqa: E402
from jpaged.server.settings import ServerSettings  # noqa: E402
from tests.support.models.checkpoints import write_tiny_llama  # noqa: E402
from tests.support.tiny_llm import EOS, VOCAB_SIZE, byte_tokenizer  # noqa: E402

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}"
    "{{ '\\n' }}"
    "{% endfor %}{{ extra or '' }}{% if add_generation_prompt %}assistant: {% endif %}"
)
SETTINGS = ServerSettings(
    model_names=("tiny", "alias"),
    max_open_sequences=40,
    max_body_bytes=100_000,
    max_n=8,
    max_prompts=20,
    max_schema_chars=2000,
    max_regex_chars=100,
    max_choices=10,
    allow_admin=True,
    drain_s=2.0,
)


class Running:
    """A server in a thread, and what tests look at."""

    def __init__(
        self, llm: LLM, settings: ServerSettings, chat_template: str | None = None
    ):
        self.llm = llm
        self.app = create_app(llm, settings, chat_template=chat_template)
        self.bridge = self.app.state.bridge
        config = uvicorn.Config(self.app, port=0, log_config=None)
        self.server = Server(config, self.bridge, settings.drain_s)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def wait_until_idle(self, seconds: float = 60.0) -> None:
        """Wait until no request is open and all blocks are free.

        An aborted request is closed before the engine's next step frees its blocks.
        """
        end = time.monotonic() + seconds
        while not (is_idle := self._is_idle()) and time.monotonic() < end:
            time.sleep(0.01)
        assert is_idle, self.client.get("/stats").json()

    def _is_idle(self) -> bool:
        if self.bridge.num_open_sequences:
            return False
        stats = self.client.get("/stats").json()
        all_free = stats["num_free_blocks"] == stats["num_blocks"]
        return all_free and stats["num_running"] == 0

    def stop(self) -> None:
        """End the server."""
        self.client.close()
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def running(llm: LLM, settings: ServerSettings):
    """A server that runs inside the block."""
    found = Running(llm, settings)
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint with a byte-level tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_llama(path, vocab_size=VOCAB_SIZE, eos_token_id=list(EOS))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def llm(folder: pathlib.Path) -> LLM:
    """The LLM of the server; its requests share a small pool."""
    return LLM(
        folder,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        block_size=4,
        num_blocks=160,
        max_model_len=160,
        max_num_requests=24,
    )


@pytest.fixture(scope="session")
def served(llm: LLM):
    """The server."""
    with running(llm, SETTINGS) as found:
        yield found


@pytest.fixture
def client(served: Running):
    """An HTTP client of the server; no request is left open."""
    yield served.client
    served.wait_until_idle()
