"""What to generate: formulas, chemical systems, elements or nothing, as one request per sample."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import SYMBOLS, atomic_number
from unimat_jax.representation import UniMatSpec
from unimat_jax.structure_files import read_structures


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample's condition. `counts`: atoms of each element, exact; `elements`: atomic numbers; `kind`: "formula",
    "chemical_system" (all of the elements and no other), "elements" (any of them), "contains" (all of them, and perhaps
    others) or "none"; `label` as asked. `num_atoms`: the numbers of atoms in the cell that may be, None: any.

    A model of compositions turns all kinds into `counts`.
    """

    kind: str
    label: str = ""
    counts: Mapping[int, int] = dataclasses.field(default_factory=dict)
    elements: tuple[int, ...] = ()
    reference_uid: str = ""
    num_atoms: range | None = None

    @property
    def size_label(self) -> str:
        """ "", "5" or "2-8"."""
        if self.num_atoms is None:
            return ""
        return f"{self.num_atoms[0]}" + (f"-{self.num_atoms[-1]}" if len(self.num_atoms) > 1 else "")

    @property
    def asked(self) -> str:
        """As it stands on a command line, "" where nothing is asked."""
        flags = [(self.kind, self.label), ("num_atoms", self.size_label)]
        return " ".join(f"--{name}={value}" for name, value in flags if value)

    def to_json(self) -> dict[str, Any]:
        """The condition as it stands in the manifest."""
        if self.kind == "formula":
            return {"formula": self.label, "atoms": {SYMBOLS[z]: n for z, n in self.counts.items()}}
        asked = {} if self.kind == "none" else {self.kind: self.label}
        return asked | ({"num_atoms": self.size_label} if self.num_atoms else {})


def parse_formula(formula: str) -> dict[int, int]:
    """Atoms of each element (atomic number) of a formula like "SrTiO3" or "Ca(OH)2". Raises UserError."""
    if not formula:
        raise UserError("--formula=: empty, perhaps by a comma too many; write it as in SrTiO3, Ca(OH)2")
    position, stack = 0, [Counter()]
    for token in re.finditer(r"([A-Z][a-z]?)(\d*)|(\()|(\))(\d*)", formula):
        if token.start() != position:
            break
        position = token.end()
        symbol, count, opened, closed, factor = token.groups()
        if symbol:
            try:
                stack[-1][atomic_number(symbol)] += int(count or 1)
            except ValueError as error:
                raise UserError(f"--formula={formula}: {error}") from error
        elif opened:
            stack.append(Counter())
        elif closed and len(stack) > 1:
            group = stack.pop()
            stack[-1].update({z: n * int(factor or 1) for z, n in group.items()})
        else:
            break
    else:
        counts = {z: n for z, n in stack[0].items() if n}
        if position == len(formula) and len(stack) == 1 and counts:
            return counts
    at = repr(formula[position:]) if formula[position:] else "its end"
    raise UserError(f"--formula={formula}: not understood at {at}; write it with whole numbers, as in SrTiO3, Ca(OH)2")


