"""Meshes of devices: how they are created and checked.

Pipeline: [mesh] -> sharding -> parameters and pages on their devices.

Source: Shoeybi et al. 2019, section 3, https://arxiv.org/abs/1909.08053; Kwon et al.
2023, section 4.6, https://arxiv.org/abs/2309.06180.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh

# Outermost first: the devices of one `tensor` group communicate most, so they are
# neighbours.
AXES = ("data", "expert", "tensor")
REPLICAS = "data"  # the axis of replicas


def make_mesh(tensor: int = 1, data: int = 1, expert: int = 1) -> Mesh:
    """Return a mesh over the first tensor * data * expert visible devices.

    Args:
      tensor: devices that share each matrix.
      data: replicas of the model, each with its own pages and schedule.
      expert: devices that share the experts.

    Raises:
      ValueError: a size is not a positive integer, or there are too few devices.
    """
    sizes = {"tensor": tensor, "expert": expert, "data": data}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")
    devices = jax.devices()
    num_devices = math.prod(sizes.values())
    if num_devices > len(devices):
        fitting, left = [], len(devices)
        for name, size in sizes.items():
            size = min(size, left)
            left //= size
            fitting.append(f"{name}={size}")
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"make_mesh: expected at most the {len(devices)} visible devices, got "
            f"{given}, in total {num_devices}; {', '.join(fitting)} would work (for "
            "CPUs, start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={num_devices})"
        )
    return jax.make_mesh(
        tuple(sizes[name] for name in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:num_devices],
    )


def check_is_mesh(mesh: Mesh) -> None:
    """Check that a mesh was created by `make_mesh` and suits this process.

    Raises:
      ValueError: it has other axes, has no devices of some processes, or has replicas
        that several processes share.
    """
    is_ours = isinstance(mesh, Mesh) and mesh.axis_names == AXES
    if not is_ours or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"mesh: expected one of jpaged.make_mesh, with the axes {AXES} (Auto), "
            f"got {mesh!r:.200}"
        )
    owners = {device.process_index for device in mesh.devices.flat}
    idle = sorted(set(range(jax.process_count())) - owners)
    if idle and owners != {jax.process_index()}:
        raise ValueError(
            "mesh: expected devices of every process, or of this process alone, got "
            f"none of {', '.join(f'process {n}' for n in idle)}; a mesh of all "
            f"{jax.device_count()} devices would work"
        )
    if len(owners) > 1 and mesh.shape[REPLICAS] > 1:
        raise ValueError(
            "mesh: expected data=1 if several processes share it, got data="
            f"{mesh.shape[REPLICAS]}; replicas across processes are not supported: "
            "start one script per replica, on its own devices"
        )


def check_mesh(mesh: Mesh, split_sizes: Mapping[str, int], num_experts: int) -> None:
    """Check that a model's matrices can be divided over a mesh.

    Args:
      mesh: a mesh of `make_mesh`.
      split_sizes: sizes that `tensor` must divide, by name: heads, intermediate sizes.
      num_experts: the size that `expert` must divide; 0 if there are no experts.

    Raises:
      ValueError: a size cannot be divided; the message has the sizes that would work.
    """
    check_is_mesh(mesh)
    tensor, expert = mesh.shape["tensor"], mesh.shape["expert"]
    common = math.gcd(*split_sizes.values())
    if common % tensor:
        sizes = ", ".join(f"{name}={size}" for name, size in split_sizes.items())
        raise ValueError(
            f"mesh: expected a `tensor` that divides {sizes}, got tensor={tensor}; "
            f"{_divisors(common, tensor)} would work"
        )
    if (num_experts or 1) % expert:
        raise ValueError(
            f"mesh: expected an `expert` that divides the {num_experts} experts of the "
            f"model, got expert={expert}; {_divisors(num_experts or 1, expert)} "
            "would work"
        )


def _divisors(number: int, limit: int) -> str:
    return " or ".join(str(n) for n in range(1, limit) if number % n == 0)


def num_replicas(mesh: Mesh | None) -> int:
    """Return the number of engines on a mesh; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[REPLICAS]
