"""What of the parsed structures is kept, in which split, with which property columns; every drop has a reason."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.datasets import Column, DataSet, feature_name
from data_prep.outcome import Outcome
from data_prep.splits import reduced_formula, split_of_hash
from data_prep.statistics import Statistics
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import ATOMIC_NUMBERS, SYMBOLS

NUM_SHOWN = 5
"""Dropped structures of each reason that the report names; all are in dropped.jsonl."""
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
class Summary:
    """What has to be known of the parsed structures of a part; that of all parts is merged in their order."""

    read: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    first_dropped: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    changed: Counter[str] = dataclasses.field(default_factory=Counter)
    numeric: Counter[str] = dataclasses.field(default_factory=Counter)
    textual: Counter[str] = dataclasses.field(default_factory=Counter)
    functionals: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    kept_of_split: Counter[int] = dataclasses.field(default_factory=Counter)
    statistics: tuple[Statistics, ...] = dataclasses.field(
        default_factory=lambda: tuple(Statistics() for _ in range(3))
    )

    def keep(self, outcome: Outcome, split: int) -> None:
        assert outcome.record is not None
        self.read += 1
        self.kept_of_split[split] += 1
        self.changed.update(outcome.changes)
        self.numeric.update(name for name, value in outcome.properties.items() if math.isfinite(value))
        self.textual.update(outcome.texts.keys())
        for name in outcome.texts.keys() & _FUNCTIONAL_COLUMNS:
            self.functionals.setdefault(name, Counter())[outcome.texts[name]] += 1
        properties = {feature_name(name): value for name, value in outcome.properties.items()}
        self.statistics[split].add(outcome.record, properties)

    def drop(self, reason: str, described: dict[str, str]) -> None:
        self.read += 1
        self.dropped[reason] += 1
        if self.dropped[reason] <= NUM_SHOWN:
            self.first_dropped.setdefault(reason, []).append(described)

    def merge(self, later: Summary) -> None:
        self.read += later.read
        for name in ("dropped", "changed", "numeric", "textual", "kept_of_split"):
            getattr(self, name).update(getattr(later, name))
        for name, values in later.functionals.items():
            self.functionals.setdefault(name, Counter()).update(values)
        for reason, described in later.first_dropped.items():
            self.first_dropped[reason] = [*self.first_dropped.get(reason, ()), *described][:NUM_SHOWN]
        for mine, theirs in zip(self.statistics, later.statistics, strict=True):
            mine.merge(theirs)

    def state(self) -> dict[str, Any]:
        """For JSON, exact."""
        return vars(self) | {"statistics": [s.state() for s in self.statistics]}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Summary:
        counters = ("dropped", "changed", "numeric", "textual")
        return cls(
            read=state["read"],
            first_dropped=state["first_dropped"],
            functionals={name: Counter(values) for name, values in state["functionals"].items()},
            kept_of_split=Counter({int(split): count for split, count in state["kept_of_split"].items()}),
            statistics=tuple(Statistics.of_state(s) for s in state["statistics"]),
            **{name: Counter(state[name]) for name in counters},
        )


@dataclasses.dataclass
class Selection:
    """The property columns by feature name, why each other column is none, and the statistics: of the train split, or
    of all crystals where there is none."""

    summary: Summary
    columns: dict[str, Column]
    unused_columns: dict[str, str]
    changed: Counter[str]
    statistics: Statistics
    ids_not_found: list[str]


def select(
    summary: Summary,
    dataset: DataSet,
    declared: Mapping[str, Column],
    ignored: Iterable[str],
    added: Iterable[str] = (),
    ids_not_found: Iterable[str] = (),
) -> Selection:
    """declared: columns described by the user; ignored: columns to leave out; added: columns that the user joined.
    UserErrors: mixed functionals, a declared column that does not exist."""
    textual = summary.textual
    columns, unused = _columns(
        dataset, declared, set(ignored), set(added), summary.numeric, textual, summary.functionals
    )
    changed = Counter(summary.changed)
    for name in columns:
        source = [n for n in textual if feature_name(n) == name]
        if source:
            changed[f"text_instead_of_number_in_{name}"] = sum(textual[n] for n in source)
    statistics = summary.statistics[0]
    if not summary.kept_of_split[0]:
        statistics = Statistics()
        for of_split in summary.statistics:
            statistics.merge(of_split)
    return Selection(summary, columns, unused, changed, statistics, list(ids_not_found))


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


def counts(summary: Summary) -> dict[str, Any]:
    """Counts of read, kept and dropped, which add up."""
    return {
        "read": summary.read,
        "kept": sum(summary.kept_of_split.values()),
        "dropped": dict(sorted(summary.dropped.items())),
    }
