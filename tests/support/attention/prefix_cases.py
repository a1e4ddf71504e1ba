"""Cases of rows that share prefixes, for attention that reads them once.

Tables are shuffled. Entries after a row's last block are garbage, often equal to those
of other rows. Slots and blocks that no row owns hold NaN.
"""

import jax.numpy as jnp
import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.kv.shared_prefix import SharedPrefix
from tests.support.attention import oracle
from tests.support.attention.oracle import Case


def filled_case(
    own: list[list[int]],
    lens: list[int],
    *,
    rng: np.random.Generator,
    width: int,
    num_blocks: int,
    queries: list[int] | None,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: str,
) -> Case:
    """Return the case of rows with these blocks and tokens; each slot is written once.

    `queries`: number of queries of each row, at most its tokens, followed by three
    queries that no row owns; or None.
    """
    tables = rng.integers(0, 4, (len(own), width))
    for row, mine in enumerate(own):
        tables[row, : len(mine)] = mine
    shape = (num_blocks, heads[1], block_size, head_dim)
    k_pages, v_pages = np.full((2, *shape), np.nan)
    for mine, length in zip(own, lens, strict=True):
        for position in range(length):
            at = mine[position // block_size], slice(None), position % block_size
            if np.isnan(k_pages[at]).any():
                k_pages[at] = rng.standard_normal(shape[1::2])
                v_pages[at] = rng.standard_normal(shape[1::2])
    starts, num_queries = None, len(own)
    if queries is not None:
        lengths = [min(n, length) for n, length in zip(queries, lens, strict=True)]
        starts = np.cumsum([0, *lengths]).astype(np.int32)
        num_queries = int(starts[-1]) + 3
    kind = oracle.DTYPES[dtype]
    return Case(
        q=rng.standard_normal((num_queries, heads[0], head_dim)).astype(kind),
        k_pages=k_pages.astype(kind),
        v_pages=v_pages.astype(kind),
        block_tables=tables.astype(np.int32),
        context_lens=np.array(lens, np.int32),
        query_start_loc=starts,
    )


def group_case(
    groups: dict[int, tuple[int, ...]],
    own_tokens: list[int],
    *,
    queries: list[int] | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 128,
    block_size: int = 16,
    dtype: str = "float32",
) -> tuple[Case, SharedPrefix]:
    """Return a case of rows with shared and own blocks, and their groups.

    Args:
      groups: by leader, the number of shared blocks and then the rows of the group,
        including the leader.
      own_tokens: tokens of each row after its shared blocks. A row without a group has
        only these, and may have 0.
      queries, heads, head_dim, block_size, dtype: as in `filled_case`.
    """
    rng = np.random.default_rng(0)
    num_rows = len(own_tokens)
    leaders, depths = list(range(num_rows)), [0] * num_rows
    for leader, (depth, *rows) in groups.items():
        for row in rows:
            leaders[row], depths[row] = leader, depth
    lens = [
        tokens + block_size * depth
        for tokens, depth in zip(own_tokens, depths, strict=True)
    ]
    used = [cdiv(length, block_size) for length in lens]
    order = iter(rng.permutation(sum(used) + 4).tolist())
    prefix = {
        leader: [next(order) for _ in range(depth)]
        for leader, (depth, *_) in groups.items()
    }
    own = []
    for row, number in enumerate(used):
        start = prefix.get(leaders[row], [])[: depths[row]]
        own.append([*start, *(next(order) for _ in range(number - len(start)))])
    case = filled_case(
        own,
        lens,
        rng=rng,
        width=max(used) + 2,
        num_blocks=sum(used) + 4,
        queries=queries,
        heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    shared = SharedPrefix(*(jnp.array(x, jnp.int32) for x in (leaders, depths)))
    return case, shared


# A group of 2 rows that are not neighbours, one of 5 (leader 3), and one of 8, more
# than a virtual row has with 16 heads per key/value head; rows alone, one of them idle.
GROUPS = {1: (2, 1, 6), 3: (1, 3, 4, 5, 8, 9), 10: (3, *range(10, 17))}
OWN_TOKENS = [40, 3, 0, 1, 20, 16, 35, 5, 16, 2, *[7, 1, 17, 32, 9, 4, 18]]
# Some rows of groups have chunks: they read alone, and the others still share. Rows
# alone have one query, several, and none.
QUERIES = [1, 5, 0, 1, 1, 9, 3, 4, 1, 1, *[1] * 7]
