"""Report: what an LLM chose, as one message.

Pipeline: llm -> [report] -> log. Host only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jpaged.log import LOG


def report_choice(sizes: str, num_replicas: int, defaults: Mapping[str, Any]) -> None:
    """Log the sizes and kernels of an LLM, and its defaults of sampling."""
    text = sizes
    if num_replicas > 1:
        text += f", {num_replicas} replicas"
    if defaults:
        values = ", ".join(f"{name}={value}" for name, value in defaults.items())
        text += f"; generation_config.json sets {values} where no parameters are given"
    LOG.info("%s", text)
