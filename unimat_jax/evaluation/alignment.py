"""The best alignment of two crystals: the numbers of pymatgen's StructureMatcher (Ong et al. 2013), in fewer steps.

StructureMatcher takes each cell to its Niggli-reduced primitive one, scales both to one volume and tries every basis of
the first lattice that is like the second's, with every translation that brings an atom of the rarest element onto one
of its kind. Here a crystal is reduced once for all its pairs, and the bases and translations of a pair are tried
together, as arrays. What is left out cannot change the answer, each with its reason beside it; the tests compare both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal, CrystalError, lattice_from_parameters
from unimat_jax.evaluation.displacement import Blocks, displacements, plane_densities, within_reach

_PERFECT = 1e-5
"""StructureMatcher takes the first alignment with a smaller RMS distance, though a later one may be better still."""
_FIRST_TRIALS, _MAX_ATOM_PAIRS = 128, 400_000
"""Alignments in the first array (`fits` often needs no more), pairs of atoms in any (some 50 MB)."""
_MAX_LATTICE_POINTS, _MAX_BASES = 300_000, 30_000_000
"""Points within the longest cell vector, bases to choose from. A needle 100 times as long as wide has 50,000 points;
pymatgen would take hours and gigabytes where these are passed."""


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """StructureMatcher's. ltol: of lengths, as a fraction; stol: of distances, in (V / n)^(1/3); angle_tol: degrees."""

    ltol: float
    stol: float
    angle_tol: float


