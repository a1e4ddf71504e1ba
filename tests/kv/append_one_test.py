"""`append_one` is `append` of one token per row, where no block has to be copied."""

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.kv import block_manager

ROWS, BLOCKS, SIZE, WIDTH = 5, 11, 3, 4
APPEND, APPEND_ONE, FORK = map(
    jax.jit,
    (block_manager.append, block_manager.append_one, block_manager.fork),
)


def random_state(rng):
    """Rows of random lengths, some of which share blocks, and blocks that are kept."""
    state = block_manager.init_state(
        num_blocks=BLOCKS, block_size=SIZE, max_seqs=ROWS, max_blocks_per_seq=WIDTH
    )
    for _ in range(3):
        state, _ = APPEND(state, jnp.asarray(rng.integers(0, 5, ROWS), jnp.int32))
        if rng.random() < 0.3:
            parents = np.arange(ROWS)
            parents[rng.integers(ROWS)] = rng.integers(ROWS)
            state = FORK(state, jnp.asarray(parents, jnp.int32))
    return state, jnp.asarray(rng.random(BLOCKS) < 0.2)


def test_the_state_is_that_of_append_or_it_is_refused():
    counts = {"same": 0, "full": 0, "copy": 0, "kept": 0}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        state, kept = random_state(rng)
        rows = jnp.asarray(rng.random(ROWS) < 0.6)
        expected, appended = APPEND(state, rows.astype(jnp.int32), kept)
        found, ok = APPEND_ONE(state, rows, kept)
        if ok:
            counts["same"] += 1
            assert appended.ok
            assert (np.asarray(appended.copy_src) == block_manager.NO_BLOCK).all()
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        elif not appended.ok:
            counts["full"] += 1
        elif (np.asarray(appended.copy_dst) != block_manager.NO_BLOCK).any():
            counts["copy"] += 1
        else:  # a row writes into a block that the prefix cache keeps
            lens, tables = (
                np.asarray(state.context_lens),
                np.asarray(state.block_tables),
            )
            written = [
                tables[row, lens[row] // SIZE]
                for row in np.flatnonzero(rows)
                if lens[row] % SIZE
            ]
            assert np.asarray(kept)[written].any()
            counts["kept"] += 1
    assert min(counts.values()) > 5, counts
