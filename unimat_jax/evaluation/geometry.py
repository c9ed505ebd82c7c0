"""What CDVAE's structure rule leaves out: an atom's own images and the sizes of the elements; and the first shells."""

from __future__ import annotations

import dataclasses

import numpy as np

from unimat_jax.crystal import Crystal, reduced_cell
from unimat_jax.periodic_table import covalent_radii

RADII_FRACTION = 0.7
"""Strict rule: no two atoms nearer than this times the sum of their covalent radii."""
DENSITY_RANGE = (0.01, 25.0)
"""g/cm3, strict rule; the densest element, osmium, has 22.6."""
SHELL_FACTOR = 1.2
"""The first shell of an atom: all atoms within this times the distance of the nearest."""
_BLOCK = 2_000_000
_IMAGES = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing="ij"), -1).reshape(-1, 3)
_HOME = 13
"""Index of the image (0, 0, 0)."""


@dataclasses.dataclass(frozen=True)
class Shells:
    """nearest [N]: distance of each atom's nearest neighbour (Angstrom), an own image included. coordination [N]:
    number of atoms in its first shell. bond_lengths: Angstrom, of all first shells. closest_ratio: the smallest
    distance of two atoms over the sum of their covalent radii."""

    nearest: np.ndarray
    coordination: np.ndarray
    bond_lengths: np.ndarray
    closest_ratio: float


def shells(crystal: Crystal) -> Shells:
    """The nearest neighbours of each atom of a crystal.

    Looked for in the 27 cells around, after a Delaunay reduction, among which every nearest image is.
    """
    cell = reduced_cell(crystal.lattice)
    frac = crystal.frac_coords @ crystal.lattice @ np.linalg.inv(cell)
    offsets = _IMAGES @ cell
    radii = covalent_radii(crystal.atomic_numbers)
    number = crystal.num_atoms
    nearest, coordination, lengths, ratio = np.zeros(number), np.zeros(number, int), [], np.inf
    rows = max(1, _BLOCK // (27 * number))
    for start in range(0, number, rows):
        block = slice(start, min(start + rows, number))
        difference = frac[block, None] - frac[None]
        difference -= np.round(difference)
        distance = np.linalg.norm((difference @ cell)[:, :, None] + offsets, axis=-1)  # [rows, N, 27]
        own = np.arange(block.start, block.stop)
        distance[own - start, own, _HOME] = np.inf
        nearest[block] = distance.min((1, 2))
        in_shell = distance <= SHELL_FACTOR * nearest[block, None, None]
        coordination[block] = in_shell.sum((1, 2))
        lengths.append(distance[in_shell])
        ratio = min(ratio, float((distance.min(2) / (radii[block, None] + radii)).min()))
    return Shells(nearest, coordination, np.concatenate(lengths), ratio)


def strict_reason(crystal: Crystal, closest_ratio: float) -> str:
    """Why a crystal fails the strict structure rule, "" where it passes: `density_out_of_range`, `atoms_too_close`."""
    if not DENSITY_RANGE[0] <= crystal.density <= DENSITY_RANGE[1]:
        return "density_out_of_range"
    return "" if closest_ratio >= RADII_FRACTION else "atoms_too_close"
