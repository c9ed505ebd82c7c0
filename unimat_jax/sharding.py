"""Mesh, shardings and the fsdp rule: one code path from one device to a pod."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unimat_jax.errors import UserError

MIN_SIZE_TO_SHARD = 2**18
"""Arrays with fewer elements are replicated: gathering them would cost more than holding them."""


def make_mesh(fsdp: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh (`data`, `fsdp`) over all devices; `fsdp` devices share one copy of the parameters."""
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(f"train.fsdp = {fsdp} does not divide the {len(devices)} devices: choose a divisor")
    grid = np.array(devices).reshape(-1, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def fsdp_sharding(mesh: Mesh, tree: Any) -> Any:
    """Shardings of a tree of arrays or shapes: the largest axis that `fsdp` divides, small arrays replicated."""

    def rule(leaf: Any) -> NamedSharding:
        size = mesh.shape["fsdp"]
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or not axes or int(np.prod(leaf.shape)) < MIN_SIZE_TO_SHARD:
            return replicated(mesh)
        axis = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, tree)


def to_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """The global batch from this process's part of it."""
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def check_batch_size(batch_size: int, mesh: Mesh, field: str) -> None:
    if batch_size % mesh.size:
        raise UserError(f"{field} = {batch_size} does not divide by the {mesh.size} devices: choose a multiple")
