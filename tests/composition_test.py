import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import load

from unimat_jax.evaluation.composition import composition_reason
from unimat_jax.evaluation.matching import reduced_composition
from unimat_jax.periodic_table import SYMBOLS, atomic_number


def composition(**counts: int) -> list[tuple[int, int]]:
    return [(atomic_number(symbol), count) for symbol, count in counts.items()]


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"Na": 1, "Cl": 1}, ""),
        ({"Sr": 1, "Ti": 1, "O": 3}, ""),
        ({"Sr": 4, "Ti": 4, "O": 12}, ""),  # counts are reduced
        ({"C": 7}, ""),  # one element
        ({"Og": 2}, ""),
        ({"Cu": 3, "Au": 1}, ""),  # metals
        ({"Na": 3, "F": 1}, "no_neutral_combination"),
        ({"He": 1, "O": 1}, "no_oxidation_states"),
        ({"Og": 1, "O": 1}, "no_oxidation_states"),
        ({"Pm": 2, "O": 3}, "no_electronegativity"),
        ({"F": 1, "Kr": 1}, "no_neutral_combination"),
        ({"N": 1, "O": 1, "F": 2, "Mg": 1}, ""),
        ({"Cl": 1, "N": 1}, ""),
        ({"Au": 1, "H": 1, "Si": 1}, ""),
        ({"H": 2, "Cl": 1}, "pauling_test"),  # neutral only as H(-1) and Cl(+2)
    ],
)
def test_known_compositions(counts, reason):
    assert composition_reason(composition(**counts)) == reason


def cdvae_rule(counts: list[tuple[int, int]], states: dict[int, list[int]], enegs: dict[int, float | None]) -> bool:
    """The rule as CDVAE's code tries it: every combination, one after another."""
    for charges in itertools.product(*(states[z] for z, _ in counts)):
        if sum(charge * n for charge, (_, n) in zip(charges, counts, strict=True)) == 0 and all(
            enegs[a] is not None
            and enegs[b] is not None
            and not (p > 0 > q and enegs[a] >= enegs[b])
            and not (p < 0 < q and enegs[a] <= enegs[b])
            for (p, (a, _)), (q, (b, _)) in itertools.combinations(zip(charges, counts, strict=True), 2)
        ):
            return True
    return False


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(sorted(set(range(1, 104)) - {2, 10, 18})), min_size=2, max_size=5, unique=True),
    st.lists(st.integers(1, 6), min_size=5, max_size=5),
)
def test_border_search_equals_trying_all_combinations(numbers, counts):
    import smact

    chosen = list(zip(sorted(numbers), counts, strict=False))
    elements = {z: smact.Element(SYMBOLS[z]) for z in numbers}
    reason = composition_reason(chosen)
    if all(SYMBOLS[z] in smact.metals for z in numbers):
        assert reason == ""
        return
    states = {z: element.oxidation_states_smact14 or [] for z, element in elements.items()}
    divisor = math.gcd(*(count for _, count in chosen))
    expected = cdvae_rule(
        [(z, count // divisor) for z, count in chosen],
        states,
        {z: element.pauling_eneg for z, element in elements.items()},
    )
    assert (reason == "") == expected


@settings(max_examples=100)
@given(
    st.lists(st.integers(1, 103), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 8), min_size=4, max_size=4),
    st.sampled_from(["smact14", "icsd24"]),
)
def test_verdicts_equal_those_of_smact(numbers, counts, oxidation_states):
    from pymatgen.core import Composition
    from smact.screening import smact_validity

    chosen = list(zip(numbers, counts, strict=False))
    pymatgen_composition = Composition({SYMBOLS[z]: count for z, count in chosen})
    named = None if oxidation_states == "icsd24" else oxidation_states  # None: smact's default, ICSD 2024
    expected = smact_validity(pymatgen_composition, oxidation_states_set=named)
    assert (composition_reason(chosen, oxidation_states) == "") == expected


@pytest.mark.parametrize("anion", [8, 17])
def test_all_oxides_and_chlorides_equal_those_of_smact(anion):
    from pymatgen.core import Composition
    from smact.screening import smact_validity

    for z in set(range(1, 104)) - {anion}:
        for number, count in ((1, 1), (2, 1), (1, 2), (2, 3), (1, 3), (2, 5), (1, 4), (1, 5)):
            for oxidation_states in ("smact14", "icsd24"):
                named = None if oxidation_states == "icsd24" else oxidation_states
                chosen = Composition({SYMBOLS[z]: number, SYMBOLS[anion]: count})
                expected = smact_validity(chosen, oxidation_states_set=named)
                assert (composition_reason([(z, number), (anion, count)], oxidation_states) == "") == expected, chosen


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 118), st.integers(1, 30)), min_size=1, max_size=12, unique_by=lambda x: x[0]))
def test_any_composition_gets_a_verdict(chosen):
    known = {"", "no_oxidation_states", "no_neutral_combination", "no_electronegativity", "pauling_test"}
    for oxidation_states in ("smact14", "icsd24"):
        assert composition_reason(chosen, oxidation_states) in known
    doubled = [(z, 2 * count) for z, count in reversed(chosen)]
    assert composition_reason(chosen) == composition_reason(doubled)


def test_unknown_set_of_oxidation_states_is_refused():
    with pytest.raises(ValueError, match="'smact15'"):
        composition_reason([(1, 1)], "smact15")


def test_share_of_valid_compositions_of_mp_20():
    rows = [composition_reason(reduced_composition(crystal)) for crystal in load("mp_20/val", 3000)]
    assert np.mean([not row for row in rows]) == pytest.approx(0.905, abs=0.015)
