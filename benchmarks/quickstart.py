"""How many of the quickstart's crystals are the known ones: rock salt, or zincblende for GaAs and ZnS.

unimat quickstart --output_dir=runs/quickstart
python -m benchmarks.quickstart --crystals=runs/quickstart/crystals --output=benchmarks/quickstart.json

A crystal counts where StructureMatcher's RMS distance to the textbook's structure is at most 0.15 (stol is 0.5).
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
from unimat_jax.evaluation.matching import match_pairs
from unimat_jax.periodic_table import atomic_number
from unimat_jax.structure_files import read_structures

ROCK_SALT = {"Na Cl": 5.64, "Mg O": 4.21, "Li F": 4.03, "K Br": 6.60, "Ca O": 4.81, "Sr S": 6.02}
ZINCBLENDE = {"Ga As": 5.65, "Zn S": 5.41}
"""Lattice constants, Angstrom."""
NEAR = 0.15


def textbook() -> list[Crystal]:
    """The primitive cell of each, its uid the formula."""
    found = []
    for name, a in {**ROCK_SALT, **ZINCBLENDE}.items():
        symbols = name.split()
        second = 0.5 if name in ROCK_SALT else 0.25
        cell = a / 2 * np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
        numbers = [atomic_number(symbol) for symbol in symbols]
        found.append(Crystal.create(numbers, [[0.0] * 3, [second] * 3], cell, "".join(symbols)))
    return found


def main(argv: Sequence[str]) -> int:
    p = Parser(prog="python -m benchmarks.quickstart", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--crystals", type=Path, required=True, help="the quickstart's crystals/")
    p.add_argument("--output", type=Path, required=True, help="a JSON file")
    arguments = p.parse(argv)
    known = {tuple(sorted(c.atomic_numbers.tolist())): c for c in textbook()}
    pairs = []
    for made in read_structures(arguments.crystals):
        if isinstance(made, Crystal):
            pairs.append((made, known[tuple(sorted(set(made.atomic_numbers.tolist())))]))
    distances = match_pairs(pairs).rms_dist
    near = [distance is not None and distance <= NEAR for distance in distances]
    formulas = [reference.uid for _, reference in pairs]
    right = Counter(f for f, good in zip(formulas, near, strict=True) if good)
    number = Counter(formulas)
    report = {
        "crystals": len(pairs),
        "known": sum(near),
        "by_formula": {f: f"{right[f]} of {number[f]}" for f in number},
        "commit": commit(),
        "machine": machine(),
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
