"""Relaxed crystals, wherever they were relaxed, held against a hull: the rows, metrics and files of a run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluate import content_hash
from unimat_jax.evaluation.entries import Entry, read_entries
from unimat_jax.evaluation.matching import tolerances_of
from unimat_jax.evaluation.metrics import Metric
from unimat_jax.evaluation.structure_statistics import describe
from unimat_jax.stability import outputs
from unimat_jax.stability.comparison import ENERGY, compare_sets, read_other
from unimat_jax.stability.corrections import check_schemes
from unimat_jax.stability.energies import MODES, Hull, as_phases, composition_of, judge, total_energy
from unimat_jax.stability.metrics import set_metrics, sun_metrics
from unimat_jax.stability.references import OUTSIDE, Phase, hash_of, read_phases, scheme_of
from unimat_jax.stability.relaxation import Relaxation, displacement

PACKAGES = ("unimat-jax", "ase", "pymatgen", "spglib", "numpy", "scipy")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Of a run's energies. corrected: MP2020 is added to them; scheme: what they are in then; pressure: GPa."""

    corrected: bool
    scheme: str
    pressure: float = 0.0


@dataclasses.dataclass(frozen=True)
class References:
    """What a user names to hold crystals against; the fields are the flags of `unimat stability`."""

    hull: Sequence[str | Path] = ()
    elements: Sequence[str | Path] = ()
    hull_structures: Sequence[str | Path] = ()
    known: Sequence[str | Path] = ()
    against: Sequence[str | Path] = ()
    mixed_schemes: bool = False
    tolerances: str = "mattergen"


@dataclasses.dataclass(frozen=True)
class Standards:
    """References as read. known: structures that are not novel; others: the rows of other runs by directory."""

    references: References
    scale: Scale
    hull: Hull
    known: list[Crystal]
    others: dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Assessed:
    """rows and relaxed: one a structure, in order, None where there is no relaxed one; comparison: by directory; about:
    what was done, as stability.json has it."""

    rows: list[dict[str, Any]]
    relaxed: list[Crystal | None]
    metrics: dict[str, Metric]
    comparison: dict[str, dict[str, Metric]]
    about: dict[str, Any]


def systems_of(entries: Sequence[Entry]) -> set[frozenset[str]]:
    """The chemical systems of the structures that could be read."""
    return {frozenset(entry.crystal.symbols) for entry in entries if entry.crystal is not None}


def read_standards(
    references: References, scale: Scale, about: Mapping[str, Any], entries: Sequence[Entry]
) -> Standards:
    """References as far as they concern the entries, read before anything expensive is done; about: the model and
    protocol, as stability.json has them. Raises UserError for what cannot be read or must not meet."""
    if references.known and not (references.hull or references.hull_structures):
        raise UserError("--known is for S.U.N., which needs a hull: give --hull or --hull_structures too")
    others = {str(path): read_other(Path(path), about, references.mixed_schemes) for path in references.against}
    hull = _reference_hull(references, scale, entries)
    known = read_entries(references.known) if references.known else []
    return Standards(references, scale, hull, [e.crystal for e in known if e.crystal is not None], others)


def _reference_hull(references: References, scale: Scale, entries: Sequence[Entry]) -> Hull:
    """The hull of modes "reference" and "elements"; "none" where no reference entries are given."""
    hull, elements, mixed = references.hull, references.elements, references.mixed_schemes
    if not hull and not elements:
        return Hull("none", [], scale.scheme)
    if scale.pressure and not mixed:
        raise UserError(
            f"--pressure={scale.pressure}: reference entries are at zero pressure; take --hull_structures, which "
            "are relaxed at the same pressure, or ask for the mixture with --mixed_schemes"
        )
    phases, left_out = read_phases([*hull, *elements], systems_of(entries))
    if elements:
        left_out["not_an_element"] += sum(len(phase.composition) > 1 for phase in phases)
        phases = [phase for phase in phases if len(phase.composition) == 1]
    theirs = scheme_of(phases)
    if scale.scheme.startswith("own") and not mixed:
        raise UserError(
            f"energies on a scale of their own ({scale.scheme}) mean nothing beside reference entries; take "
            "--hull_structures, which are relaxed by the model itself, or ask for the mixture with --mixed_schemes"
        )
    check_schemes(scale.scheme, theirs, mixed)
    return Hull("elements" if elements else "reference", phases, theirs, left_out)


def inside_systems(hull_entries: Sequence[Entry], entries: Sequence[Entry]) -> tuple[list[Entry], Counter[str]]:
    """(the entries of a self-consistent hull that lie in a chemical system of `entries`, the others by reason)."""
    inside, left_out = [], Counter()
    systems = systems_of(entries)
    for entry in hull_entries:
        if entry.crystal is None:
            left_out[entry.reason] += 1
        elif any(set(entry.crystal.symbols) <= system for system in systems):
            inside.append(entry)
        else:
            left_out[OUTSIDE] += 1
    return inside, left_out


