"""Computes hit ratios of the prefix cache on a trace of requests, by capacity.

    python -m experiments.prefix_cache
    python -m experiments.prefix_cache --trace conversation.jsonl.gz \
        --capacity_blocks=1000,10000,50000

A trace has one request per line, as JSON with `input_length` and `hash_ids`. There is
one hash id per block of the prompt; it identifies the block's tokens and all tokens
before them. This is the format of the Mooncake traces (Qin et al., FAST'25). Without
`--trace`, the runner generates one: conversations that start with one of a few system
prompts and grow.

Requests are processed one after the other. The longest cached prefix of a request is a
hit. Then all its blocks are inserted and marked as used, the last block first, and the
least recently used blocks are evicted until `--capacity_blocks` are left. The functions
`match`, `insert`, `touch` and `evict` of `jpaged.kv.prefix_cache` do this on blocks of
one "token", the hash id. The requests are a loop on the device, in pieces of 256 for
the progress bar. The loop is compiled for each capacity.

For each capacity the runner prints the blocks that were hits divided by all blocks of
all prompts; the same in tokens (the last block may be partial); the best ratio that any
eviction policy can reach if it knows the future (`jpaged.simulator.optimum`); and block
lookups per second.

Time: 1 to 17 s per capacity for 9,408 requests with 227,912 blocks on two CPU cores,
more for larger capacities, and some seconds to compile. Expected on 80 % of Mooncake's
conversation trace, in blocks: 0.0447 at 1,000, 0.2080 at 10,000 and 0.3470 at 50,000,
within 0.001 of a brute-force count.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax
from tqdm import tqdm

from experiments.lib import runner
from jpaged import plot
from jpaged.kv import block_manager, prefix_cache
from jpaged.kv.block_manager import NO_BLOCK, BlockState
from jpaged.kv.prefix_cache import Eviction, PrefixCache
from jpaged.plot import style
from jpaged.policies import EvictionPolicy
from jpaged.simulator.optimum import belady_hits
from jpaged.simulator.workloads.traces import Prompt, read_prompts

REQUESTS_PER_CALL = 256
MOST_BLOCKS = 10_000_000

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string(
        "trace", None, "File of JSON lines, also .gz; default: synthetic."
    )
    flags.DEFINE_list(
        "capacity_blocks", ["300", "1000", "3000"], "Blocks that the cache keeps."
    )
    flags.DEFINE_integer(
        "block_size", 512, "Tokens per block of the trace.", lower_bound=1
    )
    flags.DEFINE_integer(
        "num_requests", 1000, "Requests of the synthetic trace.", lower_bound=1
    )
    flags.DEFINE_integer("seed", 0, "Seed of the synthetic trace.")
    flags.DEFINE_string("plot", None, "File for the figure; needs the extra `plot`.")


@dataclasses.dataclass(frozen=True)
class CacheRatios:
    """Hit ratios and speed at one capacity."""

    capacity_blocks: int
    block_hit_ratio: float
    token_hit_ratio: float
    optimal_block_hit_ratio: float  # of the best eviction policy
    num_requests: int
    num_lookups: int  # blocks of all prompts
    seconds: float  # without compilation
    compile_s: float
    lookups_per_s: float


def synthetic_trace(num_requests: int, block_size: int, seed: int) -> list[Prompt]:
    """Generates interleaved conversations: each prompt extends the previous one.

    A third of the requests start a conversation. They start with one of eight system
    prompts, of which some are more frequent.

    Args:
      num_requests: Number of requests.
      block_size: Tokens per block.
      seed: Seed of all random choices.
    """
    rng = np.random.default_rng(seed)
    next_id = 0

    def new_blocks(count: int) -> list[int]:
        nonlocal next_id
        next_id += count
        return list(range(next_id - count, next_id))

    systems = [new_blocks(int(count)) for count in rng.integers(1, 9, 8)]
    popularity = 1 / np.arange(1, len(systems) + 1)
    talks: list[list[int]] = []
    requests = []
    for _ in range(num_requests):
        if not talks or rng.random() < 1 / 3:
            chosen = rng.choice(len(systems), p=popularity / popularity.sum())
            talks.append(list(systems[chosen]))
        # Recent conversations are more likely to continue.
        back = min(int(rng.geometric(0.05)), len(talks))
        talk = talks.pop(-back)
        talk += new_blocks(int(rng.integers(1, 12)))
        talks.append(talk)
        partial = int(rng.integers(1, block_size + 1))
        requests.append(Prompt((len(talk) - 1) * block_size + partial, list(talk)))
    return requests


def replay_request(
    cache: PrefixCache,
    blocks: BlockState,
    tokens: jax.Array,
    length: jax.Array,
    clock: jax.Array,
    capacity: int,
    eviction: Eviction | None = None,
) -> tuple[PrefixCache, BlockState, jax.Array]:
    """Processes one request.

    Args:
      cache: The prefix cache.
      blocks: The block manager, with one empty row. The pool has space for a prompt
        beside `capacity` cached blocks.
      tokens: i32[1, M], hash ids of the prompt.
      length: i32[], their number.
      clock: i32[], time of the request.
      capacity: Blocks that the cache keeps.
      eviction: Which blocks are evicted; None: the least recently used.

    Returns:
      The cache, the blocks with an empty row, and the number of hits, i32[].
    """
    (num_blocks,) = blocks.ref_counts.shape
    paths, lens = prefix_cache.match(cache, tokens, length[None])
    is_block = paths[0] != NO_BLOCK
    index = jnp.where(is_block, paths[0], num_blocks)
    before = blocks.ref_counts
    blocks = dataclasses.replace(
        blocks,
        block_tables=paths,
        ref_counts=blocks.ref_counts.at[index].add(1, mode="drop"),
        context_lens=lens,
    )
    cache = prefix_cache.count_uses(cache, before, blocks.ref_counts)
    # `append` must not allocate cached blocks, so it sees them as blocks in use.
    is_node = prefix_cache.is_cached(cache).astype(jnp.int32)
    counted = dataclasses.replace(blocks, ref_counts=blocks.ref_counts + is_node)
    counted, _ = block_manager.append(counted, length[None] - lens)
    blocks = dataclasses.replace(counted, ref_counts=counted.ref_counts - is_node)
    cache, blocks = prefix_cache.insert(cache, blocks, tokens, clock)
    cache = prefix_cache.touch(cache, blocks.ref_counts, clock)
    blocks = block_manager.free(blocks, jnp.ones((1,), jnp.bool_))
    needed = num_blocks - capacity
    cache = prefix_cache.evict(cache, blocks.ref_counts, needed, eviction)
    return cache, blocks, lens[0]


@functools.partial(
    jax.jit, static_argnames=("capacity", "policy"), donate_argnums=(0, 1)
)
def replay_requests(
    cache: PrefixCache,
    blocks: BlockState,
    tokens: jax.Array,
    lengths: jax.Array,
    clock: jax.Array,
    parameters: jax.Array,
    capacity: int,
    policy: EvictionPolicy | None,
) -> tuple[PrefixCache, BlockState, jax.Array]:
    """Applies `replay_request` to requests in order.

    `tokens` is i32[R, M], `lengths` and the returned hits are i32[R], and `parameters`
    are those of the policy, f32[P].
    """

    def body(
        number: jax.Array, carry: tuple[PrefixCache, BlockState, jax.Array]
    ) -> tuple[PrefixCache, BlockState, jax.Array]:
        cache, blocks, hits = carry
        one, now = lax.dynamic_slice_in_dim(tokens, number, 1), clock + number
        eviction = None if policy is None else Eviction(policy, parameters, now)
        cache, blocks, found = replay_request(
            cache, blocks, one, lengths[number], now, capacity, eviction
        )
        return cache, blocks, hits.at[number].set(found)

    carry = (cache, blocks, jnp.zeros_like(lengths))
    return lax.fori_loop(0, lengths.size, body, carry)


def measure_capacity(
    requests: Sequence[Prompt], capacity: int, block_size: int
) -> tuple[CacheRatios, np.ndarray]:
    """Replays a trace; returns the ratios and the hits of each request, i32[R]."""
    prompts = [request.hash_ids for request in requests]
    hits, seconds, compile_s = replay_prompts(prompts, capacity)
    optimum = belady_hits(prompts, capacity)
    num_lookups = sum(len(request.hash_ids) for request in requests)
    lengths = np.array([request.input_length for request in requests], np.int64)
    tokens = np.minimum(hits.astype(np.int64) * block_size, lengths)
    ratios = CacheRatios(
        capacity_blocks=capacity,
        block_hit_ratio=float(hits.sum()) / max(num_lookups, 1),
        token_hit_ratio=float(tokens.sum()) / max(int(lengths.sum()), 1),
        optimal_block_hit_ratio=float(optimum.sum()) / max(num_lookups, 1),
        num_requests=len(requests),
        num_lookups=num_lookups,
        seconds=seconds,
        compile_s=compile_s,
        lookups_per_s=num_lookups / seconds,
    )
    return ratios, hits


def replay_prompts(
    prompts: Sequence[Sequence[int]],
    capacity: int,
    policy: EvictionPolicy | None = None,
    parameters: Sequence[float] = (),
) -> tuple[np.ndarray, float, float]:
    """Replays prompts through a cache of `capacity` blocks.

    Args:
      prompts: Hash ids of each prompt.
      capacity: Blocks that the cache keeps.
      policy: Which blocks are evicted; None: the least recently used.
      parameters: Of the policy; others compile nothing.

    Returns:
      Hits of each prompt, i32[R]; seconds without compilation; seconds to compile.
    """
    longest = max([1, *map(len, prompts)])
    blocks = block_manager.init_state(
        num_blocks=capacity + longest,
        block_size=1,
        max_seqs=1,
        max_blocks_per_seq=longest,
    )
    cache = prefix_cache.init_prefix_cache(capacity + longest, 1, policy is not None)
    begin = time.perf_counter()
    # Prompts without blocks fill the last piece up; they change nothing.
    empty = np.zeros((REQUESTS_PER_CALL, longest), np.int32)
    none = np.zeros((REQUESTS_PER_CALL,), np.int32)
    numbers = jnp.array(parameters, jnp.float32)
    options = dict(capacity=capacity, policy=policy)
    # Does nothing, but compiles.
    cache, blocks, _ = replay_requests(
        cache, blocks, empty, none, np.int32(0), numbers, **options
    )
    jax.block_until_ready(blocks)
    compile_s = time.perf_counter() - begin

    hits = []
    begin = time.perf_counter()
    for start, tokens, lengths in _pieces(prompts, empty, capacity):
        cache, blocks, found = replay_requests(
            cache, blocks, tokens, lengths, np.int32(start), numbers, **options
        )
        hits.append(np.asarray(found))
    seconds = time.perf_counter() - begin
    wrong = prefix_cache.violations(cache, blocks)
    assert not wrong, wrong[:3]
    return np.concatenate(hits)[: len(prompts)], seconds, compile_s


def _pieces(
    prompts: Sequence[Sequence[int]], empty: np.ndarray, capacity: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields equal pieces of the prompts: start, tokens, lengths; shows progress."""
    with tqdm(
        total=len(prompts), desc=f"{capacity} blocks", unit="request", disable=None
    ) as bar:
        for start in range(0, len(prompts), len(empty)):
            piece = prompts[start : start + len(empty)]
            tokens, lengths = empty.copy(), np.zeros((len(empty),), np.int32)
            for row, prompt in enumerate(piece):
                tokens[row, : len(prompt)] = prompt
                lengths[row] = len(prompt)
            yield start, tokens, lengths
            bar.update(len(piece))


