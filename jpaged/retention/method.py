"""Method: what a retention method is, and its checks.

Pipeline: user -> [method] -> decisions.

Shape symbols: M blocks per sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

OFF = "off"  # `SamplingParams.retention` of a request that keeps all blocks
# What a method can know of a block's contents; None: only lengths.
STATISTICS = (None, "key_norm", "attention", "recent_attention", "key_extremes")
# Parameters of every method: when it decides.
COMMON = {"every": 16.0, "prompt_every": 0.0}
_LARGEST = 2.0**30


class Row(NamedTuple):
    """What a method sees of one sequence; entries after its last block are arbitrary.

    Blocks are in the order of their tokens. All are full but the last, which always
    stays, whatever the method selects.
    """

    column: jax.Array  # i32[M], 0, 1, ...: place of each block in the table
    num_blocks: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], tokens in these blocks
    num_dropped: jax.Array  # i32[], tokens that earlier decisions have dropped
    prompt_len: jax.Array  # i32[]
    noise: jax.Array  # f32[M], random, from 0 to below 1
    statistic: jax.Array  # f32[M], see `Retention.statistic`; zeros for None
    parameters: dict[str, jax.Array]  # f32[] each
    block_size: int

    def integer(self, name: str) -> jax.Array:
        """Return a parameter rounded down, i32[]."""
        return jnp.floor(self.parameters[name]).astype(jnp.int32)

    @property
    def is_block(self) -> jax.Array:
        """Which entries are blocks of the row, bool[M]."""
        return self.column < self.num_blocks

    @property
    def ends(self) -> jax.Array:
        """Number of stored tokens up to the end of each block, i32[M]."""
        return jnp.minimum((self.column + 1) * self.block_size, self.num_tokens)


def keep_highest(scores: jax.Array, row: Row) -> jax.Array:
    """Select the blocks with the highest scores, bool[M]: the default `select`.

    At most `max_tokens` // block_size blocks, at least one; of equal scores the later
    block. The last block is one of them.
    """
    most = jnp.maximum(row.integer("max_tokens") // row.block_size, 1)
    is_last = row.column == row.num_blocks - 1
    scores = jnp.where(is_last, jnp.inf, scores.astype(jnp.float32))
    scores = jnp.where(row.is_block & ~jnp.isnan(scores), scores, -jnp.inf)
    # Sorted by (is a block, score, column), from the last.
    order = jnp.lexsort((row.column, scores, row.is_block))[::-1]
    rank = jnp.zeros_like(row.column).at[order].set(row.column)
    return rank < most


def keep_positive(scores: jax.Array, row: Row) -> jax.Array:
    """Select the blocks whose score is above 0, bool[M], however many."""
    del row
    return scores > 0


Score = Callable[[Row], jax.Array]
Select = Callable[[jax.Array, Row], jax.Array]


@dataclasses.dataclass(frozen=True)
class Retention:
    """A retention method with its parameters.

    Attributes:
      score: a function of `Row` that returns a number for each block, [M]; larger ones
        stay. Pure and traceable.
      parameters: the default of each number that the functions read, by name. Two more
        are always there: the method decides after `every` generated tokens (16; 0: only
        at the end of the prompt), and while the prompt is computed after
        `prompt_every` of its tokens (0: only at its end).
      select: a function of the scores and the `Row` that returns which blocks stay,
        bool[M]. The default keeps the highest within the parameter `max_tokens`.
      statistic: what `Row.statistic` has for each block. None: nothing, which costs
        nothing. "key_norm": the mean norm of its keys. "attention": the attention that
        its tokens have got from all queries so far, in total. "recent_attention": from
        the last queries since the decision before; the parameter `queries` is the
        largest number of them. These are means over layers and heads. "key_extremes":
        the largest score that any of its keys could have with the query, from the
        extremes of its keys, as a mean over heads. The method then decides for every
        generated token and in every layer, and drops nothing: the token reads the
        blocks that the method keeps.

    Raises:
      ValueError: a function cannot be traced, or a value is out of range.
    """

    score: Score
    parameters: Any = ()
    select: Select = keep_highest
    statistic: str | None = None

    def __post_init__(self) -> None:
        given = dict(self.parameters)
        if self.statistic not in STATISTICS:
            raise ValueError(
                f"statistic: expected one of {STATISTICS}, got {self.statistic!r}"
            )
        if self.statistic == "recent_attention":
            given.setdefault("queries", 1.0)
        values = COMMON | given
        if self.only_reads:
            self._check_names(given)
            values = given | {"every": 1.0, "prompt_every": 0.0}
        checked = {name: checked_number(name, value) for name, value in values.items()}
        object.__setattr__(self, "parameters", tuple(checked.items()))
        _check(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in their order as data."""
        return tuple(name for name, _ in self.parameters)

    @property
    def only_reads(self) -> bool:
        """Whether it selects what a step reads, and drops nothing."""
        return self.statistic == "key_extremes"

    def _check_names(self, given: Any) -> None:
        if self.only_reads and (wrong := set(given) & set(COMMON)):
            raise ValueError(
                f"retention: expected no {sorted(wrong)} for a method with the "
                "statistic 'key_extremes', which decides for every generated token"
            )

    @property
    def reads_attention(self) -> bool:
        """Whether its statistic comes from queries."""
        return self.statistic in ("attention", "recent_attention")

    def values(self, given: Any = None) -> np.ndarray:
        """Return the parameters of a request as data, f32[len(names)].

        Args:
          given: `SamplingParams.retention`: other numbers by name, `OFF`, or None.

        Raises:
          ValueError: a name is unknown, or a value is out of range.
        """
        numbers = dict(self.parameters)
        if isinstance(given, str) and given == OFF:
            numbers["every"] = -1.0
        elif isinstance(given, Mapping):
            self._check_names(given)
            for name, value in given.items():
                if name not in numbers:
                    raise ValueError(
                        f"retention: expected names among {self.names}, got {name!r}"
                    )
                numbers[name] = checked_number(name, value)
        elif given is not None:
            raise ValueError(
                f"retention: expected {OFF!r} or a dict of numbers, got {given!r:.100}"
            )
        return np.array(list(numbers.values()), np.float32)


