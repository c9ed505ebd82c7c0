"""Voronoi polyhedra of a crystal's sites by the rules of pymatgen's VoronoiNN, as CrystalNN asks for them.

A Voronoi cell is the dual of a convex hull, that of the points 2 p / |p|^2 for the vectors p to a site's neighbours.
The hull takes 2 % of the time of the tessellation of all neighbours, of which pymatgen keeps one cell.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError

SEARCH_CUTOFF = 7.0
"""Angstrom; CrystalNN's. Doubled, up to the cell's longest diagonal, where the neighbours do not enclose a site."""
MAX_NEIGHBOURS = 100_000
"""Of one site within the cut-off. Matter has some 300 within 7 A."""
CLOSE = 1e-4
"""Angstrom. With atoms nearer than this the dual points lie too far out for float64: such crystals are tessellated."""
_NO_FACE = 1e-10  # sr: cells that touch in a point or along a line have faces of rounding errors, of no weight
_FEW = 12  # neighbours: it is as cheap to tessellate, and of four points qhull makes no cells, which counts
_MAX_PAIRS = 2_000_000  # at once, some 200 MB
_MAX_IMAGES = 1_000_000  # of atoms that one search looks at before the cell is reduced for it


class FingerprintError(UserError):
    """A crystal without a fingerprint; the original raises on it too. `reason` is a short code to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # carries `reason` through process pools
        return type(self), (self.reason, str(self))


@dataclasses.dataclass(frozen=True)
class Faces:
    """F faces, in no order. site, other [F]: the atom inside and the one beyond; vectors [F, 3]: from the one to the
    other (Angstrom); solid_angle [F]: seen from inside (sr); area [F] (A2)."""

    site: np.ndarray
    other: np.ndarray
    vectors: np.ndarray
    solid_angle: np.ndarray
    area: np.ndarray

    def shifted(self, first: int) -> Faces:
        """The same faces among the atoms of a larger system, where this crystal's begin at `first`."""
        return dataclasses.replace(self, site=self.site + first, other=self.other + first)

    @classmethod
    def join(cls, parts: Sequence[Faces]) -> Faces:
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)))


def voronoi_faces(crystal: Crystal, sites: np.ndarray | None = None, *, as_pymatgen: bool = False) -> Faces:
    """Of all sites or some, from neighbours within SEARCH_CUTOFF or, where they do not enclose a site, within more.

    as_pymatgen: by the same tessellation and the same order of operations as pymatgen, so that even rounding errors are
    its own; the faces of a site are in its order. It takes some 40 times as long. Raises FingerprintError:
    `no_voronoi_cell` (a site that is not enclosed, or coincides with another), `too_dense` (more than MAX_NEIGHBOURS
    within the cut-off).
    """
    diagonals = np.linalg.norm(np.array([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1]]) @ crystal.lattice, axis=1)
    limit = diagonals.max() + 0.01
    todo, cutoff = np.arange(crystal.num_atoms) if sites is None else np.array(sites, int), SEARCH_CUTOFF
    parts: list[Faces] = []
    while len(todo):
        open_sites: list[int] = []
        for pairs in _neighbours(crystal, todo, cutoff, one_by_one=as_pymatgen):
            if pairs.nearest <= CLOSE and not as_pymatgen:
                return voronoi_faces(crystal, sites, as_pymatgen=True)
            spans = list(itertools.pairwise(pairs.starts.tolist()))
            few = [as_pymatgen or stop - start <= _FEW for start, stop in spans]
            parts.extend(_tessellated(pairs, list(itertools.compress(spans, few)), open_sites))
            parts.extend(
                _dual(pairs, [span for span, is_few in zip(spans, few, strict=True) if not is_few], open_sites)
            )
        if open_sites and cutoff >= limit:
            name = f"atom {open_sites[0]} of {crystal.uid or 'the structure'}"
            raise FingerprintError("no_voronoi_cell", f"{name} is not enclosed by neighbours within {cutoff:.3g} A")
        todo, cutoff = np.array(open_sites, int), min(2 * cutoff, limit + 0.001)
    return Faces.join(parts)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """P pairs of atoms within a cut-off, each atom's pair with itself included, site by site, nearest first.

    site, other [P]; coords [P, 3] of the other's image, vectors [P, 3] to it, distances [P] (Angstrom); starts [S + 1]:
    where each of the S sites begins.
    """

    site: np.ndarray
    other: np.ndarray
    coords: np.ndarray
    vectors: np.ndarray
    distances: np.ndarray
    starts: np.ndarray

    @property
    def nearest(self) -> float:
        """The shortest distance of two atoms in Angstrom, infinite where no site has a neighbour."""
        second = self.starts[:-1] + 1
        return float(self.distances[second[second < self.starts[1:]]].min(initial=np.inf))

    def faces(self, rows: np.ndarray, solid_angle: np.ndarray, area: np.ndarray) -> Faces:
        return Faces(self.site[rows], self.other[rows], self.vectors[rows], solid_angle, area)


