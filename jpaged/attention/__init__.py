"""Paged attention over KV pages, and page updates.

Shape symbols of this package and of the kernels: S batch rows (sequences of the step),
T query tokens of the step, N blocks of the pool, M blocks per sequence, P tokens per
block (block_size), H query heads, K key/value heads, G = H // K query heads per
key/value head, D head_dim, L layers.
"""

from jpaged.attention.api import copy_blocks as copy_blocks
from jpaged.attention.api import paged_attention as paged_attention
from jpaged.attention.api import write_kv as write_kv
from jpaged.attention.backends import IMPLEMENTATIONS as IMPLEMENTATIONS
from jpaged.attention.backends import Implementation as Implementation
from jpaged.xla.online_softmax import merge_states as merge_states
