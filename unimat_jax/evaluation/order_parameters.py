"""How much a shell of neighbours looks like an ideal motif: the order parameters of CrystalNN's fingerprint.

Definitions: N. E. R. Zimmermann and A. Jain, RSC Adv. 10, 6063 (2020), doi:10.1039/C9RA07755C, with the angles and
widths of pymatgen 2026.10 (`op_params.yaml`, `cn_opt_params.yaml`), whose `LocalStructOrderParams` gives the same
values one neighbour at a time. Here a whole batch of shells is done at once.

Each neighbour j in turn is the north pole and each other neighbour k the prime meridian; the remaining neighbours m are
judged by their polar angle and their azimuth against k. A motif takes the best pair (j, k).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

Array = np.ndarray
_BLOCK = 1024  # shells at a time: 14 MB an array for 12 neighbours
_PARALLEL = 1e-12  # below this sine two neighbours lie on one axis, and no azimuth exists between them


def _gaussian(theta: Array, centre: float | Array, inverse_width: float) -> Array:
    """theta in units of pi."""
    return np.exp(-0.5 * (inverse_width * (theta - centre)) ** 2)


def _at(centre: float, inverse_width: float) -> Callable[[Array], Array]:
    return functools.partial(_gaussian, centre=centre, inverse_width=inverse_width)


def _pentagon(theta: Array) -> Array:
    return _gaussian(theta, np.where(theta <= 0.6, 0.4, 0.8), 19.333)


def _hexagon(theta: Array) -> Array:
    return _gaussian(np.abs(theta - 0.5), 0.16666667, 25.0)


# cos^2(f phi) of the azimuth phi, as polynomials in c = cos(phi), by the factor f.
_AZIMUTH: dict[float, Callable[[Array], Array]] = {
    1.0: lambda c: c**2,
    1.5: lambda c: 0.5 + c * (2 * c**2 - 1.5),
    2.0: lambda c: (2 * c**2 - 1) ** 2,
    2.5: lambda c: 0.5 + c * ((8 * c**2 - 10) * c**2 + 2.5),
    3.0: lambda c: (c * (4 * c**2 - 3)) ** 2,
}


@dataclasses.dataclass(frozen=True)
class _Motif:
    """profile: wanted polar angles (in units of pi); azimuth: the factor f, cos^2(f phi) being wanted; south: (smallest
    polar angle in radians of a neighbour at the south pole, which then is none of the equator, inverse width there);
    sector: the smallest cosine of the azimuth that counts."""

    profile: Callable[[Array], Array]
    azimuth: float
    south: tuple[float, float] | None = None
    sector: float | None = None

    def __call__(self, shell: _Shell) -> Array:
        value, count = self.profile(shell.theta), shell.pairs
        others, terms = shell.others, _AZIMUTH[self.azimuth](shell.cosine)
        if self.sector is not None:
            others = others & (shell.cosine > self.sector)
        if self.south is None:
            value = value + _sum_over_m(others, terms, value)
            count = count + others.sum(-1)
        else:
            limit, inverse_width = self.south
            north = shell.angles < limit
            at_pole = ~north[:, :, None, :] & shell.beside
            equator = others & north[:, :, None, :] & north[:, :, :, None]
            pole = _gaussian(shell.theta, 1.0, inverse_width)
            value = value * north + _sum_over_m(equator, terms, value) + _sum_over_m(at_pole, 1.0, pole)
            count = count * north + equator.sum(-1) + at_pole.sum(-1)
        return _best(value, count)


def _sum_over_m(mask: Array, terms: Array | float, profile: Array) -> Array:
    """Sums over m of mask[b, j, k, m] * terms[b, j, k, m] * profile[b, j, m]: [B, n, n]."""
    return np.matmul(mask * terms, profile[..., None])[..., 0]


def _best(value: Array, count: Array) -> Array:
    """The largest mean over pairs (j, k), [B]; a pair without any term has 0, as j = k has."""
    mean = np.divide(value, count, out=np.zeros(value.shape), where=count > 0)
    n = mean.shape[-1]
    mean[:, np.arange(n), np.arange(n)] = 0.0
    return mean.max((1, 2))


class _Shell:
    """The angles of shells of n neighbours: all that motifs depend on, each computed when first asked for.

    angles [B, n, n]: between neighbours, in radians; theta: the same over pi. cosine [B, n, n, n]: of the azimuth of m
    against k around j. pairs [n, n]: 1 where j is not k.
    """

    def __init__(self, vectors: Array):
        self.units = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        self.cosines = np.clip(self.units @ self.units.swapaxes(1, 2), -1.0, 1.0)
        self.angles = np.arccos(self.cosines)
        self.theta = self.angles / np.pi
        self.pairs = 1.0 - np.eye(vectors.shape[1])

    @functools.cached_property
    def _meridians(self) -> tuple[Array, Array]:
        """Unit vectors [B, j, k, 3] across the axis of j in the half-plane of k, and which of them exist."""
        units = self.units
        lengths = np.einsum("bji,bji->bj", units, units)[:, :, None]
        across = units[:, None] - (self.cosines / lengths)[..., None] * units[:, :, None]
        norms = np.linalg.norm(across, axis=-1)
        exists = (norms >= _PARALLEL) & (self.pairs > 0)
        return across / np.where(exists, norms, 1.0)[..., None], exists

    @functools.cached_property
    def cosine(self) -> Array:
        meridians, _ = self._meridians
        return np.clip(meridians @ meridians.swapaxes(2, 3), -1.0, 1.0)

    @functools.cached_property
    def beside(self) -> Array:
        """[B, j, k, m]: m is another neighbour than j and k, and k is off the axis of j."""
        _, exists = self._meridians
        return exists[..., None] & (self.pairs[:, None, :] * self.pairs > 0)

    @functools.cached_property
    def others(self) -> Array:
        """`beside`, and m is off the axis of j too, so that it has an azimuth."""
        _, exists = self._meridians
        return self.beside & exists[:, :, None, :]


def _single_bond(shell: _Shell) -> Array:
    return np.ones(len(shell.units))


def _bent(centre: float, inverse_width: float) -> Callable[[_Shell], Array]:
    return lambda shell: _gaussian(shell.theta[:, 0, 1], centre, inverse_width)


def _body_centred_terms(shell: _Shell) -> Array:
    """[B, j, k], not symmetric: the terms of `_body_centred`."""
    theta, n = shell.angles, shell.theta.shape[-1]
    limit = 2.5261129449194057
    pole = np.where(theta >= limit, 6 * _gaussian(shell.theta, 1.0, 15.0), 0.0)
    height = (theta - np.pi / 2) / np.arcsin(1 / 3)
    height = height * np.exp(0.5 - 0.5 * height**2)
    c = shell.cosine
    waves = _sum_over_m(shell.others, c * (4 * c**2 - 3), height)
    sides = np.where(theta < limit, np.where(theta > np.pi / 2, waves, -waves), 0.0)
    return (pole + sides) / (0.5 * n * (6 + (n - 2) * (n - 3)))


def _body_centred(shell: _Shell) -> Array:
    """B. Peters, J. Chem. Phys. 131, 244103 (2009), each pair of neighbours once: the order of neighbours matters."""
    return np.triu(_body_centred_terms(shell), 1).sum((1, 2))


def body_centred_asymmetry(vectors: Array) -> Array:
    """[B, n, n]: what "body-centered cubic" changes by where two neighbours of shells [B, n, 3] change places."""
    terms = _body_centred_terms(_Shell(vectors))
    return terms - terms.swapaxes(1, 2)


def _cuboctahedral(shell: _Shell) -> Array:
    theta = shell.angles
    south, low, high = 2.792526803190927, 1.3089969389957472, 1.8325957145940461
    pole = 1.8 * _gaussian(shell.theta, 1.0, 28.75)
    is_pole = theta >= south
    equator = (low < theta) & (theta < high)
    others = shell.others & equator[..., None]
    c = shell.cosine
    tilted = np.exp(-0.5 * (0.0556 * (np.sqrt(1 - c**2) - 0.81649658)) ** 2)
    upper, lower = theta < low, (theta > high) & (theta < south)
    value = pole * is_pole
    count = 1.8 * is_pole
    for belt, terms, profile in (
        (equator, c**2, _gaussian(shell.theta, 0.5, 25.5)),
        (upper, tilted, _gaussian(shell.theta, 1 / 3, 31.25)),
        (lower, tilted, _gaussian(shell.theta, 2 / 3, 31.25)),
    ):
        mask = others & belt[:, :, None, :]
        value = value + _sum_over_m(mask, terms, profile)
        count = count + mask.sum(-1)
    return _best(value, count)


_LEGENDRE = {
    2: lambda x: 1.5 * x**2 - 0.5,
    4: lambda x: (35 * x**4 - 30 * x**2 + 3) / 8,
    6: lambda x: (231 * x**6 - 315 * x**4 + 105 * x**2 - 5) / 16,
}


def _bond_orientation(order: int) -> Callable[[_Shell], Array]:
    """q_l of P. J. Steinhardt et al., Phys. Rev. B 28, 784 (1983), by the addition theorem of spherical harmonics."""
    return lambda shell: np.sqrt(np.maximum(_LEGENDRE[order](shell.cosines).mean((1, 2)), 0.0))


_SOUTH = 2.356194490192345
_STEINHARDT = {f"q{order}": _bond_orientation(order) for order in (2, 4, 6)}
_TETRAHEDRON = 0.6081734479693927

MOTIFS: dict[int, dict[str, Callable[[_Shell], Array]]] = {
    1: {"sgl_bd": _single_bond},
    2: {
        "L-shaped": _bent(0.5, 15.15),
        "water-like": _bent(0.5802777777777778, 13.95),
        "bent 120 degrees": _bent(0.666666666667, 13.25),
        "bent 150 degrees": _bent(0.833333333333333, 12.45),
        "linear": _bent(1.0, 8.667),
    },
    3: {
        "trigonal planar": _Motif(_at(0.66666666667, 17.5), 1.0),
        "trigonal non-coplanar": _Motif(_at(_TETRAHEDRON, 18.33), 1.5),
        "T-shaped": _Motif(_at(0.5, 15.5), 1.0),
    },
    4: {
        "square co-planar": _Motif(_at(0.5, 17.7), 1.0, (_SOUTH, 13.5)),
        "tetrahedral": _Motif(_at(_TETRAHEDRON, 18.5), 1.5),
        "rectangular see-saw-like": _Motif(_at(0.5, 27.0), 2.0, (_SOUTH, 11.5), float(np.cos(0.75 * np.pi))),
        "see-saw-like": _Motif(_at(0.5, 15.75), 1.5, (_SOUTH, 12.75)),
        "trigonal pyramidal": _Motif(_at(0.5, 15.5), 1.5),
    },
    5: {
        "pentagonal planar": _Motif(_pentagon, 1.0),
        "square pyramidal": _Motif(_at(0.5, 14.9), 2.0),
        "trigonal bipyramidal": _Motif(_at(0.5, 16.6), 1.5, (_SOUTH, 12.0)),
    },
    6: {
        "hexagonal planar": _Motif(_hexagon, 1.0, (2.6179938779914944, 7.5)),
        "octahedral": _Motif(_at(0.5, 18.0), 2.0, (_SOUTH, 15.0)),
        "pentagonal pyramidal": _Motif(_at(0.5, 13.8), 2.5),
    },
    7: {
        "hexagonal pyramidal": _Motif(_at(0.5, 12.5), 3.0),
        "pentagonal bipyramidal": _Motif(_at(0.5, 14.75), 2.5, (_SOUTH, 12.5)),
    },
    8: {
        "body-centered cubic": _body_centred,
        "hexagonal bipyramidal": _Motif(_at(0.5, 13.6), 3.0, (_SOUTH, 14.1)),
    },
    9: _STEINHARDT,
    10: _STEINHARDT,
    11: _STEINHARDT,
    12: {"cuboctahedral": _cuboctahedral, **_STEINHARDT},
}
"""The motifs of each coordination number, in the order of matminer's preset "ops"; the names are matminer's."""


def motif_values(vectors: Array) -> Array:
    """[B, M]: the order parameters of MOTIFS[n] for B shells of n neighbours, vectors [B, n, 3] from the centre.

    1 is the ideal motif (Steinhardt's q have other ranges). Raises KeyError where no motif has n neighbours.
    """
    motifs = MOTIFS[vectors.shape[1]].values()
    blocks = []
    for start in range(0, len(vectors), _BLOCK):
        shell = _Shell(vectors[start : start + _BLOCK])
        blocks.append(np.stack([motif(shell) for motif in motifs], axis=-1))
    return np.concatenate(blocks)
