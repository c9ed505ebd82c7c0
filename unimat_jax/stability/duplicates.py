"""Which known phases a relaxed candidate is, all of them: its own energy must not be part of the hull it is held to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.alignment import fits
from unimat_jax.evaluation.clusters import cells_of
from unimat_jax.evaluation.matching import TIMEOUT_S, compare, reduced_composition, tolerances_of, workers_for
from unimat_jax.evaluation.pool import Failure, Pool
from unimat_jax.stability.references import Phase


def same_structures(
    crystals: Sequence[Crystal | None],
    phases: Sequence[Phase],
    tolerances: str,
    *,
    num_workers: int | None = None,
    progress: bool = True,
) -> tuple[list[frozenset[str]], list[str]]:
    """(uids of the phases that each crystal is by StructureMatcher's `fit`, why that could not be told or "").

    Phases without a structure match nothing.
    """
    settings = tolerances_of(tolerances)
    by_composition: dict[Any, list[Phase]] = defaultdict(list)
    for phase in phases:
        if phase.crystal is not None:
            by_composition[reduced_composition(phase.crystal)].append(phase)
    pairs = [
        (i, phase)
        for i, crystal in enumerate(crystals)
        if crystal is not None
        for phase in by_composition.get(reduced_composition(crystal), [])
    ]
    needed = {phase.uid: phase.crystal for _, phase in pairs}
    with Pool(workers_for(len(crystals) + len(needed), num_workers), timeout_s=TIMEOUT_S) as pool:
        ours = cells_of(pool, crystals, progress)
        theirs = dict(zip(needed, cells_of(pool, list(needed.values()), progress), strict=True))
        asked = [(ours[i], theirs[phase.uid]) for i, phase in pairs]
        answers = compare(pool, fits, asked, settings, "matching references" if progress else "")
    found: list[set[str]] = [set() for _ in crystals]
    reasons = [cell.reason if isinstance(cell, Failure) else "" for cell in ours]
    for (i, phase), answer in zip(pairs, answers, strict=True):
        if isinstance(answer, Failure):
            reasons[i] = reasons[i] or answer.reason
        elif answer:
            found[i].add(phase.uid)
    return [frozenset(uids) for uids in found], reasons
