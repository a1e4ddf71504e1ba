"""Results: the finished outputs, read from the request table.

Pipeline: request table -> [results] -> host. Host code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from jpaged import scheduler
from jpaged.engine.request_table import (
    FINISH_REASONS,
    NO_ALGORITHM,
    NO_OUTPUT,
    RequestTable,
    SequenceParams,
)
from jpaged.scheduler import Queue


class Result(NamedTuple):
    """A finished output of a request."""

    seq_index: int
    arrival: int  # the request's number, in order of submission
    sample: int  # number of the request's output; the best beam is 0
    prompt_token_ids: list[int]
    token_ids: list[int]  # including the token that ended it
    logprobs: np.ndarray  # f32[generated]
    ranks: np.ndarray  # i32[generated], or empty
    top_ids: np.ndarray  # i32[generated, num_logprobs]
    top_logprobs: np.ndarray  # f32[generated, num_logprobs]
    masks: np.ndarray  # u32[generated, num_mask_words], see `decoding.bit_masks`
    # f32[prompt], the first is 0; only for sample 0, if the request asks for them
    prompt_logprobs: np.ndarray | None
    finish_reason: str | None
    first_step: int
    last_step: int
    num_preemptions: int
    num_dropped_tokens: int = 0  # by retention


def results(table: RequestTable) -> list[Result]:
    """Read the finished outputs, sorted by arrival and number."""
    queue, params = jax.device_get((table.queue, table.params))
    is_output = (queue.status == scheduler.FINISHED) & (params.outputs > NO_OUTPUT)
    indices = sorted(
        np.flatnonzero(is_output).tolist(),
        key=lambda index: (queue.arrivals[index], params.outputs[index]),
    )
    columns = _columns(table)
    return [_result(columns, queue, params, index) for index in indices]


def _columns(table: RequestTable) -> dict[str, np.ndarray]:
    names = ("tokens", "logprobs", "ranks", "top_ids", "top_logprobs", "masks")
    names += ("finish_reasons", "first_steps", "last_steps")
    columns = {name: getattr(table, name) for name in names}
    if table.num_dropped is not None:
        columns["num_dropped"] = table.num_dropped
    return jax.device_get(columns)


def _result(
    columns: dict[str, np.ndarray], queue: Queue, params: SequenceParams, index: int
) -> Result:
    """Read the output of sequence `index` from columns on the host."""
    start, end = int(queue.prompt_lens[index]), int(queue.num_tokens[index])
    row = {name: column[index] for name, column in columns.items()}
    prompt_logprobs = None
    if params.keeps_prompt_logprobs[index]:
        prompt_logprobs = row["logprobs"][:start]
    # Only the rows of an algorithm are preempted, all of them together.
    is_alone = params.algorithms[index] == NO_ALGORITHM
    preempted = index if is_alone else int(queue.leaders[index])
    return Result(
        seq_index=index,
        arrival=int(queue.arrivals[index]),
        sample=int(params.outputs[index]),
        prompt_token_ids=row["tokens"][:start].tolist(),
        token_ids=row["tokens"][start:end].tolist(),
        logprobs=row["logprobs"][start:end],
        ranks=row["ranks"][start:end],
        top_ids=row["top_ids"][start:end],
        top_logprobs=row["top_logprobs"][start:end],
        masks=row["masks"][start:end],
        prompt_logprobs=prompt_logprobs,
        finish_reason=FINISH_REASONS[int(row["finish_reasons"])],
        first_step=int(row["first_steps"]),
        last_step=int(row["last_steps"]),
        num_preemptions=int(queue.num_preemptions[preempted]),
        num_dropped_tokens=int(row.get("num_dropped", 0)),
    )
