"""Admission of requests whose cached prefixes are the same blocks."""

import dataclasses

import jax.numpy as jnp
import pytest

from jpaged import block_manager, scheduler
from jpaged.config import EngineConfig
from jpaged.scheduler import WAITING

CACHED, KNOWN = 5, 7  # blocks of 4 tokens: cached ones, and those of 28 tokens


@pytest.mark.parametrize(
    ("tables", "distinct"),
    [
        ([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], 9),
        ([[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]], 10),
        ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 14),
    ],
    ids=["all", "all but one", "none"],
)
def test_a_cached_block_of_several_requests_is_counted_once(tables, distinct):
    def num_admitted(num_blocks):
        config = EngineConfig(
            num_blocks=num_blocks,
            block_size=4,
            max_num_seqs=2,
            max_model_len=32,
            max_num_batched_tokens=64,
            max_num_requests=2,
            watermark=0.0,
        )
        lens = jnp.full(2, 4 * KNOWN)
        queue = dataclasses.replace(
            scheduler.init_queue(2),
            status=jnp.full(2, WAITING),
            prompt_lens=lens,
            num_tokens=lens,
            arrivals=jnp.arange(2, dtype=jnp.int32),
        )
        blocks = block_manager.init_state(
            num_blocks=num_blocks, block_size=4, max_seqs=2, max_blocks_per_seq=8
        )
        padded = [table + [0] * (8 - len(table)) for table in tables]
        hits = scheduler.Hits(jnp.array(padded, jnp.int32), jnp.full(2, 4 * CACHED))
        rows = jnp.full((2,), scheduler.NO_REQUEST)
        _, rows, _, plan = scheduler.schedule(queue, rows, blocks, config, hits)
        assert plan.num_tokens.tolist() == [
            4 * (KNOWN - CACHED) * (row >= 0) for row in rows.tolist()
        ]
        return int(plan.num_admitted)

    assert num_admitted(distinct) == 2
    assert num_admitted(distinct - 1) == 1
