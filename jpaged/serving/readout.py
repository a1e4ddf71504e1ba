"""Readout: what the host sees of the engine's state, as numpy arrays.

Place on the road: engine -> [readout] -> serving. Host only.

Each function is one device call and few transfers. What it gives out are new arrays:
the state's own are donated to the next call. Where there are several replicas, the
state's arrays have them as a first axis; here all do, even of one replica. Their
request tables are one long one outside, in which they stand one behind the other.

Letters: D replicas, R places of a replica's table, C log-probabilities of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import engine, parallel
from jpaged.engine import EngineState, events, replicas
from jpaged.kv import block_manager, prefix_cache

READ_WIDTH = 64  # tokens of a sequence that come to the host in one piece
_READ_PIECES = 64  # pieces per device call
_LOOK_UPS = 16  # prompts that are looked up in one device call


class Progress(NamedTuple):
    """How far the sequences in all replicas' tables are; i32[D * R] each."""

    status: np.ndarray
    num_tokens: np.ndarray
    finish_reasons: np.ndarray
    first_steps: np.ndarray
    last_steps: np.ndarray
    num_preemptions: np.ndarray
    num_cached: np.ndarray


class Tokens(NamedTuple):
    """Generated tokens of one sequence, in order."""

    ids: list[int]
    logprobs: np.ndarray  # f32[n]
    ranks: np.ndarray  # i32[n], or i32[n, 0] where none are kept
    top_ids: np.ndarray  # i32[n, C]
    top_logprobs: np.ndarray  # f32[n, C]


class Wanted(NamedTuple):
    """Positions `start` to `end` of the sequence at a place."""

    seq_index: int
    start: int
    end: int


def progress(state: EngineState) -> tuple[Progress, dict[str, np.ndarray]]:
    """How far the sequences are, and of each replica the counters; [D] each."""
    columns, integers, floats = (_of_each(x, state) for x in _summary(state))
    integers, floats = iter(integers.T), iter(floats.T)
    counters = {
        field.name: next(floats if _is_float(counter) else integers)
        for field, counter in zip(
            dataclasses.fields(engine.Counters),
            jax.tree.leaves(state.counters),
            strict=True,
        )
    }
    found = Progress(*(column.reshape(-1) for column in columns.swapaxes(0, 1)))
    return found, counters


def records(state: EngineState) -> Iterator[tuple[np.ndarray, ...]]:
    """Of each replica its timeline in order: the number of events of all times, the
    last ones i32[E, 3], and the rows of the last steps i32[K, C]."""
    return zip(*(_of_each(x, state) for x in _recorded(state)), strict=True)


def known_blocks(state: EngineState) -> tuple[np.ndarray, np.ndarray]:
    """Of each replica the blocks that hold nothing now, and those whose contents its
    prefix cache knows; i32[D]."""
    num_free, num_cached = (_of_each(x, state) for x in _known_blocks(state))
    return num_free, num_cached


def cached_lens(
    state: EngineState, prompts: Sequence[Sequence[int]], most: Sequence[int]
) -> np.ndarray:
    """i32[n, D], tokens of each prompt that each replica's prefix cache holds.

    `most` are those that may be taken from it.
    """
    num_replicas = parallel.num_replicas(state.mesh)
    found = np.zeros((len(prompts), num_replicas), np.int32)
    if state.prefix_cache is None:
        return found
    for at in range(0, len(prompts), _LOOK_UPS):
        chunk = prompts[at : at + _LOOK_UPS]
        tokens = np.zeros((_LOOK_UPS, state.config.max_model_len), np.int32)
        limits = np.zeros((_LOOK_UPS,), np.int32)
        limits[: len(chunk)] = most[at : at + _LOOK_UPS]
        for row, prompt in zip(tokens, chunk, strict=False):
            row[: len(prompt)] = prompt
        lens = jax.device_get(_cached_lens(state, tokens, limits))
        lens = lens.reshape(num_replicas, _LOOK_UPS)
        found[at : at + len(chunk)] = lens[:, : len(chunk)].T
    return found


