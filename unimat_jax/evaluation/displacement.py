"""How far apart the atoms of two aligned crystals are, for many alignments at once (see `alignment`).

K alignments, in M cells [M, 3, 3] (rows, Angstrom), of which `which` int [K] names each one's; N atoms. `Blocks` are
the atoms of each element: (their numbers in b, their numbers in a).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

Blocks: TypeAlias = list[tuple[np.ndarray, np.ndarray]]

_IMAGES = np.stack(np.meshgrid(*[np.arange(-1.0, 2.0)] * 3, indexing="ij"), -1).reshape(27, 3)
_UNREACHABLE = 1e20
"""The squared distance (A2) that StructureMatcher gives to atoms which must not be paired: an alignment that pairs some
is as good as none."""


def plane_densities(lattices: np.ndarray) -> np.ndarray:
    """Inverse distances of lattice planes [..., 3] (1/Angstrom): the reciprocal lengths, without 2 pi."""
    return np.linalg.norm(np.linalg.inv(lattices), axis=-2)


def within_reach(
    frac_a: np.ndarray, frac_b: np.ndarray, shifts: np.ndarray, which: np.ndarray, limits: np.ndarray, blocks: Blocks
) -> np.ndarray:
    """The alignments, int [<= K], in which each atom of b has one of its element in a inside of its box.

    frac_a: [M, N, 3]; frac_b: [N, 3], before its shifts [K, 3]; limits: the box's half widths [M, 3], fractional.
    """
    kept = np.arange(len(shifts))
    if (limits >= 0.5).all():  # the box holds the whole cell
        return kept
    for rows, columns in blocks:
        inside = np.ones((len(kept), len(rows), len(columns)), bool)
        for axis in range(3):
            moved = frac_b[rows, axis] + shifts[kept, axis, None]
            apart = moved[:, :, None] - frac_a[which[kept]][:, None, columns, axis]
            inside &= np.abs(apart - np.rint(apart)) <= limits[which[kept], axis, None, None]
        kept = kept[np.all(np.any(inside, axis=2), axis=-1)]
    return kept


def displacements(
    frac_a: np.ndarray, frac_b: np.ndarray, which: np.ndarray, cells: np.ndarray, reach: np.ndarray, blocks: Blocks
) -> tuple[np.ndarray, np.ndarray]:
    """(RMS, largest) distances [K] (Angstrom) of atoms frac_b [K, N, 3] from frac_a [M, N, 3]; inf where unreachable.

    Atoms are paired so that the sum of squared distances is least, then the mean displacement is taken off. reach:
    Angstrom [M], from an atom to the faces of the box (of the reduced cell) in which its partners lie.
    """
    used, which = np.unique(which, return_inverse=True)
    mappings = _lll_mappings(cells[used])
    inverse = np.rint(np.linalg.inv(mappings))
    frac_a, frac_b = frac_a[used] @ inverse, frac_b @ inverse[which]
    vectors, squared = _shortest_vectors(frac_a, frac_b, which, mappings @ cells[used], reach[used], blocks)
    pairing, reachable = _pair(squared, blocks)
    chosen = np.take_along_axis(vectors, pairing[:, :, None, None], 2)[:, :, 0]
    chosen -= chosen.mean(1, keepdims=True)
    distances = np.sqrt((chosen**2).sum(2))
    distances[~reachable] = np.inf
    return np.sqrt((distances**2).mean(1)), distances.max(1)


def _lll_mappings(lattices: np.ndarray) -> np.ndarray:
    """pymatgen's LLL reduction of lattices [M, 3, 3], as integer matrices [M, 3, 3] to multiply them with."""
    from pymatgen.core import Lattice

    a, b, c = np.moveaxis(lattices, 1, 0)
    squared_a = (a * a).sum(1)
    u_ba, u_ca = (a * b).sum(1) / squared_a, (a * c).sum(1) / squared_a
    b_rest = b - u_ba[:, None] * a
    squared_b = (b_rest * b_rest).sum(1)
    u_cb = (b_rest * c).sum(1) / squared_b
    c_rest = c - u_ca[:, None] * a - u_cb[:, None] * b_rest
    reduced = np.max(np.abs([u_ba, u_ca, u_cb]), axis=0) < 0.5 - 1e-9  # clear of rounding errors
    reduced &= squared_b > (0.75 - u_ba**2) * squared_a
    reduced &= (c_rest**2).sum(1) > (0.75 - u_cb**2) * squared_b
    result = np.tile(np.eye(3), (len(lattices), 1, 1))
    for i in np.flatnonzero(~reduced):
        result[i] = Lattice(lattices[i]).lll_mapping
    return result


