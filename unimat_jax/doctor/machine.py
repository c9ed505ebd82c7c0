"""The machine under it: cores, memory, disk, open files, and the processes that a cluster started."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from unimat_jax.doctor import Finding

GIB = 2**30
MIN_MEMORY, MIN_DISK, MIN_FILES = 3 * GIB, 1 * GIB, 1024
OBJECT_STORES = ("gcsfuse", "s3fs", "mountpoint-s3", "goofys", "rclone", "blobfuse")
CLUSTERS = {
    "SLURM": ("SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}
"""Variables with the number of processes and the number of this one."""


def _cgroup(name_v2: str, controller_v1: str, name_v1: str) -> list[str]:
    """Contents of a control file in this process's group and all above it."""
    found = []
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in groups:
        if controllers and controller_v1 not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controller_v1 if controllers else "")
        folder = root / path.lstrip("/")
        for place in (folder, *(p for p in folder.parents if p.is_relative_to(root))):
            file = place / (name_v1 if controllers else name_v2)
            if file.is_file():
                found.append(file.read_text().strip())
    return found


def cores() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{usable} of {os.cpu_count()} cores may be used"
    quotas = []
    for text in _cgroup("cpu.max", "cpu", "cpu.cfs_quota_us"):
        quota, *period = text.split()
        if quota not in ("max", "-1"):
            quotas.append(float(quota) / float(period[0] if period else 100_000))
    if quotas:
        found += f", with a share of {min(quotas):.1f} (control group)"
    yield Finding("ok", "cores", found)


def memory() -> Iterator[Finding]:
    """Total and available, and the control group's limit where that is less."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError):  # no Linux
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = total
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    limits = [int(text) for text in _cgroup("memory.max", "memory", "memory.limit_in_bytes") if text != "max"]
    if limits and min(limits) < total:
        found += f", limited to {min(limits) / GIB:.1f} GiB (control group)"
        available = min(available, *limits)
    enough = available >= MIN_MEMORY
    fix = "" if enough else "free some, or take a larger machine: the quickstart alone takes 2.1 GiB"
    yield Finding("ok" if enough else "warning", "memory", found, fix)


def folder(name: str, text: str, *, for_data: bool = False) -> Iterator[Finding]:
    """A folder that files go to, by really writing some. for_data: it must be there; else what uses it makes it."""
    if "://" in text:
        yield Finding("problem", name, f"{text} is no folder of this machine", "mount it, or copy it to a disk")
        return
    path = Path(text).expanduser().absolute()
    try:
        yield _folder(name, path, for_data)
    except OSError as error:
        yield Finding("problem", name, f"{path}: {error.strerror}", "name another, or have its rights changed")


def _folder(name: str, path: Path, for_data: bool) -> Finding:
    place = next(p for p in (path, *path.parents) if p.exists())
    if place != path and for_data:
        fix = "name the folder that `unimat prepare --data_dir=...` made, or make it so"
        return Finding("problem", name, f"{path} does not exist", fix)
    if not place.is_dir():
        return Finding("problem", name, f"{place} is a file", "name a directory")
    usage, inodes = shutil.disk_usage(place), os.statvfs(place)
    kind, source = _file_system(place.resolve())
    found = (
        f"{path}{'' if place == path else ' can be made'}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    )
    found += f", {kind}" if kind else ""
    sets = sorted({p.parent.parent.name for p in path.glob("*/*/statistics.json")}) if for_data else []
    if for_data:
        found += f", data sets {', '.join(sets)}" if sets else ", no data set in it"
    try:
        _write_and_rename(place)
    except OSError as error:
        status = "warning" if sets else "problem"
        fix = "it can be read, which is enough to train" if sets else "name another, or have its rights changed"
        return Finding(status, name, f"{found}; not writable: {error.strerror}", fix)
    if usage.free < MIN_DISK:
        return Finding("warning", name, f"{found}; little space", "free some, or name another disk")
    if inodes.f_files and not inodes.f_favail:
        return Finding("warning", name, f"{found}; no inodes are left", "delete small files, or name another disk")
    if any(store in f"{kind} {source}" for store in OBJECT_STORES):
        fix = "keep runs on a disk: here a folder that is renamed may be copied file by file, and seen half"
        return Finding("warning", name, f"{found}; an object store", fix)
    return Finding("ok", name, f"{found}; writes and renames work")


def _write_and_rename(place: Path) -> None:
    """What data sets, checkpoints and exports rely on: a file that replaces another, a folder that changes its name."""
    with tempfile.TemporaryDirectory(prefix=".unimat_doctor_", dir=place) as made:
        old, new, inside = Path(made, "old"), Path(made, "new"), Path(made, "folder")
        old.write_bytes(b"old")
        with new.open("wb") as file:
            file.write(b"new" * 10_000)
            file.flush()
            os.fsync(file.fileno())
        new.replace(old)
        inside.mkdir()
        old.replace(inside / "file")
        inside.replace(Path(made, "renamed"))
        if Path(made, "renamed", "file").read_bytes() != b"new" * 10_000 or new.exists():
            raise OSError(0, "a renamed file came back with another content")


def _file_system(place: Path) -> tuple[str, str]:
    """(type, as ext4 or nfs4; what is mounted); "" where that cannot be known."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "", ""
    there = [m for m in mounts if len(m) > 2 and place.is_relative_to(m[1])]
    source, _, kind = max(there, key=lambda m: len(m[1]), default=["", "", ""])[:3]
    return kind, source


def open_files() -> Iterator[Finding]:
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} at once"
    few = soft != resource.RLIM_INFINITY and soft < MIN_FILES
    allowed = "" if hard == resource.RLIM_INFINITY or hard >= MIN_FILES else f" (the system's limit is {hard:,})"
    fix = f"ulimit -n 4096{allowed}: checkpoints and data sets are many files"
    yield Finding("warning" if few else "ok", "open files", found, fix if few else "")


def processes() -> Iterator[Finding]:
    """What the environment tells of a run of several processes."""
    told, numbers = [], set()
    for cluster, (size, rank) in CLUSTERS.items():
        if size in os.environ:
            told.append(f"{cluster}: process {os.environ.get(rank, '?')} of {os.environ[size]}")
            numbers.add(os.environ[size])
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    if hosts:
        number = len(hosts.split(","))
        slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
        of = f"{number}" if slices == "1" else f"{number} in each of {slices} slices"
        told.append(f"TPU: host {os.environ.get('TPU_WORKER_ID', '?')} of {of}")
        numbers.add(str(number * int(slices)) if slices.isdigit() else slices)
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        told.append(f"JAX_COORDINATOR_ADDRESS={address}")
    found = "; ".join(told) or "one: nothing in the environment tells of others"
    if len(numbers) > 1:
        fix = "they contradict each other: unset the variables that another launcher left behind"
        yield Finding("warning", "processes", found, fix)
    elif os.environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_NODELIST" not in os.environ:
        yield Finding("warning", "processes", found, "this is the batch script itself, one process: start with srun")
    else:
        yield Finding("ok", "processes", found)
