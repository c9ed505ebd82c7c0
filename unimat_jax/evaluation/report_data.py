"""What report.html shows, and its compact form: rounded numbers, columns, each reference crystal once."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.report_histograms import histogram, plain
from unimat_jax.periodic_table import ATOMIC_NUMBERS, MAX_ATOMIC_NUMBER, SYMBOLS, covalent_radii

MAX_ATOMS = 60_000
"""The page carries no more atoms than these, some 1 MB, whatever the number of structures."""


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """One line of the headline table.

    ours: None where undefined. unit: "%" for a share, whose numbers are given in 0..1 and shown in per cent; anything
    else is printed as it is ("g/cm3", ""). n: the denominator or number of values; failures: how many of them could not
    be judged. comparison: the same metric of others by their name, None for what they do not report.
    """

    name: str
    ours: float | None
    interval: tuple[float, float] | None = None
    unit: str = ""
    definition: str = ""
    n: int = 0
    failures: int = 0
    comparison: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    rows: one dictionary a structure, any keys: each becomes a column. `uid` names the row; where there is a
    `unique_cluster` and no `unique`, the first row of each cluster is the unique one. generated: the crystals in the
    order of rows, None where there is none (empty: no structures to show). nearest: the reference structure to show
    beside a row, by the row's uid. reference: the crystals whose elements are compared. histograms: title -> series
    name ("generated", "reference", ...) -> values; floats are binned, whole numbers and texts counted one by one.
    failures: number of structures by reason. files: name -> what it holds, of the machine-readable results.
    """

    title: str
    protocol: str
    created: str
    headline: Sequence[MetricRow] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    generated: Sequence[Crystal | None] = ()
    nearest: Mapping[str, Crystal] = dataclasses.field(default_factory=dict)
    reference: Sequence[Crystal] = ()
    histograms: Mapping[str, Mapping[str, Sequence[Any]]] = dataclasses.field(default_factory=dict)
    failures: Mapping[str, int] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def payload(data: ReportData, max_structures: int) -> dict[str, Any]:
    """The page's data, ready for JSON. Raises ValueError where `generated` and `rows` differ in length."""
    if data.generated and len(data.generated) != len(data.rows):
        raise ValueError(f"{len(data.generated)} generated crystals for {len(data.rows)} rows: give one each, or None")
    crystals, generated, nearest = _structures(data, max_structures)
    shown = {int(z) for crystal in crystals for z in crystal["z"]}
    return {
        "title": data.title,
        "protocol": data.protocol,
        "created": data.created,
        "headline": [{key: plain(value) for key, value in vars(row).items()} for row in data.headline],
        "columns": [_column(name, values) for name, values in _columns(data.rows).items()],
        "num_rows": len(data.rows),
        "crystals": crystals,
        "generated": generated,
        "nearest": nearest,
        "atoms": {z: _look(z) for z in sorted(shown)},
        "histograms": [histogram(title, series) for title, series in data.histograms.items()],
        "elements": _elements(data),
        "failures": [[reason, int(n)] for reason, n in Counter(data.failures).most_common()],
        "files": dict(data.files),
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Every key of any row in order of first appearance, with a value or None for each row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [plain(row.get(name)) for row in rows] for name in names}
    if "unique_cluster" in columns and "unique" not in columns:
        seen: set[Any] = set()
        first = []
        for cluster in map(str, columns["unique_cluster"]):
            first.append(cluster != "None" and cluster not in seen)
            seen.add(cluster)
        columns["unique"] = first
    return columns


