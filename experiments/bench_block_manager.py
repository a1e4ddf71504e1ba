"""Benchmarks the block manager: append, fork, free and truncate by pool size.

    python -m experiments.bench_block_manager --num_blocks 1024,16384,131072

Each operation has two medians. "call" is one jitted call from Python that donates its
state, until the result is ready. "in loop" is one iteration of a `lax.while_loop` of
`--iterations` inside one program; the engine runs it this way. "bound" is the time to
read and write the state once at the memory bandwidth measured in the same run.

Time: about a minute on two CPU cores. Aim there: under 500 us at 256 rows and 16,384
blocks.

The pool is half full, with blocks in random order, and every row holds about a quarter
of its table. Operations:
  decode        every row appends one token (one row in block_size opens a block)
  fork_identity parents are the rows themselves, as after greedy decoding or sampling
  fork          every row continues another row, as when beams are reordered
  decode+fork   a step of beam search: copies, new blocks, then the reordering
  prefill       one row in 16 appends `--prefill_tokens`, then all rows are truncated
                to their first lengths
  grow_all      every row opens four blocks, more than a step's token budget allows,
                which uses the larger search for free blocks; then truncated likewise
  readmit       one row in eight is freed and gets its first block again
  truncate      every row removes one token
  exclusive     the blocks that preempting each row would free, with all rows sharing
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from experiments.lib import runner
from jpaged.kv import block_manager
from jpaged.kv.block_manager import NO_BLOCK, BlockState

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_integer("rows", 256, "Rows (sequences) of the state.", lower_bound=8)
    flags.DEFINE_list("num_blocks", ["1024", "16384", "131072"], "Pool sizes.")
    flags.DEFINE_integer("max_blocks_per_seq", 128, "Columns of the block tables.")
    flags.DEFINE_integer("block_size", 16, "Tokens per block.")
    flags.DEFINE_integer("prefill_tokens", 512, "Tokens per row in `prefill`.")
    flags.DEFINE_list("operations", [], "Names of operations to time; default: all.")
    flags.DEFINE_integer("iterations", 100, "Iterations of the while_loop.")
    flags.DEFINE_integer(
        "repeats", 15, "Timed runs of the loop; calls are timed 10 times as often."
    )
    flags.DEFINE_integer("seed", 0, "Seed of the order of the blocks.")


Operation = Callable[[BlockState], BlockState]


def half_full_state(
    num_blocks: int, rows: int, max_blocks_per_seq: int, block_size: int, seed: int
) -> BlockState:
    """A state whose rows use at most half the pool, in random order.

    The last blocks of the rows are filled to different degrees.
    """
    rng = np.random.default_rng(seed)
    used = max(1, min(max_blocks_per_seq // 4, num_blocks // (2 * rows)))
    tables = np.full((rows, max_blocks_per_seq), NO_BLOCK, np.int32)
    tables[:, :used] = rng.permutation(num_blocks)[: rows * used].reshape(rows, used)
    ref_counts = np.zeros((num_blocks,), np.int32)
    ref_counts[tables[:, :used]] = 1
    lengths = (used - 1) * block_size + 1 + np.arange(rows) % block_size
    state = BlockState(
        ref_counts=jnp.asarray(ref_counts),
        block_tables=jnp.asarray(tables),
        context_lens=jnp.asarray(lengths, jnp.int32),
        block_size=block_size,
    )
    assert not block_manager.violations(state)
    return state


def timed_operations(
    rows: int, prefill_tokens: int, start: BlockState
) -> dict[str, Operation]:
    """The operations. Each returns a state on which it can be applied again."""
    index = jnp.arange(rows, dtype=jnp.int32)
    one = jnp.ones((rows,), jnp.int32)
    neighbour = jnp.roll(index, 1)
    eighth = index % 8 == 0
    prompts = jnp.where(index % 16 == 0, prefill_tokens, 0)

    def append(num_tokens: jax.Array, state: BlockState) -> BlockState:
        return block_manager.append(state, num_tokens)[0]

    def append_and_cut(num_tokens: jax.Array, state: BlockState) -> BlockState:
        return block_manager.truncate(append(num_tokens, state), start.context_lens)

    def reordered(state: BlockState) -> BlockState:
        # Both rows of a pair continue one row, so that half of the rows copy next.
        return block_manager.fork(state, neighbour // 2 * 2)

    def exclusive(state: BlockState) -> BlockState:
        # The result changes the next order, so that XLA can remove no iteration.
        counts = block_manager.exclusive_blocks(state, index + state.context_lens)
        lens = jnp.where(counts < 0, 0, state.context_lens)
        return dataclasses.replace(state, context_lens=lens)

    return {
        "decode": functools.partial(append, one),
        "fork_identity": lambda s: block_manager.fork(s, index),
        "fork": lambda s: block_manager.fork(s, neighbour),
        "decode+fork": lambda s: reordered(append(one, s)),
        "prefill": functools.partial(append_and_cut, prompts),
        "grow_all": functools.partial(append_and_cut, one * 4 * start.block_size),
        "readmit": lambda s: append(
            jnp.where(eighth, start.block_size, 0), block_manager.free(s, eighth)
        ),
        "truncate": lambda s: block_manager.truncate(s, s.context_lens - 1),
        "exclusive": exclusive,
    }


def median_us(run: Operation, state: BlockState, n: int) -> float:
    """Median time of `n` runs in us; each run gets a copy of `state` to donate."""
    times = []
    for _ in range(n + 2):
        copy = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        begin = time.perf_counter()
        jax.block_until_ready(run(copy))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:])) * 1e6


def in_loop(operation: Operation, iterations: int) -> Operation:
    """The operation repeated inside one program."""

    def run(state: BlockState) -> BlockState:
        _, state = lax.while_loop(
            lambda carry: carry[0] < iterations,
            lambda carry: (carry[0] + 1, operation(carry[1])),
            (jnp.int32(0), state),
        )
        return state

    return run


def bandwidth_bytes_per_s() -> float:
    """Bandwidth of copying 128 MB, counting bytes read and written."""
    x = jnp.zeros((32 * 2**20,), jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        x = jax.block_until_ready(add(x))
        times.append(time.perf_counter() - begin)
    return 2 * x.nbytes / min(times)


def measure_pool(num_blocks: int, bandwidth: float) -> list[dict[str, object]]:
    """Times every operation at one pool size.

    Args:
      num_blocks: Blocks of the pool.
      bandwidth: Memory bandwidth in bytes per second.
    """
    state = half_full_state(
        num_blocks, FLAGS.rows, FLAGS.max_blocks_per_seq, FLAGS.block_size, FLAGS.seed
    )
    bound = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / bandwidth * 1e6
    results: list[dict[str, object]] = []
    operations = timed_operations(FLAGS.rows, FLAGS.prefill_tokens, state)
    for name, operation in operations.items():
        if FLAGS.operations and name not in FLAGS.operations:
            continue
        if name == "exclusive":
            state = block_manager.fork(state, jnp.arange(FLAGS.rows) // 2 * 2)
        call = jax.jit(operation, donate_argnums=0)
        loop = jax.jit(in_loop(operation, FLAGS.iterations), donate_argnums=0)
        results.append(
            dict(
                num_blocks=num_blocks,
                operation=name,
                call_us=median_us(call, state, 10 * FLAGS.repeats),
                in_loop_us=median_us(loop, state, FLAGS.repeats) / FLAGS.iterations,
                bound_us=bound,
            )
        )
    return results


def main(argv: list[str]) -> None:
    """Times all operations and prints the results."""
    del argv
    with runner.user_errors("bench_block_manager"):
        pool_sizes = runner.positive_integers("num_blocks")
    bandwidth = bandwidth_bytes_per_s()
    print(
        f"{FLAGS.rows} rows, tables of {FLAGS.max_blocks_per_seq}, "
        f"{jax.devices()[0].device_kind}, {bandwidth / 1e9:.1f} GB/s, medians in us"
    )
    print(f"{'num_blocks':>10} {'operation':<18}{'call':>9}{'in loop':>9}{'bound':>9}")
    results = []
    for num_blocks in pool_sizes:
        for row in measure_pool(num_blocks, bandwidth):
            results.append(row)
            print(
                f"{row['num_blocks']:>10} {row['operation']:<18}"
                f"{row['call_us']:>9.1f}{row['in_loop_us']:>9.1f}{row['bound_us']:>9.1f}",
                flush=True,
            )
    runner.print_json(
        dict(
            flags=runner.flag_values(__name__),
            bandwidth_gb_per_s=bandwidth / 1e9,
            rows=results,
        )
    )


if __name__ == "__main__":
    runner.start(main, define_flags)
