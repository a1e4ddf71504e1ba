"""Settings of the server: names, keys, and the limits of what a request may ask for.

Pipeline: command line -> [settings] -> app. Host only.
"""

from __future__ import annotations

import dataclasses
import pathlib

from jpaged.validation import flag, integer, number, strings

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """What the server allows. All limits are per request unless they say otherwise.

    Attributes:
      model_names: names under which requests can address the model; the first one is
        in the responses.
      api_keys: a request must send one of these as a bearer token; none: no key.
      allow_admin: serve the endpoints that pause the engine and replace its weights.
      weights_root: folder below which `/update_weights` may read; None: nothing.
      allowed_origins: origins of web pages that may call the server ("https://a.b").
      max_open_sequences: sequences of all requests that may run or wait at the same
        time. More are refused with status 429.
      slice_s: seconds of steps between two updates of the clients, one step at least.
        None chooses the length: 0.05 s, or 4 to 8 steps but at most 0.3 s if steps
        are slow and no request waits for its first token. Each update delays the next
        step by a few milliseconds.
      max_body_bytes: size of a request's body.
      max_prompts: prompts of one completion request.
      max_n: outputs per prompt, and beams.
      max_stop: stop strings.
      max_stop_chars: characters of all stop strings together.
      max_logit_bias: entries of `logit_bias`.
      max_bad_words: entries of `bad_words`.
      max_schema_chars: characters of a JSON schema.
      max_regex_chars: characters of a regex.
      max_choices: number of choices.
      max_choice_chars: characters of all choices together.
      read_timeout_s: time for a client to send its body.
      write_timeout_s: time for a client to accept a part of its response.
      drain_s: time for open requests to end after SIGTERM; then they are aborted.

    Raises:
      ValueError: a value is out of range.
    """

    model_names: tuple[str, ...] = ("jpaged",)
    api_keys: tuple[str, ...] = ()
    allow_admin: bool = False
    weights_root: pathlib.Path | None = None
    allowed_origins: tuple[str, ...] = ()
    max_open_sequences: int = 1024
    slice_s: float | None = None
    max_body_bytes: int = 8 * MIB
    max_prompts: int = 1024
    max_n: int = 128
    max_stop: int = 64
    max_stop_chars: int = 4096
    max_logit_bias: int = 300
    max_bad_words: int = 32
    max_schema_chars: int = 65_536
    max_regex_chars: int = 4096
    max_choices: int = 1000
    max_choice_chars: int = 65_536
    read_timeout_s: float = 60.0
    write_timeout_s: float = 120.0
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        """Check all values."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_"):
                value = integer(field.name, value, low=1)
            elif field.name == "slice_s" and value is None:
                continue
            elif field.name.endswith("_s"):
                value = number(field.name, value, low=0)
            elif field.name == "allow_admin":
                value = flag(field.name, value)
            elif field.name != "weights_root":
                value = strings(field.name, value)
            object.__setattr__(self, field.name, value)
        if not self.model_names:
            raise ValueError("model_names: expected at least one name, got none")
        if self.weights_root is not None:
            root = pathlib.Path(self.weights_root).resolve()
            if not root.is_dir():
                raise ValueError(f"weights_root: expected a folder, got {root}")
            object.__setattr__(self, "weights_root", root)
