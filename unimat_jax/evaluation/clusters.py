"""Which crystals are one structure: the clusters that uniqueness counts.

Two crystals are one structure where StructureMatcher's `fit` says so (each displacement below stol), as MatterGen
(Zeni et al. 2025) and pymatgen's `group_structures` have it; FlowMM (Miller et al. 2024) asks for an RMS distance below
stol instead, which is looser. `fit` is no equivalence relation, so that clusters need a rule. MatterGen and pymatgen
compare each structure with the first ones of the clusters so far, in the order of the files. Here the order is one of
the contents, by volume an atom, ties by a hash: the clusters are those of `group_structures` for the list so ordered,
whatever order the files have. Connected components would need no order, but chain unlike structures together.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.alignment import Reduced, Tolerances, fits
from unimat_jax.evaluation.matching import TIMEOUT_S, compare, reduce_all, tolerances_of, workers_for
from unimat_jax.evaluation.pool import Failure, Pool, progress_bar

Cells: TypeAlias = list[Reduced | Failure]
NO_CRYSTAL = Failure("no_crystal")


@dataclasses.dataclass(frozen=True)
class Clusters:
    """leaders: for each crystal the number of the crystal that leads its cluster; None for those without a cluster.

    reasons: why a crystal is in none: `no_crystal`, or the reason of the Failure that reducing or comparing it ended
    with. Such ones count as neither unique nor novel, but in every denominator.
    """

    leaders: list[int | None]
    reasons: list[str]

    @property
    def unique(self) -> list[bool]:
        """Whether a crystal leads its cluster: as many as there are clusters."""
        return [leader == i for i, leader in enumerate(self.leaders)]


def unique_clusters(
    crystals: Sequence[Crystal | None],
    tolerances: str | Tolerances = "mattergen",
    *,
    num_workers: int | None = None,
    progress: bool = True,
) -> Clusters:
    """The clusters of crystals that are one structure each (see the module's text for the rule)."""
    with Pool(workers_for(len(crystals), num_workers), timeout_s=TIMEOUT_S) as pool:
        return cluster_cells(pool, crystals, cells_of(pool, crystals, progress), tolerances_of(tolerances), progress)


def cells_of(pool: Pool, crystals: Sequence[Crystal | None], progress: bool) -> Cells:
    """The reduced cells of crystals, NO_CRYSTAL for None."""
    found = iter(reduce_all(pool, [crystal for crystal in crystals if crystal is not None], progress))
    return [NO_CRYSTAL if crystal is None else next(found) for crystal in crystals]


def cluster_cells(
    pool: Pool, crystals: Sequence[Crystal | None], cells: Cells, tolerances: Tolerances, progress: bool
) -> Clusters:
    """`unique_clusters` of crystals whose reduced cells are there."""
    leaders: list[int | None] = [None] * len(cells)
    reasons = [cell.reason if isinstance(cell, Failure) else "" for cell in cells]
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (crystal, cell) in enumerate(zip(crystals, cells, strict=True)):
        if crystal is not None and isinstance(cell, Reduced):
            groups[cell.counts].append(i)
    waiting = [sorted(group, key=lambda i: content_order(crystals[i])) for group in groups.values()]
    with progress_bar(sum(map(len, waiting)), "clustering" if progress else "") as bar:
        while waiting:  # each round the first of every group becomes a leader, and all others meet it
            pairs = []
            for group in waiting:
                leaders[group[0]] = group[0]
                pairs += [(group[0], i) for i in group[1:]]
            same = compare(pool, fits, [(cells[leader], cells[i]) for leader, i in pairs], tolerances)
            for (leader, i), found in zip(pairs, same, strict=True):
                if isinstance(found, Failure):
                    reasons[i] = found.reason
                elif found:
                    leaders[i] = leader
            before = sum(map(len, waiting))
            waiting = [[i for i in group if leaders[i] is None and not reasons[i]] for group in waiting]
            waiting = [group for group in waiting if group]
            bar.update(before - sum(map(len, waiting)))
    return Clusters(leaders, reasons)


def content_order(crystal: Crystal | None) -> tuple[float, str]:
    """What crystals are sorted by: volume an atom (A3), then a hash of the contents; names do not count."""
    if crystal is None:
        return (np.inf, "")
    content = b"".join(
        np.ascontiguousarray(array).tobytes()
        for array in (crystal.atomic_numbers, crystal.frac_coords, crystal.lattice)
    )
    return crystal.volume / crystal.num_atoms, hashlib.sha256(content).hexdigest()