def _column(name: str, values: list[Any]) -> dict[str, Any]:
    """kind: "flag", "number" or "text"; repeated texts as `codes` into `texts`, everything else as `values`."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, bool) for value in present):
        return {"name": name, "kind": "flag", "values": [None if v is None else int(v) for v in values]}
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        return {"name": name, "kind": "number", "values": values}
    texts = [None if v is None else _joined(v) or None for v in values]
    different = list(dict.fromkeys(text for text in texts if text is not None))
    if len(different) > len(texts) / 2:
        return {"name": name, "kind": "text", "values": texts}
    place = {text: i for i, text in enumerate(different)}
    return {"name": name, "kind": "text", "texts": different, "codes": [-1 if t is None else place[t] for t in texts]}


def _joined(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_joined, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_joined(item)}" for key, item in value.items())
    return str(value)


def _structures(data: ReportData, limit: int) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """Crystals, and for every row the places of its own and of its nearest: -1 where there is none, -2 where the page
    does not carry it.

    Rows get theirs in order, until `limit` structures or `MAX_ATOMS` atoms.
    """
    crystals: list[dict[str, Any]] = []
    known: dict[int, int] = {}
    generated, nearest = [-1] * len(data.rows), [-1] * len(data.rows)
    atoms = carried = 0
    for i, crystal in enumerate(data.generated):
        if crystal is None or not drawable(crystal):
            continue
        other = data.nearest.get(str(data.rows[i].get("uid", "")))
        other = other if other is not None and drawable(other) else None
        new = [c for c in (crystal, other) if c is not None and id(c) not in known]
        atoms += sum(c.num_atoms for c in new)
        if carried == limit or atoms > MAX_ATOMS:  # then no later, smaller one is carried either
            generated[i] = -2
            continue
        carried += 1
        for c in new:
            known[id(c)] = len(crystals)
            crystals.append(_encode(c))
        generated[i] = known[id(crystal)]
        nearest[i] = -1 if other is None else known[id(other)]
    return crystals, generated, nearest


def drawable(crystal: Crystal) -> bool:
    """Whether all numbers are finite and the cell spans a volume: only then can a crystal be drawn."""
    finite = np.isfinite(crystal.frac_coords).all() and np.isfinite(crystal.lattice).all()
    return bool(finite) and crystal.volume > 0


def _encode(crystal: Crystal) -> dict[str, Any]:
    """cell: a, b, c (A), alpha, beta, gamma (degrees); z; frac: coordinates in 0..1 times 10,000, atom by atom."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen's, about elements without an electronegativity
        formula = crystal.formula
    frac = np.round(np.mod(crystal.frac_coords, 1.0) * 10_000).astype(int) % 10_000
    cell = np.concatenate([crystal.lengths, crystal.angles]).round(3)
    return {
        "uid": crystal.uid,
        "formula": formula,
        "cell": cell.tolist(),
        "z": crystal.atomic_numbers.tolist(),
        "frac": frac.ravel().tolist(),
    }


def _look(z: int) -> dict[str, Any]:
    """Symbol, covalent radius (A) and Jmol's colour of an element."""
    from ase.data.colors import jmol_colors

    color = jmol_colors[z] if z < len(jmol_colors) else jmol_colors[-1]
    radius = float(covalent_radii(np.array([z]))[0])
    return {
        "symbol": SYMBOLS[z],
        "radius": round(radius, 2),
        "color": "#" + "".join(f"{round(255 * c):02x}" for c in color),
    }


def _elements(data: ReportData) -> dict[str, Any]:
    """How many crystals of each side hold each element, by atomic number; the table's places as [z, row, column]."""

    def count(crystals: Sequence[Crystal | None]) -> dict[str, Any]:
        present = [crystal for crystal in crystals if crystal is not None]
        counts = np.zeros(MAX_ATOMIC_NUMBER + 1, int)
        for crystal in present:
            counts[np.unique(crystal.atomic_numbers)] += 1
        return {"n": len(present), "counts": counts.tolist()}

    places = [[int(ATOMIC_NUMBERS[row, column]), int(row), int(column)] for row, column in np.argwhere(ATOMIC_NUMBERS)]
    return {
        "places": [[SYMBOLS[z], z, row, column] for z, row, column in places],
        "generated": count(data.generated),
        "reference": count(data.reference),
    }