TOLERANCES = {
    "cdvae": Tolerances(ltol=0.3, stol=0.5, angle_tol=10.0),
    "mattergen": Tolerances(ltol=0.2, stol=0.3, angle_tol=5.0),
    "lemat": Tolerances(ltol=0.1, stol=0.3, angle_tol=5.0),
}
"""cdvae: CDVAE's and DiffCSP's; mattergen: MatterGen's, pymatgen's defaults; lemat: LeMat-GenBench's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reduced:
    """A crystal in its reduced primitive cell. numbers int [N]; frac_coords [N, 3]; lattice [3, 3], rows, Angstrom."""

    numbers: np.ndarray
    frac_coords: np.ndarray
    lattice: np.ndarray

    @property
    def num_atoms(self) -> int:
        return len(self.numbers)

    @cached_property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """(atomic number, number of atoms) pairs. StructureMatcher matches no crystals whose pairs differ."""
        numbers, counts = np.unique(self.numbers, return_counts=True)
        return tuple(zip(numbers.tolist(), counts.tolist(), strict=True))

    @cached_property
    def places(self) -> dict[int, np.ndarray]:
        """The atoms of each element, by atomic number."""
        return {number: np.flatnonzero(self.numbers == number) for number, _ in self.counts}

    @cached_property
    def volume(self) -> float:
        """Cubic Angstrom."""
        return float(abs(np.linalg.det(self.lattice)))


def reduced(crystal: Crystal) -> Reduced:
    """The Niggli-reduced primitive cell that StructureMatcher compares.

    Raises CrystalError (`needle_cell`), and what pymatgen raises on odd cells.
    """
    from pymatgen.core import Lattice

    given = Lattice(crystal.lattice)
    _refuse_needle(np.linalg.norm(given.lll_matrix, axis=1).max(), crystal.volume)
    counts = np.unique(crystal.atomic_numbers, return_counts=True)[1]
    if np.gcd.reduce(counts) > 1:
        structure: Any = crystal.to_pymatgen().get_reduced_structure().get_primitive_structure()
        lattice = np.array(structure.lattice.matrix)
        return Reduced(np.array(structure.atomic_numbers, np.int32), np.array(structure.frac_coords), lattice)
    # A smaller cell would hold these counts divided by a number: there is none.
    niggli = given.get_niggli_reduced_lattice()
    if niggli == given:  # to rounding errors, which pymatgen leaves alone
        return Reduced(crystal.atomic_numbers, crystal.frac_coords, crystal.lattice)
    frac = np.mod(niggli.get_fractional_coords(given.get_cartesian_coords(crystal.frac_coords)), 1)
    return Reduced(crystal.atomic_numbers, frac, np.array(niggli.matrix))


def rms_dist(prediction: Reduced, reference: Reduced, tolerances: Tolerances) -> float | None:
    """StructureMatcher's `get_rms_dist(prediction, reference)[0]`: the smallest root mean square displacement.

    In units of (V / n)^(1/3); None where no alignment has one below `stol`.
    """
    return _best(prediction, reference, tolerances)[0]


def fits(a: Reduced, b: Reduced, tolerances: Tolerances) -> bool:
    """StructureMatcher's `fit(a, b)`: whether some alignment leaves every displacement below `stol` (V / n)^(1/3).

    Stricter than an RMS distance below `stol`, and not quite symmetric in `a` and `b`.
    """
    return any((largest < tolerances.stol).any() for _, largest in _trials(a, b, tolerances))


def fit_rms(a: Reduced, b: Reduced, tolerances: Tolerances) -> float | None:
    """`rms_dist` of two crystals of which `fits` says that they are one structure, else None."""
    rms, fit = _best(a, b, tolerances)
    return rms if fit else None


def _best(a: Reduced, b: Reduced, tolerances: Tolerances) -> tuple[float | None, bool]:
    """What `rms_dist` and `fits` answer."""
    best, fit = math.inf, False
    for rms, largest in _trials(a, b, tolerances):
        fit = fit or bool((largest < tolerances.stol).any())
        perfect = np.flatnonzero(rms < min(_PERFECT, tolerances.stol))
        if len(perfect):
            return float(rms[perfect[0]]), fit
        best = min(best, float(rms.min()))
    return (best if best < tolerances.stol else None), fit


def _trials(a: Reduced, b: Reduced, tolerances: Tolerances) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(RMS, largest) displacements of alignments of `b` onto `a`, in (V / n)^(1/3), in StructureMatcher's order."""
    if a.counts != b.counts:
        return
    ratio = (b.volume / a.volume) ** (1 / 6)
    bases, cells = _bases(a.lattice * ratio, b.lattice / ratio, tolerances)
    lengths = (np.abs(np.linalg.det(cells)) / a.num_atoms) ** (1 / 3)  # (V / n)^(1/3)
    # Atoms are partners within a box whose faces are 2 stol (V / n)^(1/3) away.
    reach = 2 * tolerances.stol * lengths
    limits = reach[:, None] * plane_densities(cells)
    blocks: Blocks = [
        (b.places[number], a.places[number]) for number in sorted(a.places, key=lambda z: len(a.places[z]))
    ]
    fewest = len(blocks[0][0])
    # StructureMatcher moves the first atom of a rarest element onto all of its kind.
    anchor, starts = min((rows[0], columns) for rows, columns in blocks if len(rows) == fewest)
    size, begin, total = _FIRST_TRIALS, 0, len(bases) * len(starts)
    most = max(1, _MAX_ATOM_PAIRS // sum(len(rows) ** 2 for rows, _ in blocks))
    while begin < total:
        trial = np.arange(begin, min(begin + min(size, most), total))
        begin, size = begin + len(trial), 4 * size
        which = trial // len(starts)
        part = slice(which[0], which[-1] + 1)
        which -= which[0]
        frac_a = a.frac_coords @ np.linalg.inv(bases[part])
        frac_a -= np.floor(frac_a)
        shifts = frac_a[which, starts[trial % len(starts)]] - b.frac_coords[anchor]
        kept = within_reach(frac_a, b.frac_coords, shifts, which, limits[part], blocks)
        if len(kept):
            frac_b = b.frac_coords + shifts[kept, None]
            rms, largest = displacements(frac_a, frac_b, which[kept], cells[part], reach[part], blocks)
            unit = lengths[part][which[kept]]
            yield rms / unit, largest / unit


def _bases(a: np.ndarray, b: np.ndarray, tolerances: Tolerances) -> tuple[np.ndarray, np.ndarray]:
    """Bases of lattice `a` like `b`, integer [M, 3, 3] in terms of `a`'s rows, and for each the mean of both cells.

    The mean is taken of lengths and angles: [M, 3, 3], rows, Angstrom.
    """
    from pymatgen.core import Lattice

    ltol, angle_tol = tolerances.ltol, tolerances.angle_tol
    lengths_b, angles_b = np.linalg.norm(b, axis=1), _angles(b[[1, 0, 0]], b[[2, 2, 1]])
    _refuse_needle(lengths_b.max() * (1 + ltol), abs(np.linalg.det(a)))
    # pymatgen's own search, for its order: of several perfect alignments the first is taken.
    found: Any = Lattice(a).get_points_in_sphere(
        [[0, 0, 0]], [0, 0, 0], lengths_b.max() * (1 + ltol), zip_results=False
    )
    points, ratios = np.round(found[0]), np.asarray(found[1])[:, None] / lengths_b
    alike = (ratios < 1 + ltol) & (ratios > 1 / (1 + ltol))
    rows = [points[alike[:, axis]] for axis in range(3)]
    if math.prod(map(len, rows)) > _MAX_BASES:
        raise CrystalError("needle_cell", f"{math.prod(map(len, rows)):,} bases to choose from: the cell is too uneven")
    vectors = [part @ a for part in rows]
    lengths_a = [np.linalg.norm(part, axis=1) for part in vectors]
    alpha = _angles(vectors[1][:, None], vectors[2])
    beta = _angles(vectors[0][:, None], vectors[2])
    gamma = _angles(vectors[0][:, None], vectors[1])
    close = [np.abs(angle - angles_b[axis]) <= angle_tol for axis, angle in enumerate((alpha, beta, gamma))]
    i, j, k = np.nonzero(close[2][:, :, None] & close[1][:, None, :] & close[0])
    bases = np.stack([rows[0][i], rows[1][j], rows[2][k]], 1)
    lengths = np.stack([lengths_a[0][i], lengths_a[1][j], lengths_a[2][k]], 1)
    angles = np.stack([alpha[j, k], beta[i, k], gamma[i, j]], 1)
    cells = lattice_from_parameters((lengths + lengths_b) / 2, (angles + angles_b) / 2)
    kept = np.abs(np.abs(np.linalg.det(bases)) - 1) < 0.5  # bases of the lattice itself, not of a coarser one
    kept &= np.nan_to_num(np.linalg.det(cells)) > 0  # the mean angles of two needles may span no cell
    return bases[kept], cells[kept]


def _refuse_needle(radius: float, volume: float) -> None:
    points = 4 / 3 * math.pi * radius**3 / volume
    if not points < _MAX_LATTICE_POINTS:
        raise CrystalError("needle_cell", f"{points:,.0f} lattice points within {radius:.1f} A: the cell is too uneven")


def _angles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Degrees, between vectors [..., 3]."""
    cosines = (u * v).sum(-1) / (np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1))
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))
