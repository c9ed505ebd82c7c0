"""unimat doctor: what this machine and installation can do, and what to do about what they cannot.

Checks Python, the packages and their pins, jax (a known bug of its compiled numbers is tried out), devices, cores,
memory, disk and optional parts. Exit code 1 where there is a problem; nothing is changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from unimat_jax.cli import Parser, run_program
from unimat_jax.doctor import STATUSES, Finding, devices, machine, packages
from unimat_jax.errors import UserError


def examine(data_dir: str | None, workdir: str | None, time_limit: float) -> list[Finding]:
    """All findings. A check that fails itself is one of them."""
    findings: list[Finding] = []

    def take(name: str, check: Callable[[], Iterator[Finding]]) -> None:
        try:
            for finding in check():
                findings.append(finding)
        except ModuleNotFoundError as error:
            findings.append(
                Finding("problem", name, f"{error.name} is not installed", "in the clone: pip install -e .")
            )
        except Exception as error:
            what = f"this check failed itself: {type(error).__name__}: {error}"
            findings.append(Finding("warning", name, what, "please report it, with this line"))

    take("python", packages.python)
    take("packages", packages.required)
    found: list[devices.Probe] = []

    def jax() -> Iterator[Finding]:
        found.append(devices.Probe(time_limit))
        yield from devices.jax(found[0], time_limit)

    take("jax", jax)
    for probe in found:
        take("accelerators", functools.partial(devices.accelerators, probe))
    for name, check in (("cores", machine.cores), ("memory", machine.memory), ("open files", machine.open_files),
                        ("processes", machine.processes)):  # fmt: skip
        take(name, check)
    folders = {"here": "." if data_dir is None and workdir is None else None, "data_dir": data_dir, "workdir": workdir}
    folders["temporary"] = tempfile.gettempdir()
    for probe in found:
        folders["cache"] = probe["compilation cache"].get("directory")
        take("cache", functools.partial(devices.cache, probe))
    for name, folder in folders.items():
        if folder is not None:
            take(name, functools.partial(machine.folder, name, folder, for_data=name == "data_dir"))
    take("extras", packages.extras)
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="unimat doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data_dir", help="where prepared data are; default: the current directory is looked at")
    p.add_argument("--workdir", help="where a training run goes")
    p.add_argument("--time_limit", type=float, default=60, help="seconds for jax to start (default 60)")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    if not arguments.time_limit > 0:
        raise UserError(f"--time_limit={arguments.time_limit}: give seconds above 0")
    findings = examine(arguments.data_dir, arguments.workdir, arguments.time_limit)
    numbers = Counter(finding.status for finding in findings)
    if arguments.json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"counts": {s: numbers[s] for s in STATUSES}, "findings": rows}, indent=1))
    else:
        for finding in findings:
            print(f"{finding.status:<8} {finding.check:<18} {finding.found}")
            if finding.fix:
                print(f"{'':<8} {'':<18} -> {finding.fix}")
        print(", ".join(f"{numbers[s]} {s}" for s in STATUSES))
    return 1 if numbers["problem"] else 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
