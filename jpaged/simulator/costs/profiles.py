"""Profiles: a cost model of measured times, by tables of a machine's kernels.

Place on the road: profile files -> [profiles] -> seconds of a load.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.simulator.costs.chips import Chip
from jpaged.simulator.costs.features import Features, features
from jpaged.simulator.costs.load import Load
from jpaged.simulator.costs.profile_files import AttentionTimes, Curve, DenseTimes
from jpaged.simulator.costs.served_models import ServedModel
from jpaged.simulator.costs.tables import Grid, grid_of_rows
from jpaged.simulator.costs.transfers import Transfers

Number = jax.Array | float


def _prompt(work: Features) -> tuple[jax.Array, jax.Array]:
    """The one chunk, and the tokens before it, that stand for all chunks of a step.

    It has as many pairs of query and key as they have together: the root of the sum of
    their squares within the chunk, and what came before them in proportion. For one
    chunk it is that chunk.
    """
    chunk = jnp.sqrt(work.prompt_squares)
    return chunk, work.prompt_past / jnp.maximum(chunk, 1.0)


def _decode(work: Features) -> tuple[jax.Array, jax.Array]:
    """Rows that decode, and the mean number of tokens before the one they compute."""
    rows = work.decode_rows
    return rows, work.decode_contexts / jnp.maximum(rows, 1.0) - 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ApartAttention:
    """Prompts and decoding rows in kernels of their own: their times are added."""

    prompts: Grid  # chunk, tokens before it -> seconds
    decoding: Grid  # rows, tokens before each -> seconds

    def __call__(self, work: Features) -> jax.Array:
        """f32[], seconds, all layers."""
        prompts = self.prompts(*_prompt(work)) * work.prompt_steps
        decoding = self.decoding(*_decode(work)) * (work.decode_rows > 0).astype(
            jnp.float32
        )
        return prompts + decoding

    def limits(self) -> tuple[float, float, float, float]:
        """Longest chunk, most tokens before it, most rows, most tokens before them."""
        return (*_ends(self.prompts), *_ends(self.decoding))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MixedAttention:
    """One kernel for both, measured together."""

    both: Grid  # chunk, tokens before it, rows, tokens before each -> seconds

    def __call__(self, work: Features) -> jax.Array:
        """f32[], seconds, all layers."""
        seconds = self.both(*_prompt(work), *_decode(work))
        return seconds * (work.num_tokens > 0).astype(jnp.float32)

    def limits(self) -> tuple[float, float, float, float]:
        """Longest chunk, most tokens before it, most rows, most tokens before them."""
        longest, past, rows, contexts = _ends(self.both)
        return longest, past, rows, contexts


def _ends(grid: Grid) -> tuple[float, ...]:
    return tuple(last for _, last in grid.measured)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """A cost model of tables.

    A step takes the sum of: all products and small operations by its number of tokens,
    whoever computes them; attention, where all chunks of prompts count as the one that
    has as many pairs of query and key, and decoding rows as so many of mean context;
    logits and sampling by the rows that are decided; copies and swapping; `step_s`.

    Between measurements times are linear, below the first they are the first's, and
    beyond the last they go on straight (`tables.Grid`): ask `check_range` before.
    """

    tokens: Grid  # tokens of the step -> seconds, all layers
    attention: ApartAttention | MixedAttention
    logits: Grid  # rows -> seconds
    step_s: Number
    transfers: Transfers
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, load: Load) -> jax.Array:
        """f32[], seconds."""
        work = features(load)
        tokens, logits = work.num_tokens, work.logits
        dense = self.tokens(tokens) * (tokens > 0).astype(jnp.float32)
        head = self.logits(logits) * (logits > 0).astype(jnp.float32)
        others = work.steps * self.step_s + self.transfers(work)
        return dense + self.attention(work) + head + others

    def check_range(self, *, max_tokens: int, max_context: int, max_rows: int) -> None:
        """Nothing, where the profile was measured as far as a run goes.

        Args:
          max_tokens: of one step.
          max_context: of one sequence.
          max_rows: that decode in one step.

        Raises:
          ValueError: it was not; the range is named.
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
                    f"{argument}: the profile {self.name!r} was measured up to "
                    f"{limit:g} {what}, got {value}; take a smaller {argument} or a "
                    "profile that goes further"
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
        """The profile of a model from what `profile_files` has read.

        Args:
          model: its layers, and the bytes that an all-reduce of a token takes.
          name: of the profile, for messages.
          dense: of one layer, as one chip computes it.
          attention: of one layer, likewise.
          transfers: copies and swapping, which no profile has.
          logits: by rows; None: those in `dense`. `logits_by_roofline` where no file
            has them.
          all_reduce: two a layer, where the layer is divided over chips.
          step_s: the host's share of a step.

        Raises:
          ValueError: no logits were given, or the all-reduce was not measured for as
            many bytes as the most tokens of `dense` send.
        """
        if not step_s >= 0:
            raise ValueError(f"step_s: expected at least 0, got {step_s}")
        logits = logits or dense.logits
        if logits is None:
            raise ValueError(
                f"logits: {dense.path} has none; read a file of them, or take "
                "logits_by_roofline"
            )
        seconds = dense.seconds(model.num_layers)
        if all_reduce is not None:
            sizes = dense.tokens * model.hidden_size * model.dtype_bytes
            if sizes[-1] > all_reduce.x[-1]:
                raise ValueError(
                    f"all_reduce: {all_reduce.path} was measured up to "
                    f"{all_reduce.x[-1]:g} bytes, and {dense.tokens[-1]:g} tokens send "
                    f"{sizes[-1]:g}"
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
    """Times of logits against rows, for profiles without: weights read, or FLOPs."""
    rows = np.arange(1, max_rows + 1, dtype=np.float64)
    reads = chip.memory_bytes_per_s * chip.reach.read_share
    flops = chip.flops_per_s * chip.reach.matmul_share
    size = model.head_params / num_chips
    seconds = np.maximum(size * model.dtype_bytes / reads, 2 * rows * size / flops)
    ends = [0, int(np.argmax(seconds > seconds[0])), max_rows - 1]
    ends = sorted(set(ends))
    return Curve(rows[ends], seconds[ends], f"roofline of {chip.name}")


def _attention(
    times: AttentionTimes, num_layers: int
) -> ApartAttention | MixedAttention:
    """Tables of all layers."""
    seconds = times.seconds * num_layers
    prompts, rows = times.chunks > 0, times.rows > 0
    if not times.is_mixed:
        return ApartAttention(
            prompts=grid_of_rows(
                [times.chunks[prompts], times.past[prompts]], seconds[prompts]
            ),
            decoding=grid_of_rows(
                [times.rows[rows], times.contexts[rows]], seconds[rows]
            ),
        )
    # Where there is no prompt, what came before it changes nothing, and likewise for
    # rows: such measurements stand for the whole line. Where there is neither, the
    # shortest time does, from which a chunk below the first measured one begins.
    places = [times.chunks, times.past, times.rows, times.contexts]
    pasts, contexts = np.unique(times.past), np.unique(times.contexts)
    no_prompt, no_rows = np.flatnonzero(~prompts), np.flatnonzero(~rows)
    repeats = [
        _repeated(places, seconds, no_prompt, 1, pasts),
        _repeated(places, seconds, no_rows, 3, contexts),
    ]
    corner = np.stack(np.meshgrid([0.0], pasts, [0.0], contexts), -1).reshape(-1, 4)
    repeats.append((corner, np.full(len(corner), seconds.min())))
    both = prompts & rows
    measured = np.stack(places, -1)[both]
    columns = np.concatenate([measured, *(place for place, _ in repeats)])
    values = np.concatenate([seconds[both], *(value for _, value in repeats)])
    return MixedAttention(grid_of_rows(list(columns.T), values))


def _repeated(
    places: list[np.ndarray],
    seconds: np.ndarray,
    which: np.ndarray,
    axis: int,
    values: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Some measurements, once for each value that one of their columns may have."""
    chosen = np.stack(places, -1)[which]
    repeated = np.repeat(chosen, len(values), axis=0)
    repeated[:, axis] = np.tile(values, len(chosen))
    return repeated, np.repeat(seconds[which], len(values))
