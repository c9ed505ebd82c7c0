"""Composition validity by SMACT (Davies et al. 2016, doi:10.1016/j.chempr.2016.09.010), by the rule of CDVAE."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

from unimat_jax.periodic_table import SYMBOLS

OXIDATION_STATES = ("smact14", "icsd24")
"""smact14: the list of smact 2.6 and older, on which published CDVAE numbers rest. icsd24: smact's newer default."""


def composition_reason(composition: Iterable[tuple[int, int]], oxidation_states: str = "smact14") -> str:
    """Why a composition, (atomic number, count) pairs, is invalid by SMACT; "" where it is valid.

    Elements and alloys of SMACT's metals are valid. Otherwise one oxidation state for each element must give a neutral
    formula in which every cation is less electronegative than every anion. Reasons: `no_oxidation_states`,
    `no_neutral_combination`, `no_electronegativity`, `pauling_test`. Answers are kept: asking again costs microseconds.
    """
    if oxidation_states not in OXIDATION_STATES:
        raise ValueError(f"oxidation_states = {oxidation_states!r}: choose from {', '.join(OXIDATION_STATES)}")
    composition = sorted(composition)
    divisor = math.gcd(*(count for _, count in composition))
    return _composition_reason(tuple((number, count // divisor) for number, count in composition), oxidation_states)


@functools.lru_cache(maxsize=200_000)
def _composition_reason(composition: tuple[tuple[int, int], ...], oxidation_states: str) -> str:
    table = _elements(oxidation_states)
    elements = [table[number] for number, _ in composition]
    if len(composition) == 1 or all(element.is_metal for element in elements):
        return ""
    if not all(element.states for element in elements):
        return "no_oxidation_states"
    counts = [count for _, count in composition]
    if 0 not in _total_charges([element.states for element in elements], counts):
        return "no_neutral_combination"
    # SMACT's test fails without an electronegativity (CDVAE means it to pass, but what it catches is never raised).
    electronegativities = [element.electronegativity for element in elements if element.electronegativity is not None]
    if len(electronegativities) < len(elements):
        return "no_electronegativity"
    # CDVAE tries the product of all oxidation states. The same answer at a small part of the cost, so that no cap on
    # the number of combinations is needed (DiffCSP gives up at 1e7): in a combination that passes, every element below
    # some electronegativity is a cation and every other an anion.
    for border in set(electronegativities):
        signed = [
            [state for state in element.states if (state > 0) == (electronegativity < border)]
            for element, electronegativity in zip(elements, electronegativities, strict=True)
        ]
        if 0 in _total_charges(signed, counts):
            return ""
    return "pauling_test"


def _total_charges(states: Sequence[Sequence[int]], counts: Sequence[int]) -> set[int]:
    """All total charges that one state per element can give."""
    totals = {0}
    for choices, count in zip(states, counts, strict=True):
        totals = {total + count * state for total in totals for state in choices}
    return totals


@dataclasses.dataclass(frozen=True)
class _Element:
    is_metal: bool
    states: tuple[int, ...]
    electronegativity: float | None  # Pauling scale


@functools.cache
def _elements(oxidation_states: str) -> list[_Element]:
    """SMACT's data by atomic number; elements that SMACT does not know (beyond Lr) have no states."""
    import smact

    icsd24: dict[str, list[int]] = {}
    if oxidation_states == "icsd24":
        from smact.utils.oxidation import ICSD24OxStatesFilter

        # The settings of smact.screening.smact_validity, written out because its defaults have changed before.
        found = ICSD24OxStatesFilter().filter(consensus=3, include_zero=False, commonality="low")
        icsd24 = {
            str(symbol): [int(state) for state in str(states).split()]
            for symbol, states in zip(found["element"], found["oxidation_state"], strict=True)
        }
    elements = []
    for symbol in SYMBOLS:
        try:
            data = smact.Element(symbol)
        except KeyError:
            elements.append(_Element(False, (), None))
            continue
        states = data.oxidation_states_smact14 if oxidation_states == "smact14" else icsd24.get(symbol)
        elements.append(_Element(symbol in smact.metals, tuple(states or ()), data.pauling_eneg))
    return elements
