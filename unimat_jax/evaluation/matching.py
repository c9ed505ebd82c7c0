"""How near generated crystals are to reference crystals: pymatgen's StructureMatcher, as in CDVAE and DiffCSP.

Distances are root mean square displacements divided by (V / n)^(1/3): without unit, after the best alignment of the two
cells and their scaling to one volume. A mirror image matches its original.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from unimat_jax.crystal import Crystal

if TYPE_CHECKING:
    from pymatgen.core.structure_matcher import StructureMatcher

MATCHER_SETTINGS: dict[str, Any] = {"stol": 0.5, "ltol": 0.3, "angle_tol": 10.0}
"""stol in units of (V / n)^(1/3), ltol as a fraction of the lengths, angle_tol in degrees; as in CDVAE and DiffCSP."""


@functools.cache
def _matcher() -> StructureMatcher:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(**MATCHER_SETTINGS)


def match_rms(prediction: Crystal, reference: Crystal) -> float | None:
    """The normalised RMS distance of a prediction to its reference, None where the two do not match. Never raises."""
    if reduced_composition(prediction) != reduced_composition(reference):
        return None  # the matcher's answer too, without its work
    try:
        found = _matcher().get_rms_dist(prediction.to_pymatgen(), reference.to_pymatgen())
    except Exception as error:  # pymatgen stumbles over some broken cells; such a prediction matches nothing
        print(f"no match for {prediction.uid or 'a crystal'}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return None if found is None else float(found[0])


def reduced_composition(crystal: Crystal) -> tuple[tuple[int, int], ...]:
    """(atomic number, count) pairs over the counts' greatest common divisor, by atomic number."""
    numbers, counts = np.unique(crystal.atomic_numbers, return_counts=True)
    counts = counts // np.gcd.reduce(counts)
    return tuple(zip(numbers.tolist(), counts.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Matches:
    """rms_dist: one value a pair, None where unmatched; the rates take all pairs as denominator."""

    rms_dist: list[float | None]

    @property
    def match_rate(self) -> float | None:
        """Matched pairs over all pairs, in 0..1."""
        return len(self.matched) / len(self.rms_dist) if self.rms_dist else None

    @property
    def rmse(self) -> float | None:
        """Mean of rms_dist over the matched pairs (the field calls it RMSE)."""
        return float(np.mean(self.matched)) if self.matched else None

    @property
    def matched(self) -> list[float]:
        return [value for value in self.rms_dist if value is not None]

    def to_json(self) -> dict[str, Any]:
        return {"num_pairs": len(self.rms_dist), "match_rate": self.match_rate, "rms_dist": self.rmse}


def match_pairs(
    pairs: Iterable[tuple[Crystal | None, Crystal]], *, num_workers: int | None = None, progress: bool = True
) -> Matches:
    """Matches each (prediction, reference); a prediction of None (failed or invalid) is unmatched but counted.

    Work is spread over `num_workers` processes (default: all cores; 1: this process).
    """
    from tqdm import tqdm

    pairs = list(pairs)
    workers = min(num_workers or os.cpu_count() or 1, 1 + len(pairs) // 50)  # a process costs a second to start
    bar = tqdm(total=len(pairs), desc="matching", unit="pair", disable=not progress, file=sys.stderr)
    found: list[float | None] = []
    if workers == 1:
        for pair in pairs:
            found.append(_match(pair))
            bar.update()
    else:
        # Not fork: the caller may hold jax, whose threads a forked child cannot use.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for value in pool.map(_match, pairs, chunksize=16):
                found.append(value)
                bar.update()
    bar.close()
    return Matches(found)


def _match(pair: Sequence[Crystal | None]) -> float | None:
    prediction, reference = pair
    return None if prediction is None or reference is None else match_rms(prediction, reference)
