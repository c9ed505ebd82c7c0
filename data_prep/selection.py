"""What of the parsed structures is kept, in which split, with which property columns; every drop has a reason."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.datasets import Column, DataSet, feature_name
from data_prep.parse_pool import Outcome
from data_prep.splits import reduced_formula, split_of_hash
from data_prep.statistics import Statistics
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import ATOMIC_NUMBERS, SYMBOLS

DROPPED = 255
_SPLIT_INDEX = {"train": 0, "validation": 1, "test": 2}
_FUNCTIONAL_COLUMNS = {"functional", "xc", "xc_functional", "dft_functional", "run_type", "calc_type"}
_ENERGY = re.compile(r"energy|e_form|e_hull|ehull|e_above|heat_|enthalpy|toten|decomposition", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Filters:
    """None keeps everything. elements: the allowed symbols."""

    max_atoms: int | None = None
    max_atoms_per_element: int | None = None
    elements: frozenset[str] | None = None

    def reason(self, slots) -> tuple[str, str]:
        """("", "") or the reason and what is wrong."""
        if self.max_atoms is not None and len(slots) > self.max_atoms:
            return "too_many_atoms", f"{len(slots)} atoms, --max_atoms={self.max_atoms}"
        most = int(slots[:, 0].max()) + 1
        if self.max_atoms_per_element is not None and most > self.max_atoms_per_element:
            return (
                "too_many_of_element",
                f"{most} atoms of one element, --max_atoms_per_element={self.max_atoms_per_element}",
            )
        if self.elements is not None:
            outside = sorted({SYMBOLS[z] for z in ATOMIC_NUMBERS[slots[:, 1], slots[:, 2]]} - self.elements)
            if outside:
                return "element_not_allowed", f"{', '.join(outside)} not in --elements"
        return "", ""


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """How crystals without a split of their own get one: `ids` if given, else a hash of the id or the formula."""

    ids: Mapping[str, int] | None = None
    by: str = "id"
    fractions: tuple[float, ...] = (0.9, 0.05, 0.05)
    seed: int = 0

    def split(self, outcome: Outcome) -> int | None:
        if outcome.split:
            return _SPLIT_INDEX[outcome.split]
        if self.ids is not None:
            return self.ids.get(outcome.uid)
        assert outcome.record is not None
        key = outcome.uid if self.by == "id" else reduced_formula(outcome.record["slots"])
        return split_of_hash(key, self.fractions, self.seed)


@dataclasses.dataclass
class Selection:
    """The decision on every entry of the spool. split_of: index in builders.SPLITS, or DROPPED."""

    split_of: bytearray
    dropped: dict[str, list[dict[str, str]]]
    changed: Counter[str]
    columns: dict[str, Column]
    unused_columns: dict[str, str]
    statistics: Statistics
    kept_of_split: Counter[int]
    ids_not_found: list[str]


def select(
    outcomes: Iterable[Outcome],
    filters: Filters,
    rule: SplitRule,
    dataset: DataSet,
    declared: Mapping[str, Column],
    ignored: Iterable[str],
    added: Iterable[str] = (),
) -> Selection:
    """Reads the outcomes once. declared: columns described by the user; ignored: columns to leave out; added: columns
    that the user joined. UserErrors: mixed functionals, a declared column that does not exist."""
    split_of = bytearray()
    dropped: dict[str, list[dict[str, str]]] = defaultdict(list)
    changed: Counter[str] = Counter()
    statistics, everything = Statistics(), Statistics()
    seen: dict[str, str] = {}
    numeric: Counter[str] = Counter()
    textual: Counter[str] = Counter()
    functionals: dict[str, Counter[str]] = defaultdict(Counter)
    kept: Counter[int] = Counter()
    for outcome in outcomes:
        reason, message, split = outcome.reason, outcome.message, None
        if outcome.record is not None:
            reason, message = filters.reason(outcome.record["slots"])
            if not reason and outcome.uid in seen:
                reason, message = "duplicate_id", f"the id stands at {seen[outcome.uid]} already: the first is kept"
            if not reason and (split := rule.split(outcome)) is None:
                reason, message = "not_in_split_ids", "the file of split ids does not name it"
        split_of.append(DROPPED if split is None or reason else split)
        if reason or split is None:
            dropped[reason].append({"id": outcome.uid, "origin": outcome.origin, "message": message})
            continue
        assert outcome.record is not None
        seen[outcome.uid] = outcome.origin
        kept[split] += 1
        changed.update(outcome.changes)
        numeric.update(name for name, value in outcome.properties.items() if math.isfinite(value))
        textual.update(outcome.texts.keys())
        for name in outcome.texts.keys() & _FUNCTIONAL_COLUMNS:
            functionals[name][outcome.texts[name]] += 1
        properties = {feature_name(name): value for name, value in outcome.properties.items()}
        everything.add(outcome.record, properties)
        if split == 0:
            statistics.add(outcome.record, properties)
    columns, unused = _columns(dataset, declared, set(ignored), set(added), numeric, textual, functionals)
    for name in columns:
        source = [n for n in textual if feature_name(n) == name]
        if source:
            changed[f"text_instead_of_number_in_{name}"] = sum(textual[n] for n in source)
    not_found = sorted(rule.ids.keys() - seen.keys()) if rule.ids is not None else []
    chosen = statistics if kept[0] else everything
    return Selection(split_of, dict(dropped), changed, columns, unused, chosen, kept, not_found)


def _columns(
    dataset: DataSet,
    declared: Mapping[str, Column],
    ignored: set[str],
    added: set[str],
    numeric: Counter[str],
    textual: Counter[str],
    functionals: Mapping[str, Counter[str]],
) -> tuple[dict[str, Column], dict[str, str]]:
    """The property columns by feature name, and why each other column is none."""
    for flag, names in (("--property", declared.keys()), ("--ignore_property", ignored)):
        for name in names:
            if name not in numeric and name not in textual:
                have = ", ".join(sorted(numeric)) or "none"
                raise UserError(f"{flag}={name}: no such column (numeric columns: {have})")
            if flag == "--property" and numeric[name] == 0:
                raise UserError(f"--property={name}: the column holds text, not numbers")
    columns, unused = {}, {}
    for name in sorted(numeric.keys() | textual.keys()):
        if name in ignored:
            unused[name] = "left out by --ignore_property"
        elif textual[name] >= max(numeric[name], 1):
            unused[name] = "text"
        elif dataset.columns is not None and name not in dataset.columns.keys() | declared.keys() | added:
            unused[name] = "not a property of this data set"
        else:
            known = (dataset.columns or {}).get(name, Column())
            columns[name] = declared.get(name, known)
    if dataset.columns is None:
        columns = {name: _with_functional(name, c, name in declared, functionals) for name, c in columns.items()}
    renamed = {feature_name(name): column for name, column in columns.items()}
    if len(renamed) < len(columns):
        raise UserError(f"columns {sorted(columns)} have the same name once written as words: rename one")
    return renamed, unused


def _with_functional(name: str, column: Column, declared: bool, functionals: Mapping[str, Counter[str]]) -> Column:
    """An energy's functional from a column such as run_type; UserError where that column holds several."""
    if not _ENERGY.search(name) or (declared and column.functional):
        return column
    for beside, values in functionals.items():
        if len(values) > 1:
            found = ", ".join(f"{value} ({count})" for value, count in values.most_common())
            raise UserError(
                f"mixed functionals: column {name!r} is an energy and column {beside!r} holds {found}: keep one "
                f"of them in the source, or say what it is with --property={name}:UNIT:FUNCTIONAL[:CORRECTION], or "
                f"leave it out with --ignore_property={name}"
            )
        return dataclasses.replace(column, functional=next(iter(values)))
    return dataclasses.replace(column, functional="unknown")


def counts(selection: Selection) -> dict[str, Any]:
    """Counts of read, kept and dropped, which add up."""
    return {
        "read": len(selection.split_of),
        "kept": sum(selection.kept_of_split.values()),
        "dropped": {reason: len(items) for reason, items in sorted(selection.dropped.items())},
    }
