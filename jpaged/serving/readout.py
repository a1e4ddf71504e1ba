"""Readout: parts of the engine's state, copied to the host as numpy arrays.

Pipeline: engine -> [readout] -> engine host. Host only.

Each function is one device call or none. The arrays that it returns are new, because
the state's own arrays are donated to the next call. With several replicas, the
state's arrays have the replicas as first axis. The arrays returned here always have
that axis, even with one replica. The host concatenates the request tables of all
replicas: sequence index `i` is in replica `i // R`.

Shape symbols: D replicas, R entries of a replica's request table, C log-probabilities
kept per token, E events and K steps of a timeline, N columns of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import engine, parallel
from jpaged.compat import quick_jit
from jpaged.decoding.bit_masks import MASK_BITS
from jpaged.engine import EngineState, events, replicas
from jpaged.kv import block_manager, prefix_cache

READ_WIDTH = 64  # tokens per window: a part of a sequence that is copied at once
_NUM_WINDOWS = 64  # windows per device call
_NUM_LOOKUPS = 16  # prompts that one device call looks up


class SequenceProgress(NamedTuple):
    """The progress of all sequences in all request tables; each i32[D * R]."""

    status: np.ndarray
    num_tokens: np.ndarray
    finish_reasons: np.ndarray
    first_steps: np.ndarray
    last_steps: np.ndarray
    num_preemptions: np.ndarray
    num_cached: np.ndarray
    num_dropped: np.ndarray | None = None  # None without retention


class SequenceTokens(NamedTuple):
    """Tokens of one sequence, in order, with what the engine keeps of each."""

    ids: list[int]
    logprobs: np.ndarray  # f32[n]
    ranks: np.ndarray  # i32[n], or i32[n, 0] if the engine keeps no ranks
    top_ids: np.ndarray  # i32[n, C]
    top_logprobs: np.ndarray  # f32[n, C]


class TokenSpan(NamedTuple):
    """Positions `start` to `end` (exclusive) of one sequence."""

    seq_index: int
    start: int
    end: int


def read_progress(
    state: EngineState,
) -> tuple[SequenceProgress, dict[str, np.ndarray]]:
    """Return the progress of all sequences, and the counters, each [D]."""
    table, queue = state.requests, state.requests.queue
    columns = (
        queue.status,
        queue.num_tokens,
        table.finish_reasons,
        table.first_steps,
        table.last_steps,
        queue.num_preemptions,
        queue.num_cached,
        *jax.tree.leaves(table.num_dropped),
    )
    columns, counters = _copies((columns, state.counters), state)
    names = [field.name for field in dataclasses.fields(engine.Counters)]
    present = {name: getattr(counters, name) for name in names}
    return (
        SequenceProgress(*(column.reshape(-1) for column in columns)),
        {name: value for name, value in present.items() if value is not None},
    )


def read_timelines(state: EngineState) -> Iterator[tuple[np.ndarray, ...]]:
    """Return the timeline of each replica, oldest entries first.

    Yields:
      Per replica: the number of events so far; the last events, i32[E, 3]; the rows of
      the last steps, i32[K, N].
    """
    timelines, num_steps = _copies((state.timeline, state.counters.num_steps), state)
    for replica, steps in enumerate(num_steps.tolist()):
        mine = jax.tree.map(lambda array, at=replica: array[at], timelines)
        yield mine.num_events, *events.in_order(mine, steps)


def count_blocks(state: EngineState) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of free and of cached blocks, each i32[D].

    A free block belongs to no sequence. A cached block is one that the prefix cache can
    find; cached blocks that belong to no sequence count as free too.
    """
    num_free, num_cached = (_per_replica(x, state) for x in _count_blocks(state))
    return num_free, num_cached


def cached_lens(
    state: EngineState, prompts: Sequence[Sequence[int]], limits: Sequence[int]
) -> np.ndarray:
    """Return the number of tokens of each prompt in each replica's prefix cache.

    Args:
      state: the engine's state.
      prompts: token ids of n prompts.
      limits: per prompt, the maximum number of tokens to look up.

    Returns:
      i32[n, D].
    """
    num_replicas = parallel.num_replicas(state.mesh)
    found = np.zeros((len(prompts), num_replicas), np.int32)
    if state.prefix_cache is None:
        return found
    for at in range(0, len(prompts), _NUM_LOOKUPS):
        chunk = prompts[at : at + _NUM_LOOKUPS]
        tokens = np.zeros((_NUM_LOOKUPS, state.config.max_model_len), np.int32)
        most = np.zeros((_NUM_LOOKUPS,), np.int32)
        most[: len(chunk)] = limits[at : at + _NUM_LOOKUPS]
        for row, prompt in zip(tokens, chunk, strict=False):
            row[: len(prompt)] = prompt
        lens = jax.device_get(_cached_lens(state, tokens, most))
        lens = lens.reshape(num_replicas, _NUM_LOOKUPS)
        found[at : at + len(chunk)] = lens[:, : len(chunk)].T
    return found