def _neighbours(crystal: Crystal, sites: np.ndarray, cutoff: float, *, one_by_one: bool = False) -> Iterator[_Pairs]:
    """Of groups of sites, so large that memory suffices, or of each alone: then equally near neighbours, too, are in
    pymatgen's order, on which the rounding errors of a tessellation depend."""
    from pymatgen.optimization.neighbors import find_points_in_spheres

    expected = 4 / 3 * np.pi * cutoff**3 * crystal.num_atoms / crystal.volume
    if expected > MAX_NEIGHBOURS:
        message = f"{crystal.uid or 'the structure'} has some {expected:.2g} atoms within {cutoff:.3g} A of each"
        raise FingerprintError("too_dense", f"{message}, more than {MAX_NEIGHBOURS}")
    frac, lattice = _compact(crystal, cutoff)
    coords = np.ascontiguousarray(frac @ lattice)
    periodic = np.ones(3, np.int64)
    groups = len(sites) if one_by_one else int(np.ceil(len(sites) * expected / _MAX_PAIRS))
    for group in np.array_split(sites, groups or 1):
        centres = np.ascontiguousarray(coords[group])
        row, other, offsets, distances = find_points_in_spheres(coords, centres, cutoff, periodic, lattice, tol=1e-8)
        order = np.lexsort((distances, row))
        row, other, distances = row[order], other[order], distances[order]
        there = (frac[other] + offsets[order]) @ lattice
        starts = np.searchsorted(row, np.arange(len(group) + 1))
        yield _Pairs(group[row], other, there, there - centres[row], distances, starts)


