"""Parallel: the mesh of devices, and which part of each parameter lies where on it.

Place on the road: checkpoint -> [parallel] -> parameters on their devices.

Matrices come in pairs: the first is split over its outputs, the second over its inputs,
so that between the two no device needs what another has, and after the second one sum
over all devices is enough.

Source: Shoeybi et al. 2019, section 3, https://arxiv.org/abs/1909.08053.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Outermost first: the devices of one `tensor` group, which talk most, are neighbours.
AXES = ("data", "expert", "tensor")

# Parameter, and the axis of the mesh that splits each axis of its weight; () is whole
# on every device, as everything is along `data`. Weights are [in, out], of experts
# [experts, in, out]; biases and scales [out] go with the last axis of their weight.
RULES: Mapping[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", None),  # [vocabulary, hidden]
    "output": (None, "tensor"),
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


def make_mesh(tensor: int = 1, data: int = 1, expert: int = 1) -> Mesh:
    """Mesh over the first tensor * data * expert visible devices.

    Args:
      tensor: devices that share each matrix.
      data: copies of the model.
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


def check_mesh(mesh: Mesh, split_sizes: Mapping[str, int], num_experts: int) -> None:
    """Raises ValueError where a model's matrices do not divide over a mesh.

    Args:
      mesh: of `make_mesh`.
      split_sizes: what `tensor` must divide, by name: heads, intermediate sizes.
      num_experts: what `expert` must divide; 0 where there are none.
    """
    is_ours = isinstance(mesh, Mesh) and mesh.axis_names == AXES
    if not is_ours or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"mesh: wanted one of jpaged.make_mesh, with the axes {AXES} (Auto), "
            f"got {mesh!r:.200}"
        )
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


def param_sharding(
    mesh: Mesh, path: Sequence[str | int], shape: Sequence[int], num_kv_heads: int
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
    spec = RULES[module]
    if kind != "weight" and spec:
        spec = (*spec[:-2], spec[-1])  # without the axis that is summed over
    if module in ("attention.key", "attention.value"):
        mesh = _grouped(mesh, math.gcd(num_kv_heads, mesh.shape["tensor"]))
    # What is left undivided after `check_mesh`: a vocabulary.
    spec = tuple(
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    )
    return NamedSharding(mesh, PartitionSpec(*spec))


def _grouped(mesh: Mesh, num_parts: int) -> Mesh:
    """The same devices in the same order, with `tensor` cut into parts and copies."""
    if num_parts == mesh.shape["tensor"]:
        return mesh
    devices: np.ndarray = mesh.devices
    return Mesh(
        devices.reshape(*devices.shape[:-1], num_parts, -1),
        (*AXES, "copies"),
        axis_types=(AxisType.Auto,) * (len(AXES) + 1),
    )
