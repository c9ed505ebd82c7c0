"""How near generated crystals are to reference crystals, by the rules of pymatgen's StructureMatcher, as in CDVAE.

Distances are root mean square displacements divided by (V / n)^(1/3): without unit, after the best alignment of the two
cells and their scaling to one volume. A mirror image matches its original. `alignment` has the search itself.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.alignment import TOLERANCES, Reduced, Tolerances, reduced, rms_dist
from unimat_jax.evaluation.pool import Failure, Pool, available_cores

MATCHER_SETTINGS: dict[str, Any] = dataclasses.asdict(TOLERANCES["cdvae"])
"""stol in units of (V / n)^(1/3), ltol as a fraction of the lengths, angle_tol in degrees; as in CDVAE and DiffCSP."""
TIMEOUT_S = 60.0
"""Seconds that the reduction of one crystal, or one comparison, may take."""


def tolerances_of(name: str | Tolerances) -> Tolerances:
    """The tolerances of that name (`cdvae`, `mattergen`, `lemat`). Raises UserError for another."""
    if isinstance(name, Tolerances):
        return name
    if name not in TOLERANCES:
        raise UserError(f"tolerances = {name!r}: choose from {', '.join(TOLERANCES)}")
    return TOLERANCES[name]


def match_rms(prediction: Crystal, reference: Crystal, tolerances: str | Tolerances = "cdvae") -> float | None:
    """The normalised RMS distance of a prediction to its reference, None where the two do not match.

    No crystal makes it raise; an unknown name of tolerances does (UserError).
    """
    settings = tolerances_of(tolerances)
    if reduced_composition(prediction) != reduced_composition(reference):
        return None  # the matcher's answer too, without its work
    try:
        return rms_dist(reduced(prediction), reduced(reference), settings)
    except Exception as error:  # pymatgen stumbles over some broken cells; such a prediction matches nothing
        print(f"no match for {prediction.uid or 'a crystal'}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def reduced_composition(crystal: Crystal) -> tuple[tuple[int, int], ...]:
    """(atomic number, count) pairs over the counts' greatest common divisor, by atomic number."""
    numbers, counts = np.unique(crystal.atomic_numbers, return_counts=True)
    counts = counts // np.gcd.reduce(counts)
    return tuple(zip(numbers.tolist(), counts.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Matches:
    """rms_dist: one value a pair, None where unmatched; the rates take all pairs as denominator.

    reasons: why a pair has no value: `no_crystal`, `no_match`, or the reason of the Failure that comparing it ended
    with; "" where it has one.
    """

    rms_dist: list[float | None]
    reasons: list[str] = dataclasses.field(default_factory=list)

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
    pairs: Iterable[tuple[Crystal | None, Crystal]],
    *,
    tolerances: str | Tolerances = "cdvae",
    num_workers: int | None = None,
    progress: bool = True,
) -> Matches:
    """Matches each (prediction, reference); a prediction of None (failed or invalid) is unmatched but counted.

    Work is spread over `num_workers` processes (default: all cores; 1: this process). A crystal in several pairs is
    reduced once.
    """
    pairs = list(pairs)
    settings = tolerances_of(tolerances)
    alike = [
        None if a is None or reduced_composition(a) != reduced_composition(b) else (a, b) for a, b in pairs
    ]  # of other compositions: the matcher's answer is no, without its work
    crystals = {id(crystal): crystal for pair in alike if pair for crystal in pair}
    with Pool(workers_for(len(pairs), num_workers), timeout_s=TIMEOUT_S) as pool:
        cells = dict(zip(crystals, reduce_all(pool, list(crystals.values()), progress), strict=True))
        compared = iter(
            compare(
                pool, rms_dist, [(cells[id(pair[0])], cells[id(pair[1])]) for pair in alike if pair], settings,
                "matching" if progress else "",
            )
        )  # fmt: skip
        found = [next(compared) if pair else None for pair in alike]
    values = [value if isinstance(value, float) else None for value in found]
    return Matches(
        values, [why_unmatched(prediction, value) for (prediction, _), value in zip(pairs, found, strict=True)]
    )


def why_unmatched(prediction: Crystal | None, found: float | Failure | None) -> str:
    """The reason for `Matches.reasons`."""
    if prediction is None:
        return "no_crystal"
    return found.reason if isinstance(found, Failure) else "no_match" if found is None else ""


def workers_for(items: int, num_workers: int | None) -> int:
    """Processes for so many crystals or pairs, which cost a second each to start; 0: this one, also for 1."""
    workers = min(available_cores() if num_workers is None else num_workers, 1 + items // 50)
    return 0 if workers == 1 else workers


def reduce_all(pool: Pool, crystals: Sequence[Crystal], progress: bool, what: str = "cells") -> list[Reduced | Failure]:
    """The reduced cells of crystals, in order."""
    return list(pool.map(reduced, crystals, progress=f"reducing {what}" if progress else ""))


def compare(
    pool: Pool,
    comparison: Callable[[Reduced, Reduced, Tolerances], Any],
    pairs: Sequence[tuple[Reduced | Failure, Reduced | Failure]],
    tolerances: Tolerances,
    progress: str = "",
) -> list[Any]:
    """comparison(a, b, tolerances) of each pair: `rms_dist` or `fits` of `alignment`; in order.

    None without asking where a and b have other numbers of atoms by element; a Failure where a or b is one.
    """
    broken = [next((part for part in pair if isinstance(part, Failure)), None) for pair in pairs]
    asked = [
        i
        for i, (a, b) in enumerate(pairs)
        if isinstance(a, Reduced) and isinstance(b, Reduced) and a.counts == b.counts
    ]
    tasks = [(comparison, *pairs[i], tolerances) for i in asked]
    results: list[Any] = list(broken)
    for i, result in zip(asked, pool.map(_compare, tasks, progress=progress, unit="pair"), strict=True):
        results[i] = result
    return results


def _compare(task: tuple[Callable[[Reduced, Reduced, Tolerances], Any], Reduced, Reduced, Tolerances]) -> Any:
    comparison, a, b, tolerances = task
    return comparison(a, b, tolerances)
