"""Mesh, shardings and the fsdp rule: one code path from one device to a pod."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unimat_jax.errors import UserError

MIN_SIZE_TO_SHARD = 2**18
"""Arrays with fewer elements are replicated: gathering them would cost more than holding them."""


def make_mesh(fsdp: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh (`data`, `fsdp`) over all devices; `fsdp` devices share one copy of the parameters."""
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(f"train.fsdp = {fsdp} does not divide the {len(devices)} devices: choose a divisor")
    # A process's devices lie together: it reads one contiguous part of each batch.
    grid = np.array(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(-1, fsdp)
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


def whole_to_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """The global batch where every process has all of it."""

    def place(value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return {name: place(value) for name, value in batch.items()}


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array, in every process, whatever devices hold it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def all_processes(flag: bool) -> bool:
    """Whether it is so in every process."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).all())


def number_of_first(value: int) -> int:
    """Process 0's value, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value))) if jax.process_count() > 1 else value


def device_table(hosts: Sequence[str]) -> str:
    """What the job runs on, a line a process, for people. hosts: names by process, or none for a single one."""
    lines = []
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    for process, devices in sorted(by_process.items()):
        where = f" on {hosts[process]}" if hosts else ""
        lines.append(f"process {process}{where}: {len(devices)} x {devices[0].device_kind}")
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB each" if "bytes_limit" in stats else ""
    return f"devices: {jax.device_count()}{memory}, jax {jax.__version__}\n" + "\n".join(f"  {line}" for line in lines)


def check_batch_size(batch_size: int, mesh: Mesh, field: str) -> None:
    if batch_size % mesh.size:
        raise UserError(f"{field} = {batch_size} does not divide by the {mesh.size} devices: choose a multiple")
