"""Collecting: run the requests of one call to their end, with a progress bar.

Pipeline: batcher -> [collect] -> llm. Host only.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from jpaged.outputs import RequestOutput
from jpaged.progress import Progress, progress_bar
from jpaged.serving.batcher import Batcher
from jpaged.serving.request_state import RequestState

OnOutput = Callable[[int, RequestOutput], None]


def collect_outputs(
    batcher: Batcher,
    requests: Sequence[RequestState],
    outputs: list[RequestOutput | None],
    *,
    progress: Progress,
    on_output: OnOutput | None,
) -> list[RequestOutput]:
    """Run requests to their end and return all outputs of the call.

    Args:
      batcher: runs the requests.
      requests: the valid requests of the call.
      outputs: per prompt, the output if the request is invalid, else None.
      progress: see `progress.progress_bar`.
      on_output: called with (index of the prompt, output) when an output is complete.
    """
    with progress_bar(len(outputs), "requests", "request", progress) as bar:
        for index, output in enumerate(outputs):
            if output is not None:
                _report(bar, index, output, on_output)
        for request in requests:
            is_shown = not getattr(bar, "disable", False)
            request.is_awaited = on_output is not None or is_shown
        with contextlib.closing(batcher.follow(requests)) as updates:
            for update in updates:
                if update.is_finished:
                    index = update.request.index
                    output = update.request.request_output()
                    outputs[index] = output
                    _report(bar, index, output, on_output)
                bar.set_postfix_str(f"{batcher.host.tokens_per_s:.0f} tokens/s")
    return [output for output in outputs if output is not None]


def _report(
    bar: Any, index: int, output: RequestOutput, on_output: OnOutput | None
) -> None:
    """Count a finished request, and call `on_output` without the bar on its line."""
    bar.update()
    if on_output is not None:
        with tqdm.external_write_mode(file=sys.stdout):
            on_output(index, output)
