"""jax and its devices, as a process of its own found them (`probe.py`), and the accelerators that it leaves unused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimat_jax.doctor import Finding, packages
from unimat_jax.doctor.probe import STAGES

GOOGLE = "0x1ae0"
TPU_CHIPS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
"""PCI vendor, and device ids of TPU chips, as jax knows them (jax/_src/hardware_utils.py)."""
HANGS = {
    "import": "the disk may be slow: try again with --time_limit=300",
    "devices": "a driver hangs or waits: another program may hold the accelerator; on a slice of several hosts run it "
    "on all of them at once; JAX_PLATFORMS=cpu leaves accelerators alone",
}


class Probe:
    """What the probe found, by stage; stopped: the stage that was under way when it died or ran out of time."""

    def __init__(self, time_limit: float):
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}  # beside a training run too
        process = subprocess.Popen(
            [sys.executable, "-m", "unimat_jax.doctor.probe"],
            env=environment, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        lines: list[str] = []

        def read() -> None:
            for line in process.stdout or ():
                lines.append(line)

        # A thread that ends with the program: a process that hangs in a driver may outlive even SIGKILL.
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            self.exit_code: int | None = process.wait(time_limit)
            reader.join(5)
        except subprocess.TimeoutExpired:
            self.exit_code = None
            process.kill()
        self.found: dict[str, dict[str, Any]] = {}
        self.noise: list[str] = []
        for line in list(lines):
            try:
                found = json.loads(line)
                self.found[found["stage"]] = found
            except (ValueError, TypeError, KeyError):
                self.noise.append(line.strip())
        self.stopped = next((s for s in STAGES if "seconds" not in self.found.get(s, {})), None)

    def __getitem__(self, stage: str) -> dict[str, Any]:
        """What a finished stage found, {} of another."""
        return self.found[stage] if "seconds" in self.found.get(stage, {}) else {}


def jax(probe: Probe, time_limit: float) -> Iterator[Finding]:
    """Import, numbers and devices."""
    if about := probe["import"]:
        yield Finding("ok", "jax", f"jax {about['jax']}, jaxlib {about['jaxlib']}, imported in {about['seconds']} s")
    if about := probe["devices"]:
        kinds = Counter((d["kind"], d["platform"], d["bytes"]) for d in about["devices"])
        shown = ", ".join(
            f"{number} x {kind} ({platform}{f', {size / 2**30:.1f} GiB for jax' if size else ''})"
            for (kind, platform, size), number in kinds.items()
        )
        yield Finding("ok", "devices", shown)
    if about := probe["jit"]:
        checked = " and ".join(about["checked"])
        for wrong in about["wrong"]:
            yield Finding(
                "problem", "jit", f"wrong results: {wrong}", "install a jax in range, in the clone: pip install -e ."
            )
        if not about["wrong"]:
            yield Finding("ok", "jit", f"a compiled sum of products and a matrix product are right on {checked}")
    if probe.stopped:
        stage, error = probe.stopped, probe.found.get(probe.stopped, {}).get("error")
        fix = "to have a jax that works, in the clone: pip install -e ."
        if error:
            found = f"{stage} failed: {' '.join(error.split())[:500]}"
            if stage != "import":
                asked = os.environ.get("JAX_PLATFORMS")
                fix = (
                    f"JAX_PLATFORMS={asked} may ask for what is not there"
                    if asked
                    else "JAX_PLATFORMS=cpu does without"
                )
        elif probe.exit_code is None:
            found, fix = f"{stage} did not end in {time_limit:g} s", HANGS.get(stage, "try --time_limit=300")
        else:
            last = f": {probe.noise[-1][:300]}" if probe.noise else ""
            found = f"{stage} ended the process with exit code {probe.exit_code}{last}"
        yield Finding("problem", "jax", found, fix)


def cache(probe: Probe) -> Iterator[Finding]:
    """Only where there is none: the folder is looked at as others are."""
    if "directory" in probe["compilation cache"] and probe["compilation cache"]["directory"] is None:
        fix = "--config.train.compilation_cache=DIR, or JAX_COMPILATION_CACHE_DIR"
        yield Finding("warning", "cache", "the home directory is not writable: each run compiles anew", fix)


def accelerators(probe: Probe) -> Iterator[Finding]:
    """GPUs and TPUs of this machine against those that jax uses."""
    used = {d["platform"] for d in probe["devices"].get("devices", [])}
    gpus, driver_works = _nvidia()
    for name, found, platforms, extra in (("gpu", gpus, {"gpu", "cuda"}, "cuda"), ("tpu", _tpu(), {"tpu"}, "tpu")):
        if not found:
            yield Finding("ok", name, "none is seen on this machine")
        elif used & platforms:
            yield Finding("ok", name, found)
        else:
            yield Finding("warning", name, f"{found}, which jax does not use", _why_unused(probe, extra, driver_works))


def _why_unused(probe: Probe, extra: str, driver_works: bool) -> str:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return f"JAX_PLATFORMS={platforms} leaves it out: unset it"
    if not packages.extra_installed(extra):
        return f"in the clone: pip install -e '.[{extra}]'"
    if extra == "cuda" and not driver_works:
        return "nvidia-smi does not work: install the driver, or start the container with its GPUs (--gpus all)"
    said = [line for line in probe.noise if "unable" in line.lower() or "error" in line.lower()]
    return f"the extra {extra} is installed; " + (f"jax says: {said[-1][:300]}" if said else "see what the driver logs")


def _nvidia() -> tuple[str, bool]:
    """(the GPUs in words, "" for none; whether nvidia-smi works)."""
    if program := shutil.which("nvidia-smi"):
        fields = "--query-gpu=name,memory.used,memory.total,driver_version"
        try:
            done = subprocess.run(
                [program, fields, "--format=csv,noheader"], capture_output=True, text=True, timeout=5, check=False
            )
            if done.returncode == 0 and done.stdout.strip():
                rows = [[part.strip() for part in line.split(",")] for line in done.stdout.strip().splitlines()]
                shown = (f"{r[0]} ({r[1]} of {r[2]} used)" if len(r) == 4 else ", ".join(r) for r in rows)
                return f"{'; '.join(shown)}, driver {rows[0][-1]}", True
        except (OSError, subprocess.TimeoutExpired):
            pass
    there = [path for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg") if Path(path).exists()]
    return (f"an NVIDIA GPU ({there[0]}; nvidia-smi does not tell more)" if there else ""), False


def _tpu() -> str:
    chips = [path.name for path in sorted(Path("/dev").glob("accel[0-9]*"))]
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor") if not chips else ():
        if vendor.read_text().strip() == GOOGLE and vendor.with_name("device").read_text().strip() in TPU_CHIPS:
            chips.append(vendor.parent.name)
    return f"{len(chips)} TPU chips ({', '.join(chips[:4])}{', ...' if len(chips) > 4 else ''})" if chips else ""
