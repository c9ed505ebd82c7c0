"""Coverage of a reference set by generated crystals, and how near they come: COV, AMSD and AMCD of CDVAE.

Definitions: T. Xie et al. 2022, arXiv 2110.06197, by the rules of its `compute_cov`. A reference crystal is recalled
if the nearest generated structure and the nearest generated composition, which need not be of one crystal, are within
two cut-offs; a generated one is precise if the same holds of the references. A crystal without fingerprints is neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from unimat_jax.evaluation.magpie import standardise

CUTOFFS: dict[str, dict[str, float]] = {
    "mp_20": {"struct_cutoff": 0.4, "comp_cutoff": 10.0},
    "carbon_24": {"struct_cutoff": 0.2, "comp_cutoff": 4.0},
    "perov_5": {"struct_cutoff": 0.2, "comp_cutoff": 4.0},
}
"""CDVAE's, for its three data sets."""
_BLOCK = 1024  # rows at a time: a block of distances to 10,000 others takes 80 MB


@dataclasses.dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest others of N crystals. struct_distance, comp_distance: float64 [N], NaN without fingerprints or
    others; struct_index, comp_index: int [N], the other's place in its list, -1 where the distance is NaN."""

    struct_distance: np.ndarray
    comp_distance: np.ndarray
    struct_index: np.ndarray
    comp_index: np.ndarray

    def within(self, struct_cutoff: float, comp_cutoff: float) -> np.ndarray:
        """bool [N]: both distances are at most the cut-offs."""
        return (self.struct_distance <= struct_cutoff) & (self.comp_distance <= comp_cutoff)


@dataclasses.dataclass(frozen=True, eq=False)
class Coverage:
    """COV in 0..1 and mean nearest distances. Recall goes over the references, precision over the generated crystals.

    Both shares count crystals without fingerprints as not covered: precision's denominator is num_generated, recall's
    num_reference. The mean distances leave them out, and are None where nothing is left. generated, reference: the
    nearest of each crystal in the other set.
    """

    cov_recall: float | None
    cov_precision: float | None
    amsd_recall: float | None
    amsd_precision: float | None
    amcd_recall: float | None
    amcd_precision: float | None
    struct_cutoff: float
    comp_cutoff: float
    num_generated: int
    num_reference: int
    num_generated_without_fingerprint: int
    num_reference_without_fingerprint: int
    generated: Nearest
    reference: Nearest

    def to_json(self) -> dict[str, Any]:
        """All but the arrays."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("generated", "reference")}


def coverage(
    struct_fps: Sequence[np.ndarray | None],
    comp_fps: Sequence[np.ndarray | None],
    ref_struct_fps: Sequence[np.ndarray | None],
    ref_comp_fps: Sequence[np.ndarray | None],
    *,
    struct_cutoff: float,
    comp_cutoff: float,
    num_generated: int | None = None,
) -> Coverage:
    """Coverage of the references by generated crystals.

    Fingerprints are those of `structure_fingerprint` [61] and `composition_fingerprint` [132], the latter not yet
    standardised, None where there is none: a crystal that lacks one counts as having neither. num_generated: all that
    was asked for, if more than are given here (crystals that could not be read). Raises ValueError if it is less.
    """
    total = len(struct_fps) if num_generated is None else num_generated
    if total < len(struct_fps):
        raise ValueError(f"num_generated = {total}, but {len(struct_fps)} fingerprints are given")
    ours, theirs = _Set.of(struct_fps, comp_fps), _Set.of(ref_struct_fps, ref_comp_fps)
    generated, reference = ours.nearest(theirs), theirs.nearest(ours)

    def share(nearest: Nearest, denominator: int) -> float | None:
        return float(nearest.within(struct_cutoff, comp_cutoff).sum() / denominator) if denominator else None

    return Coverage(
        cov_recall=share(reference, theirs.size),
        cov_precision=share(generated, total),
        amsd_recall=_mean(reference.struct_distance),
        amsd_precision=_mean(generated.struct_distance),
        amcd_recall=_mean(reference.comp_distance),
        amcd_precision=_mean(generated.comp_distance),
        struct_cutoff=struct_cutoff,
        comp_cutoff=comp_cutoff,
        num_generated=total,
        num_reference=theirs.size,
        num_generated_without_fingerprint=total - len(ours.rows),
        num_reference_without_fingerprint=theirs.size - len(theirs.rows),
        generated=generated,
        reference=reference,
    )


def _mean(distances: np.ndarray) -> float | None:
    known = distances[~np.isnan(distances)]
    return float(known.mean()) if len(known) else None


@dataclasses.dataclass(frozen=True)
class _Set:
    """The K crystals with both fingerprints among `size`: rows [K] their places, struct [K, 61], comp [K, 132]."""

    size: int
    rows: np.ndarray
    struct: np.ndarray
    comp: np.ndarray

    @classmethod
    def of(cls, struct_fps: Sequence[np.ndarray | None], comp_fps: Sequence[np.ndarray | None]) -> _Set:
        pairs = list(zip(struct_fps, comp_fps, strict=True))
        rows = [row for row, pair in enumerate(pairs) if pair[0] is not None and pair[1] is not None]
        struct = np.array([pairs[row][0] for row in rows], np.float64)
        comp = np.array([pairs[row][1] for row in rows], np.float64)
        return cls(len(pairs), np.array(rows, int), struct, standardise(comp) if rows else comp)

    def nearest(self, others: _Set) -> Nearest:
        distances = np.full((2, self.size), np.nan)
        indices = np.full((2, self.size), -1)
        if len(self.rows) and len(others.rows):
            for kind, (ours, theirs) in enumerate(((self.struct, others.struct), (self.comp, others.comp))):
                distances[kind, self.rows], found = nearest_rows(ours, theirs)
                indices[kind, self.rows] = others.rows[found]
        return Nearest(distances[0], distances[1], indices[0], indices[1])


def nearest_rows(points: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Euclidean distance [N] of each row of points [N, D] to the nearest row of others [M, D], that row's index [N]).

    A matrix product finds the candidates, those that rounding could confuse with the nearest; differences decide among
    them. So the distance is exact, and of equally near rows the first is named.
    """
    unique, inverse = np.unique(points, axis=0, return_inverse=True)
    targets, target_first = np.unique(others, axis=0, return_index=True)
    targets, target_first = targets[np.argsort(target_first)], np.sort(target_first)
    centre = targets.mean(0)  # small numbers keep the rounding of the product small
    centred = targets - centre
    squares = np.einsum("ij,ij->i", centred, centred)
    distances, indices = np.empty(len(unique)), np.empty(len(unique), int)
    for start in range(0, len(unique), _BLOCK):
        block = unique[start : start + _BLOCK]
        offset = block - centre
        rough = squares - 2 * offset @ centred.T  # squared distance, less the row's own square
        own = np.einsum("ij,ij->i", offset, offset)
        error = 1e-13 * (own + squares.max()) + 1e-300
        row, column = np.nonzero(rough <= rough.min(1)[:, None] + 4 * error[:, None])
        exact = np.linalg.norm(block[row] - targets[column], axis=1)
        order = np.lexsort((column, exact, row))
        best = order[np.searchsorted(row[order], np.arange(len(block)))]
        distances[start : start + _BLOCK] = exact[best]
        indices[start : start + _BLOCK] = target_first[column[best]]
    inverse = inverse.reshape(-1)
    return distances[inverse], indices[inverse]
