"""TPU slices by name ("v4:4x4x2"), their chips' numbers, and devices to compile for on a machine without any."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

from unimat_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip has. FLOP/s (bfloat16) and bytes/s are peaks.

    usable_hbm: bytes that the compiler lets a program use; the rest is reserved. ici: bytes/s that leave a chip over
    all of its links, one way. max_chips: of the largest slice.
    """

    name: str
    hbm: int
    usable_hbm: int
    flops: float
    hbm_bandwidth: float
    ici: float
    dimensions: int
    max_chips: int
    examples: tuple[str, ...]
    source: str


# Peaks, capacities and interconnect: the pages of Google Cloud's TPU documentation named by `source`. The page of v4
# has no interconnect bandwidth per chip: it is the pod's all-reduce bandwidth, 1.1 PB/s, over its 4,096 chips, as for
# v5e and v6e, where both are given and agree. v5e, v5p and v6e: half of the bidirectional bandwidth. `usable_hbm`: from
# the message of libtpu 0.0.41 for a program that is too large ("Used 34.00G of 30.75G hbm").
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", 32 * GIB, int(30.75 * GIB), 275e12, 1200e9, 1.1e15 / 4096, 3, 4096,
            ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x2", "4x4x4", "4x4x8"),
            "https://docs.cloud.google.com/tpu/docs/v4",
        ),
        Chip(
            "v5e", 16 * GIB, int(15.75 * GIB), 197e12, 819e9, 200e9, 2, 256,
            ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
            "https://docs.cloud.google.com/tpu/docs/v5e",
        ),
        Chip(
            "v5p", 95 * GIB, int(95.74 * GIB), 459e12, 2765e9, 600e9, 3, 6144,
            ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
            "https://docs.cloud.google.com/tpu/docs/v5p",
        ),
        Chip(
            "v6e", 32 * GIB, int(31.25 * GIB), 918e12, 1638e9, 400e9, 2, 256,
            ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
            "https://docs.cloud.google.com/tpu/docs/v6e",
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its name, its chips and how many lie along each axis."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def options(self) -> dict[str, Any]:
        """Of libtpu. v4 and v5p have two cores a chip, which are one device only in the mode "megacore"; a host of v5e
        has four chips unless it is told that there is one."""
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.chip.dimensions == 3 else {}
        return options | ({"chips_per_host_bounds": (1, 1, 1)} if self.num_chips == 1 else {})


def choices() -> str:
    return "; ".join(f"{chip.name}:{{{','.join(chip.examples)}}}" for chip in CHIPS.values())


def parse_topology(text: str | None) -> Topology:
    """The slice of a name as "v4:4x4x2": generation, chips along each axis. Raises UserError with what can be given."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text or "")
    chip = CHIPS.get(match[1]) if match else None
    if match is None or chip is None:
        missing = "is missing" if not text else f"= {text} is no slice of a TPU that is known here"
        raise UserError(f"--topology {missing}: give GENERATION:CHIPSxCHIPS..., for example of {choices()}")
    shape = tuple(map(int, match[2].split("x")))
    if len(shape) != chip.dimensions or 0 in shape or math.prod(shape) > chip.max_chips:
        raise UserError(
            f"--topology = {text}: a {chip.name} slice has {chip.dimensions} axes and at most {chip.max_chips} chips; "
            f"examples: {', '.join(f'{chip.name}:{shape}' for shape in chip.examples)}"
        )
    return Topology(text or "", chip, shape)


def quiet_libtpu() -> None:
    """Settings with which libtpu only compiles: no look-up of a TPU machine's metadata (which waits for an answer that
    never comes), no claim on the one lock file (so that two programs can run at once), no chatter. To be called before
    libtpu is loaded; what the user has set stays."""
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def check_versions() -> None:
    """Raises UserError if libtpu is not of the version that the installed jax asks for: what another one compiles may
    hold instructions that this jax cannot read."""
    wanted = [re.match(r"libtpu *== *([\d.]*\d)", line) for line in importlib.metadata.requires("jax") or []]
    installed = importlib.metadata.version("libtpu")
    for match in filter(None, wanted):
        if installed != match[1] and not installed.startswith(match[1] + "."):
            raise UserError(
                f"libtpu {installed} is not the one for jax {importlib.metadata.version('jax')}, {match[1]}: "
                "pip install 'unimat-jax[tpu]'"
            )


def make_devices(topology: Topology) -> list[Any]:
    """The slice's chips as devices to compile for. Raises UserError without libtpu, or if libtpu has no such slice."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--mode=compile needs libtpu, the TPU compiler (it needs no TPU): pip install 'unimat-jax[tpu]'"
        )
    check_versions()
    quiet_libtpu()
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **topology.options)
    except JaxRuntimeError as error:
        raise UserError(
            f"--topology = {topology.name}: the TPU compiler refuses it ({str(error).splitlines()[0]}); examples: "
            f"{', '.join(f'{topology.chip.name}:{shape}' for shape in topology.chip.examples)}"
        ) from error
    if len(described.devices) != topology.num_chips:
        raise UserError(
            f"--topology = {topology.name}: libtpu makes {len(described.devices)} devices of {topology.num_chips} "
            "chips: pip install 'unimat-jax[tpu]' brings the version that counts chips"
        )
    return list(described.devices)
