"""Structure fingerprints: how each site is coordinated, as matminer's CrystalNNFingerprint, preset "ops", tells it.

CDVAE's coverage (Xie et al. 2022, arXiv 2110.06197) compares crystals by them. The rules are those of matminer 0.10.1
and of pymatgen 2026.10's CrystalNN with its default settings: N. E. R. Zimmermann and A. Jain, RSC Adv. 10, 6063
(2020), doi:10.1039/C9RA07755C. Neighbours share a face of the Voronoi polyhedron; its solid angle, the difference of
electronegativity and the distance weigh them; every coordination number gets a probability, and its shell is compared
with ideal motifs.

The values are matminer's: on the same numpy, 3,414 crystals showed no site that differs by more than 3e-8. One feature,
"body-centered cubic CN_8", depends on the order of neighbours, which among equal ones is that of rounding errors:
matminer's own value changes with the version of numpy (in 1 of 100 crystals of MP-20, by 3e-5).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.magpie import element_data
from unimat_jax.evaluation.order_parameters import MOTIFS, body_centred_asymmetry, motif_values
from unimat_jax.evaluation.voronoi import Faces, FingerprintError, voronoi_faces
from unimat_jax.periodic_table import SYMBOLS

MAX_COORDINATION = 24
ELECTRONEGATIVITY_WEIGHT, ELECTRONEGATIVITY_RANGE = 3.0, 3.3
"""CrystalNN's x_diff_weight, and the largest difference between two elements (Pauling scale)."""
FULL_DISTANCE, NO_DISTANCE = 0.5, 1.0
"""Angstrom beyond the sum of the covalent radii: a neighbour's weight falls from all to nothing between the two."""

_ROUNDING = 1e-7  # more than the rounding errors of weights, less than what matters

_NAMES = {cn: ("wt", *MOTIFS.get(cn, ())) for cn in range(1, MAX_COORDINATION + 1)}
FEATURE_NAMES = tuple(f"{name} CN_{cn}" for cn, names in _NAMES.items() for name in names)
"""The 61 features by matminer's names: "wt" is a coordination number's probability, the others that times a motif."""
_FIRST = np.array([0, *(FEATURE_NAMES.index(f"wt CN_{cn}") for cn in _NAMES)])


def structure_fingerprint(crystal: Crystal) -> np.ndarray:
    """float64 [61]: the mean of `site_fingerprints` over the sites; see there for what it raises."""
    return site_fingerprints(crystal).mean(0)


def site_fingerprints(crystal: Crystal) -> np.ndarray:
    """float64 [num_atoms, 61]: FEATURE_NAMES of every site.

    Raises FingerprintError: `no_radius` (an element beyond Cm), `too_dense`, `no_voronoi_cell` (see `voronoi_faces`).
    """
    return features_of([surroundings(crystal)])[0]


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """A crystal and what its atoms have around them."""

    crystal: Crystal
    faces: Faces


def surroundings(crystal: Crystal) -> Surroundings:
    """The dear part of a fingerprint. Raises what `site_fingerprints` raises."""
    unknown = np.isnan(_radii()[crystal.atomic_numbers])
    if unknown.any():
        names = ", ".join(sorted({SYMBOLS[z] for z in crystal.atomic_numbers[unknown]}))
        raise FingerprintError("no_radius", f"{crystal.uid or 'the structure'}: no covalent radius is known of {names}")
    return Surroundings(crystal, voronoi_faces(crystal))


def features_of(crystals: Sequence[Surroundings]) -> list[np.ndarray]:
    """`site_fingerprints` of many small crystals at a third of their cost one by one.

    Where rounding errors decide (see `_features`), a site is done again as pymatgen does it, to err as it errs.
    """
    numbers = np.concatenate([one.crystal.atomic_numbers for one in crystals])
    first = list(itertools.accumulate((one.crystal.num_atoms for one in crystals), initial=0))
    faces = Faces.join([one.faces.shifted(start) for one, start in zip(crystals, first, strict=False)])
    features, doubtful = _features(faces, _weights(faces, numbers), len(numbers))
    if len(doubtful):
        owner = np.searchsorted(first, doubtful, side="right") - 1
        faces = Faces.join([
            voronoi_faces(crystals[i].crystal, doubtful[owner == i] - first[i], as_pymatgen=True).shifted(first[i])
            for i in sorted(set(owner.tolist()))
        ])  # fmt: skip
        again, _ = _features(faces, _weights(faces, numbers), len(numbers))
        features[doubtful] = again[doubtful]
    return np.split(features, first[1:-1])


