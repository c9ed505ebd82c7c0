"""Damaged crystal files through the readers, the parsing pool and the encoder, as `unimat prepare` reads them.

python -m benchmarks.fuzz --files=10000 --seed=0 --output_dir=benchmarks/fuzz

Passed: every file ends in crystals or in failures with a reason, no process crashed, nothing took longer than the
limit, no error was an unexpected one, and every record is finite and gives a crystal back. Exit code 1 otherwise.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.fingerprints import commit, machine
from benchmarks.fuzz_files import FORMATS, make
from data_prep.datasets import source_files
from data_prep.outcome import Outcome, read_outcome
from data_prep.parse_pool import CellOptions, Item, parse_all
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.representation import crystal_of_record
from unimat_jax.structure_files import read_structures, scan

BUGS = ("crashed", "timeout", "internal_error", "no_reason", "bad_record", "no_outcome", "scan_raised", "scan_too_long")
"""What must not be. The first three are reasons of data_prep.parse_pool."""


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.fuzz", description=__doc__)
    p.add_argument("--files", type=int, default=10_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num_workers", type=int, default=2)
    p.add_argument(
        "--time_limit", type=float, default=20.0, help="seconds for one structure, and for scanning one file"
    )
    p.add_argument("--output_dir", type=Path, required=True)
    a = p.parse(sys.argv[1:] if argv is None else argv)
    result = fuzz(a.files, a.seed, num_workers=a.num_workers, time_limit=a.time_limit)
    result = {"command": f"--files={a.files} --seed={a.seed}", **result, "commit": commit(), **machine()}
    result["versions"] = {name: importlib.metadata.version(name) for name in ("pymatgen", "ase", "numpy", "pyarrow")}
    a.output_dir.mkdir(parents=True, exist_ok=True)
    path = a.output_dir / "fuzz.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"written: {path}")
    return 1 if result["bugs"] else 0


def fuzz(number: int, seed: int, *, num_workers: int, time_limit: float, damages: int | None = None) -> dict[str, Any]:
    """Counts by format, and each bug with its file's number. damages: for each file; None draws 1 to 4, mostly 1."""
    (path,) = source_files("starter", None).values()
    crystals = [c for c in read_structures(path) if isinstance(c, Crystal) and c.num_atoms <= 12]
    kinds = sorted(FORMATS)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    files: dict[str, Counter[str]] = defaultdict(Counter)
    bugs: list[dict[str, Any]] = []
    seen: dict[int, set[bool]] = {}
    slowest = (0.0, 0)

    def note(index: int, reason: str, message: str = "") -> None:
        kind = kinds[index % len(kinds)]
        seen.setdefault(index, set()).add(reason == "ok")
        counts[kind][reason] += 1
        if reason in BUGS:
            bugs.append({"file": index, "format": kind, "bug": reason, "message": message[:300]})

    def items(directory: Path) -> Iterator[Item]:
        nonlocal slowest
        for index in tqdm(range(number), desc="reading", unit="file", file=sys.stderr, mininterval=5):
            random = np.random.default_rng([seed, index])
            chosen = [crystals[i] for i in random.choice(len(crystals), int(random.integers(1, 4)), replace=False)]
            amount = int(random.choice([1, 1, 1, 2, 3, 4])) if damages is None else damages
            name, content = make(kinds[index % len(kinds)], chosen, random, amount)
            place = directory / str(index)
            place.mkdir()
            (place / name).write_bytes(content)
            begin, given = time.monotonic(), 0.0
            try:
                found = scan(place if random.random() < 0.5 and not name.endswith(".zip") else place / name)
                for raw in found:
                    now = time.monotonic()
                    yield str(index), raw
                    given += time.monotonic() - now
            except UserError as error:
                lines = str(error).splitlines()
                note(index, "whole_file_refused" if len(lines) == 1 and lines[0] else "no_reason", str(error))
            except Exception as error:
                note(index, "scan_raised", f"{type(error).__name__}: {error}")
            taken = time.monotonic() - begin - given
            slowest = max(slowest, (taken, index))
            if taken > time_limit:
                note(index, "scan_too_long", f"{taken:.1f} s")
            (place / name).unlink()

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        outcomes = parse_all(items(Path(directory)), CellOptions(), num_workers=num_workers, time_limit=time_limit)
        for written in outcomes:
            outcome = read_outcome(io.BytesIO(written))
            assert outcome is not None
            note(int(outcome.split), *_judge(outcome))
    for index in set(range(number)) - seen.keys():
        note(index, "no_outcome")
    for index, results in seen.items():
        kind = kinds[index % len(kinds)]
        files[kind]["files"] += 1
        files[kind]["all accepted" if results == {True} else "all rejected" if results == {False} else "both"] += 1
    return {
        **{"files": number, "seed": seed, "time_limit": time_limit, "passed": not bugs, "bugs": bugs},
        "bug_counts": {name: sum(bug["bug"] == name for bug in bugs) for name in BUGS},
        "files_by_format": {kind: dict(files[kind]) for kind in sorted(files)},
        "structures_by_format": {kind: dict(counts[kind].most_common()) for kind in sorted(counts)},
        "seconds": round(time.monotonic() - begin, 1),
        "longest_scan": {"seconds": round(slowest[0], 2), "file": slowest[1]},
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_memory_of_a_worker_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }


def _judge(outcome: Outcome) -> tuple[str, str]:
    if outcome.record is None:
        told = outcome.reason and outcome.message and "\n" not in outcome.message and outcome.uid
        return (outcome.reason if told else "no_reason"), outcome.message
    record = outcome.record
    slots, frac, cell = record["slots"], record["frac_coords"], record["lattice"]
    values = np.array(list(outcome.properties.values()))
    try:
        crystal = crystal_of_record(record, outcome.uid, outcome.properties)
        json.dumps([outcome.uid, outcome.origin, outcome.texts]).encode()
        good = (
            *(bool(outcome.uid), outcome.uid.encode(), crystal.num_atoms == len(slots) == len(frac)),
            *(np.isfinite(frac).all(), frac.min() >= 0, frac.max() < 1, np.isfinite(cell).all(), cell[:3].min() > 0),
            *(cell[3:].min() > 0, cell[3:].max() < 180, np.isfinite(values.astype(np.float32)).all()),
        )
    except Exception as error:
        return "bad_record", f"{outcome.origin}: {type(error).__name__}: {error}"
    return ("ok", "") if all(good) else ("bad_record", f"{outcome.origin}: {cell}, {frac.min()} to {frac.max()}")


def table(result: dict[str, Any]) -> str:
    lines = [
        "| format | files | all accepted | both | all rejected | most frequent rejections |",
        "|---|---|---|---|---|---|",
    ]
    for kind, files in result["files_by_format"].items():
        reasons = {r: n for r, n in result["structures_by_format"][kind].items() if r != "ok"}
        told = ", ".join(f"{reason} {count}" for reason, count in list(reasons.items())[:4])
        numbers = " | ".join(str(files.get(name, 0)) for name in ("files", "all accepted", "both", "all rejected"))
        lines.append(f"| {kind} | {numbers} | {told} |")
    told = ", ".join(f"{name} {count}" for name, count in result["bug_counts"].items())
    return "\n".join([*lines, "", f"{'passed' if result['passed'] else 'FAILED'}: {told}; {result['seconds']} s"])


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
