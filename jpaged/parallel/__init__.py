"""Devices and processes: meshes, sharding rules, collectives, several hosts.

`mesh` creates and checks meshes, `sharding` has the rules that place arrays on them,
`collectives` are the operations between devices, and `distributed` (imported by its
own name) connects the processes of several hosts.
"""

from jpaged.parallel.collectives import (
    device_index,
    embed_tokens,
    gather_logits,
    select_kv_heads,
    sum_partials,
)
from jpaged.parallel.mesh import (
    AXES,
    REPLICAS,
    check_is_mesh,
    check_mesh,
    make_mesh,
    num_replicas,
)
from jpaged.parallel.sharding import (
    PAGES,
    PARTIAL_SUMS,
    RULES,
    STATE,
    param_sharding,
    partition_spec,
    split_tensor_axis,
    stored_kv_heads,
)

__all__ = [
    "AXES",
    "PAGES",
    "PARTIAL_SUMS",
    "REPLICAS",
    "RULES",
    "STATE",
    "check_is_mesh",
    "check_mesh",
    "device_index",
    "embed_tokens",
    "gather_logits",
    "make_mesh",
    "num_replicas",
    "param_sharding",
    "partition_spec",
    "select_kv_heads",
    "split_tensor_axis",
    "stored_kv_heads",
    "sum_partials",
]
