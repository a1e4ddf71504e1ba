"""Profiles: a cost model of tables with the measured times of a machine's kernels.

Pipeline: profile files -> [profiles] -> cost model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.simulator.costs import roofline
from jpaged.simulator.costs.base import CostEntry, Machine
from jpaged.simulator.costs.chips import Chip
from jpaged.simulator.costs.features import Features, features
from jpaged.simulator.costs.load import Number, StepLoad
from jpaged.simulator.costs.profile_files import (
    AttentionTimes,
    Curve,
    DenseTimes,
    read_attention,
    read_dense,
    read_per_sequence,
)
from jpaged.simulator.costs.served_models import ServedModel
from jpaged.simulator.costs.tables import Grid, grid_of_rows
from jpaged.simulator.costs.transfers import Transfers
from jpaged.simulator.options import Option


def _prompt(work: Features) -> tuple[jax.Array, jax.Array]:
    """Return one chunk, and the tokens before it, that represent all chunks of a step.

    The one chunk has as many pairs of a query and a key as all chunks together. Its
    length is the root of the sum of their squares, and the tokens before it are scaled
    accordingly. A single chunk represents itself.
    """
    chunk = jnp.sqrt(work.prompt_squares)
    return chunk, work.prompt_past / jnp.maximum(chunk, 1.0)


def _decode(work: Features) -> tuple[jax.Array, jax.Array]:
    """Return the decode rows, and the mean number of tokens before each new one."""
    rows = work.decode_rows
    return rows, work.decode_contexts / jnp.maximum(rows, 1.0) - 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SeparateAttention:
    """Attention with separate kernels for prompts and for decode rows."""

    prompts: Grid  # chunk, tokens before it -> seconds
    decoding: Grid  # rows, tokens before each -> seconds

    def __call__(self, work: Features) -> jax.Array:
        """Return f32[], seconds of all layers."""
        prompts = self.prompts(*_prompt(work)) * work.prompt_steps
        decoding = self.decoding(*_decode(work)) * (work.decode_rows > 0).astype(
            jnp.float32
        )
        return prompts + decoding

    def limits(self) -> tuple[float, float, float, float]:
        """Return the largest measured chunk, tokens before it, rows, tokens before."""
        chunk, past = _ends(self.prompts)
        rows, contexts = _ends(self.decoding)
        return chunk, past, rows, contexts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MixedAttention:
    """Attention with one kernel for both, measured together."""

    both: Grid  # chunk, tokens before it, rows, tokens before each -> seconds

    def __call__(self, work: Features) -> jax.Array:
        """Return f32[], seconds of all layers."""
        seconds = self.both(*_prompt(work), *_decode(work))
        return seconds * (work.num_tokens > 0).astype(jnp.float32)

    def limits(self) -> tuple[float, float, float, float]:
        """Return the largest measured chunk, tokens before it, rows, tokens before."""
        longest, past, rows, contexts = _ends(self.both)
        return longest, past, rows, contexts


def _ends(grid: Grid) -> tuple[float, ...]:
    return tuple(last for _, last in grid.measured)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """A cost model of tables.

    The duration of a step is the sum of:
      matrix products and small operations, by the number of tokens of the step;
      attention: all chunks of prompts count as one chunk with as many pairs of a query
        and a key, and all decode rows have their mean context;
      logits and sampling, by the rows whose next token is sampled;
      copies and swapping;
      `step_s`.

    Times between measurements are interpolated and times beyond them are extrapolated
    (`tables.Grid`). `check_range` checks that a run needs no extrapolation.
    """

    tokens: Grid  # tokens of the step -> seconds, all layers
    attention: SeparateAttention | MixedAttention
    logits: Grid  # rows -> seconds
    step_s: Number
    transfers: Transfers
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, load: StepLoad) -> jax.Array:
        """Return f32[], seconds."""
        work = features(load)
        tokens, logits = work.num_tokens, work.logits
        dense = self.tokens(tokens) * (tokens > 0).astype(jnp.float32)
        head = self.logits(logits) * (logits > 0).astype(jnp.float32)
        others = work.steps * self.step_s + self.transfers(work)
        return dense + self.attention(work) + head + others

    def check_range(self, *, max_tokens: int, max_context: int, max_rows: int) -> None:
        """Check that the measurements cover a run.

        Args:
          max_tokens: most tokens of a step.
          max_context: most tokens of a sequence.
          max_rows: most decode rows of a step.

        Raises:
          ValueError: they do not; the message names the measured range.
        """
        chunk, past, rows, contexts = self.attention.limits()
        (tokens,), (logits,) = _ends(self.tokens), _ends(self.logits)
        for argument, value, what, limit in (
            ("max_tokens", max_tokens, "tokens of a step", tokens),
            ("max_tokens", max_tokens, "tokens of a prompt's chunk", chunk),
            ("max_context", max_context, "tokens of a prompt", past + 1),
            ("max_context", max_context, "tokens of a decoding row", contexts + 1),
            ("max_rows", max_rows, "rows that decode", rows),
            ("max_rows", max_rows, "rows with logits", logits),
        ):
            if value > limit:
                raise ValueError(
                    f"{argument}: expected at most {limit:g} {what}, as the profile "
                    f"{self.name!r} was measured, got {value}; use a smaller "
                    f"{argument} or a profile with a larger range"
                )

    @classmethod
    def of(
        cls,
        model: ServedModel,
        *,
        name: str,
        dense: DenseTimes,
        attention: AttentionTimes,
        transfers: Transfers,
        logits: Curve | None = None,
        all_reduce: Curve | None = None,
        step_s: float = 0.0,
    ) -> Profile:
        """Build the profile of a model from the results of `profile_files`.

        Args:
          model: for the number of layers, and the bytes of a token in an all-reduce.
          name: of the profile, for messages.
          dense: times of one layer on one chip, without attention.
          attention: times of one layer's attention on one chip.
          transfers: copies and swapping, which no profile includes.
          logits: times by rows. None: those in `dense`. If no file has them, use
            `logits_by_roofline`.
          all_reduce: times by bytes, of which a layer has two if it is divided over
            several chips.
          step_s: host time of a step.

        Raises:
          ValueError: there are no times of logits, or the all-reduce was not measured
            for the bytes of the largest step in `dense`.
        """
        if not step_s >= 0:
            raise ValueError(f"step_s: expected at least 0, got {step_s}")
        logits = logits or dense.logits
        if logits is None:
            raise ValueError(
                f"logits: expected times, got none in {dense.path}; read a file of "
                "them, or use logits_by_roofline"
            )
        seconds = dense.seconds(model.num_layers)
        if all_reduce is not None:
            sizes = dense.tokens * model.hidden_size * model.dtype_bytes
            if sizes[-1] > all_reduce.x[-1]:
                raise ValueError(
                    f"all_reduce: expected times up to {sizes[-1]:g} bytes, which "
                    f"{dense.tokens[-1]:g} tokens send, got {all_reduce.x[-1]:g} in "
                    f"{all_reduce.path}"
                )
            each = np.interp(sizes, all_reduce.x, all_reduce.seconds)
            seconds = seconds + 2 * model.num_layers * each
        return cls(
            tokens=Grid.of([dense.tokens], seconds),
            attention=_attention(attention, model.num_layers),
            logits=Grid.of([logits.x], logits.seconds),
            step_s=step_s,
            transfers=transfers,
            name=name,
        )


def logits_by_roofline(
    model: ServedModel, chip: Chip, num_chips: int = 1, *, max_rows: int = 4096
) -> Curve:
    """Compute times of logits by rows: the longer of reading weights and computing."""
    rows = np.arange(1, max_rows + 1, dtype=np.float64)
    reads = chip.memory_bytes_per_s * chip.efficiency.read_share
    flops = chip.flops_per_s * chip.efficiency.matmul_share
    size = model.head_params / num_chips
    read_s = size * model.matrix_param_bytes / reads
    seconds = np.maximum(read_s, 2 * rows * size / flops)
    ends = [0, int(np.argmax(seconds > seconds[0])), max_rows - 1]
    ends = sorted(set(ends))
    return Curve(rows[ends], seconds[ends], f"roofline of {chip.name}")


def _attention(
    times: AttentionTimes, num_layers: int
) -> SeparateAttention | MixedAttention:
    """Build the tables of all layers."""
    seconds = times.seconds * num_layers
    prompts, rows = times.chunks > 0, times.rows > 0
    if not times.is_mixed:
        return SeparateAttention(
            prompts=grid_of_rows(
                [times.chunks[prompts], times.past[prompts]], seconds[prompts]
            ),
            decoding=grid_of_rows(
                [times.rows[rows], times.contexts[rows]], seconds[rows]
            ),
        )
    # Without a prompt, the tokens before it have no effect, so a measurement without a
    # prompt holds for all their values; the same is true for rows and their contexts.
    # Without both, the shortest time is used: times of chunks below the first measured
    # one are interpolated from there.
    points = [times.chunks, times.past, times.rows, times.contexts]
    pasts, contexts = np.unique(times.past), np.unique(times.contexts)
    no_prompt, no_rows = np.flatnonzero(~prompts), np.flatnonzero(~rows)
    repeats = [
        _repeated(points, seconds, no_prompt, 1, pasts),
        _repeated(points, seconds, no_rows, 3, contexts),
    ]
    corner = np.stack(np.meshgrid([0.0], pasts, [0.0], contexts), -1).reshape(-1, 4)
    repeats.append((corner, np.full(len(corner), seconds.min())))
    both = prompts & rows
    measured = np.stack(points, -1)[both]
    columns = np.concatenate([measured, *(point for point, _ in repeats)])
    values = np.concatenate([seconds[both], *(value for _, value in repeats)])
    return MixedAttention(grid_of_rows(list(columns.T), values))


def _repeated(
    points: list[np.ndarray],
    seconds: np.ndarray,
    which: np.ndarray,
    axis: int,
    values: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Repeat measurements for each of the values that one of their columns can have."""
    chosen = np.stack(points, -1)[which]
    repeated = np.repeat(chosen, len(values), axis=0)
    repeated[:, axis] = np.tile(values, len(chosen))
    return repeated, np.repeat(seconds[which], len(values))


