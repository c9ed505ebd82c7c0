"""Relaxed candidates on a common scale: formation energy, distance to the hull, and what they would fall apart into."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.clusters import unique_clusters
from unimat_jax.stability.duplicates import same_structures
from unimat_jax.stability.hull import Decomposition, Query, decompose, elemental_energies, formation_energy
from unimat_jax.stability.references import Phase
from unimat_jax.stability.relaxation import Relaxation

MODES = {
    "none": "no reference: energies of the model alone",
    "elements": "elemental references: formation energies, no hull",
    "reference": "reference entries",
    "self_consistent": "elements and known structures, relaxed by the same protocol and model",
}


@dataclasses.dataclass(frozen=True)
class Hull:
    """What candidates are held against. mode: one of MODES; scheme: of its energies; left_out: entries and structures
    that it could have had, by reason."""

    mode: str
    phases: list[Phase]
    scheme: str
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)


def total_energy(
    relaxation: Relaxation, volume: float, *, corrected: bool, pressure: float
) -> tuple[float | None, str]:
    """(eV a cell, "") or (None, why there is none). With a pressure (GPa) it is the enthalpy E + P V (volume: A3)."""
    from ase.units import GPa

    if relaxation.energy is None:
        return None, "not_relaxed"
    if corrected and relaxation.correction is None:
        return None, "no_correction"
    return relaxation.energy + (relaxation.correction or 0.0 if corrected else 0.0) + pressure * GPa * volume, ""


def as_phases(
    crystals: Sequence[Crystal], relaxations: Sequence[Relaxation], *, corrected: bool, pressure: float
) -> tuple[list[Phase], Counter[str]]:
    """The converged ones as phases of a hull, and why the others are none."""
    phases, left_out = [], Counter()
    for crystal, relaxation in zip(crystals, relaxations, strict=True):
        relaxed = relaxation.crystal(crystal)
        if relaxation.status != "converged" or relaxed is None:
            left_out[relaxation.label] += 1
            continue
        energy, reason = total_energy(relaxation, relaxed.volume, corrected=corrected, pressure=pressure)
        if energy is None:
            left_out[reason] += 1
            continue
        phases.append(Phase(crystal.uid, composition_of(relaxed), energy, relaxed))
    return phases, left_out


def composition_of(crystal: Crystal) -> dict[str, float]:
    """Atoms by symbol in the cell."""
    return {symbol: float(number) for symbol, number in Counter(crystal.symbols).items()}


def judge(
    candidates: Sequence[Phase | None],
    hull: Hull,
    tolerances: str,
    *,
    num_workers: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Columns for each candidate; None is one without an energy, and gets none.

    The hull is without the candidate's structural duplicates, and with all other phases, those of its composition
    included. `decomposition_energy_among_candidates` is against the hull and the other candidates, without those of one
    structure with it.
    """
    there = [i for i, candidate in enumerate(candidates) if candidate is not None]
    ours = [candidate for candidate in candidates if candidate is not None]
    crystals = [candidate.crystal for candidate in ours]
    shared: dict[str, Any] = {"num_workers": num_workers, "progress": progress}
    known, reasons = same_structures(crystals, hull.phases, tolerances, **shared)
    elements = elemental_energies(hull.phases)
    rows: list[dict[str, Any]] = [{} for _ in candidates]
    for i, candidate, same, reason in zip(there, ours, known, reasons, strict=True):
        energy, missing = formation_energy(candidate.composition, candidate.energy, elements)
        rows[i] = {"formation_energy_per_atom": energy, "energy_status": missing if hull.mode != "none" else "",
                   "same_as": ";".join(sorted(same)), "match_reason": reason}  # fmt: skip
    if hull.mode in ("none", "elements"):
        return rows
    by_uid = {phase.uid: phase for phase in hull.phases}
    lowest = _lowest(hull.phases)
    queries = [Query(c.composition, c.energy, same) for c, same in zip(ours, known, strict=True)]
    bar = "hulls" if progress else ""
    found = decompose(queries, hull.phases, num_workers=num_workers, progress=bar)
    for i, candidate, same, answer in zip(there, ours, known, found, strict=True):
        polymorph = lowest.get(candidate.formula)
        rows[i] |= {
            "decomposition_energy": answer.energy,
            "e_above_hull": None if answer.energy is None else max(answer.energy, 0.0),
            "energy_status": rows[i]["energy_status"] or answer.reason,
            "decomposition": products_text(answer, by_uid),
            "nearest_known": _nearest(same, polymorph, answer, by_uid),
        }
    others = [dataclasses.replace(c, uid=f"candidate {i}") for i, c in zip(there, ours, strict=True)]
    clusters = unique_clusters(crystals, tolerances, **shared).leaders
    members: dict[Any, set[str]] = defaultdict(set)
    for other, leader in zip(others, clusters, strict=True):
        members[leader].add(other.uid)
    queries = [
        dataclasses.replace(
            query, excluded=query.excluded | {other.uid} | (members[leader] if leader is not None else set())
        )
        for query, other, leader in zip(queries, others, clusters, strict=True)
    ]
    bar = "hulls with candidates" if progress else ""
    for i, answer in zip(
        there, decompose(queries, [*hull.phases, *others], num_workers=num_workers, progress=bar), strict=True
    ):
        rows[i]["decomposition_energy_among_candidates"] = answer.energy
    return rows


def _lowest(phases: Sequence[Phase]) -> dict[str, Phase]:
    """The lowest phase of each reduced formula."""
    result: dict[str, Phase] = {}
    for phase in sorted(phases, key=lambda phase: -phase.energy_per_atom):
        result[phase.formula] = phase
    return result


def _nearest(same: frozenset[str], polymorph: Phase | None, answer: Decomposition, phases: Mapping[str, Phase]) -> str:
    """The lowest phase that the candidate is, else the lowest of its composition, else its main product."""
    if same:
        return min(same, key=lambda uid: phases[uid].energy_per_atom)
    if polymorph is not None:
        return polymorph.uid
    return max(answer.products, key=lambda uid: answer.products[uid], default="")


def products_text(answer: Decomposition, phases: Mapping[str, Phase]) -> str:
    """ "0.400 SrO (mp-2472) + 0.600 TiO2 (mp-390)": shares of the atoms."""
    parts = sorted(answer.products.items(), key=lambda item: -item[1])
    return " + ".join(f"{share:.3f} {phases[uid].formula} ({uid})" for uid, share in parts)
