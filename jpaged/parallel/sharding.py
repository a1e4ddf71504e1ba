"""Sharding rules: which part of each array is on which device.

Pipeline: checkpoint -> [sharding] -> parameters and pages on their devices.

Matrices come in pairs: the first is split over its outputs, the second over its inputs.
Between the two, no device needs data of another; after the second, one sum over all
devices is enough. That makes two sums per layer. Pages are split by KV heads, on the
same devices as the query heads that read them. Everything else is replicated: every
device schedules and samples for itself, with the same result.

Source: Shoeybi et al. 2019, section 3, https://arxiv.org/abs/1909.08053; Kwon et al.
2023, section 4.6, https://arxiv.org/abs/2309.06180.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jpaged.parallel.mesh import AXES

AnyMesh = TypeVar("AnyMesh", Mesh, AbstractMesh)

# For each array, the mesh axis that splits each of its axes; () is replicated. All of
# these arrays are replicated over `data`. Weights are [in, out], weights of experts
# [experts, in, out]; biases and scales [out] follow the last axis of their weight.
RULES: Mapping[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", None),  # [vocabulary, hidden]
    "output": (None, "tensor"),
    "output.rows": ("tensor", None),  # the same as [vocabulary, hidden]
    "attention.query": (None, "tensor"),  # out: heads
    "attention.key": (None, "tensor"),  # out: KV heads, see `param_sharding`
    "attention.value": (None, "tensor"),
    "attention.sinks": ("tensor",),  # [heads]
    "attention.out": ("tensor", None),
    "attention.query_down": (),
    "attention.query_up": (None, "tensor"),
    "attention.latent": (),  # one for all heads
    "attention.key_up": ("tensor", None, None),  # [heads, nope_dim, rank]
    "attention.value_up": ("tensor", None, None),  # [heads, value_dim, rank]
    "mlp.gate": (None, "tensor"),
    "mlp.up": (None, "tensor"),
    "mlp.down": ("tensor", None),
    "experts.gate": ("expert", None, "tensor"),
    "experts.up": ("expert", None, "tensor"),
    "experts.down": ("expert", "tensor", None),
    "experts.router": (),
    "experts.correction": (),
    "experts.shared.gate": (None, "tensor"),
    "experts.shared.up": (None, "tensor"),
    "experts.shared.down": ("tensor", None),
    "position_embedding": (),
    "project_in": (),
    "project_out": (),
    "attention_norm": (),
    "attention_out_norm": (),
    "attention.query_norm": (),
    "attention.key_norm": (),
    "attention.query_down_norm": (),
    "attention.latent_norm": (),
    "mlp_norm": (),
    "mlp_out_norm": (),
    "final_norm": (),
}

# The same for the engine's state and for intermediate results of a step. Arrays that
# are split over `tensor` or `expert` are never sent; a partial sum is summed over the
# axes named here. With several replicas, the blocks of all replicas are one axis of the
# pages, and every other array of the state has the replicas as its first axis. Replicas
# exchange no data.
PAGES = (None, "data", "tensor")  # [L, N, KV heads, P, D], also in the host pool
STATE = ()  # block tables, requests, counters, ...
LOGITS = (None, "tensor")  # [N, V], gathered for the sampler
PARTIAL_SUMS: Mapping[str, tuple[str, ...]] = {
    "embedding": ("tensor",),  # each device looks up the tokens of its vocabulary rows
    "attention.out": ("tensor",),
    "mlp.down": ("tensor",),
    "experts.down": ("expert", "tensor"),
}


def split_tensor_axis(mesh: AnyMesh) -> AnyMesh:
    """Return the same devices in the same order, with `tensor` split into prime sizes.

    Arrays can then be split over a part of `tensor` and replicated within each group.
    """
    primes = _primes(mesh.shape["tensor"])
    names = (*AXES, *(f"tensor_{i}" for i in range(1, len(primes))))
    shape = (*(mesh.shape[axis] for axis in AXES[:-1]), *primes)
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, names, axis_types=types)
    return Mesh(mesh.devices.reshape(shape), names, axis_types=types)


def _primes(number: int) -> list[int]:
    """Return the prime factors in ascending order; [1] for 1."""
    for prime in range(2, number + 1):
        if number % prime == 0:
            rest = number // prime
            return [prime] if rest == 1 else [prime, *_primes(rest)]
    return [1]


def split_axis_names(mesh: Mesh | AbstractMesh, axis: str | None) -> tuple[str, ...]:
    """Return the names of an axis of `AXES` on a mesh of `split_tensor_axis`."""
    is_tensor = axis == "tensor"
    return tuple(
        name
        for name in mesh.axis_names
        if name == axis or (is_tensor and name.startswith("tensor_"))
    )


def axis_size(mesh: Mesh | AbstractMesh, names: Sequence[str]) -> int:
    """Return the product of the sizes of some axes."""
    return math.prod(mesh.shape[name] for name in names)


def partition_spec(mesh: Mesh, rule: Sequence[str | None]) -> PartitionSpec:
    """Return a rule as a JAX PartitionSpec, on a mesh of `split_tensor_axis`.

    Axes of size 1 are left out: XLA returns arrays without them, and JAX compiles
    another program for an array with another sharding.
    """
    split = (
        [a for a in split_axis_names(mesh, name) if mesh.shape[a] > 1] for name in rule
    )
    return PartitionSpec(*(tuple(names) or None for names in split))


def stored_kv_heads(num_kv_heads: int, tensor: int) -> int:
    """Return the KV heads in the pages, copies included.

    Each head is stored once for each group of devices that reads it: 2 heads on 8
    devices are stored four times each, 3 heads on 2 devices twice.
    """
    return math.lcm(num_kv_heads, tensor)


def param_sharding(
    mesh: AnyMesh,
    path: Sequence[str | int],
    shape: Sequence[int],
    num_kv_heads: int,
) -> NamedSharding:
    """Return the sharding of a parameter by `RULES`.

    If `tensor` does not divide the KV heads, they are split into as many parts as
    divide both, and each part is replicated over a group of neighbouring devices: 2
    heads on 8 devices are 2 parts with 4 copies, on the devices with the query heads
    that read them; 3 heads on 2 devices are replicated on both. A vocabulary that
    `tensor` does not divide is replicated on every device.

    Args:
      mesh: a mesh of `make_mesh`.
      path: attribute names and list indices from the decoder to the parameter.
      shape: shape of the parameter.
      num_kv_heads: KV heads of the model.
    """
    names = [str(name) for name in (path[2:] if path[0] == "layers" else path)]
    kind = names.pop() if names[-1] in ("weight", "bias", "scale") else "weight"
    module = ".".join(names)
    rule = RULES[module]
    if kind != "weight" and rule:
        rule = (*rule[:-2], rule[-1])  # without the input axis
    mesh = split_tensor_axis(mesh)
    split = [split_axis_names(mesh, axis) for axis in rule]
    if module in ("attention.key", "attention.value"):
        split[-1] = _kv_axes(mesh, num_kv_heads)
    # After `check_mesh`, only a vocabulary can be indivisible.
    split = [
        names if names and size % axis_size(mesh, names) == 0 else None
        for names, size in zip(split, shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*split))


def _kv_axes(mesh: Mesh | AbstractMesh, num_kv_heads: int) -> tuple[str, ...]:
    """Return the first parts of `tensor` whose sizes together divide the KV heads."""
    names = split_axis_names(mesh, "tensor")
    while num_kv_heads % axis_size(mesh, names):
        names = names[:-1]
    return names
