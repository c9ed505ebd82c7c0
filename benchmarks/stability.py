"""How many crystals a core relaxes in a minute, and how they end: real crystals, strained and rattled as a sample is.

python -m benchmarks.stability --structures=$UNIMAT_DATA/perov_5/val.npz --energy_model=chgnet --output_dir=DIR

Writes DIR/throughput.json, and the run beside it. Nothing may be lost: as many rows as crystals. Processor seconds are
those of the relaxations; loading the engine and Python comes once for each process.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.fingerprints import commit, machine
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.stability.assessment import assess
from unimat_jax.stability.engines import energy_model
from unimat_jax.stability.relaxation import Protocol

STRAIN, RATTLE = 0.03, 0.08
"""Of all three lengths; Angstrom, the deviation of each coordinate."""


def raw(crystal: Crystal, rng: np.random.Generator, strain: float = STRAIN, rattle: float = RATTLE) -> Crystal:
    """The crystal as a sample of a good generator would be: too large, and near its sites."""
    lattice = crystal.lattice * (1 + strain)
    shift = rng.normal(scale=rattle, size=(crystal.num_atoms, 3)) @ np.linalg.inv(lattice)
    return Crystal.create(crystal.atomic_numbers, crystal.frac_coords + shift, lattice, crystal.uid)


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.stability", description=__doc__)
    p.add_argument("--structures", required=True)
    p.add_argument("--energy_model", required=True)
    p.add_argument("--number", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max_steps", type=int, default=300)
    p.add_argument("--timeout_s", type=float, default=300.0)
    p.add_argument("--num_workers", type=int, default=2)
    p.add_argument("--output_dir", type=Path, required=True)
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    rng = np.random.default_rng(arguments.seed)
    crystals = [entry.crystal for entry in read_entries(arguments.structures) if entry.crystal is not None]
    drawn = [raw(crystals[i], rng) for i in rng.choice(len(crystals), arguments.number, replace=False)]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    start = arguments.output_dir / "raw.extxyz"
    start.write_text("".join(crystal.to_extxyz() for crystal in drawn), encoding="utf-8")
    model = energy_model(arguments.energy_model)
    found = assess([start], model, output_dir=arguments.output_dir / "run", num_workers=arguments.num_workers,
                   protocol=Protocol(max_steps=arguments.max_steps), timeout_s=arguments.timeout_s)  # fmt: skip
    assert len(found.rows) == arguments.number
    converged = [row for row in found.rows if row["status"] == "converged"]
    cpu = sum(row["cpu_seconds"] for row in found.rows)
    result = {
        "commit": commit(), "machine": machine(), "seed": arguments.seed, "structures": Path(arguments.structures).name,
        "strain": STRAIN, "rattle_a": RATTLE, "energy_model": model.name, "package": model.package,
        "protocol": found.about["protocol_text"], "num_workers": arguments.num_workers,
        "rows": len(found.rows), "status": dict(Counter(row["status"] for row in found.rows)),
        "force_calls_mean": float(np.mean([row["force_calls"] for row in found.rows])),
        "cpu_seconds": round(cpu, 1), "seconds": found.about["seconds"],
        "crystals_per_cpu_minute": round(60 * len(found.rows) / cpu, 2),
        "relax_rmsd_a_mean": float(np.mean([row["relax_rmsd"] for row in converged])) if converged else None,
        "volume_change_mean": float(np.mean([row["volume_change"] for row in converged])) if converged else None,
    }  # fmt: skip
    (arguments.output_dir / "throughput.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
