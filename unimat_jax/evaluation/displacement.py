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
    in_use = np.bincount(which, minlength=len(cells)) > 0
    which = (np.cumsum(in_use) - 1)[which]
    frac_a, cells, reach = frac_a[in_use], cells[in_use], reach[in_use]
    mappings = _lll_mappings(cells)
    if mappings is not None:
        inverse = np.rint(np.linalg.inv(mappings))
        frac_a, frac_b, cells = frac_a @ inverse, frac_b @ inverse[which], mappings @ cells
    vectors, squared = _shortest_vectors(frac_a, frac_b, which, cells, reach, blocks)
    pairing, reachable = _pair(squared)
    chosen = np.take_along_axis(vectors, pairing[:, :, None, None], 2)[:, :, 0]
    chosen -= chosen.mean(1, keepdims=True)
    distances = np.sqrt((chosen**2).sum(2))
    distances[~reachable] = np.inf
    return np.sqrt((distances**2).mean(1)), distances.max(1)


def _lll_mappings(lattices: np.ndarray) -> np.ndarray | None:
    """pymatgen's LLL reduction of lattices [M, 3, 3], as integer matrices [M, 3, 3] to multiply them with.

    None where all are reduced.
    """
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
    if reduced.all():
        return None
    from pymatgen.core import Lattice

    result = np.tile(np.eye(3), (len(lattices), 1, 1))
    known: dict[bytes, np.ndarray] = {}  # symmetric crystals align in many ways with one and the same mean cell
    for i in np.flatnonzero(~reduced):
        key = (np.round(lattices[i], 9) + 0.0).tobytes()
        if key not in known:
            known[key] = Lattice(lattices[i]).lll_mapping
        result[i] = known[key]
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
    rows = np.concatenate([np.repeat(atoms_b, len(atoms_a)) for atoms_b, atoms_a in blocks])
    columns = np.concatenate([np.tile(atoms_a, len(atoms_b)) for atoms_b, atoms_a in blocks])
    apart = wrapped_a[which[:, None], columns] - wrapped_b[:, rows]  # [K, pairs of one element, 3]
    near = apart - np.rint(apart)
    k, pair = np.nonzero(np.all(np.abs(near) <= limits[which][:, None], axis=-1))
    near, cell = near[k, pair], which[k]
    # Another image lies beyond at least one pair of lattice planes: farther than (1 - |near|) of their distance.
    other = np.min((1 - np.abs(near)) / densities[cell], axis=1)
    unsure = np.flatnonzero(np.einsum("pi,pij,pj->p", near, metrics[cell], near) > (other - 1e-9) ** 2)
    if len(unsure):
        start, at = apart[k[unsure], pair[unsure]], cell[unsure]
        # |start + image|^2 less |start|^2, which all images share.
        added = 2 * np.einsum("pi,pij->pj", start, metrics[at]) @ _IMAGES.T + image_squares[at]
        near[unsure] = start + _IMAGES[added.argmin(1)]
    found = np.einsum("pi,pij->pj", near, cells[cell])
    vectors[k, rows[pair], columns[pair]] = found
    squared[k, rows[pair], columns[pair]] = np.einsum("pi,pi->p", found, found)
    return vectors, squared


def _pair(squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each matrix [K, N, N] the column of each row at the least total, int [K, N], and whether it is reachable."""
    from scipy.optimize import linear_sum_assignment

    pairing = squared.argmin(2)
    reachable = np.all(squared.min(2) < _UNREACHABLE, axis=1) & np.all(squared.min(1) < _UNREACHABLE, axis=1)
    # Where the nearest of each atom is another one, no other pairing has a smaller total.
    clear = np.all(np.sort(pairing, 1) == np.arange(pairing.shape[1]), axis=1)
    for k in np.flatnonzero(reachable & ~clear):
        rows, pairing[k] = linear_sum_assignment(squared[k])
        reachable[k] = np.all(squared[k][rows, pairing[k]] < _UNREACHABLE)
    return pairing, reachable