def checked_flags() -> tuple[list[Prompt], list[int]]:
    """The requests and the capacities.

    Raises:
      OSError: The trace cannot be read.
      ValueError: A flag or the trace is invalid.
    """
    capacities = [int(one) for one in FLAGS.capacity_blocks if one.isdecimal()]
    if (
        len(capacities) != len(FLAGS.capacity_blocks)
        or not capacities
        or min(capacities) < 1
        or max(capacities) > MOST_BLOCKS
    ):
        raise ValueError(
            f"--capacity_blocks: expected integers from 1 to {MOST_BLOCKS}, "
            f"got {','.join(FLAGS.capacity_blocks)!r}"
        )
    if FLAGS.trace is not None:
        return read_prompts(FLAGS.trace), capacities
    count, size = FLAGS.num_requests, FLAGS.block_size
    return synthetic_trace(count, size, FLAGS.seed), capacities


def plot_ratios(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draws the hit ratios of blocks and tokens against the capacity."""
    names = {"blocks": "block_hit_ratio", "tokens": "token_hit_ratio"}
    curves = {
        name: [(row["capacity_blocks"], row[key]) for row in rows]
        for name, key in names.items()
    }
    best = [(row["capacity_blocks"], row["optimal_block_hit_ratio"]) for row in rows]
    style.save(plot.hit_ratio(curves, optimum=best).figure, path)


def main(argv: list[str]) -> None:
    """Replays the trace at all capacities and prints the results."""
    del argv
    with runner.user_errors("prefix_cache", EOFError):
        requests, capacities = checked_flags()
    num_blocks = sum(len(request.hash_ids) for request in requests)
    print(f"{len(requests)} requests, {num_blocks} blocks")
    names = ("capacity", "blocks hit", "tokens hit", "optimum", "seconds", "lookups/s")
    print("".join(f"{name:>12}" for name in names), flush=True)
    rows = []
    for capacity in capacities:
        one, _ = measure_capacity(requests, capacity, FLAGS.block_size)
        rows.append(dataclasses.asdict(one))
        print(
            f"{one.capacity_blocks:>12}{one.block_hit_ratio:>12.4f}"
            f"{one.token_hit_ratio:>12.4f}{one.optimal_block_hit_ratio:>12.4f}"
            f"{one.seconds:>12.2f}{one.lookups_per_s:>12.0f}",
            flush=True,
        )
    if FLAGS.plot is not None:
        plot_ratios(rows, FLAGS.plot)
    # The top level has the figures of the last capacity, "rows" those of all.
    flag_values = runner.flag_values(__name__)
    runner.print_json({**rows[-1], "rows": rows, "flags": flag_values})


if __name__ == "__main__":
    runner.start(main, define_flags)
