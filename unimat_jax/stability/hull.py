"""Formation energies and distances to the convex hull, by pymatgen's PhaseDiagram.

The hull of a candidate is made of all phases but those that are the candidate itself (`Query.excluded`): what is left
decides whether the candidate is new and stable. Phases of its composition with another structure stay.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unimat_jax.evaluation.matching import workers_for
from unimat_jax.evaluation.pool import Failure, map_isolated
from unimat_jax.stability.references import Phase

TIMEOUT_S = 300.0
"""Seconds that the candidates of one chemical system may take; ten elements and more can take qhull forever."""


@dataclasses.dataclass(frozen=True)
class Query:
    """composition: atoms by symbol in the cell; energy: eV for all of them; excluded: uids of phases to leave out."""

    composition: dict[str, float]
    energy: float
    excluded: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """energy: E_d, eV/atom above (below: negative) the hull; None where there is none, and `reason` says why.

    products: share of the atoms by phase uid, of the phases that the composition would fall apart into.
    """

    energy: float | None
    products: dict[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""


def elemental_energies(phases: Iterable[Phase]) -> dict[str, float]:
    """eV/atom of the lowest phase of each element that there is."""
    result: dict[str, float] = {}
    for phase in phases:
        if len(phase.composition) == 1:
            (symbol,) = phase.composition
            result[symbol] = min(phase.energy_per_atom, result.get(symbol, phase.energy_per_atom))
    return result


def formation_energy(
    composition: Mapping[str, float], energy: float, elements: Mapping[str, float]
) -> tuple[float | None, str]:
    """(eV/atom from the elements, "") or (None, which element is missing)."""
    missing = sorted(symbol for symbol in composition if symbol not in elements)
    if missing:
        return None, f"missing_terminal({','.join(missing)})"
    from_elements = sum(amount * elements[symbol] for symbol, amount in composition.items())
    return (energy - from_elements) / sum(composition.values()), ""


def decompose(
    queries: Sequence[Query], phases: Sequence[Phase], *, num_workers: int | None = None, progress: str = "hulls"
) -> list[Decomposition]:
    """One Decomposition a query, in order; each chemical system is worked on by itself, so that one that takes too long
    or fails costs no other."""
    by_elements: dict[frozenset[str], list[Phase]] = defaultdict(list)
    for phase in phases:
        by_elements[frozenset(phase.composition)].append(phase)
    systems: dict[frozenset[str], list[int]] = defaultdict(list)
    for i, query in enumerate(queries):
        systems[frozenset(query.composition)].append(i)
    tasks = []
    for system, members in systems.items():
        inside = [p for elements, group in by_elements.items() if elements <= system for p in group]
        light = [(p.uid, p.composition, p.energy) for p in inside]
        tasks.append((light, [queries[i] for i in members]))
    results: list[Decomposition] = [Decomposition(None, reason="no_answer")] * len(queries)
    workers = workers_for(len(tasks), num_workers)
    found = map_isolated(_decompose, tasks, num_workers=workers, timeout_s=TIMEOUT_S, progress=progress, unit="system")
    for members, answers in zip(systems.values(), found, strict=True):
        if isinstance(answers, Failure):
            answers = [Decomposition(None, reason=f"hull: {answers.reason}")] * len(members)
        for i, answer in zip(members, answers, strict=True):
            results[i] = answer
    return results


def _decompose(task: tuple[list[tuple[str, dict[str, float], float]], list[Query]]) -> list[Decomposition]:
    """The queries of one chemical system; runs in a worker."""
    from pymatgen.analysis.phase_diagram import PDEntry
    from pymatgen.core import Composition

    phases, queries = task
    entries = [PDEntry(Composition(composition), energy, name=uid) for uid, composition, energy in phases]
    system = _System(frozenset(queries[0].composition), entries)
    return [system.answer(query) for query in queries]


class _System:
    """The phase diagrams of one chemical system, with and without some phases, each made once."""

    def __init__(self, elements: frozenset[str], entries: Sequence[Any]):
        self.elements = elements
        self.entries = entries
        self.diagrams: dict[frozenset[str], Any] = {}
        everything = self.without(frozenset())
        self.stable = None if everything is None else {entry.name for entry in everything.stable_entries}

    def answer(self, query: Query) -> Decomposition:
        from pymatgen.analysis.phase_diagram import PDEntry
        from pymatgen.core import Composition

        # Without phases of which none is on the hull, the hull is the same.
        needless = self.stable is not None and not query.excluded & self.stable
        excluded = frozenset() if needless else query.excluded
        diagram = self.without(excluded)
        if diagram is None:
            missing = ",".join(sorted(self.elements - self.terminals(excluded)))
            return Decomposition(None, reason=f"missing_terminal({missing})")
        entry = PDEntry(Composition(query.composition), query.energy)
        products, energy = diagram.get_decomp_and_e_above_hull(entry, allow_negative=True, check_stable=False)
        return Decomposition(float(energy), {product.name: float(share) for product, share in products.items()})

    def terminals(self, excluded: frozenset[str]) -> set[str]:
        """Symbols of the elements that have a phase of their own."""
        return {
            entry.composition.elements[0].symbol
            for entry in self.entries
            if entry.composition.is_element and entry.name not in excluded
        }

    def without(self, excluded: frozenset[str]) -> Any:
        """The PhaseDiagram without these phases; None where an element is missing."""
        from pymatgen.analysis.phase_diagram import PhaseDiagram

        if excluded not in self.diagrams:
            left = [entry for entry in self.entries if entry.name not in excluded]
            complete = self.terminals(excluded) >= self.elements
            self.diagrams[excluded] = PhaseDiagram(left) if complete else None
        return self.diagrams[excluded]
