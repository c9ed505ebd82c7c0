"""What a density-functional calculation of a crystal is made with, as the Materials Project makes its own: settings,
Hubbard U, magnetic starts, k-points, symmetry. Nothing here computes an energy."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError

SPINS = ("auto", "always", "never")
BOND_WITH_SPIN = 1.4
"""Angstrom. Oxygen atoms nearer than this are O2 or a superoxide, which have a moment; a peroxide's are at 1.5."""


@dataclasses.dataclass(frozen=True)
class DftSettings:
    """cutoff: of the plane waves, eV. kpoint_density: k-points an A^-3 of the reciprocal cell, in a mesh with Gamma;
    static_kpoint_density: those of the static point (64 and 100 are the Materials Project's). smearing: the width of
    Fermi-Dirac's, eV; energies are extrapolated to none. energy_tolerance: eV a valence electron, and max_scf_steps, of
    each self-consistent loop. hubbard_u: PBE+U where the Materials Project has it; without, PBE everywhere. spin: of
    SPINS; "auto": with spin where `has_moments`. symprec: Angstrom, within which a cell is made symmetric.
    num_relaxations: one after the other, 0 for the static point alone.
    """

    cutoff: float = 800.0
    kpoint_density: float = 64.0
    static_kpoint_density: float = 100.0
    smearing: float = 0.05
    energy_tolerance: float = 1e-5
    max_scf_steps: int = 300
    hubbard_u: bool = True
    spin: str = "auto"
    symprec: float = 0.01
    num_relaxations: int = 2

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DftSettings:
        """The defaults with these values. Raises UserError for names and values that there are not."""
        known: dict[str, Any] = {name: type(value) for name, value in dataclasses.asdict(cls()).items()}
        for name, value in values.items():
            if name not in known:
                raise UserError(f"--energy_model_kwargs: there is no setting {name!r}; choose from {', '.join(known)}")
            _check(name, value, known[name])
        return cls(**{name: known[name](value) for name, value in values.items()})


def _check(name: str, value: Any, kind: type) -> None:
    if kind is str:
        good, wanted = value in SPINS, f"one of {', '.join(SPINS)}"
    elif kind is bool:
        good, wanted = isinstance(value, bool), "true or false"
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
        least = 0 if name in ("num_relaxations", "symprec") else None
        good = number and (value > 0 if least is None else value >= least) and (kind is float or value == int(value))
        what = "a whole number" if kind is int else "a number"
        wanted = f"{what} of at least 0" if least == 0 else f"{what} above 0"
    if not good:
        raise UserError(f"--energy_model_kwargs: {name} = {value!r}: give {wanted}")


@functools.cache
def _mp_moments() -> dict[str, float]:
    """MPRelaxSet's starting moments, by element or ion."""
    from pymatgen.io.vasp.sets import MPRelaxSet

    return dict(MPRelaxSet.CONFIG["INCAR"]["MAGMOM"])


def _mp_incar(crystal: Crystal) -> tuple[dict[str, Any], list[str]]:
    """What MPRelaxSet gives VASP, with the atoms in our order, and the symbols that its lists by element go by."""
    from pymatgen.io.vasp.sets import MPRelaxSet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on oxidation states and the smearing, which are not asked for
        settings: Any = {"user_incar_settings": {"KSPACING": 0.5}, "user_kpoints_settings": None}
        inputs = MPRelaxSet(crystal.to_pymatgen(), sort_structure=False, **settings)
        return dict(inputs.incar), list(inputs.poscar.site_symbols)


def hubbard_u(crystal: Crystal) -> dict[str, float]:
    """eV by symbol, for the d electrons; empty where the Materials Project takes plain PBE, as outside of oxides and
    fluorides of Co, Cr, Fe, Mn, Mo, Ni, V and W."""
    incar, symbols = _mp_incar(crystal)
    values = incar.get("LDAUU") or []
    return {symbol: float(u) for symbol, u in zip(symbols, values, strict=False) if u}


def has_moments(crystal: Crystal) -> bool:
    """Whether an element is one for which MPRelaxSet names a moment (La and Lu have none left), or oxygen atoms are
    bound as in O2."""
    from ase.neighborlist import neighbor_list

    named = {ion.rstrip("+-0123456789") for ion, moment in _mp_moments().items() if moment > 0.6 or ion == "Co"}
    if named & set(crystal.symbols):
        return True
    oxygens = np.flatnonzero(crystal.atomic_numbers == 8)
    if len(oxygens) == 0:
        return False
    return bool(len(neighbor_list("d", crystal.to_ase()[oxygens.tolist()], BOND_WITH_SPIN)))


def starting_moments(crystal: Crystal, spin: str) -> list[float] | None:
    """Bohr magnetons of each atom, ferromagnetic, as MPRelaxSet has them; None for a calculation without spin."""
    if spin == "never" or (spin == "auto" and not has_moments(crystal)):
        return None
    return [float(moment) for moment in _mp_incar(crystal)[0]["MAGMOM"]]


def kpoint_mesh(crystal: Crystal, density: float) -> tuple[int, int, int]:
    """Divisions of a mesh around Gamma with about `density` points an A^-3 of the reciprocal cell."""
    from pymatgen.io.vasp.inputs import Kpoints

    structure: Any = crystal.to_pymatgen()
    kppvol: Any = density
    first, second, third = Kpoints.automatic_density_by_vol(structure, kppvol, force_gamma=True).kpts[0]
    return int(first), int(second), int(third)


def symmetrised(crystal: Crystal, symprec: float) -> Crystal:
    """The same cell and atoms, moved to where the symmetry found within symprec (A) has them, and all together to its
    standard origin.

    What a potential relaxed is off by thousandths of an Angstrom, and without symmetry has ten times the k-points. GPAW
    sees only the symmetry that leaves the origin where it is, or moves it by a fraction of its grid.
    """
    from ase.spacegroup.symmetrize import refine_symmetry

    if not symprec:
        return crystal
    atoms = crystal.to_ase()
    try:
        found: Any = refine_symmetry(atoms, symprec=symprec)
        origin = -np.linalg.solve(found.transformation_matrix, found.origin_shift)
    except Exception:  # spglib finds none
        return crystal
    frac_coords = np.linalg.solve(atoms.cell.array.T, atoms.positions.T).T - origin
    return Crystal.create(crystal.atomic_numbers, frac_coords, atoms.cell.array, crystal.uid, crystal.properties)
