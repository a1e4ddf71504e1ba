"""Devices and processes: meshes, sharding rules, several hosts."""

from jpaged.parallel.mesh import AXES as AXES
from jpaged.parallel.mesh import LOGITS as LOGITS
from jpaged.parallel.mesh import PAGES as PAGES
from jpaged.parallel.mesh import PARTIAL_SUMS as PARTIAL_SUMS
from jpaged.parallel.mesh import REPLICAS as REPLICAS
from jpaged.parallel.mesh import RULES as RULES
from jpaged.parallel.mesh import STATE as STATE
from jpaged.parallel.mesh import axes as axes
from jpaged.parallel.mesh import check_is_mesh as check_is_mesh
from jpaged.parallel.mesh import check_mesh as check_mesh
from jpaged.parallel.mesh import cut as cut
from jpaged.parallel.mesh import gathered_logits as gathered_logits
from jpaged.parallel.mesh import index as index
from jpaged.parallel.mesh import look_up as look_up
from jpaged.parallel.mesh import make_mesh as make_mesh
from jpaged.parallel.mesh import num_replicas as num_replicas
from jpaged.parallel.mesh import own_kv_heads as own_kv_heads
from jpaged.parallel.mesh import param_sharding as param_sharding
from jpaged.parallel.mesh import spec as spec
from jpaged.parallel.mesh import stored_kv_heads as stored_kv_heads
from jpaged.parallel.mesh import summed as summed