def _compact(crystal: Crystal, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Fractional coordinates and lattice of the crystal, in a reduced cell where a search in its own takes ages."""
    frac, lattice = crystal.frac_coords, np.ascontiguousarray(crystal.lattice)
    images = np.prod(2 + 2 * cutoff * np.linalg.norm(np.linalg.inv(lattice), axis=0)) * len(frac)
    if images > _MAX_IMAGES:
        from pymatgen.core import Lattice

        reduced = np.ascontiguousarray(Lattice(lattice).get_lll_reduced_lattice().matrix)
        return frac @ lattice @ np.linalg.inv(reduced), reduced
    return frac, lattice


def _dual(pairs: _Pairs, spans: Sequence[tuple[int, int]], open_sites: list[int]) -> Iterator[Faces]:
    """Faces of the sites with these spans of pairs, by convex hulls; sites whose neighbours do not enclose them are
    appended to `open_sites`."""
    from scipy.spatial import ConvexHull, QhullError

    points = np.divide(2, pairs.distances**2, out=np.zeros(len(pairs.site)), where=pairs.distances > 0)[:, None]
    points = points * pairs.vectors
    vertices, simplices, neighbours = [], [], []
    facets = 0
    for start, stop in spans:
        try:
            hull = ConvexHull(points[start + 1 : stop])  # the site's first pair is itself
        except QhullError:  # all in one plane
            open_sites.append(int(pairs.site[start]))
            continue
        offsets = hull.equations[:, 3:]
        if offsets.max() > -1e-10:  # the site lies on the hull: its cell reaches beyond 1e10 A
            open_sites.append(int(pairs.site[start]))
            continue
        vertices.append(hull.equations[:, :3] / -offsets)
        simplices.append(hull.simplices + (start + 1))
        neighbours.append(hull.neighbors + facets)
        facets += len(offsets)
    if not vertices:
        return
    rows, solid_angle, area = _measure(
        pairs.vectors, np.concatenate(vertices), np.concatenate(simplices), np.concatenate(neighbours)
    )
    yield pairs.faces(rows, solid_angle, area)


def _measure(
    vectors: np.ndarray, vertices: np.ndarray, simplices: np.ndarray, neighbours: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows of `vectors` that have a face worth the name, its solid angle, its area).

    A facet of the hull is one of the `vertices` [V, 3] of cells. `simplices` [V, 3]: the rows of the three faces that
    meet there; `neighbours` [V, 3]: the vertex at the other end of the edge between two of them, opposite to the third.
    """
    end = neighbours.ravel()
    once = np.flatnonzero(np.repeat(np.arange(len(vertices)), 3) < end)
    begin, end = once // 3, end[once]
    corner = once % 3
    one, two = (simplices[begin, (corner + turn) % 3] for turn in (1, 2))
    u, v = vertices[begin], vertices[end]
    across, dot = np.cross(u, v), np.einsum("ij,ij->i", u, v)
    radii = np.sqrt(np.einsum("ij,ij->i", vertices, vertices))
    product, total = radii[begin] * radii[end], radii[begin] + radii[end]
    solid_angle, area = np.zeros((2, len(vectors)))
    for face, beyond in ((one, two), (two, one)):
        # A face is the sum of the triangles between its edges and the middle m between the two atoms, which may lie
        # outside of the face: then some triangles count as negative. m u = m v = |m|^2, since all lie in the face.
        to, other = vectors[face], vectors[beyond]
        height = np.sqrt(np.einsum("ij,ij->i", to, to)) / 2
        twice = np.abs(np.einsum("ij,ij->i", to, across)) / (2 * height)
        twice = np.copysign(twice, np.einsum("ij,ij->i", other, other - to))
        angle = 2 * np.arctan2(twice, product + total * height + dot)
        solid_angle += np.bincount(face, angle, len(vectors))
        area += np.bincount(face, twice / 2, len(vectors))
    rows = np.flatnonzero(solid_angle > _NO_FACE)
    return rows, solid_angle[rows], area[rows]


def _tessellated(pairs: _Pairs, spans: Sequence[tuple[int, int]], open_sites: list[int]) -> Iterator[Faces]:
    """As `_dual`, by the tessellation of all neighbours, as pymatgen does it, site by site. Raises FingerprintError
    `no_voronoi_cell` where a site has no cell of its own: another lies on it, or there are four points in all."""
    from scipy.spatial import QhullError, Voronoi

    for start, stop in spans:
        site = int(pairs.site[start])
        try:
            found = Voronoi(pairs.coords[start:stop])
        except QhullError:  # three points, or all in one plane
            open_sites.append(site)
            continue
        ridges = np.flatnonzero((found.ridge_points == 0).any(1))
        polygons = [found.ridge_vertices[ridge] for ridge in ridges]
        if not polygons:
            raise FingerprintError("no_voronoi_cell", f"atom {site} has no Voronoi polyhedron among its neighbours")
        if any(-1 in polygon for polygon in polygons):
            open_sites.append(site)
            continue
        rows = start + found.ridge_points[ridges].sum(1)
        yield pairs.faces(rows, *_fans(found.vertices, polygons, pairs.coords[start], pairs.coords[rows]))


def _fans(
    vertices: np.ndarray, polygons: Sequence[list[int]], centre: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Solid angles [F] seen from the centre and areas [F] of the faces towards the others [F, 3], cut into triangles.

    Solid angles by A. van Oosterom and J. Strackee, IEEE Trans. Biomed. Eng. 30, 125 (1983). All is to the last bit as
    in pymatgen, which takes an exactly flat triangle for half of space.
    """
    face = np.repeat(np.arange(len(polygons)), [len(polygon) - 2 for polygon in polygons])
    corners = [(polygon[0], *pair) for polygon in polygons for pair in itertools.pairwise(polygon[1:])]
    a, b, c = vertices[np.array(corners).T]
    volume = np.abs(_dots(centre - c, np.cross(a - c, b - c))) / 6
    a, b, c = a - centre, b - centre, c - centre
    la, lb, lc = (np.sqrt(_dots(x, x)) for x in (a, b, c))
    triple = np.abs(_dots(a, np.cross(b, c)))
    below = la * lb * lc + lc * _dots(a, b) + lb * _dots(a, c) + la * _dots(b, c)
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = np.where(below == 0, np.where(triple > 0, np.pi / 2, -np.pi / 2), np.arctan(triple / below))
    angle = np.where(angle > 0, angle, angle + np.pi) * 2
    heights = np.sqrt(_dots(centre - others, centre - others)) / 2
    return np.bincount(face, angle), 3 * np.bincount(face, volume) / heights


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of rows, each rounded as np.dot does."""
    return (a[:, None, :] @ b[:, :, None])[:, 0, 0]
