"""The block manager's public API; its code is in `jpaged.kv.block_manager`."""

from jpaged.kv.block_manager import NO_BLOCK as NO_BLOCK
from jpaged.kv.block_manager import Append as Append
from jpaged.kv.block_manager import BlockState as BlockState
from jpaged.kv.block_manager import adopt as adopt
from jpaged.kv.block_manager import append as append
from jpaged.kv.block_manager import blocks_needed as blocks_needed
from jpaged.kv.block_manager import exclusive_blocks as exclusive_blocks
from jpaged.kv.block_manager import fork as fork
from jpaged.kv.block_manager import free as free
from jpaged.kv.block_manager import init_state as init_state
from jpaged.kv.block_manager import num_free_blocks as num_free_blocks
from jpaged.kv.block_manager import slots as slots
from jpaged.kv.block_manager import truncate as truncate
from jpaged.kv.block_manager import violations as violations