def read_tokens(state: EngineState, spans: Sequence[TokenSpan]) -> list[SequenceTokens]:
    """Return the tokens of each span.

    All windows have one width and all calls one number of windows, so one compiled
    program serves spans of any length.
    """
    num_replicas = parallel.num_replicas(state.mesh)
    # Per replica: (index of the span, sequence index in the replica, first position).
    windows: list[list[tuple[int, int, int]]] = [[] for _ in range(num_replicas)]
    for number, (seq_index, start, end) in enumerate(spans):
        replica, own_index = divmod(seq_index, state.config.max_num_requests)
        # An empty span has one window, of which no token is used.
        for first in range(start, max(end, start + 1), READ_WIDTH):
            windows[replica].append((number, own_index, first))
    parts: list[list[Any]] = [[] for _ in spans]
    for at in range(0, max(map(len, windows)), _NUM_WINDOWS):
        chunks = [each[at : at + _NUM_WINDOWS] for each in windows]
        index = np.zeros((2, num_replicas, _NUM_WINDOWS), np.int32)
        for replica, chunk in enumerate(chunks):
            for i, (_, own_index, first) in enumerate(chunk):
                index[:, replica, i] = own_index, first
        read = _read_windows(state, *(for_state(side, state) for side in index))
        columns = [_per_replica(column, state) for column in read]
        for replica, chunk in enumerate(chunks):
            for i, (number, _, first) in enumerate(chunk):
                size = min(READ_WIDTH, spans[number].end - first)
                parts[number].append([c[replica, i, :size] for c in columns])
    found = []
    for part in parts:
        ids, *rest = (np.concatenate(column) for column in zip(*part, strict=True))
        found.append(SequenceTokens(ids.tolist(), *rest))
    return found


def read_masks(state: EngineState, seq_index: int, start: int, end: int) -> np.ndarray:
    """Return the masks of tokens that could be sampled, bool[end - start, 32 * W].

    Args:
      state: the engine's state, with masks.
      seq_index: the sequence.
      start: first position.
      end: position after the last.
    """
    replica, own_index = divmod(seq_index, state.config.max_num_requests)
    parts = [np.zeros((0, state.config.num_mask_words), np.uint32)]
    for first in range(start, end, READ_WIDTH):
        index = np.zeros((2, parallel.num_replicas(state.mesh)), np.int32)
        index[:, replica] = own_index, first
        read = _read_mask_window(state, *(for_state(side, state) for side in index))
        parts.append(_per_replica(read, state)[replica, : end - first])
    words = np.concatenate(parts)
    bits = (words[:, :, None] >> np.arange(MASK_BITS, dtype=np.uint32)) & 1
    return bits.reshape(len(words), -1).astype(np.bool_)


def for_state(array: np.ndarray, state: EngineState) -> np.ndarray:
    """Return `array` [D, ...] as the state expects it: without D if there is one."""
    return array if parallel.num_replicas(state.mesh) > 1 else array[0]


def _per_replica(array: jax.Array, state: EngineState) -> np.ndarray:
    """Return an array of `replicas.read_each` with replicas as the first axis."""
    found = jax.device_get(array)
    return found if parallel.num_replicas(state.mesh) > 1 else found[None]


def _copies(tree: Any, state: EngineState) -> Any:
    """Return copies of arrays of the state, with replicas as the first axis."""
    has_axis = parallel.num_replicas(state.mesh) > 1
    found = jax.tree.map(np.array, jax.device_get(tree))
    return found if has_axis else jax.tree.map(lambda array: array[None], found)


@quick_jit
def _count_blocks(state: EngineState) -> tuple[jax.Array, jax.Array]:
    """Return the number of free blocks i32[] and of cached blocks i32[]."""

    def count(state: EngineState) -> tuple[jax.Array, jax.Array]:
        cache, num_cached = state.prefix_cache, jnp.int32(0)
        if cache is not None:
            num_cached = jnp.sum(prefix_cache.is_cached(cache), dtype=jnp.int32)
        return block_manager.num_free_blocks(state.blocks), num_cached

    return replicas.read_each(count, state)


@quick_jit
def _cached_lens(state: EngineState, tokens: jax.Array, most: jax.Array) -> jax.Array:
    """Return i32[B]: cached tokens among the first `most` of each prompt [B, L]."""

    def match(state: EngineState, tokens: jax.Array, most: jax.Array) -> jax.Array:
        assert state.prefix_cache is not None
        return prefix_cache.match(state.prefix_cache, tokens, most)[1]

    return replicas.read_each(
        match, state, *replicas.broadcast_to_replicas((tokens, most), state.mesh)
    )


@quick_jit
def _read_mask_window(
    state: EngineState, seq_index: jax.Array, start: jax.Array
) -> jax.Array:
    """Return u32[READ_WIDTH, W], zeros past the end of the sequence's entry."""

    def read(state: EngineState, seq_index: jax.Array, start: jax.Array) -> jax.Array:
        positions = start + jnp.arange(READ_WIDTH, dtype=jnp.int32)
        at = state.requests.masks.at[seq_index, positions]
        return at.get(mode="fill", fill_value=0)

    return replicas.read_each(read, state, seq_index, start)


@quick_jit
def _read_windows(
    state: EngineState, seq_indices: jax.Array, starts: jax.Array
) -> tuple[jax.Array, ...]:
    """Return READ_WIDTH positions of each column, zeros past its end.

    Args:
      state: the engine's state.
      seq_indices: i32[B], index of each window's sequence.
      starts: i32[B], first position of each window.

    Returns:
      The columns of `SequenceTokens`: [B, READ_WIDTH] or [B, READ_WIDTH, C].
    """

    def read(
        state: EngineState, seq_indices: jax.Array, starts: jax.Array
    ) -> tuple[jax.Array, ...]:
        table = state.requests
        offsets = jnp.arange(READ_WIDTH, dtype=jnp.int32)
        positions = starts[:, None] + offsets[None, :]

        def window(column: Any) -> jax.Array:
            if 0 in column.shape:
                return jnp.zeros((*positions.shape, 0), column.dtype)
            at = column.at[seq_indices[:, None], positions]
            return at.get(mode="fill", fill_value=0)

        return (
            window(table.tokens),
            window(table.logprobs),
            window(table.ranks),
            window(table.top_ids),
            window(table.top_logprobs),
        )

    return replicas.read_each(read, state, seq_indices, starts)
