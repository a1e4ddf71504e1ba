"""Paged attention over KV pages, and the page updates that go with it."""

from jpaged.attention.api import IMPLEMENTATIONS as IMPLEMENTATIONS
from jpaged.attention.api import Implementation as Implementation
from jpaged.attention.api import copy_blocks as copy_blocks
from jpaged.attention.api import merge_states as merge_states
from jpaged.attention.api import paged_attention as paged_attention
from jpaged.attention.api import write_kv as write_kv
