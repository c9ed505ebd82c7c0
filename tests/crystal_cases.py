"""Crystals to test with, and the proof that two crystals are the same up to a proper rotation."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from unimat_jax.crystal import Crystal, lattice_from_parameters


def quartz() -> Crystal:
    """Alpha-quartz in P3_121 (152), made by its six symmetry operations, none of which turns it into P3_221 (154)."""

    def orbit(x: float, y: float, z: float) -> list[tuple[float, float, float]]:
        third = 1 / 3
        images = [(x, y, z), (-y, x - y, z + third), (y - x, -x, z + 2 * third)]
        images += [(y, x, -z), (x - y, -y, 2 * third - z), (-x, y - x, third - z)]
        return images

    silicon = orbit(0.4697, 0.0, 1 / 3)[:3]
    oxygen = orbit(0.4135, 0.2669, 0.2144)
    lattice = lattice_from_parameters(np.array([4.9134, 4.9134, 5.4052]), np.array([90.0, 90.0, 120.0]))
    return Crystal.create([14] * 3 + [8] * 6, np.mod(silicon + oxygen, 1.0), lattice, "quartz")


def perovskite() -> Crystal:
    """SrTiO3, cubic (221)."""
    frac = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Crystal.create([38, 22, 8, 8, 8], frac, 3.905 * np.eye(3), "SrTiO3")


def diamond() -> Crystal:
    """Primitive cell of diamond (227)."""
    cell = 3.567 / 2 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    return Crystal.create([6, 6], [[0, 0, 0], [0.25, 0.25, 0.25]], cell, "diamond")


def mirrored(crystal: Crystal) -> Crystal:
    """The mirror image: the cell's shape is kept, every coordinate changes sign."""
    return Crystal(crystal.atomic_numbers, -crystal.frac_coords, crystal.lattice, crystal.uid, crystal.properties)


def random_crystal(
    rng: np.random.Generator, max_atoms: int = 12, elements: tuple[int, ...] = tuple(range(1, 119))
) -> Crystal:
    """Atoms anywhere in a cell of any shape that spans some volume; usually chiral."""
    number = int(rng.integers(1, max_atoms + 1))
    kinds = rng.choice(elements, size=min(3, len(elements)), replace=False)
    while True:
        lattice = lattice_from_parameters(rng.uniform(2.0, 12.0, 3), rng.uniform(40.0, 140.0, 3))
        if np.isfinite(lattice).all() and np.linalg.det(lattice) > 0.1 * np.linalg.norm(lattice, axis=1).prod():
            break
    # Not along x: a crystal may come in any orientation.
    lattice = lattice @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    frac = rng.uniform(-2.0, 2.0, (number, 3))
    return Crystal.create(rng.choice(kinds, number), frac, lattice, f"random-{number}")


def crystals(max_atoms: int = 12, elements: tuple[int, ...] = tuple(range(1, 119))) -> st.SearchStrategy[Crystal]:
    return st.integers(0, 2**32 - 1).map(lambda seed: random_crystal(np.random.default_rng(seed), max_atoms, elements))


