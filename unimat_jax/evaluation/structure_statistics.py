"""A crystal in a few numbers, for manifests and tables."""

from __future__ import annotations

from typing import Any

from unimat_jax.crystal import Crystal

SYMPREC = 0.01
SYMPREC_LOOSE = 0.1
"""Angstrom: spglib's tolerance for nearly exact coordinates, and for generated ones that nobody has relaxed."""


def describe(crystal: Crystal) -> dict[str, Any]:
    """num_atoms, formula, density (g/cm3), volume_per_atom (A3), min_distance (A, an atom's own images included),
    space_group_number at 0.01 A and space_group_number_loose at 0.1 A (1-230), all ready for JSON.

    A space group is None where spglib finds none; `space_group_failure` then says why. Never raises for a `Crystal`.
    The cost is spglib's: 0.5 ms a crystal without symmetry, several for a highly symmetric one.
    """
    number, failure = space_group(crystal, SYMPREC)
    loose, loose_failure = space_group(crystal, SYMPREC_LOOSE)
    result = {
        "num_atoms": crystal.num_atoms,
        "formula": crystal.formula,
        "density": crystal.density,
        "volume_per_atom": crystal.volume / crystal.num_atoms,
        "min_distance": crystal.min_distance,
        "space_group_number": number,
        "space_group_number_loose": loose,
    }
    if failure or loose_failure:
        result["space_group_failure"] = failure or loose_failure
    return result


def space_group(crystal: Crystal, symprec: float) -> tuple[int | None, str]:
    """(space group number, "") at a tolerance in Angstrom, or (None, why spglib found none)."""
    import spglib

    cell: Any = (crystal.lattice, crystal.frac_coords, crystal.atomic_numbers)
    try:
        found = spglib.get_symmetry_dataset(cell, symprec=symprec)  # 2.x returns None on failure, later versions raise
    except Exception as error:
        return None, f"spglib at {symprec} A: {type(error).__name__}: {error}"
    if found is None:
        return None, f"spglib finds no space group at {symprec} A"
    return int(found.number), ""
