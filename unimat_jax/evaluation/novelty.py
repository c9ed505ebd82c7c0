"""Uniqueness, novelty and S.U.N.: which generated crystals are new, and good.

A crystal is known where StructureMatcher's `fit(crystal, known)` accepts some known structure, as in MatterGen (Zeni et
al. 2025). Clusters of generated crystals are those of `clusters`. All shares are over all crystals that were asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.alignment import Reduced, Tolerances, fit_rms
from unimat_jax.evaluation.clusters import Cells, Clusters, cells_of, cluster_cells, content_order, unique_clusters
from unimat_jax.evaluation.matching import (
    TIMEOUT_S,
    compare,
    reduce_all,
    reduced_composition,
    tolerances_of,
    workers_for,
)
from unimat_jax.evaluation.metrics import Metric, share
from unimat_jax.evaluation.pool import Failure, Pool, progress_bar

__all__ = ["Clusters", "KnownMatches", "KnownStructures", "match_known", "novelty_metrics", "unique_clusters"]

_CANDIDATES = 16
"""Known structures that one crystal is compared with before the next round leaves out those that have matched."""


@dataclasses.dataclass(frozen=True)
class KnownMatches:
    """uids: the known structure that each crystal is, None where none; rms_dist: to it, in (V / n)^(1/3).

    reasons: why it could not be told, "" where it could.
    """

    uids: list[str | None]
    rms_dist: list[float | None]
    reasons: list[str]

    @property
    def novel(self) -> list[bool]:
        """Whether a crystal is known to be none of the known ones."""
        return [uid is None and not reason for uid, reason in zip(self.uids, self.reasons, strict=True)]


class KnownStructures:
    """Known structures by reduced composition, read when first asked for, and reduced where a crystal needs them."""

    def __init__(self, crystals: Iterable[Crystal]):
        self._source = crystals
        self._by_composition: dict[Any, list[Crystal]] | None = None
        self._cells: dict[Any, Cells] = {}

    def of(self, composition: Any) -> list[Crystal]:
        """The structures of a `reduced_composition`, in the order of their uids and contents."""
        if self._by_composition is None:
            index: dict[Any, list[Crystal]] = defaultdict(list)
            for crystal in self._source:
                index[reduced_composition(crystal)].append(crystal)
            self._by_composition = {
                key: sorted(crystals, key=lambda crystal: (crystal.uid, *content_order(crystal)))
                for key, crystals in index.items()
            }
            self._source = ()
        return self._by_composition.get(composition, [])

    def cells(self, pool: Pool, compositions: Iterable[Any], progress: bool) -> dict[Any, Cells]:
        """The reduced cells of `of(composition)` for each composition."""
        missing = [composition for composition in dict.fromkeys(compositions) if composition not in self._cells]
        crystals = [crystal for composition in missing for crystal in self.of(composition)]
        found = iter(reduce_all(pool, crystals, progress, "known cells"))
        for composition in missing:
            self._cells[composition] = [next(found) for _ in self.of(composition)]
        return self._cells


def match_known(
    crystals: Sequence[Crystal | None],
    known: KnownStructures,
    tolerances: str | Tolerances = "mattergen",
    *,
    num_workers: int | None = None,
    progress: bool = True,
) -> KnownMatches:
    """For each crystal a known structure that it is: of those that `fit(crystal, known)` accepts, the one whose volume
    an atom is nearest, ties by uid."""
    with Pool(workers_for(len(crystals), num_workers), timeout_s=TIMEOUT_S) as pool:
        cells = cells_of(pool, crystals, progress)
        return match_known_cells(pool, crystals, cells, known, tolerances_of(tolerances), progress)


def match_known_cells(
    pool: Pool,
    crystals: Sequence[Crystal | None],
    cells: Cells,
    known: KnownStructures,
    tolerances: Tolerances,
    progress: bool,
) -> KnownMatches:
    """`match_known` of crystals whose reduced cells are there."""
    uids: list[str | None] = [None] * len(cells)
    distances: list[float | None] = [None] * len(cells)
    reasons = [cell.reason if isinstance(cell, Failure) else "" for cell in cells]
    compositions = {
        i: reduced_composition(crystal) for i, crystal in enumerate(crystals) if crystal is not None and not reasons[i]
    }
    known_cells = known.cells(pool, compositions.values(), progress)
    waiting: dict[int, list[tuple[str, Reduced | Failure]]] = {}
    for i, composition in compositions.items():
        cell = cells[i]
        found = zip(known.of(composition), known_cells[composition], strict=True)
        candidates = [(crystal.uid, other) for crystal, other in found if _may_be(cell, other)]
        waiting[i] = sorted(candidates, key=lambda candidate, cell=cell: _volume_difference(cell, candidate[1]))
    with progress_bar(len(waiting), "matching known" if progress else "") as bar:
        while waiting:
            pairs = [(i, uid, other) for i, candidates in waiting.items() for uid, other in candidates[:_CANDIDATES]]
            results = compare(pool, fit_rms, [(cells[i], other) for i, _, other in pairs], tolerances)
            for (i, uid, _), result in zip(pairs, results, strict=True):
                if isinstance(result, Failure):
                    reasons[i] = reasons[i] or result.reason
                elif result is not None and uids[i] is None:
                    uids[i], distances[i] = uid, result
            before = len(waiting)
            waiting = {i: rest for i, tried in waiting.items() if uids[i] is None and (rest := tried[_CANDIDATES:])}
            bar.update(before - len(waiting))
    reasons = [reason if uid is None else "" for uid, reason in zip(uids, reasons, strict=True)]
    return KnownMatches(uids, distances, reasons)


def _may_be(cell: Reduced | Failure, other: Reduced | Failure) -> bool:
    """Whether the answer is open: an unreadable known structure of the composition leaves it so."""
    return isinstance(other, Failure) or (isinstance(cell, Reduced) and cell.counts == other.counts)


def _volume_difference(cell: Reduced | Failure, other: Reduced | Failure) -> float:
    if isinstance(cell, Failure) or isinstance(other, Failure):
        return np.inf
    return round(abs(cell.volume / cell.num_atoms - other.volume / other.num_atoms), 6)  # rounding errors decide no tie


def novelty_metrics(
    crystals: Sequence[Crystal | None],
    known: KnownStructures | None,
    *,
    tolerances: str | Tolerances = "mattergen",
    e_above_hull: Sequence[float] | None = None,
    stable: float = 0.0,
    metastable: float = 0.1,
    num_workers: int | None = None,
    progress: bool = True,
) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    """Metrics by name, and one row a crystal.

    unique: clusters; novel: crystals that are not known; un: clusters whose leader is novel. With e_above_hull
    (eV/atom, not finite: unknown), also stable and metastable: crystals at or below the thresholds (eV/atom); sun:
    clusters whose member of lowest energy is novel and stable; msun: the same with metastable; msun_without_sun: those
    of them that are not in sun, as LeMat-GenBench counts. What needs `known` is left out where that is None.
    """
    if e_above_hull is not None and len(e_above_hull) != len(crystals):
        raise ValueError(f"{len(e_above_hull)} energies above the hull for {len(crystals)} crystals")
    settings = tolerances_of(tolerances)
    with Pool(workers_for(len(crystals), num_workers), timeout_s=TIMEOUT_S) as pool:
        cells = cells_of(pool, crystals, progress)
        clusters = cluster_cells(pool, crystals, cells, settings, progress)
        matches = match_known_cells(pool, crystals, cells, known, settings, progress) if known else None
    text = f"StructureMatcher.fit(ltol={settings.ltol}, stol={settings.stol}, angle_tol={settings.angle_tol})"
    unique = clusters.unique
    failures = sum(leader is None for leader in clusters.leaders)
    metrics = {"unique": share(unique, f"clusters of one structure by {text}", failures=failures)}
    rows: list[dict[str, Any]] = [
        {"unique_cluster": leader, "unique": first, "unique_reason": reason}
        for leader, first, reason in zip(clusters.leaders, unique, clusters.reasons, strict=True)
    ]
    energies = [float(energy) if math.isfinite(energy) else math.nan for energy in e_above_hull or []]
    unknown = sum(math.isnan(energy) for energy in energies)
    if e_above_hull is not None:
        for name, limit in (("stable", stable), ("metastable", metastable)):
            definition = f"at most {limit} eV/atom above the hull"
            metrics[name] = share([energy <= limit for energy in energies], definition, failures=unknown)
    if matches is None:
        return metrics, rows
    novel = matches.novel
    undecided = [bool(reason) for reason in matches.reasons]
    metrics["novel"] = share(novel, f"matching no known structure by {text}", failures=sum(undecided))
    either = [a or b for a, b in zip(clusters.reasons, matches.reasons, strict=True)]
    un = [first and new for first, new in zip(unique, novel, strict=True)]
    metrics["un"] = share(un, f"clusters whose leader is novel; {text}", failures=sum(map(bool, either)))
    for row, uid, distance, new, reason in zip(
        rows, matches.uids, matches.rms_dist, novel, matches.reasons, strict=True
    ):
        row |= {"novel": new, "known_uid": uid, "known_rms_dist": distance, "novel_reason": reason}
    if e_above_hull is not None:
        lowest = lowest_members(clusters, novel, energies)
        candidates = {i: energies[i] for i, new in lowest.items() if new}
        text = f"clusters whose lowest member is novel and {{}} eV/atom above the hull; {text}"
        limits = {
            "sun": (-math.inf, stable, f"at most {stable}"),
            "msun": (-math.inf, metastable, f"at most {metastable}"),
            "msun_without_sun": (stable, metastable, f"more than {stable}, at most {metastable}"),
        }
        for name, (above, limit, words) in limits.items():
            flags = [above < candidates.get(i, math.inf) <= limit for i in range(len(crystals))]
            metrics[name] = share(flags, text.format(words), failures=unknown)
            for row, flag in zip(rows, flags, strict=True):
                row[name] = flag
    return metrics, rows


def lowest_members(clusters: Clusters, novel: Sequence[bool], e_above_hull: Sequence[float]) -> dict[int, bool]:
    """For each cluster with a known energy, the number of its lowest member, and whether it is novel.

    Of several equally low members all must be novel; the first stands for them.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for i, leader in enumerate(clusters.leaders):
        if leader is not None and not math.isnan(e_above_hull[i]):
            members[leader].append(i)
    result = {}
    for group in members.values():
        least = min(e_above_hull[i] for i in group)
        lowest = [i for i in group if e_above_hull[i] == least]
        result[lowest[0]] = all(novel[i] for i in lowest)
    return result