def tokens(state: EngineState, wanted: Sequence[Wanted]) -> list[Tokens]:
    """The tokens of each that is wanted, in pieces of one width: one program."""
    num_replicas = parallel.num_replicas(state.mesh)
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(num_replicas)]
    for number, (seq_index, start, end) in enumerate(wanted):
        replica, own = divmod(seq_index, state.config.max_num_requests)
        # Nothing to read is a piece too, of no tokens.
        for first in range(start, max(end, start + 1), READ_WIDTH):
            pieces[replica].append((number, own, first))
    parts: list[list[Any]] = [[] for _ in wanted]
    for at in range(0, max(map(len, pieces)), _READ_PIECES):
        chunks = [mine[at : at + _READ_PIECES] for mine in pieces]
        index = np.zeros((2, num_replicas, _READ_PIECES), np.int32)
        for replica, chunk in enumerate(chunks):
            for i, (_, own, first) in enumerate(chunk):
                index[:, replica, i] = own, first
        read = _windows(state, *(for_each(side, state) for side in index))
        columns = [_of_each(column, state) for column in read]
        for replica, chunk in enumerate(chunks):
            for i, (number, _, first) in enumerate(chunk):
                size = min(READ_WIDTH, wanted[number].end - first)
                parts[number].append([c[replica, i, :size] for c in columns])
    found = []
    for mine in parts:
        ids, *rest = (np.concatenate(column) for column in zip(*mine, strict=True))
        found.append(Tokens(ids.tolist(), *rest))
    return found


def for_each(array: np.ndarray, state: EngineState) -> np.ndarray:
    """What has the replicas as first axis, as the state wants it."""
    return array if parallel.num_replicas(state.mesh) > 1 else array[0]


def _of_each(array: jax.Array, state: EngineState) -> np.ndarray:
    """An array of `sharded.read` with the replicas as first axis, even of one."""
    found = jax.device_get(array)
    return found if parallel.num_replicas(state.mesh) > 1 else found[None]


def _is_float(counter: jax.Array) -> bool:
    return counter.dtype == jnp.float32


@jax.jit
def _summary(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Progress as i32[7, R], and the counters, integers and floats."""

    def summary(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
        table, queue = state.requests, state.requests.queue
        columns = (
            queue.status,
            queue.num_tokens,
            table.finish_reasons,
            table.first_steps,
            table.last_steps,
            queue.num_preemptions,
            queue.num_cached,
        )
        counters = jax.tree.leaves(state.counters)
        floats = [counter for counter in counters if _is_float(counter)]
        others = [counter for counter in counters if not _is_float(counter)]
        integers = [counter.astype(jnp.int32) for counter in others]
        return jnp.stack(columns), jnp.stack(integers), jnp.stack(floats)

    return replicas.read_each(summary, state)


@jax.jit
def _recorded(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The timeline in order."""

    def recorded(state: EngineState) -> tuple[jax.Array, jax.Array, jax.Array]:
        ordered = events.in_order(state.timeline, state.counters.num_steps)
        return state.timeline.num_events, *ordered

    return replicas.read_each(recorded, state)


@jax.jit
def _known_blocks(state: EngineState) -> tuple[jax.Array, jax.Array]:
    """i32[] blocks that are free, and i32[] those that the prefix cache knows."""

    def known(state: EngineState) -> tuple[jax.Array, jax.Array]:
        cache, num_cached = state.prefix_cache, jnp.int32(0)
        if cache is not None:
            num_cached = jnp.sum(prefix_cache.is_cached(cache), dtype=jnp.int32)
        return block_manager.num_free_blocks(state.blocks), num_cached

    return replicas.read_each(known, state)


@jax.jit
def _cached_lens(state: EngineState, tokens: jax.Array, most: jax.Array) -> jax.Array:
    """i32[B], of prompts [B, L] the tokens that are cached, of the first `most`."""

    def match(state: EngineState, tokens: jax.Array, most: jax.Array) -> jax.Array:
        return prefix_cache.match(state.prefix_cache, tokens, most)[1]

    parts = replicas.broadcast_to_replicas((tokens, most), state.mesh)
    return replicas.read_each(match, state, *parts)


@jax.jit
def _windows(
    state: EngineState, seq_indices: jax.Array, starts: jax.Array
) -> tuple[jax.Array, ...]:
    """[B, READ_WIDTH] (and [B, READ_WIDTH, C]) of each column, zeros behind it."""

    def read(state: EngineState, seq_indices: jax.Array, starts: jax.Array):
        table = state.requests
        offsets = jnp.arange(READ_WIDTH, dtype=jnp.int32)
        positions = starts[:, None] + offsets[None, :]

        def window(column: jax.Array) -> jax.Array:
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
