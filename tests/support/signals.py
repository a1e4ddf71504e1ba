"""Ctrl-C in tests, also where the tests run in the background and ignore it."""

import signal

import pytest


@pytest.fixture
def ctrl_c():
    """Let SIGINT raise KeyboardInterrupt, as in a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
