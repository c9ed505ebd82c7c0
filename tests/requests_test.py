"""What can be asked of `unimat generate`, and what is said of the rest."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimat_jax.errors import UserError
from unimat_jax.periodic_table import SYMBOLS, Table, atomic_number
from unimat_jax.representation import UniMatSpec
from unimat_jax.requests import (
    Request,
    check_fits,
    count_table,
    counts_of_table,
    element_requests,
    element_table,
    formula_requests,
    parse_elements,
    parse_formula,
    parse_range,
)

SPEC = UniMatSpec(max_atoms_per_element=6, max_atoms=20, table=Table.of_elements(["Sr", "Ti", "O", "Ba", "Ca", "H"]))


def by_symbol(counts):
    return {SYMBOLS[z]: n for z, n in counts.items()}


@pytest.mark.parametrize(
    ("formula", "atoms"),
    [
        ("SrTiO3", {"Sr": 1, "Ti": 1, "O": 3}),
        ("Ca(OH)2", {"Ca": 1, "O": 2, "H": 2}),
        ("OO2", {"O": 3}),
        ("CO", {"C": 1, "O": 1}),
        ("Co", {"Co": 1}),
        ("Al2(SO4)3", {"Al": 2, "S": 3, "O": 12}),
        ("K4(Fe(CN)6)(H2O)3", {"K": 4, "Fe": 1, "C": 6, "N": 6, "H": 6, "O": 3}),
        ("Si12", {"Si": 12}),
        ("(NaCl)", {"Na": 1, "Cl": 1}),
        ("LiC0O2", {"Li": 1, "O": 2}),
    ],
)
def test_formulas(formula, atoms):
    assert by_symbol(parse_formula(formula)) == atoms


@pytest.mark.parametrize(
    ("formula", "named"),
    [
        ("", "empty"),
        ("srtio3", "srtio3"),
        ("Sr Ti", "' Ti'"),
        ("SrTiO3-", "'-'"),
        ("Na0.5Cl", "'.5Cl'"),
        ("Ca(OH", "its end"),
        ("Ca)OH", "'OH'"),
        ("Xx2", "'Xx' is not a chemical element"),
        ("Na0", "its end"),
        ("()", "its end"),
        ("Na2^+", re.escape("'^+'")),
    ],
)
def test_formulas_that_do_not_parse_say_where(formula, named):
    with pytest.raises(UserError, match=rf"--formula={re.escape(formula)}: .*({named})"):
        parse_formula(formula)


@given(st.dictionaries(st.sampled_from(SYMBOLS[1:]), st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 4))
def test_what_is_written_is_read(atoms, factor):
    body = "".join(f"{symbol}{number if number > 1 else ''}" for symbol, number in atoms.items())
    assert by_symbol(parse_formula(body)) == atoms
    assert by_symbol(parse_formula(f"({body}){factor}")) == {s: n * factor for s, n in atoms.items()}


def test_units():
    assert list(parse_range("2", "num_formula_units")) == [2] and list(parse_range(" 1-4 ", "num_atoms")) == [
        1,
        2,
        3,
        4,
    ]
    for bad in ("0", "3-1", "0-2", "a", "1-", "-1", "1.5", ""):
        with pytest.raises(UserError, match=rf"--num_atoms={bad}: write a number or a range"):
            parse_range(bad, "num_atoms")


def test_elements():
    assert parse_elements("Sr-Ti-O", "x") == parse_elements("O, Ti,Sr", "x") == (8, 22, 38)
    assert parse_elements("O,O", "x") == (8,)
    with pytest.raises(UserError, match=r"--chemical_system=Sr-Tio: 'Tio' is not a chemical element"):
        parse_elements("Sr-Tio", "chemical_system")


def test_sample_i_takes_formula_i_modulo_their_number():
    requests = formula_requests(["SrTiO3", "BaO", "CaO"], range(1, 2), 8, 0, SPEC)
    assert [r.label for r in requests] == ["SrTiO3", "BaO", "CaO"] * 2 + ["SrTiO3", "BaO"]
    assert by_symbol(requests[3].counts) == {"Sr": 1, "Ti": 1, "O": 3}
    assert requests[1].to_json() == {"formula": "BaO", "atoms": {"Ba": 1, "O": 1}}


def test_formula_units_are_drawn_by_seed_and_number_alone():
    draw = lambda number, seed: [r.counts[8] for r in formula_requests(["CaO"], range(2, 6), number, seed, SPEC)]  # noqa: E731
    assert draw(60, 1)[:20] == draw(20, 1) != draw(20, 2)
    assert set(Counter(draw(400, 0))) == {2, 3, 4, 5} and min(Counter(draw(400, 0)).values()) > 60


def test_what_the_model_cannot_hold():
    with pytest.raises(UserError, match=r"NaCl x 1: Na, Cl is outside the model's table, which holds .*Sr"):
        formula_requests(["SrTiO3", "NaCl"], range(1, 2), 1, 0, SPEC)
    with pytest.raises(UserError, match=r"SrTiO3 x 3: 9 atoms of O, but the model holds at most L = 6 of an element"):
        formula_requests(["SrTiO3"], range(1, 4), 1, 0, SPEC)
    with pytest.raises(UserError, match="Sr-Na: Na is outside"):
        element_requests("chemical_system", "Sr-Na", 1, SPEC)
    check_fits({8: 6}, SPEC, "O6")
    whole = UniMatSpec(max_atoms_per_element=1, max_atoms=9, table=Table(rows=(0, 1, 2, 3, 4)))
    with pytest.raises(
        UserError, match=r"Cs: Cs is outside the model's table, which holds 54 elements, see its model.json"
    ):
        check_fits({55: 1}, whole, "Cs")


def test_tables_of_a_request():
    request = Request("formula", "SrTiO3", parse_formula("SrTiO3"))
    numbers = SPEC.table.atomic_numbers
    counts = count_table(request, SPEC)
    assert counts.sum() == 5 and {SYMBOLS[z]: int(counts[numbers == z][0]) for z in (8, 22, 38)} == {
        "O": 3,
        "Ti": 1,
        "Sr": 1,
    }
    np.testing.assert_array_equal(element_table(request, SPEC), counts > 0)
    (system,) = element_requests("chemical_system", "Ca-O", 1, SPEC)
    assert sorted(numbers[element_table(system, SPEC) > 0]) == [8, 20] and not count_table(system, SPEC).any()
    assert system.to_json() == {"chemical_system": "Ca-O"} and system.elements == (8, 20)
    (salt,) = element_requests("contains", "O", 1, SPEC, range(2, 9))
    assert salt.to_json() == {"contains": "O", "num_atoms": "2-8"} and salt.asked == "--contains=O --num_atoms=2-8"
    assert counts_of_table(counts, SPEC) == request.counts
    assert Request("none").to_json() == {} and not element_table(Request("none"), SPEC).any()
    assert atomic_number("Ca") == 20