def with_own_hull(
    standards: Standards, entries: Sequence[Entry], relaxations: Sequence[Relaxation], left_out: Counter[str]
) -> Standards:
    """The standards with the self-consistent hull of these relaxations."""
    scale = standards.scale
    crystals = [entry.crystal for entry in entries if entry.crystal is not None]
    phases, failed = as_phases(crystals, relaxations, corrected=scale.corrected, pressure=scale.pressure)
    return dataclasses.replace(standards, hull=Hull("self_consistent", phases, scale.scheme, left_out + failed))


def judge_all(
    entries: Sequence[Entry],
    relaxations: Sequence[Relaxation],
    standards: Standards,
    about: Mapping[str, Any],
    *,
    num_workers: int | None = None,
) -> Assessed:
    """The rows and metrics of relaxed structures, one Relaxation an entry."""
    hull, tolerances = standards.hull, standards.references.tolerances
    rows, candidates, relaxed = [], [], []
    for entry, relaxation in zip(entries, relaxations, strict=True):
        row, candidate = _row(entry, relaxation, standards.scale)
        rows.append(row)
        candidates.append(candidate)
        relaxed.append(relaxation.crystal(_named(entry.crystal, entry.uid)) if entry.crystal is not None else None)
    good = [c if row["status"] == "converged" else None for c, row in zip(candidates, rows, strict=True)]
    for row, columns in zip(rows, judge(good, hull, tolerances, num_workers=num_workers), strict=True):
        row |= columns
    has_hull = hull.mode in ("reference", "self_consistent")
    metrics = set_metrics(rows, tolerances, has_hull=has_hull)
    if has_hull and standards.known:
        crystals = [candidate.crystal if candidate else None for candidate in good]
        metrics |= sun_metrics(rows, crystals, standards.known, num_workers=num_workers)
    comparison = {title: compare_sets(rows, other) for title, other in standards.others.items()}
    return Assessed(rows, relaxed, metrics, comparison, {**about, **_about(entries, relaxations, standards)})


def write(assessed: Assessed, output_dir: Path) -> None:
    """The run's files."""
    output_dir.mkdir(parents=True, exist_ok=True)
    outputs.write_all(
        assessed.rows, assessed.relaxed, assessed.metrics, assessed.comparison, assessed.about, output_dir
    )


def _about(entries: Sequence[Entry], relaxations: Sequence[Relaxation], standards: Standards) -> dict[str, Any]:
    """What the crystals were held against, as stability.json has it."""
    references, hull = standards.references, standards.hull
    paths = [*references.hull, *references.elements, *references.hull_structures]
    return {
        "hull": hull.mode, "hull_text": MODES[hull.mode], "hull_scheme": hull.scheme,
        "mixed_schemes": references.mixed_schemes, "reference_hash": hash_of(hull.phases),
        "num_reference_phases": len(hull.phases), "reference_left_out": dict(hull.left_out),
        "num_reference_phases_without_structure": sum(phase.crystal is None for phase in hull.phases),
        "tolerances": {"name": references.tolerances, **dataclasses.asdict(tolerances_of(references.tolerances))},
        "structures_hash": content_hash(entries), "num_structures": len(entries),
        "references": [str(path) for path in paths], "known": [str(path) for path in references.known],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "relaxation_seconds": round(sum(relaxation.seconds for relaxation in relaxations), 1),
    }  # fmt: skip


def _named(crystal: Crystal, uid: str) -> Crystal:
    """A repeated uid has got another in its entry."""
    return dataclasses.replace(crystal, uid=uid)


def _row(entry: Entry, relaxation: Relaxation, scale: Scale) -> tuple[dict[str, Any], Phase | None]:
    """What a structure's row says before it meets a hull, and the structure as a candidate where it has an energy."""
    row: dict[str, Any] = {f"input_{name}": value for name, value in entry.properties.items()}
    row |= {
        "uid": entry.uid, "status": relaxation.label, "message": relaxation.message,
        "reference_uid": entry.reference_uid, "max_force": relaxation.max_force, "max_stress": relaxation.max_stress,
        "magnetic_moment": relaxation.magnetic_moment, "force_calls": relaxation.force_calls,
        "seconds": relaxation.seconds, "cpu_seconds": relaxation.cpu_seconds, "energy_status": "",
    }  # fmt: skip
    if entry.crystal is None:
        return row, None
    start = _named(entry.crystal, entry.uid)
    phase = Phase("", composition_of(start), 0.0)
    row |= {"formula": start.formula, "reduced_formula": phase.formula, "num_atoms": start.num_atoms}
    relaxed = relaxation.crystal(start)
    if relaxed is None or relaxation.energy is None:
        return row, None
    rmsd, normalised = displacement(start, relaxation)
    row |= describe(relaxed) | {
        "energy_per_atom": relaxation.energy / start.num_atoms,
        "correction_per_atom": None if relaxation.correction is None else relaxation.correction / start.num_atoms,
        "relax_rmsd": rmsd, "relax_rms_dist": normalised, "volume_change": relaxed.volume / start.volume - 1,
    }  # fmt: skip
    energy, reason = total_energy(relaxation, relaxed.volume, corrected=scale.corrected, pressure=scale.pressure)
    if energy is None:
        return row | {"energy_status": reason}, None
    row[ENERGY] = energy / start.num_atoms
    return row, dataclasses.replace(phase, uid=entry.uid, energy=energy, crystal=relaxed)