def parse_range(text: str, flag: str) -> range:
    """Numbers from "2" or "1-4". Raises UserError."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"--{flag}={text}: write a number or a range, as in 2 or 1-4")
    return range(low, high + 1)


def parse_elements(text: str, flag: str) -> tuple[int, ...]:
    """Atomic numbers from "Sr-Ti-O" or "Sr,Ti,O". Raises UserError."""
    try:
        found = [atomic_number(part.strip()) for part in re.split(r"[-,]", text)]
    except ValueError as error:
        raise UserError(f"--{flag}={text}: {error}") from error
    return tuple(sorted(set(found)))


def formula_requests(
    formulas: Sequence[str], units: range, num_samples: int, seed: int, spec: UniMatSpec
) -> list[Request]:
    """Sample i takes formula i modulo their number; its formula units are drawn from (seed, i)."""
    parsed = [parse_formula(formula) for formula in formulas]
    for formula, counts in zip(formulas, parsed, strict=True):
        check_fits({z: n * units[-1] for z, n in counts.items()}, spec, f"{formula} x {units[-1]}")
    requests = []
    for i in range(num_samples):
        number = units[int(np.random.default_rng([seed, i]).integers(len(units)))]
        counts = {z: n * number for z, n in parsed[i % len(parsed)].items()}
        requests.append(Request("formula", formulas[i % len(parsed)], counts))
    return requests


def element_requests(
    kind: str, text: str, num_samples: int, spec: UniMatSpec, num_atoms: range | None = None
) -> list[Request]:
    elements = parse_elements(text, kind)
    check_fits(dict.fromkeys(elements, 1), spec, text)
    return [Request(kind, text, elements=elements, num_atoms=num_atoms)] * num_samples


def file_requests(path: str, per_composition: int, limit: int | None, spec: UniMatSpec) -> list[Request]:
    """One request for each structure of crystal files, times `per_composition`; at most `limit` in all. What cannot be
    read, and what the model cannot hold, is told and left out. Raises UserError where nothing is left."""
    requests, skipped = [], []
    for found in read_structures(path):
        if limit is not None and len(requests) >= limit:
            break
        if not isinstance(found, Crystal):
            skipped.append(f"{found.uid}: {found.reason}")
            continue
        counts = Counter(found.atomic_numbers.tolist())
        try:
            check_fits(counts, spec, found.uid)
        except UserError as error:
            skipped.append(str(error))
            continue
        requests += [Request("formula", found.formula, counts, reference_uid=found.uid)] * per_composition
    if not requests:
        first = f"; the first of {len(skipped)} left out: {skipped[0]}" if skipped else ""
        raise UserError(f"--compositions_from={path}: no structure that the model could make{first}")
    for reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)
    if skipped:
        print(f"--compositions_from={path}: {len(skipped)} structures skipped", file=sys.stderr)
    return requests[:limit]


def check_fits(counts: Mapping[int, int], spec: UniMatSpec, label: str) -> None:
    """Raises UserError for an element outside the model's table or more atoms of one element than L."""
    places = spec.table.place_of
    outside = [SYMBOLS[z] for z in counts if places[z] < 0]
    if outside:
        known = [SYMBOLS[z] for z in spec.table.atomic_numbers.ravel() if z]
        shown = ", ".join(known) if len(known) < 40 else f"{len(known)} elements, see its model.json"
        raise UserError(f"{label}: {', '.join(outside)} is outside the model's table, which holds {shown}")
    for z, number in counts.items():
        if number > spec.max_atoms_per_element:
            raise UserError(
                f"{label}: {number} atoms of {SYMBOLS[z]}, but the model holds at most L = {spec.max_atoms_per_element}"
                " of an element; ask for fewer formula units, or train with a larger config.data.max_atoms_per_element"
            )


def count_table(request: Request, spec: UniMatSpec) -> np.ndarray:
    """Atoms asked at each place [H, W], int."""
    return _fill(request.counts, spec)


def counts_of_table(table: np.ndarray, spec: UniMatSpec) -> dict[int, int]:
    """Atoms of each element (atomic number) of a table of counts [H, W]."""
    there = table > 0
    return dict(zip(spec.table.atomic_numbers[there].tolist(), table[there].tolist(), strict=True))


def element_table(request: Request, spec: UniMatSpec) -> np.ndarray:
    """1 at the place [H, W] of each element of the request."""
    return np.minimum(_fill(request.counts or dict.fromkeys(request.elements, 1), spec), 1)


def _fill(counts: Mapping[int, int], spec: UniMatSpec) -> np.ndarray:
    table = np.zeros(int(np.prod(spec.table.shape)), int)
    for z, number in counts.items():
        table[spec.table.place_of[z]] = number
    return table.reshape(spec.table.shape)