def build(
    machine: Machine,
    *,
    dense: str | None = None,
    attention: str | None = None,
    per_sequence: str | None = None,
    step_s: float = 0.0,
) -> Profile:
    """Build the profile of a model on one chip from files; see `profile_files`.

    Args:
      machine: the model on its chip.
      dense, attention, per_sequence: the files; without `per_sequence`, `dense` has the
        times of logits.
      step_s: host time of a step.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: a file is missing or invalid, or there are several chips.
    """
    if dense is None or attention is None:
        given = {"dense": dense, "attention": attention}
        raise ValueError(f"dense, attention: expected a CSV file each, got {given}")
    model, chip, num_chips = machine.model, machine.chip, machine.num_chips
    if num_chips != 1:
        raise ValueError(
            "num_chips: expected 1, as the files have no times of an all-reduce, got "
            f"{num_chips}"
        )
    logits = None if per_sequence is None else read_per_sequence(per_sequence)
    return Profile.of(
        model,
        name=dense,
        dense=read_dense(dense),
        attention=read_attention(attention),
        logits=logits,
        transfers=Transfers.of(model, chip),
        step_s=step_s,
    )


ENTRY = CostEntry(
    "profile",
    build,
    (
        Option("dense", "str", "Profile: CSV of a layer's operations by tokens."),
        Option("attention", "str", "Profile: CSV of a layer's attention."),
        Option("per_sequence", "str", "Profile: CSV of logits and sampler by rows."),
        *roofline.ENTRY.options,
    ),
)
