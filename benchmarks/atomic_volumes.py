"""The table of unimat_jax/stability/atomic_volumes.py: how much volume an atom of each element takes in real crystals.

python -m benchmarks.atomic_volumes --structures=CRYSTALS --test_structures=OTHER_CRYSTALS

Prints the table as Python, and how well it tells volumes of the other crystals. Least squares of the relative error
over all crystals, no volume below zero; elements in fewer than MIN_CRYSTALS crystals get a number from their column.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.periodic_table import SYMBOLS

MIN_CRYSTALS = 20


def counts_and_volumes(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Atoms of each element [crystals, 119] and volumes [crystals]."""
    crystals: list[Crystal] = [entry.crystal for entry in read_entries(paths) if entry.crystal is not None]
    counts = np.array([np.bincount(crystal.atomic_numbers, minlength=119) for crystal in crystals], float)
    return counts, np.array([crystal.volume for crystal in crystals])


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.atomic_volumes", description=__doc__)
    p.add_argument("--structures", nargs="+", required=True)
    p.add_argument("--test_structures", nargs="+", action="append", default=[])
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    counts, volumes = counts_and_volumes(arguments.structures)
    table, _ = nnls(counts / volumes[:, None], np.ones(len(volumes)))
    enough = (counts > 0).sum(0) >= MIN_CRYSTALS
    print({SYMBOLS[z]: round(float(table[z]), 1) for z in range(1, 119) if enough[z] and table[z] > 0})
    print(
        "too rare or zero:",
        [SYMBOLS[z] for z in range(1, 119) if counts[:, z].any() and not (enough[z] and table[z] > 0)],
    )
    for paths in arguments.test_structures:
        counts, volumes = counts_and_volumes(paths)
        known = (counts[:, ~(enough & (table > 0))] == 0).all(1)
        ratios = volumes[known] / (counts[known] @ table)
        shown = ", ".join(f"{q} %: {np.percentile(ratios, q):.2f}" for q in (1, 10, 50, 90, 99))
        print(f"{paths}: volume over estimate of {known.sum()} crystals: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
