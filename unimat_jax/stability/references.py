"""Reference entries, as the Materials Project serves them: pymatgen's ComputedEntry lists in JSON or Parquet."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.errors import UserError
from unimat_jax.stability.corrections import ANY

_ADJUSTMENTS = {
    "ConstantEnergyAdjustment",
    "ManualEnergyAdjustment",
    "CompositionEnergyAdjustment",
    "TemperatureEnergyAdjustment",
}
OUTSIDE = "in no candidate's chemical system"
_MODULE = "pymatgen.entries.computed_entries"


@dataclasses.dataclass(frozen=True)
class Phase:
    """A known phase. composition: atoms by symbol in its cell; energy: eV for all of them, corrections included;
    crystal: None where its file has no structure. scheme: of its corrections, "" where it has none."""

    uid: str
    composition: dict[str, float]
    energy: float
    crystal: Crystal | None = None
    scheme: str = ""

    @property
    def num_atoms(self) -> float:
        return sum(self.composition.values())

    @property
    def energy_per_atom(self) -> float:
        return self.energy / self.num_atoms

    @property
    def formula(self) -> str:
        from pymatgen.core import Composition

        return Composition(self.composition).reduced_formula


def read_phases(
    paths: Sequence[str | Path], systems: Collection[frozenset[str]] | None = None
) -> tuple[list[Phase], Counter[str]]:
    """(phases with unique uids, entries that were not used, counted by reason).

    systems: sets of symbols; entries that lie in none of them are left out, which saves most of the time. None: all.

    Files: .json(.gz, .bz2) with a list of entries or an object of them, .jsonl(.gz, .bz2), .parquet with the entries'
    fields as columns. Raises UserError where a file cannot be read or holds no entry.
    """
    phases: dict[str, Phase] = {}
    failures: Counter[str] = Counter()
    inside: dict[frozenset[str], bool] = {}
    for path in map(Path, paths):
        entries = 0
        for number, raw in enumerate(_raw_entries(path)):
            try:
                elements = frozenset(symbol for symbol, amount in raw["composition"].items() if amount)
                entries += 1
                if systems is not None and elements not in inside:
                    inside[elements] = any(elements <= system for system in systems)
                if not inside.get(elements, True):
                    failures[OUTSIDE] += 1
                    continue
                phase = _phase(raw, f"{path.name}-{number}")
            except CrystalError as error:
                failures[error.reason] += 1
                continue
            except Exception as error:
                failures[f"no_entry: {type(error).__name__}"] += 1
                continue
            uid, again = phase.uid, 1
            while uid in phases:
                again += 1
                uid = f"{phase.uid}#{again}"
            phases[uid] = dataclasses.replace(phase, uid=uid)
        if not entries:
            raise UserError(f"{path} holds no ComputedEntry: give entries as the Materials Project serves them (JSON)")
    return list(phases.values()), failures


def _raw_entries(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a .json, .jsonl (.gz, .bz2) or .parquet file of entries")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for row in pyarrow.parquet.read_table(path).to_pylist():
            texts = {k: json.loads(v) if isinstance(v, str) and v[:1] in ("{", "[") else v for k, v in row.items()}
            yield texts.get("entry") or texts
        return
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:  # type: ignore[operator]
            if ".jsonl" in path.suffixes:
                content: Any = [json.loads(line) for line in file if line.strip()]
            else:
                content = json.load(file)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): is the file cut off?") from error
    if isinstance(content, Mapping) and "entries" in content:
        content = content["entries"]
    if isinstance(content, Mapping) and "composition" in content:
        content = [content]
    yield from content.values() if isinstance(content, Mapping) else content


def _phase(raw: Mapping[str, Any], fallback: str) -> Phase:
    """The phase of an entry's dict. Only pymatgen's own energy adjustments are made of it, never another class."""
    from pymatgen.core import Structure
    from pymatgen.entries.computed_entries import ComputedEntry

    adjustments = [
        {**adjustment, "@module": _MODULE}
        for adjustment in raw.get("energy_adjustments") or []
        if adjustment["@class"] in _ADJUSTMENTS
    ]
    if len(adjustments) < len(raw.get("energy_adjustments") or []):
        raise CrystalError("unknown_adjustment", "an energy adjustment that pymatgen does not know")
    composition = {symbol: float(n) for symbol, n in raw["composition"].items() if n}
    fields = {"energy": raw["energy"], "composition": composition, "energy_adjustments": adjustments}
    entry = ComputedEntry.from_dict({**fields, "correction": raw.get("correction") or 0.0})
    names = " ".join(str(adjustment.get("name")) for adjustment in adjustments)
    scheme = "" if not entry.correction else "MP2020" if "MP2020" in names else "other corrections"
    uid = str(raw.get("entry_id") or raw.get("material_id") or fallback)
    crystal = None
    if raw.get("structure"):
        crystal = Crystal.from_pymatgen(Structure.from_dict(dict(raw["structure"])), uid)
    elements = {element.symbol: float(n) for element, n in entry.composition.element_composition.items()}
    return Phase(uid, elements, float(entry.energy), crystal, scheme)


def scheme_of(phases: Sequence[Phase]) -> str:
    """The scheme that phases are corrected in: "MP2020", "other corrections", "none", or ANY for elements alone.

    Corrected and uncorrected phases stand side by side in one scheme, as most intermetallics have no correction.
    """
    schemes = {phase.scheme for phase in phases} - {""}
    if schemes:
        return " and ".join(sorted(schemes))
    return "none" if any(len(phase.composition) > 1 for phase in phases) else ANY


def hash_of(phases: Sequence[Phase]) -> str:
    """Of the compositions and energies that were used, whatever their order and names: 16 hexadecimal digits."""
    lines = sorted(f"{sorted(phase.composition.items())} {phase.energy:.6f}" for phase in phases)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
