"""What to search for: the contents of cells, from formulas or from crystal files, each composition once."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.requests import parse_formula

Reduced = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Composition:
    """counts: atoms of each element (atomic number) in the cell; uid and crystal: of the known one that it was read
    from, "" and None where it was written as a formula."""

    formula: str
    counts: dict[int, int]
    uid: str = ""
    crystal: Crystal | None = None

    @property
    def reduced_formula(self) -> str:
        from pymatgen.core import Composition as Formula

        return Formula(self.formula).reduced_formula


def compositions(
    formulas: str | None,
    structures: str | None,
    *,
    not_in: Sequence[str] = (),
    number: int | None = None,
    seed: int = 0,
) -> list[Composition]:
    """Of formulas ("SrTiO3,Ti2O4") or of crystal files, the first cell of each reduced composition, without those that
    the crystal files `not_in` have; `number` of them, drawn by `seed`. Raises UserError."""
    if bool(formulas) == bool(structures):
        raise UserError("give --formula or --compositions_from, one of them")
    if formulas:
        found = [Composition(text.strip(), parse_formula(text.strip())) for text in formulas.split(",")]
    else:
        crystals = _crystals([str(structures)])
        found = [Composition(c.formula, _counts(c), c.uid, c) for c in crystals]
    taken = {reduced(_counts(crystal)) for crystal in _crystals(not_in)} if not_in else set()
    unique: dict[Reduced, Composition] = {}
    for composition in found:
        key = reduced(composition.counts)
        if key not in taken:
            unique.setdefault(key, composition)
    kept = list(unique.values())
    if number is not None and not 0 < number <= len(kept):
        raise UserError(f"--num_compositions={number}: there are {len(kept)} to draw from")
    if not kept:
        raise UserError(f"--not_in: all compositions of the {len(found)} structures are in it")
    return kept if number is None or number == len(kept) else random.Random(seed).sample(kept, number)


def reduced(counts: Mapping[int, int]) -> Reduced:
    """(atomic number, atoms) of the smallest formula with the same ratios."""
    unit = math.gcd(*counts.values())
    return tuple(sorted((z, n // unit) for z, n in counts.items()))


def _crystals(paths: Sequence[str]) -> list[Crystal]:
    found = [dataclasses.replace(e.crystal, uid=e.uid) for e in read_entries(list(paths)) if e.crystal is not None]
    if not found:
        raise UserError(f"{', '.join(paths)}: no structure could be read")
    return found


def _counts(crystal: Crystal) -> dict[int, int]:
    return dict(sorted(Counter(crystal.atomic_numbers.tolist()).items()))
