"""Fingerprints and coverage: this package against matminer on the same crystals, each with its own pool of processes.

python -m benchmarks.fingerprints --data_dir=$UNIMAT_DATA --reference_python=PYTHON --output_dir=benchmarks/fingerprints

PYTHON is the interpreter of an environment with matminer 0.10.1. The two run in turn. Our time includes the start of
our processes and the writing of a cache that was empty; matminer's begins after its imports.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.coverage import CUTOFFS, coverage
from unimat_jax.evaluation.crystalnn import FEATURE_NAMES
from unimat_jax.evaluation.fingerprint_pool import Fingerprint, fingerprints

REFERENCE_PROGRAM = Path(__file__).parent / "fingerprints" / "with_matminer.py"
BCC = "body-centered cubic CN_8"
"""Among equally near neighbours it depends on rounding errors: pymatgen's differs with the numpy that it runs on."""
RATTLE = 0.1
"""Angstrom, the deviation of each coordinate: generated crystals lack the symmetry that makes fingerprints cheap."""


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.fingerprints", description=__doc__)
    p.add_argument("--data_dir", type=Path, required=True)
    p.add_argument("--reference_python", required=True, help="of an environment with matminer 0.10.1")
    p.add_argument("--num_perov", type=int, default=200, help="rattled crystals of perov_5/val")
    p.add_argument("--num_mp", type=int, default=100, help="crystals of mp_20/val as they are")
    p.add_argument("--num_large", type=int, default=10_000, help="rattled perovskites for ours alone, 0: none")
    p.add_argument("--num_workers", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/fingerprints"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    rng = np.random.default_rng(arguments.seed)
    perov, mp = (read(arguments.data_dir / split / "val.npz") for split in ("perov_5", "mp_20"))
    parts = {
        "perov_5/val, rattled by 0.1 A": [rattled(crystal, rng) for crystal in draw(perov, arguments.num_perov, rng)],
        "mp_20/val": draw(mp, arguments.num_mp, rng),
    }
    result: dict[str, Any] = {
        "commit": commit(), "seed": arguments.seed, "machine": machine(), "num_workers": arguments.num_workers,
        "versions": {name: version(name) for name in ("pymatgen", "numpy", "scipy")}, "sets": {},
    }  # fmt: skip
    for name, crystals in parts.items():
        result["sets"][name] = compare(crystals, arguments)
        result["reference_versions"] = result["sets"][name].pop("versions")
    if arguments.num_large:
        result["large"] = large(perov, arguments, rng)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "fingerprints.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
    return 0


def compare(crystals: Sequence[Crystal], arguments) -> dict[str, Any]:
    """Both sides in turn on the same crystals; seconds, their ratio, and by how much the values differ."""
    rounds = []
    ours: list[Fingerprint] = []
    theirs: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        seconds, ours = run_ours(crystals, arguments.num_workers)
        theirs = run_matminer(crystals, arguments.reference_python, arguments.num_workers)
        rounds.append({"ours": seconds, "matminer": theirs["seconds"], "ratio": theirs["seconds"] / seconds})
        print(f"ours {seconds:6.2f} s   matminer {theirs['seconds']:7.2f} s   ratio {rounds[-1]['ratio']:6.1f}")
    start, _ = run_ours(crystals[: arguments.num_workers], arguments.num_workers)
    failures = [(one.struct is None, other is None) for one, other in zip(ours, theirs["struct"], strict=True)]
    found = [
        (one, np.array(struct), np.array(comp))
        for one, struct, comp in zip(ours, theirs["struct"], theirs["comp"], strict=True)
        if one.struct is not None and struct is not None
    ]
    struct = np.array([np.abs(one.struct - struct) for one, struct, _ in found])
    comp = np.array([np.abs(one.comp - comp) for one, _, comp in found])
    median = statistics.median(row["ours"] for row in rounds)
    return {
        "num_crystals": len(crystals),
        "num_atoms": sum(crystal.num_atoms for crystal in crystals),
        "rounds": rounds,
        "median_ratio": statistics.median(row["ratio"] for row in rounds),
        "our_start_seconds": start,
        "our_milliseconds_per_crystal_after_start": 1000 * (median - start) / len(crystals),
        "matminer_milliseconds_per_crystal": 1000 * statistics.median(r["matminer"] for r in rounds) / len(crystals),
        "failures": {"ours": sum(a for a, _ in failures), "matminer": sum(b for _, b in failures)},
        "same_failures": all(a == b for a, b in failures),
        "largest_difference_comp": float(comp.max()),
        "largest_difference_struct": float(struct.max()),
        "largest_difference_struct_but_bcc": float(np.delete(struct, FEATURE_NAMES.index(BCC), axis=1).max()),
        "num_crystals_differing_by_1e-6": int((struct.max(1) > 1e-6).sum()),
        "versions": theirs["versions"],
    }


def run_ours(crystals: Sequence[Crystal], num_workers: int) -> tuple[float, list[Fingerprint]]:
    with tempfile.TemporaryDirectory() as cache_dir:
        begin = time.perf_counter()
        found = fingerprints(crystals, num_workers=num_workers, cache_dir=cache_dir, progress=False)
        return time.perf_counter() - begin, found


def run_matminer(crystals: Sequence[Crystal], python: str, num_workers: int) -> dict[str, Any]:
    """Raises UserError with the program's last line."""
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "crystals.json", Path(directory) / "result.json"
        names = ("atomic_numbers", "frac_coords", "lattice")
        rows = [{name: getattr(crystal, name).tolist() for name in names} for crystal in crystals]
        source.write_text(json.dumps(rows))
        command = [python, str(REFERENCE_PROGRAM), str(source), str(target), str(num_workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"--reference_python={python}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return json.loads(target.read_text())


def large(perov: Sequence[Crystal], arguments, rng: np.random.Generator) -> dict[str, Any]:
    """Fingerprints of many rattled perovskites and of the whole split, and the coverage of one by the other."""
    generated = [rattled(perov[i], rng) for i in rng.integers(len(perov), size=arguments.num_large)]
    seconds, ours = run_ours(generated, arguments.num_workers)
    reference_seconds, theirs = run_ours(perov, arguments.num_workers)
    begin = time.perf_counter()
    found = coverage(
        *([one.struct for one in ours], [one.comp for one in ours]),
        *([one.struct for one in theirs], [one.comp for one in theirs]),
        struct_cutoff=CUTOFFS["perov_5"]["struct_cutoff"],
        comp_cutoff=CUTOFFS["perov_5"]["comp_cutoff"],
    )
    coverage_seconds = time.perf_counter() - begin
    print(
        f"{len(generated)} in {seconds:.1f} s, {len(perov)} in {reference_seconds:.1f} s, COV {coverage_seconds:.1f} s"
    )
    return {
        "num_generated": len(generated), "num_reference": len(perov), "fingerprint_seconds": seconds,
        "reference_fingerprint_seconds": reference_seconds, "coverage_seconds": coverage_seconds, **found.to_json(),
    }  # fmt: skip


def read(path: Path) -> list[Crystal]:
    """All crystals of a split."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: --data_dir names the directory with perov_5/val.npz and mp_20/val.npz")
    with np.load(path) as file:
        data = {name: file[name] for name in ("material_id", "n_atoms", "numbers", "frac_coords", "lattice")}
    stops = np.cumsum(data["n_atoms"].astype(int))
    atoms = [slice(stop - size, stop) for stop, size in zip(stops, data["n_atoms"].astype(int), strict=True)]
    return [
        Crystal.create(
            data["numbers"][part], data["frac_coords"][part], data["lattice"][i], str(data["material_id"][i])
        )
        for i, part in enumerate(atoms)
    ]


def draw(crystals: Sequence[Crystal], number: int, rng: np.random.Generator) -> list[Crystal]:
    return [crystals[i] for i in rng.choice(len(crystals), min(number, len(crystals)), replace=False)]


def rattled(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    shifts = RATTLE * rng.normal(size=(crystal.num_atoms, 3)) @ np.linalg.inv(crystal.lattice)
    return Crystal.create(crystal.atomic_numbers, crystal.frac_coords + shifts, crystal.lattice, crystal.uid)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