@functools.cache
def _radii() -> np.ndarray:
    """Angstrom by atomic number [119], NaN where there is none."""
    return np.array([np.nan, *element_data()["crystalnn_radius"]], float)


@functools.cache
def _electronegativities() -> np.ndarray:
    """Pauling's, by atomic number [119], NaN where there is none."""
    return np.array([np.nan, *element_data()["pauling_electronegativity"]], float)


def _weights(faces: Faces, numbers: np.ndarray) -> np.ndarray:
    """[F], in 0..1: how much the atom beyond a face counts as a neighbour. Operations are in pymatgen's order."""
    ones, others = numbers[faces.site], numbers[faces.other]
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = faces.solid_angle / _largest(faces.solid_angle, faces.site)
        # In open structures distant faces are large but seen at a slant: CrystalNN's "porous adjustment".
        weights = weights * (faces.solid_angle / faces.area)
        difference = np.abs(_electronegativities()[ones] - _electronegativities()[others]) / ELECTRONEGATIVITY_RANGE
        weights = weights * (1 + ELECTRONEGATIVITY_WEIGHT * np.sqrt(np.nan_to_num(difference)))
        weights = np.nan_to_num(weights / _largest(weights, faces.site))
    distances = np.sqrt((faces.vectors[:, None, :] @ faces.vectors[:, :, None])[:, 0, 0])
    radii = _radii()[ones] + _radii()[others]
    low, high = radii + FULL_DISTANCE, radii + NO_DISTANCE
    weights[distances >= high] = 0.0
    for i in np.flatnonzero((low < distances) & (distances < high)):
        weights[i] *= (math.cos((distances[i] - low[i]) / (high[i] - low[i]) * math.pi) + 1) * 0.5
    return weights


def _largest(values: np.ndarray, site: np.ndarray) -> np.ndarray:
    """Each face's largest value among the faces of its site."""
    largest = np.zeros(site.max() + 1)
    np.maximum.at(largest, site, values)
    return largest[site]


def _features(faces: Faces, weights: np.ndarray, num_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """([num_atoms, 61] from the weights of neighbours, sites whose row hangs on rounding errors).

    The n heaviest neighbours of a site are its shell of coordination number n, where the next is lighter by 0.001; the
    probability of n is the area under a quarter of the unit circle between the two weights. Rounding errors decide on
    a weight in the middle between two steps, and on which of two equal neighbours is the first: "body-centered cubic"
    depends on that.
    """
    features = np.zeros((num_atoms, len(FEATURE_NAMES)))
    rounded = np.round(weights, 3)
    doubtful = [faces.site[np.abs(np.abs(weights - rounded) - 0.0005) < _ROUNDING]]
    order = np.lexsort((-weights, faces.site))
    order = order[rounded[order] > 0]
    site, weight, vectors = faces.site[order], rounded[order], faces.vectors[order]
    following = np.append(np.where(site[1:] == site[:-1], weight[1:], 0.0), 0.0)
    start = np.searchsorted(site, site)  # the first neighbour of the same site
    size = np.arange(len(site)) - start + 1
    ends = np.flatnonzero((following != weight) & (size <= MAX_COORDINATION))
    probability = _quarter_circle(weight[ends]) - _quarter_circle(following[ends])
    features[site[ends], _FIRST[size[ends]]] = probability
    for cn in set(size[ends].tolist()) & set(MOTIFS):
        of_size = size[ends] == cn
        shells = start[ends[of_size]][:, None] + np.arange(cn)
        values, sites = motif_values(vectors[shells]), site[ends[of_size]]
        columns = _FIRST[cn] + 1 + np.arange(values.shape[1])
        features[sites[:, None], columns] = probability[of_size][:, None] * values
        if cn == 8:
            exact = weights[order][shells]
            equal = np.abs(exact[:, :, None] - exact[:, None, :]) < _ROUNDING
            change = (np.abs(body_centred_asymmetry(vectors[shells])) * equal).sum((1, 2)) / 2
            doubtful.append(sites[probability[of_size] * change > _ROUNDING])
    return features, np.unique(np.concatenate(doubtful))


def _quarter_circle(x: np.ndarray) -> np.ndarray:
    """Share of the quarter of the unit circle left of x in 0..1."""
    return (x * np.sqrt(1 - x**2) + np.arcsin(x)) * 2 / np.pi
