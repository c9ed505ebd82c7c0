"""The 9 x 18 periodic table of the UniMat tensor (paper, section 2.1): atomic number <-> (row, column).

Rows 0-6 are periods 1-7; row 7 holds La-Lu (57-71) and row 8 Ac-Lr (89-103), both in columns 2-16, so that group 3
of periods 6 and 7 is empty. The paper gives H = 9 and not the place of the f block: checkpoints freeze this choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

NUM_PERIODS = 9
NUM_GROUPS = 18
MAX_ATOMIC_NUMBER = 118
_UNKNOWN_RADIUS = 1.5

# One line a period; "." is a place without an element.
_LAYOUT = """
H  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  He
Li Be .  .  .  .  .  .  .  .  .  .  B  C  N  O  F  Ne
Na Mg .  .  .  .  .  .  .  .  .  .  Al Si P  S  Cl Ar
K  Ca Sc Ti V  Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
Rb Sr Y  Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I  Xe
Cs Ba .  Hf Ta W  Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn
Fr Ra .  Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
.  .  La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu .
.  .  Ac Th Pa U  Np Pu Am Cm Bk Cf Es Fm Md No Lr .
"""
# The order in which atomic numbers run through the rows above: the f block comes before group 4.
_SEGMENTS = [
    *((row, 0, NUM_GROUPS) for row in range(5)),
    *((5, 0, 2), (7, 2, 17), (5, 3, NUM_GROUPS)),
    *((6, 0, 2), (8, 2, 17), (6, 3, NUM_GROUPS)),
]


def _build() -> tuple[np.ndarray, list[str]]:
    layout = [line.split() for line in _LAYOUT.strip().splitlines()]
    atomic_numbers = np.zeros((NUM_PERIODS, NUM_GROUPS), np.int32)
    symbols = ["X"]
    for row, start, stop in _SEGMENTS:
        for column in range(start, stop):
            if layout[row][column] != ".":
                atomic_numbers[row, column] = len(symbols)
                symbols.append(layout[row][column])
    return atomic_numbers, symbols


ATOMIC_NUMBERS, SYMBOLS = _build()
"""Atomic number at each place [9, 18], 0 where there is no element; symbol of each atomic number (index 0 is "X")."""

ROW, COLUMN = np.full((2, MAX_ATOMIC_NUMBER + 1), -1, np.int32)
"""Row and column of each atomic number, -1 at index 0."""
for _row, _column in np.argwhere(ATOMIC_NUMBERS):
    ROW[ATOMIC_NUMBERS[_row, _column]], COLUMN[ATOMIC_NUMBERS[_row, _column]] = _row, _column

_NUMBER_OF = {symbol: number for number, symbol in enumerate(SYMBOLS) if number}


def atomic_number(symbol: str) -> int:
    """Atomic number of a chemical symbol. Raises ValueError for anything that is not one of the 118 elements."""
    if symbol not in _NUMBER_OF:
        raise ValueError(f"{symbol!r} is not a chemical element: write symbols as in 'Sr', 'Ti', 'O'")
    return _NUMBER_OF[symbol]


def covalent_radii(atomic_numbers: np.ndarray) -> np.ndarray:
    """Angstrom, Cordero et al. 2008 (doi:10.1039/b801115j) as ase has them; 1.5 for elements without one (Z > 96), and
    at 0, where there is no element."""
    from ase.data import covalent_radii as known

    values = np.full(MAX_ATOMIC_NUMBER + 1, _UNKNOWN_RADIUS)
    values[1:97] = known[1:97]
    return values[atomic_numbers]


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows and columns of the periodic table that a tensor keeps (paper, section 2.1: "H = W = 1 for one element").

    `rows` and `columns` index the full 9 x 18 table, ascending. The default keeps everything.
    """

    rows: tuple[int, ...] = tuple(range(NUM_PERIODS))
    columns: tuple[int, ...] = tuple(range(NUM_GROUPS))

    def __post_init__(self):
        for name, values, size in (("rows", self.rows, NUM_PERIODS), ("columns", self.columns, NUM_GROUPS)):
            if not values or list(values) != sorted(set(values)) or values[0] < 0 or values[-1] >= size:
                raise ValueError(f"table {name} = {values}: give ascending, distinct numbers from 0 to {size - 1}")

    @classmethod
    def of_elements(cls, elements: Iterable[int | str]) -> Table:
        """The smallest table with a place for each given element (atomic numbers or symbols)."""
        numbers = [atomic_number(e) if isinstance(e, str) else int(e) for e in elements]
        if not numbers or min(numbers) < 1 or max(numbers) > MAX_ATOMIC_NUMBER:
            raise ValueError(f"elements = {list(elements)}: give at least one, atomic numbers 1 to {MAX_ATOMIC_NUMBER}")
        return cls(
            tuple(sorted({int(ROW[z]) for z in numbers})),
            tuple(sorted({int(COLUMN[z]) for z in numbers})),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return len(self.rows), len(self.columns)

    @property
    def atomic_numbers(self) -> np.ndarray:
        """Atomic number at each kept place [H, W], 0 where there is no element."""
        return ATOMIC_NUMBERS[np.ix_(self.rows, self.columns)]

    @property
    def place_of(self) -> np.ndarray:
        """Flat place row * W + column in this table of each atomic number [119], -1 for elements outside it."""
        places = np.full(MAX_ATOMIC_NUMBER + 1, -1, np.int32)
        numbers = self.atomic_numbers.ravel()
        places[numbers[numbers > 0]] = np.flatnonzero(numbers)
        return places
