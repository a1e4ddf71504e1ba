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
from jpaged.serving.batcher import Batcher
from jpaged.serving.request_state import RequestState

OnOutput = Callable[[int, RequestOutput], None]


def collect_outputs(
    batcher: Batcher,
    requests: Sequence[RequestState],
    outputs: list[RequestOutput | None],
    *,
    progress: bool,
    on_output: OnOutput | None,
) -> list[RequestOutput]:
    """Run requests to their end and return all outputs of the call.

    Args:
      batcher: runs the requests.
      requests: the valid requests of the call.
      outputs: per prompt, the output if the request is invalid, else None.
      progress: show a progress bar where stderr can show one.
      on_output: called with (index of the prompt, output) when an output is complete.
    """
    with _progress_bar(len(outputs), is_shown=progress) as bar:
        for index, output in enumerate(outputs):
            if output is not None:
                _report(bar, index, output, on_output)
        for request in requests:
            request.is_awaited = on_output is not None or not bar.disable
        with contextlib.closing(batcher.follow(requests)) as updates:
            for update in updates:
                if update.is_finished:
                    index = update.request.index
                    output = update.request.request_output()
                    outputs[index] = output
                    _report(bar, index, output, on_output)
                bar.set_postfix_str(f"{batcher.host.tokens_per_s:.0f} tokens/s")
    return [output for output in outputs if output is not None]


def _progress_bar(num_requests: int, is_shown: bool) -> tqdm[Any]:
    """Return a progress bar, disabled where stderr cannot show one."""
    # tqdm's None disables the bar unless stderr is a terminal. A notebook's stderr is
    # not a terminal, but can show a bar.
    is_notebook = "ipykernel" in sys.modules
    disable = (False if is_notebook else None) if is_shown else True
    return tqdm(total=num_requests, unit="request", delay=0.5, disable=disable)


def _report(
    bar: tqdm[Any], index: int, output: RequestOutput, on_output: OnOutput | None
) -> None:
    """Count a finished request, and call `on_output` without the bar on its line."""
    bar.update()
    if on_output is not None:
        with tqdm.external_write_mode(file=sys.stdout):
            on_output(index, output)
