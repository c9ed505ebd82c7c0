"""Crystal: what every part of this package passes on, and its conversions to pymatgen, ASE, CIF, extxyz and POSCAR."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from unimat_jax.errors import UserError
from unimat_jax.periodic_table import MAX_ATOMIC_NUMBER, SYMBOLS

if TYPE_CHECKING:
    import ase
    from pymatgen.core import Structure

AMU_PER_A3_IN_G_PER_CM3 = 1.66053906660
"""Density of 1 atomic mass unit per cubic Angstrom, g/cm3 (CODATA 2018)."""


class CrystalError(UserError):
    """A structure that cannot be used. `reason` is a short code to count by, the message says what to do."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # carries `reason` through process pools
        return type(self), (self.reason, str(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Crystal:
    """An ordered periodic crystal.

    atomic_numbers: int [N]; frac_coords: float64 [N, 3], any range; lattice: float64 [3, 3], rows are the cell vectors
    in Angstrom, right-handed (`Crystal.create` makes it so); uid: a name; properties: numbers by name.
    """

    atomic_numbers: np.ndarray
    frac_coords: np.ndarray
    lattice: np.ndarray
    uid: str = ""
    properties: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def create(cls, atomic_numbers, frac_coords, lattice, uid: str = "", properties=None) -> Crystal:
        """A checked crystal.

        Raises CrystalError (`no_atoms`, `bad_shape`, `bad_element`, `not_finite`, `cell_degenerate`).
        A left-handed cell is inverted, basis and coordinates together: each atom stays where it is in space, so that
        taking lengths and angles afterwards does not mirror the crystal.
        """
        numbers = np.asarray(atomic_numbers, np.int32).reshape(-1)
        frac = np.asarray(frac_coords, np.float64)
        cell = np.asarray(lattice, np.float64)
        if numbers.size == 0:
            raise CrystalError("no_atoms", f"{uid or 'structure'} has no atoms: give at least one site")
        if frac.shape != (numbers.size, 3) or cell.shape != (3, 3):
            shapes = f"frac_coords {frac.shape} and lattice {cell.shape} for {numbers.size} atoms"
            raise CrystalError("bad_shape", f"{uid or 'structure'}: {shapes}; they must be (N, 3) and (3, 3)")
        if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
            bad = sorted(set(numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)].tolist()))
            raise CrystalError("bad_element", f"{uid or 'structure'}: atomic numbers {bad} are not elements 1 to 118")
        if not (np.isfinite(frac).all() and np.isfinite(cell).all()):
            raise CrystalError("not_finite", f"{uid or 'structure'}: a coordinate or the lattice is NaN or infinite")
        determinant = np.linalg.det(cell)
        lengths = np.linalg.norm(cell, axis=1)
        if lengths.min() < 1e-3 or abs(determinant) < 1e-6 * np.prod(lengths):
            raise CrystalError(
                "cell_degenerate", f"{uid or 'structure'}: the lattice {cell.round(4).tolist()} spans no volume"
            )
        if determinant < 0:
            cell, frac = -cell, -frac
        return cls(numbers, frac, cell, uid, dict(properties or {}))

    @property
    def num_atoms(self) -> int:
        return len(self.atomic_numbers)

    @property
    def lengths(self) -> np.ndarray:
        """(a, b, c) in Angstrom."""
        return np.linalg.norm(self.lattice, axis=1)

    @property
    def angles(self) -> np.ndarray:
        """(alpha, beta, gamma) in degrees."""
        return angles_of(self.lattice)

    @property
    def volume(self) -> float:
        """Cubic Angstrom."""
        return float(abs(np.linalg.det(self.lattice)))

    @property
    def density(self) -> float:
        """g/cm3."""
        from ase.data import atomic_masses

        return float(atomic_masses[self.atomic_numbers].sum() / self.volume * AMU_PER_A3_IN_G_PER_CM3)

    @property
    def symbols(self) -> list[str]:
        return [SYMBOLS[z] for z in self.atomic_numbers]

    @property
    def formula(self) -> str:
        """The cell's formula with elements in pymatgen's order of electronegativity, as in 'SrTiO3'."""
        from pymatgen.core import Composition

        parts = Composition(Counter(self.symbols)).formula.split()  # pymatgen writes "Sr1 Ti1 O3"
        return "".join(part[:-1] if part[-1] == "1" and part[-2].isalpha() else part for part in parts)

    @property
    def min_distance(self) -> float:
        """The shortest distance between two atoms, periodic images of one atom included (Angstrom)."""
        return min_distance(self.frac_coords, self.lattice)

    def niggli(self, tolerance: float = 1e-5) -> Crystal:
        """The same crystal in its Niggli-reduced cell (spglib, `tolerance` as its `eps`)."""
        import spglib

        # Noise of the tolerance's own size (a float32 cell) can send spglib in circles, some 0.5 % of cells: then a
        # tolerance ten times smaller or larger serves.
        attempts = (
            found_by_spglib(spglib.niggli_reduce, self.lattice, eps=tolerance * factor) for factor in (1.0, 0.1, 10.0)
        )
        reduced = next((lattice for lattice in attempts if lattice is not None), None)
        if reduced is None:
            raise CrystalError("niggli_failed", f"{self.uid or 'structure'}: no Niggli cell at tolerance {tolerance}")
        frac = self.frac_coords @ self.lattice @ np.linalg.inv(reduced)
        return Crystal.create(self.atomic_numbers, frac, reduced, self.uid, self.properties)

    def primitive(self, tolerance: float = 0.01) -> Crystal:
        """The same crystal in a primitive cell, not idealised (spglib, `tolerance` in Angstrom as `symprec`)."""
        import spglib

        cell: Any = (self.lattice, self.frac_coords, self.atomic_numbers)
        found = found_by_spglib(spglib.standardize_cell, cell, to_primitive=True, no_idealize=True, symprec=tolerance)
        if found is None:
            raise CrystalError("primitive_failed", f"{self.uid or 'structure'}: no primitive cell at {tolerance} A")
        lattice, frac, numbers = found
        return Crystal.create(numbers, frac, lattice, self.uid, self.properties)

    def to_pymatgen(self) -> Structure:
        from pymatgen.core import Structure

        return Structure(self.lattice, self.atomic_numbers.tolist(), self.frac_coords, properties={"uid": self.uid})

    @classmethod
    def from_pymatgen(cls, structure: Structure, uid: str = "", properties=None) -> Crystal:
        """Raises CrystalError (`disordered`, `bad_element`, ...) for all but ordered crystals of real elements."""
        if not structure.is_ordered:
            sites = [str(site.species) for site in structure if not site.is_ordered]
            raise CrystalError(
                "disordered",
                f"{uid or 'structure'} has {len(sites)} partly occupied or mixed sites (first: {sites[0]}): "
                "give an ordered approximant",
            )
        # Not `site.specie.Z`: a dummy species (a vacancy) has none.
        numbers = [
            getattr(site.specie, "Z", 0) if "Dummy" not in type(site.specie).__name__ else 0 for site in structure
        ]
        return cls.create(numbers, structure.frac_coords, structure.lattice.matrix, uid, properties)

    def to_ase(self) -> ase.Atoms:
        import ase

        # Not an empty uid: extxyz would write "uid= pbc=...", and the reader take the next key for its value.
        info: dict[str, Any] = {**({"uid": self.uid} if self.uid else {}), **self.properties}
        return ase.Atoms(
            numbers=self.atomic_numbers, scaled_positions=self.frac_coords, cell=self.lattice, pbc=True, info=info
        )

    @classmethod
    def from_ase(cls, atoms: ase.Atoms, uid: str = "", properties=None) -> Crystal:
        if not atoms.cell.rank == 3 or not atoms.pbc.all():
            raise CrystalError(
                "not_periodic", f"{uid or 'structure'} is not periodic in three directions: give its cell"
            )
        cell = atoms.cell.array
        frac = np.linalg.solve(cell.T, atoms.positions.T).T
        return cls.create(atoms.numbers, frac, cell, uid, properties)

    def to_cif(self) -> str:
        """CIF text in P1 whose data block is named by the uid."""
        from pymatgen.io.cif import CifWriter

        lines = str(CifWriter(self.to_pymatgen(), significant_figures=8)).splitlines()
        index = next(i for i, line in enumerate(lines) if line.startswith("data_"))
        lines[index] = f"data_{self.uid or self.formula}"
        return "\n".join(lines) + "\n"

    def to_extxyz(self) -> str:
        """One extended-XYZ frame; `uid` and the properties stand in its comment line."""
        import ase.io

        buffer = io.StringIO()
        ase.io.write(buffer, self.to_ase(), format="extxyz")
        return buffer.getvalue()

    def to_poscar(self) -> str:
        from pymatgen.io.vasp import Poscar

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only about sorted species, which POSCAR allows
            return Poscar(self.to_pymatgen().get_sorted_structure(), comment=self.uid or self.formula).get_str(
                significant_figures=12
            )