def neighbours(crystal: Crystal, atom: int, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers [K] and vectors [K, 3] (Angstrom) of all atoms within `radius` of one, itself left out."""
    inverse = np.linalg.inv(crystal.lattice)
    reach = np.ceil(radius * np.linalg.norm(inverse, axis=0) + 1).astype(int)  # planes are 1 / |column| apart
    shifts = np.array(list(itertools.product(*[range(-n, n + 1) for n in reach])))
    start = crystal.frac_coords - crystal.frac_coords[atom]
    vectors = ((start - np.floor(start))[:, None, :] + shifts) @ crystal.lattice
    distances = np.linalg.norm(vectors, axis=-1)
    kept = (distances < radius) & (distances > 1e-3)
    return np.repeat(crystal.atomic_numbers, len(shifts)).reshape(kept.shape)[kept], vectors[kept]


def shells(crystal: Crystal, radius: float) -> list[np.ndarray]:
    """For every atom, (its element, neighbour's element, distance) of all neighbours, sorted; the atoms sorted too."""
    rows = []
    for atom, number in enumerate(crystal.atomic_numbers):
        numbers, vectors = neighbours(crystal, atom, radius)
        table = np.stack([np.full(len(numbers), number), numbers, np.linalg.norm(vectors, axis=1).round(3)], 1)
        rows.append(table[np.lexsort(table.T[::-1])])
    return sorted(rows, key=lambda row: (len(row), row[:8].tolist()))


def cluster_radius(crystal: Crystal) -> float:
    """Far enough to see past the cell in every direction, but not more than some 300 atoms (Angstrom)."""
    of_300_atoms = np.cbrt(300 * crystal.volume / crystal.num_atoms * 3 / (4 * np.pi))
    return min(1.25 * float(crystal.lengths.max()), of_300_atoms) + 1e-3 * np.pi  # odd: no shell right on the border


def same_up_to_proper_rotation(a: Crystal, b: Crystal, *, tolerance: float = 1e-3, allow_mirror: bool = False) -> bool:
    """Whether a rotation with determinant +1 takes the surroundings of an atom of `a` onto those of an atom of `b`.

    The cluster of neighbours within `cluster_radius(a)` must land on neighbours of the same element within `tolerance`
    Angstrom, by the Kabsch rotation of the whole cluster. Nothing is assumed of cell, origin or order of the atoms.
    """
    if sorted(a.atomic_numbers.tolist()) != sorted(b.atomic_numbers.tolist()):
        return False
    radius = cluster_radius(a)
    atom = int(np.argmin([np.sum(a.atomic_numbers == number) for number in a.atomic_numbers]))  # of the rarest element
    numbers, vectors = neighbours(a, atom, radius)
    for candidate in np.flatnonzero(b.atomic_numbers == a.atomic_numbers[atom]):
        others, targets = neighbours(b, int(candidate), radius + 2 * tolerance)
        if _rotation(numbers, vectors, others, targets, tolerance, allow_mirror) is not None:
            return True
    return False


def _rotation(numbers, vectors, others, targets, tolerance: float, allow_mirror: bool) -> np.ndarray | None:
    """The rotation [3, 3] that takes each vector onto a target of its element, or None."""
    order = np.argsort(np.linalg.norm(vectors, axis=1))
    first = order[0]
    normals = np.linalg.norm(np.cross(vectors[first], vectors), axis=1)
    # The nearest neighbour that is not in line with the first: the two and their cross product fix a rotation.
    second = next(i for i in order if normals[i] > 0.2 * np.linalg.norm(vectors[first]) * np.linalg.norm(vectors[i]))
    dot = vectors[first] @ vectors[second]
    for i, j in itertools.product(*[_alike(numbers, vectors, others, targets, k, tolerance) for k in (first, second)]):
        if i == j or abs(targets[i] @ targets[j] - dot) > 20 * tolerance:
            continue
        for sign in (1, -1) if allow_mirror else (1,):
            frame = np.stack([vectors[first], vectors[second], np.cross(vectors[first], vectors[second])])
            image = np.stack([targets[i], targets[j], sign * np.cross(targets[i], targets[j])])
            rough = np.linalg.solve(frame, image)
            distances = np.linalg.norm((vectors @ rough)[:, None] - targets, axis=-1)
            distances[numbers[:, None] != others] = np.inf
            nearest = distances.argmin(1)
            if distances[np.arange(len(vectors)), nearest].max() > 50 * tolerance:
                continue
            u, _, vt = np.linalg.svd(vectors.T @ targets[nearest])  # Kabsch
            rotation = u @ np.diag([1, 1, sign * np.sign(np.linalg.det(u @ vt))]) @ vt
            if np.linalg.norm(vectors @ rotation - targets[nearest], axis=1).max() < tolerance:
                return rotation
    return None


def _alike(numbers, vectors, others, targets, index: int, tolerance: float) -> np.ndarray:
    lengths = np.linalg.norm(targets, axis=1)
    same = np.abs(lengths - np.linalg.norm(vectors[index])) < 2 * tolerance
    return np.flatnonzero((others == numbers[index]) & same)


def space_group(crystal: Crystal, symprec: float = 1e-3) -> int:
    import spglib

    found = spglib.get_symmetry_dataset((crystal.lattice, crystal.frac_coords, crystal.atomic_numbers), symprec=symprec)
    assert found is not None
    return int(found.number)


def difference(a: Crystal, b: Crystal) -> float:
    """The largest difference of a fractional coordinate modulo 1, a length (A) or a cosine between two crystals whose
    cells and atoms correspond, the atoms of one element in any order."""
    assert sorted(a.atomic_numbers.tolist()) == sorted(b.atomic_numbers.tolist())
    worst = max(
        np.abs(a.lengths - b.lengths).max(), np.abs(np.cos(np.radians(a.angles)) - np.cos(np.radians(b.angles))).max()
    )
    for number in set(a.atomic_numbers.tolist()):
        rest = b.frac_coords[b.atomic_numbers == number]
        for frac in a.frac_coords[a.atomic_numbers == number]:
            offset = frac - rest
            distances = np.abs(offset - np.round(offset)).max(1)
            worst = max(worst, distances.min())
            rest = np.delete(rest, distances.argmin(), 0)
    return float(worst)
