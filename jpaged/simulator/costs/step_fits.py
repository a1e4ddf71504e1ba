"""Step fits: whole iterations of a measured engine, by a published formula.

Place on the road: file -> [step_fits] -> seconds of a load.
Source: Zhong et al. 2024 (DistServe), section 4.1 and its artifact's profile data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.simulator.costs.features import Features, features
from jpaged.simulator.costs.load import Load
from jpaged.simulator.costs.transfers import Transfers

Number = jax.Array | float
Line = tuple[Number, Number, Number]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StepFit:
    """A cost model of fitted lines, seconds; every number is a leaf.

    Prompts alone take a + b x (their tokens) + c x (the sum of their squares), rows
    that decode a + b x (their contexts) + c x (their number), with other coefficients
    from `threshold` rows on. A step of both takes the sums of both and once the larger
    a, since weights are read once. A chunk's square is what it adds to that of its
    prompt, so that the chunks of a prompt add up to the prompt's own.
    """

    prompts: Line
    few_rows: Line
    many_rows: Line
    threshold: Number
    transfers: Transfers

    def __call__(self, load: Load) -> jax.Array:
        """f32[], seconds."""
        work = features(load)
        base, per_token, per_square = self.prompts
        is_prompt = work.prompt_steps
        # (past + chunk)^2 - past^2
        squares = work.prompt_squares + 2 * work.prompt_past
        grows = per_token * work.prompt_tokens + per_square * squares
        rows = work.decode_rows
        few, many = self._rows(self.few_rows, work), self._rows(self.many_rows, work)
        is_few = rows < self.threshold
        decode_base = jnp.where(is_few, few[0], many[0])
        decode_grows = jnp.where(is_few, few[1], many[1])
        has_rows = (rows > 0).astype(jnp.float32)
        fixed = jnp.maximum(base * is_prompt, decode_base * has_rows)
        return fixed + grows + decode_grows + self.transfers(work)

    @staticmethod
    def _rows(line: Line, work: Features) -> tuple[jax.Array, jax.Array]:
        base, per_context, per_row = line
        grows = per_context * work.decode_contexts + per_row * work.decode_rows
        return jnp.asarray(base, jnp.float32), grows

    def scaled(
        self, *, prompts: float = 1.0, decoding: float = 1.0, host_s: float = 0.0
    ) -> StepFit:
        """Each phase's times multiplied, such as for another chip of the same kind.

        Decoding reads memory, so A100-40GB takes 2,039 / 1,555 of A100-80GB's time.
        Prompts compute, and both have the same FLOP/s. The host's share of a step that
        decodes, `host_s` of its a, stays as it is.

        Raises:
          ValueError: a factor is not above 0, or the host's share is more than there
            is.
        """
        for name, factor in (("prompts", prompts), ("decoding", decoding)):
            if not 0 < factor < math.inf:
                raise ValueError(f"{name}: expected more than 0, got {factor}")
        most = min(float(self.few_rows[0]), float(self.many_rows[0]))
        if not 0 <= host_s <= most:
            raise ValueError(f"host_s: expected from 0 to {most:g}, got {host_s}")
        return dataclasses.replace(
            self,
            prompts=_times(self.prompts, prompts),
            few_rows=_times(self.few_rows, decoding, host_s),
            many_rows=_times(self.many_rows, decoding, host_s),
        )


def read_step_fit(
    path: str | os.PathLike[str],
    *,
    model: str,
    tensor_parallel: int = 1,
    engine: str = "vllm",
    transfers: Transfers,
) -> StepFit:
    """The fit of an engine and a model in a JSON file.

    The file: engine -> model -> tensor parallelism -> `prefill`, `decoding_smallbs`
    and `decoding_largebs`, three numbers each, in milliseconds, and
    `decoding_large_small_bs_threshold`.

    Args:
      path: the file.
      model: its name there, such as "facebook/opt-13b".
      tensor_parallel: chips.
      engine: whose iterations were measured, such as "vllm" or "distserve".
      transfers: copies and swapping, which the fit does not have.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON, or lacks what was asked for; the message lists what
        it has.
    """
    try:
        found: Any = json.loads(pathlib.Path(path).read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    for argument, key in (
        ("engine", engine),
        ("model", model),
        ("tensor_parallel", str(tensor_parallel)),
    ):
        if not isinstance(found, dict) or key not in found:
            have = ", ".join(found) if isinstance(found, dict) else "nothing"
            raise ValueError(f"{argument}: {path} has {have}, got {key!r}")
        found = found[key]
    lines = [
        _line(path, found, name)
        for name in ("prefill", "decoding_smallbs", "decoding_largebs")
    ]
    threshold = found.get("decoding_large_small_bs_threshold")
    if not isinstance(threshold, int | float):
        raise ValueError(
            f"{path}: expected a number decoding_large_small_bs_threshold for "
            f"{model} on {tensor_parallel}, got {threshold!r}"
        )
    return StepFit(*lines, threshold=float(threshold), transfers=transfers)


def _line(path: str | os.PathLike[str], entry: Any, name: str) -> Line:
    values = entry.get(name) if isinstance(entry, dict) else None
    is_line = isinstance(values, list) and len(values) == 3
    if not is_line or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{path}: expected three numbers as {name}, got {values!r}")
    a, b, c = (float(value) * 1e-3 for value in values)
    return a, b, c


def _times(line: Line, factor: float, host_s: float = 0.0) -> Line:
    a, b, c = line
    return (a - host_s) * factor + host_s, b * factor, c * factor