def angles_of(lattice: np.ndarray) -> np.ndarray:
    """Cell angles (alpha, beta, gamma) in degrees [..., 3] of lattices [..., 3, 3] given as rows."""
    u, v = lattice[..., (1, 0, 0), :], lattice[..., (2, 2, 1), :]
    y, z = (1, 2, 0), (2, 0, 1)
    cross = u[..., y] * v[..., z] - u[..., z] * v[..., y]  # np.cross takes longer than all else in reading a crystal
    # Exact near 0 and 180 degrees, unlike arccos.
    return np.degrees(np.arctan2(np.linalg.norm(cross, axis=-1), (u * v).sum(-1)))


def lattice_from_parameters(lengths: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Right-handed lattices [..., 3, 3] (Angstrom, rows) from lengths [..., 3] (Angstrom), angles [..., 3] (degrees).

    a lies along x, b in the xy plane. Angles that span no cell give NaN in the last row.
    """
    a, b, c = np.moveaxis(np.asarray(lengths, np.float64), -1, 0)
    cos_a, cos_b, cos_g = np.moveaxis(np.cos(np.radians(np.asarray(angles, np.float64))), -1, 0)
    sin_g = np.sqrt(np.maximum(1 - cos_g**2, 1e-300))
    y = (cos_a - cos_b * cos_g) / sin_g
    with np.errstate(invalid="ignore"):
        z = np.sqrt(1 - cos_b**2 - y**2)
    zero = np.zeros_like(a)
    rows = [
        np.stack([a, zero, zero], -1),
        np.stack([b * cos_g, b * sin_g, zero], -1),
        np.stack([c * cos_b, c * y, c * z], -1),
    ]
    return np.stack(rows, -2)


_OFFSETS = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing="ij"), -1).reshape(-1, 3)


def found_by_spglib(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What spglib finds, None where it finds nothing: it says that by None or, by a setting that any package in the
    process may change, by an exception."""
    from spglib.error import SpglibError

    try:
        return function(*args, **kwargs)
    except SpglibError:
        return None


def reduced_cell(lattice: np.ndarray) -> np.ndarray:
    """The Delaunay-reduced cell, or the one given where spglib finds none."""
    import spglib

    reduced = found_by_spglib(spglib.delaunay_reduce, lattice)
    return lattice if reduced is None else reduced


def min_distance(frac_coords: np.ndarray, lattice: np.ndarray) -> float:
    """The shortest interatomic distance (Angstrom), an atom's own periodic images included.

    The cell is Delaunay-reduced first, so that the 26 neighbouring cells hold every nearest image. (Niggli's would do
    as well, but its reduction does not end for some cells with the noise of float32.)
    """
    reduced = reduced_cell(lattice)
    frac = frac_coords @ lattice @ np.linalg.inv(reduced)
    offsets = _OFFSETS @ reduced
    own_image = np.linalg.norm(offsets[np.any(_OFFSETS != 0, axis=1)], axis=1).min()
    i, j = np.triu_indices(len(frac), 1)
    if not len(i):
        return float(own_image)
    difference = frac[i] - frac[j]
    difference -= np.round(difference)
    vectors = (difference @ reduced)[:, None, :] + offsets
    return float(min(own_image, np.sqrt((vectors**2).sum(-1).min())))
