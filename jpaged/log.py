"""Log: messages for people on stderr, under the logger "jpaged".

An LLM reports there what it chose, and which programs it waits for, at the level INFO.
`logging.getLogger("jpaged").setLevel("WARNING")`, or the environment variable
JPAGED_LOG_LEVEL=WARNING, turns this off. If the program configures logging itself, its
handlers get the messages instead of stderr.
"""

from __future__ import annotations

import logging
import os
import sys

from tqdm import tqdm

LOG = logging.getLogger("jpaged")


class _StderrHandler(logging.Handler):
    """Writes to stderr, beside progress bars, unless the program has own handlers."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return  # the record reaches them, too
        try:
            with tqdm.external_write_mode(file=sys.stderr):
                sys.stderr.write(f"jpaged: {self.format(record)}\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _set_up() -> None:
    if not LOG.handlers:
        LOG.addHandler(_StderrHandler())
    if LOG.level == logging.NOTSET:
        level = os.environ.get("JPAGED_LOG_LEVEL", "INFO").upper()
        LOG.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")


_set_up()
