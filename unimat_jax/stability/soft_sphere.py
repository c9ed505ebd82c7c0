"""Soft spheres: atoms nearer than the sum of their radii push each other away, and nothing else is between them.

What spreads the atoms of a random cell before a dear potential sees them. E = 1/2 k (d - r)^2 for each pair with r < d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress

STIFFNESS = 1.0
"""k, eV/A^2."""
FMAX = 0.1
"""eV/A: atoms that overlap by 0.1 A are left as they are."""

Distances = Mapping[tuple[int, int], float]
"""Angstrom by atomic numbers, both ways round."""


class SoftSphere(Calculator):
    """The potential as an ASE calculator. diameters: d of each pair of elements."""

    implemented_properties: ClassVar = ["energy", "forces", "stress"]

    def __init__(self, diameters: Distances):
        super().__init__()
        self.diameters = dict(diameters)

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        found: Any = neighbor_list("ijdD", atoms, self.diameters)  # each pair both ways, periodic images included
        i, j, r, vectors = found
        numbers = atoms.numbers
        overlap = np.array([self.diameters[a, b] for a, b in zip(numbers[i], numbers[j], strict=True)]) - r
        push = (STIFFNESS * overlap / np.maximum(r, 1e-12))[:, None] * vectors  # on j, away from i
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, j, push)
        virial = -0.5 * vectors.T @ push
        self.results = {
            "energy": 0.25 * STIFFNESS * float((overlap**2).sum()),
            "forces": forces,
            "stress": full_3x3_to_voigt_6_stress(virial / atoms.get_volume()),
        }


@dataclasses.dataclass(frozen=True)
class Spread:
    """atoms: after the last step; force_calls: spent; converged: no overlap is left that pushes."""

    atoms: Atoms
    force_calls: int
    converged: bool


def spread(atoms: Atoms, diameters: Distances, *, max_force_calls: int, variable_cell: bool = False) -> Spread:
    """The atoms moved apart, in their cell or (variable_cell) with it, within a budget of force calls."""
    from ase.filters import FrechetCellFilter
    from ase.optimize import FIRE

    atoms = atoms.copy()
    if max_force_calls < 1:
        return Spread(atoms, 0, False)
    atoms.calc = SoftSphere(diameters)
    moved: Any = FrechetCellFilter(atoms) if variable_cell else atoms
    calls, converged = 0, False
    for done in FIRE(moved, logfile=None).irun(fmax=FMAX, steps=max_force_calls - 1):  # pyright: ignore[reportArgumentType]
        calls, converged = calls + 1, bool(done)
    atoms.calc = None
    return Spread(atoms, calls, converged)
