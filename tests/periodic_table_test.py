import numpy as np
import pytest
from ase.data import chemical_symbols

from unimat_jax.periodic_table import ATOMIC_NUMBERS, COLUMN, ROW, SYMBOLS, Table, atomic_number


def test_every_element_has_its_own_cell_and_comes_back():
    cells = {(int(ROW[z]), int(COLUMN[z])) for z in range(1, 119)}
    assert len(cells) == 118
    assert [int(ATOMIC_NUMBERS[ROW[z], COLUMN[z]]) for z in range(1, 119)] == list(range(1, 119))
    assert np.count_nonzero(ATOMIC_NUMBERS) == 118


def test_symbols_are_those_of_ase():
    assert chemical_symbols[:119] == SYMBOLS
    assert all(atomic_number(SYMBOLS[z]) == z for z in range(1, 119))
    with pytest.raises(ValueError, match="'Qq'"):
        atomic_number("Qq")
    with pytest.raises(ValueError, match="'X'"):
        atomic_number("X")


def test_f_block_lies_in_rows_8_and_9_columns_3_to_17():
    # The issue counts from 1, arrays from 0.
    assert ATOMIC_NUMBERS[8 - 1, 3 - 1 : 17].tolist() == list(range(57, 72))
    assert ATOMIC_NUMBERS[9 - 1, 3 - 1 : 17].tolist() == list(range(89, 104))
    assert ATOMIC_NUMBERS[7:, [0, 1, 17]].tolist() == [[0, 0, 0]] * 2


def test_group_3_of_periods_6_and_7_is_empty():
    assert ATOMIC_NUMBERS[[5, 6], 2].tolist() == [0, 0]
    assert ATOMIC_NUMBERS[[3, 4], 2].tolist() == [21, 39]


def test_periods_and_groups_outside_the_f_block_are_iupac():
    from pymatgen.core import Element

    for z in range(1, 119):
        if not (57 <= z <= 71 or 89 <= z <= 103):
            element = Element.from_Z(z)
            assert (ROW[z] + 1, COLUMN[z] + 1) == (element.row, element.group), element


@pytest.mark.parametrize(
    ("elements", "shape"),
    [(["C"], (1, 1)), (["Sr", "Ti", "O"], (3, 3)), (["La", "O"], (2, 2)), ([1, 118], (2, 2)), (range(1, 119), (9, 18))],
)
def test_table_of_elements_is_the_smallest_that_holds_them(elements, shape):
    table = Table.of_elements(elements)
    assert table.shape == shape
    for element in elements:
        z = atomic_number(element) if isinstance(element, str) else element
        place = table.place_of[z]
        assert place >= 0
        assert table.atomic_numbers.ravel()[place] == z


def test_place_of_is_minus_one_outside_the_table():
    table = Table.of_elements(["C"])
    assert (table.place_of >= 0).sum() == 1
    assert (Table().place_of >= 0).sum() == 118
    two_groups = Table(columns=(0, 16))
    assert two_groups.shape == (9, 2)
    assert two_groups.place_of[9] >= 0  # F
    assert two_groups.place_of[8] == -1


@pytest.mark.parametrize("rows", [(), (1, 0), (0, 0), (0, 9), (-1, 0)])
def test_bad_rows_are_refused(rows):
    with pytest.raises(ValueError, match="table rows"):
        Table(rows=rows)


@pytest.mark.parametrize("elements", [[], [0], [119]])
def test_bad_elements_are_refused(elements):
    with pytest.raises(ValueError, match="elements"):
        Table.of_elements(elements)
