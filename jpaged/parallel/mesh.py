"""Parallel: the mesh of devices, which part of each array lies where, who sums what.

Place on the road: checkpoint -> [parallel] -> parameters, pages on their devices.

Matrices come in pairs: the first is split over its outputs, the second over its inputs,
so that between the two no device needs what another has, and after the second one sum
over all devices is enough: two a layer. Pages are split by kv heads, beside the query
heads that read them. All else is whole everywhere: every device schedules and samples
for itself, and all do the same.

Source: Shoeybi et al. 2019, section 3, https://arxiv.org/abs/1909.08053; Kwon et al.
2023, section 4.6, https://arxiv.org/abs/2309.06180.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AnyMesh = TypeVar("AnyMesh", Mesh, AbstractMesh)

# Outermost first: the devices of one `tensor` group, which talk most, are neighbours.
AXES = ("data", "expert", "tensor")

# Array, and the axis of the mesh that splits each of its axes; () is whole on every
# device, as all of these are along `data`. Weights are [in, out], of experts [experts,
# in, out]; biases and scales [out] go with the last axis of their weight.
RULES: Mapping[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", None),  # [vocabulary, hidden]
    "output": (None, "tensor"),
    "output.rows": ("tensor", None),  # the same, [vocabulary, hidden]
    "attention.query": (None, "tensor"),  # out: heads
    "attention.key": (None, "tensor"),  # out: kv heads, see `param_sharding`
    "attention.value": (None, "tensor"),
    "attention.sinks": ("tensor",),  # [heads]
    "attention.out": ("tensor", None),
    "mlp.gate": (None, "tensor"),
    "mlp.up": (None, "tensor"),
    "mlp.down": ("tensor", None),
    "experts.gate": ("expert", None, "tensor"),
    "experts.up": ("expert", None, "tensor"),
    "experts.down": ("expert", "tensor", None),
    "experts.router": (),
    "position_embedding": (),
    "project_in": (),
    "project_out": (),
    "attention_norm": (),
    "attention_out_norm": (),
    "attention.query_norm": (),
    "attention.key_norm": (),
    "mlp_norm": (),
    "mlp_out_norm": (),
    "final_norm": (),
}

# The same of the engine's state and of what a step computes. What is split over
# `tensor` or `expert` is never sent; a partial sum is summed over the axes named.
# Replicas' blocks lie side by side; of all else in the state, where `data` is more than
# one, they are the first axis. Nothing is summed or sent from one to another.
REPLICAS = "data"
PAGES = (None, "data", "tensor")  # [L, N, kv heads, P, D], swapped ones too
STATE = ()  # block tables, requests, counters, ...
LOGITS = (None, "tensor")  # [N, V], gathered for the sampler
PARTIAL_SUMS: Mapping[str, tuple[str, ...]] = {
    "embedding": ("tensor",),  # each device looks up the tokens of its rows
    "attention.out": ("tensor",),
    "mlp.down": ("tensor",),
    "experts.down": ("expert", "tensor"),
}


def make_mesh(tensor: int = 1, data: int = 1, expert: int = 1) -> Mesh:
    """Mesh over the first tensor * data * expert visible devices.

    Args:
      tensor: devices that share each matrix.
      data: replicas of the model, each with pages and a schedule of its own.
      expert: devices that share the experts.

    Raises:
      ValueError: a size that is no integer above 0, or more devices than there are.
    """
    sizes = {"tensor": tensor, "expert": expert, "data": data}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: wanted an integer of at least 1, got {size!r}")
    devices = jax.devices()
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        fitting, left = [], len(devices)
        for name, size in sizes.items():
            size = min(size, left)
            left //= size
            fitting.append(f"{name}={size}")
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"make_mesh: wanted at most the {len(devices)} visible devices, got "
            f"{asked}, in all {wanted}; {', '.join(fitting)} would work (for CPUs, "
            f"start with XLA_FLAGS=--xla_force_host_platform_device_count={wanted})"
        )
    return jax.make_mesh(
        tuple(sizes[name] for name in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:wanted],
    )


def check_is_mesh(mesh: Mesh) -> None:
    """Raises ValueError for what is no mesh of `make_mesh`."""
    is_ours = isinstance(mesh, Mesh) and mesh.axis_names == AXES
    if not is_ours or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"mesh: wanted one of jpaged.make_mesh, with the axes {AXES} (Auto), "
            f"got {mesh!r:.200}"
        )
    owners = {device.process_index for device in mesh.devices.flat}
    idle = sorted(set(range(jax.process_count())) - owners)
    if idle and owners != {jax.process_index()}:
        raise ValueError(
            "mesh: wanted devices of every process, or this one's alone, got none of "
            f"{', '.join(f'process {n}' for n in idle)}; a mesh of all "
            f"{jax.device_count()} devices would work"
        )
    if len(owners) > 1 and mesh.shape["data"] > 1:
        raise ValueError(
            "mesh: wanted data=1 where several processes share it, got data="
            f"{mesh.shape['data']}; replicas of several processes are not built: start "
            "a script for each, on devices of its own"
        )


def check_mesh(mesh: Mesh, split_sizes: Mapping[str, int], num_experts: int) -> None:
    """Raises ValueError where a model's matrices do not divide over a mesh.

    Args:
      mesh: of `make_mesh`.
      split_sizes: what `tensor` must divide, by name: heads, intermediate sizes.
      num_experts: what `expert` must divide; 0 where there are none.
    """
    check_is_mesh(mesh)
    tensor, expert = mesh.shape["tensor"], mesh.shape["expert"]
    common = math.gcd(*split_sizes.values())
    if common % tensor:
        sizes = ", ".join(f"{name}={size}" for name, size in split_sizes.items())
        raise ValueError(
            f"mesh: wanted a `tensor` that divides {sizes}, got tensor={tensor}; "
            f"{_divisors(common, tensor)} would work"
        )
    if (num_experts or 1) % expert:
        raise ValueError(
            f"mesh: wanted an `expert` that divides the {num_experts} experts of the "
            f"model, got expert={expert}; {_divisors(num_experts or 1, expert)} "
            "would work"
        )


def _divisors(number: int, most: int) -> str:
    return " or ".join(str(n) for n in range(1, most) if number % n == 0)


def num_replicas(mesh: Mesh | None) -> int:
    """How many engines there are on a mesh, or without one."""
    return 1 if mesh is None else mesh.shape[REPLICAS]


def cut(mesh: AnyMesh) -> AnyMesh:
    """The same devices in the same order, `tensor` cut into axes of prime sizes.

    So arrays can be split over a part of `tensor`, and be the same within each group.
    """
    primes = _primes(mesh.shape["tensor"])
    names = (*AXES, *(f"tensor_{i}" for i in range(1, len(primes))))
    shape = (*(mesh.shape[axis] for axis in AXES[:-1]), *primes)
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, names, axis_types=types)
    return Mesh(mesh.devices.reshape(shape), names, axis_types=types)


def _primes(number: int) -> list[int]:
    """Its prime factors, the smallest first; of 1 [1]."""
    for prime in range(2, number + 1):
        if number % prime == 0:
            rest = number // prime
            return [prime] if rest == 1 else [prime, *_primes(rest)]
    return [1]


def axes(mesh: Mesh | AbstractMesh, axis: str | None) -> tuple[str, ...]:
    """What an axis of `AXES` is called on a mesh of `cut`."""
    is_tensor = axis == "tensor"
    return tuple(
        name
        for name in mesh.axis_names
        if name == axis or (is_tensor and name.startswith("tensor_"))
    )


def spec(mesh: Mesh, rule: Sequence[str | None]) -> PartitionSpec:
    """A row of the rules as JAX wants it, on a mesh of `cut`.

    Without axes of one device: XLA gives none of these back, and to JAX an array that
    lies elsewhere is another program.
    """
    split = ([a for a in axes(mesh, name) if mesh.shape[a] > 1] for name in rule)
    return PartitionSpec(*(tuple(names) or None for names in split))


def stored_kv_heads(num_kv_heads: int, tensor: int) -> int:
    """Kv heads in the pages: each as often as devices of other groups read it.

    2 heads on 8 devices are stored four times each, 3 on 2 twice.
    """
    return math.lcm(num_kv_heads, tensor)


def param_sharding(
    mesh: Mesh | AbstractMesh,
    path: Sequence[str | int],
    shape: Sequence[int],
    num_kv_heads: int,
) -> NamedSharding:
    """Where a parameter lies, by `RULES`.

    Where `tensor` does not divide the kv heads, they are split into as many parts as
    both divide by, and each part lies on a group of neighbours: 2 heads on 8 devices
    are 2 parts with 4 copies, beside the query heads that read them; 3 on 2 devices
    are whole on both. A vocabulary that does not divide is whole on every device.

    Args:
      mesh: of `make_mesh`.
      path: attribute names and list indices from the decoder to the parameter.
      shape: of the parameter.
      num_kv_heads: of the model.
    """
    names = [str(name) for name in (path[2:] if path[0] == "layers" else path)]
    kind = names.pop() if names[-1] in ("weight", "bias", "scale") else "weight"
    module = ".".join(names)
    rule = RULES[module]
    if kind != "weight" and rule:
        rule = (*rule[:-2], rule[-1])  # without the axis that is summed over
    mesh = cut(mesh)
    split = [axes(mesh, axis) for axis in rule]
    if module in ("attention.key", "attention.value"):
        split[-1] = _kv_axes(mesh, num_kv_heads)
    # What is left undivided after `check_mesh`: a vocabulary.
    split = [
        names if names and size % _size(mesh, names) == 0 else None
        for names, size in zip(split, shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*split))


def _size(mesh: Mesh | AbstractMesh, names: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _kv_axes(mesh: Mesh | AbstractMesh, num_kv_heads: int) -> tuple[str, ...]:
    """The first axes of a cut `tensor` whose devices together divide the kv heads."""
    names = axes(mesh, "tensor")
    while num_kv_heads % _size(mesh, names):
        names = names[:-1]
    return names


# What a device does inside of `shard_map`, and nowhere else: outside of it, as in the
# plain forward, these functions give back what they get.


def _manual_mesh() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    is_ours = mesh.axis_names[: len(AXES)] == AXES
    return mesh if is_ours and AxisType.Manual in mesh.axis_types else None


def summed(x: jax.Array, part: str) -> jax.Array:
    """A partial result of `PARTIAL_SUMS`, summed over the devices that have parts."""
    mesh = _manual_mesh()
    if mesh is None:
        return x
    names = [
        name
        for axis in PARTIAL_SUMS[part]
        for name in axes(mesh, axis)
        if mesh.shape[name] > 1
    ]
    return lax.psum(x, tuple(names)) if names else x


def index(axis: str) -> jax.Array | int:
    """Which part along an axis of `AXES` this device has."""
    mesh = _manual_mesh()
    return 0 if mesh is None else lax.axis_index(axes(mesh, axis))


def look_up(table: jax.Array, tokens: jax.Array, vocab_size: int) -> jax.Array:
    """Rows [T, E] of an embedding [V, E], of which each device may have a part."""
    num_rows = table.shape[0]
    if num_rows == vocab_size:
        return table[tokens]
    own = tokens - index("tensor") * num_rows
    is_mine = (own >= 0) & (own < num_rows)
    rows = table[jnp.where(is_mine, own, 0)]
    return summed(jnp.where(is_mine[:, None], rows, jnp.zeros_like(rows)), "embedding")


def gathered_logits(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits [N, V] of the devices' parts of the vocabulary."""
    mesh = _manual_mesh()
    if mesh is None or logits.shape[-1] == vocab_size:
        return logits
    names = axes(mesh, LOGITS[-1])
    return lax.all_gather(logits, names, axis=logits.ndim - 1, tiled=True)


def own_kv_heads(heads: jax.Array, num_kv_heads: int) -> jax.Array:
    """Of keys or values [T, K, D] those [T, stored / tensor, D] that are stored here.

    Where `tensor` divides the kv heads, all that it has. Otherwise its query heads may
    read one of them more often than another, so one may be there twice.
    """
    mesh = _manual_mesh()
    if mesh is None:
        return heads
    tensor = _size(mesh, axes(mesh, "tensor"))
    stored = stored_kv_heads(num_kv_heads, tensor)
    number, copies = stored // tensor, stored // num_kv_heads
    num_held = heads.shape[1]
    if num_held == number and 1 in (number, copies):
        return heads
    device = index("tensor")
    first = device // (tensor * num_held // num_kv_heads) * num_held
    wanted = (device * number + jnp.arange(number, dtype=jnp.int32)) // copies
    return heads[:, wanted - first]
