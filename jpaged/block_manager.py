"""Public name of the block manager, `jpaged.kv.block_manager`."""

from jpaged.kv.block_manager import (
    NO_BLOCK,
    Append,
    BlockState,
    adopt,
    append,
    blocks_needed,
    exclusive_blocks,
    fork,
    free,
    init_state,
    num_free_blocks,
    slots,
    truncate,
    violations,
)

__all__ = [
    "NO_BLOCK",
    "Append",
    "BlockState",
    "adopt",
    "append",
    "blocks_needed",
    "exclusive_blocks",
    "fork",
    "free",
    "init_state",
    "num_free_blocks",
    "slots",
    "truncate",
    "violations",
]