def checked_number(name: str, value: Any) -> float:
    """Return a parameter as float; raise ValueError unless it is from 0 to 2**30."""
    is_number = isinstance(value, int | float | np.number | jax.Array)
    if isinstance(value, bool) or not is_number or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if name in ("every", "prompt_every", "queries", "max_tokens"):
        least = 1 if name in ("queries", "max_tokens") else 0
        if value != int(value) or not least <= value <= _LARGEST:
            raise ValueError(
                f"{name}: expected an integer from {least} to 2**30, got {value!r}"
            )
    return float(value)


def example_row(method: Retention, num_blocks: int = 8) -> Row:
    """Return a row of 6 blocks in a table of 8, to check a method with."""
    index = jnp.arange(num_blocks, dtype=jnp.int32)
    return Row(
        column=index,
        num_blocks=jnp.int32(num_blocks - 2),
        num_tokens=jnp.int32(4 * (num_blocks - 2) - 1),
        num_dropped=jnp.int32(4),
        prompt_len=jnp.int32(20),
        noise=jnp.linspace(0.0, 0.9, num_blocks),
        statistic=jnp.linspace(1.0, 2.0, num_blocks),
        parameters={name: jnp.float32(value) for name, value in method.parameters},
        block_size=4,
    )


@functools.lru_cache(maxsize=64)
def _check_functions(score: Score, select: Select, parameters: tuple) -> None:
    # A config may also be created while a step is traced.
    with jax.ensure_compile_time_eval():
        row = example_row(_Given(parameters))  # type: ignore[arg-type]
        try:
            scores = jax.eval_shape(lambda *row: score(_row(row)), *row[:-1])
            jnp.zeros(scores.shape, scores.dtype)
            found = jax.eval_shape(
                lambda scores, *row: select(scores, _row(row)), scores, *row[:-1]
            )
            shapes = (scores.shape, found.shape, found.dtype)
        except KeyError as error:
            raise ValueError(
                f"parameters: expected a default for {error}, which the method reads, "
                f"got {tuple(name for name, _ in parameters)}"
            ) from None
        except Exception as error:
            text = (str(error).splitlines() or [""])[0]
            raise ValueError(
                "score, select: expected functions of retention.Row that jax.jit can "
                f"trace, got {type(error).__name__} ({text}); use jnp.where in place "
                "of `if`, and no numpy"
            ) from error
    expected = (row.column.shape, row.column.shape, jnp.bool_)
    if shapes != expected:
        raise ValueError(
            "score, select: expected numbers [M], then bool[M], where M is the size of "
            f"row.column ({expected[0]} in the example), got {shapes}"
        )


def _row(parts: Any) -> Row:
    return Row(*parts, block_size=4)


class _Given(NamedTuple):
    parameters: tuple


def _check(method: Retention) -> None:
    for name in ("score", "select"):
        if not callable(getattr(method, name)):
            raise ValueError(
                f"{name}: expected a function, got {getattr(method, name)!r:.100}"
            )
    _check_functions(method.score, method.select, method.parameters)
