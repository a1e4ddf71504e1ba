"""Step fits: whole steps of a measured engine, by a published formula.

Pipeline: file -> [step_fits] -> cost model.
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

from jpaged.simulator.costs.base import CostEntry, Machine
from jpaged.simulator.costs.features import Features, features
from jpaged.simulator.costs.load import Number, StepLoad
from jpaged.simulator.costs.roofline import VLLM_2023_STEP_S
from jpaged.simulator.costs.transfers import Transfers
from jpaged.simulator.options import Option

Line = tuple[Number, Number, Number]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StepFit:
    """A cost model of fitted coefficients (a, b, c), in seconds; each is a leaf.

    A step of prompts takes a + b * tokens + c * sum(tokens^2). A step of decode rows
    takes a + b * sum(contexts) + c * rows, with other coefficients from `threshold`
    rows on. A mixed step takes the larger a, since weights are read once, plus the
    remaining terms of both. A chunk's square is its contribution to the square of its
    prompt, so that the chunks of a prompt add up to the whole prompt.
    """

    prompts: Line
    few_rows: Line
    many_rows: Line
    threshold: Number
    transfers: Transfers

    def __call__(self, load: StepLoad) -> jax.Array:
        """Return f32[], seconds."""
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
        """Multiply the seconds of each phase, for example for a similar chip.

        Decoding reads memory, so an A100-40GB takes 2,039 / 1,555 of the time of an
        A100-80GB. Prompts compute, and both chips have the same FLOP/s.

        Args:
          prompts: factor of prompts.
          decoding: factor of decoding.
          host_s: host time within the a of decoding, which is not multiplied.

        Raises:
          ValueError: a factor is not above 0, or host_s is larger than a.
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
    """Read the fit of an engine and a model from a JSON file.

    The file maps engine -> model -> tensor parallelism -> `prefill`,
    `decoding_smallbs` and `decoding_largebs`, three numbers each, in milliseconds, and
    `decoding_large_small_bs_threshold`.

    Args:
      path: the file.
      model: name of the model in the file, such as "facebook/opt-13b".
      tensor_parallel: number of chips.
      engine: the measured engine, such as "vllm" or "distserve".
      transfers: copies and swapping, which the fit does not include.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not JSON, or does not have the requested fit; the message lists
        what it has.
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
            raise ValueError(
                f"{argument}: expected one of {have} in {path}, got {key!r}"
            )
        found = found[key]
    lines = [
        _line(path, found, name)
        for name in ("prefill", "decoding_smallbs", "decoding_largebs")
    ]
    threshold = found.get("decoding_large_small_bs_threshold")
    if not isinstance(threshold, int | float):
        raise ValueError(
            f"{path}: expected a number decoding_large_small_bs_threshold for "
            f"{model} on {tensor_parallel} chips, got {threshold!r}"
        )
    return StepFit(*lines, threshold=float(threshold), transfers=transfers)


def _line(path: str | os.PathLike[str], entry: Any, name: str) -> Line:
    values = entry.get(name) if isinstance(entry, dict) else None
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(value, int | float) for value in values)
    ):
        raise ValueError(f"{path}: expected three numbers as {name}, got {values!r}")
    a, b, c = (float(value) * 1e-3 for value in values)
    return a, b, c


def _times(line: Line, factor: float, host_s: float = 0.0) -> Line:
    a, b, c = line
    return (a - host_s) * factor + host_s, b * factor, c * factor


def _build(
    machine: Machine, *, step_fit: str | None = None, decoding_factor: float = 1.0
) -> StepFit:
    if step_fit is None:
        raise ValueError("step_fit: expected a JSON file of measured steps, got none")
    model, chip, num_chips = machine.model, machine.chip, machine.num_chips
    fit = read_step_fit(
        step_fit,
        model=f"facebook/{model.name}",
        tensor_parallel=num_chips,
        transfers=Transfers.of(model, chip, num_chips),
    )
    return fit.scaled(decoding=decoding_factor, host_s=VLLM_2023_STEP_S)


ENTRY = CostEntry(
    "step_fit",
    _build,
    (
        Option("step_fit", "str", "JSON file of vLLM's measured steps."),
        Option(
            "decoding_factor",
            "float",
            "Factor of the measured decoding steps, without their host time, for a "
            "chip with another bandwidth; default: 1.",
            minimum=0.01,
        ),
    ),
)