def _shortest_vectors(
    frac_a: np.ndarray, frac_b: np.ndarray, which: np.ndarray, cells: np.ndarray, reach: np.ndarray, blocks: Blocks
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (A) [K, N, N, 3] from atoms of b to atoms of a, the nearest of 27 images, and squared lengths [K, N, N].

    `_UNREACHABLE` between elements and outside of the box.
    """
    number, atoms, _ = frac_b.shape
    vectors = np.zeros((number, atoms, atoms, 3))
    squared = np.full((number, atoms, atoms), _UNREACHABLE)
    densities = plane_densities(cells)
    limits = reach[:, None] * densities
    metrics = cells @ np.swapaxes(cells, 1, 2)
    image_squares = np.einsum("ni,mij,nj->mn", _IMAGES, metrics, _IMAGES)
    wrapped_a, wrapped_b = frac_a - np.floor(frac_a), frac_b - np.floor(frac_b)
    for rows, columns in blocks:
        apart = wrapped_a[which][:, None, columns] - wrapped_b[:, rows, None]  # [K, rows, columns, 3]
        near = apart - np.rint(apart)
        inside = np.ones(near.shape[:3], bool)
        for axis in range(3):
            inside &= np.abs(near[..., axis]) <= limits[which, axis, None, None]
        k, i, j = np.nonzero(inside)
        near, cell = near[k, i, j], which[k]
        # Another image lies beyond at least one pair of lattice planes: farther than (1 - |near|) of their distance.
        other = np.min((1 - np.abs(near)) / densities[cell], axis=1)
        unsure = np.flatnonzero(np.einsum("pi,pij,pj->p", near, metrics[cell], near) > (other - 1e-9) ** 2)
        if len(unsure):
            start, at = apart[k[unsure], i[unsure], j[unsure]], cell[unsure]
            # |start + image|^2 less |start|^2, which all images share.
            added = 2 * np.einsum("pi,pij->pj", start, metrics[at]) @ _IMAGES.T + image_squares[at]
            near[unsure] = start + _IMAGES[added.argmin(1)]
        found = np.einsum("pi,pij->pj", near, cells[cell])
        vectors[k, rows[i], columns[j]] = found
        squared[k, rows[i], columns[j]] = np.einsum("pi,pi->p", found, found)
    return vectors, squared


def _pair(squared: np.ndarray, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """For each matrix [K, N, N] the column of each row at the least total, int [K, N], and whether it is reachable."""
    from scipy.optimize import linear_sum_assignment

    pairing = np.zeros(squared.shape[:2], int)
    reachable = np.all(squared.min(2) < _UNREACHABLE, axis=1) & np.all(squared.min(1) < _UNREACHABLE, axis=1)
    clear = reachable.copy()
    for rows, columns in blocks:
        block = squared[:, rows[:, None], columns]
        nearest = block.argmin(2)
        pairing[:, rows] = columns[nearest]
        # Where the nearest of each atom is another one, no other pairing has a smaller total.
        clear &= np.all(np.sort(nearest, 1) == np.arange(len(rows)), axis=1)
    for k in np.flatnonzero(reachable & ~clear):
        rows, pairing[k] = linear_sum_assignment(squared[k])
        reachable[k] = np.all(squared[k][rows, pairing[k]] < _UNREACHABLE)
    return pairing, reachable
