"""Crystals in files -> relaxed, on a common energy scale, held against a hull: the rows and metrics of a run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
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
from unimat_jax.stability.corrections import check_schemes, resolve
from unimat_jax.stability.energies import MODES, Hull, as_phases, composition_of, judge, total_energy
from unimat_jax.stability.engines import EnergyModel
from unimat_jax.stability.journal import Journal, relax_all
from unimat_jax.stability.metrics import set_metrics, sun_metrics
from unimat_jax.stability.references import OUTSIDE, Phase, hash_of, read_phases, scheme_of
from unimat_jax.stability.relaxation import Protocol, Relaxation, Relaxer, displacement

PACKAGES = ("unimat-jax", "ase", "pymatgen", "spglib", "numpy", "scipy")


@dataclasses.dataclass(frozen=True)
class Assessed:
    """rows and relaxed: one a structure, in order, None where there is no relaxed one; comparison: by directory; about:
    what was done, as stability.json has it."""

    rows: list[dict[str, Any]]
    relaxed: list[Crystal | None]
    metrics: dict[str, Metric]
    comparison: dict[str, dict[str, Metric]]
    about: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Run:
    """What relaxes, and on what scale."""

    relaxer: Relaxer
    journal: Journal
    scheme: str
    timeout_s: float
    num_workers: int | None

    @property
    def scale(self) -> dict[str, Any]:
        return {"corrected": self.relaxer.with_correction, "pressure": self.relaxer.protocol.pressure}

    def relax(self, crystals: Sequence[Crystal], progress: str) -> list[Relaxation]:
        return relax_all(crystals, self.relaxer, self.journal, timeout_s=self.timeout_s,
                         num_workers=self.num_workers, progress=progress)  # fmt: skip


def assess(
    structures: Sequence[str | Path],
    model: EnergyModel,
    *,
    output_dir: str | Path,
    hull: Sequence[str | Path] = (),
    elements: Sequence[str | Path] = (),
    hull_structures: Sequence[str | Path] = (),
    known: Sequence[str | Path] = (),
    against: Sequence[str | Path] = (),
    correction: str = "auto",
    mixed_schemes: bool = False,
    tolerances: str = "mattergen",
    protocol: Protocol | None = None,
    timeout_s: float = 600.0,
    memory_limit_gb: float = 0.0,
    num_workers: int | None = None,
    batch_size: int = 1,
    retry: bool = False,
) -> Assessed:
    """Relaxes the structures in files, puts their energies on the scale of the hull, writes everything into
    `output_dir`, which may hold a part of it from before, and returns it.

    Raises UserError for inputs that are missing, cannot be read or must not meet. Structures that fail have a status.
    """
    begin = time.monotonic()
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    output_dir, protocol = Path(output_dir), protocol or Protocol()
    added, scheme = resolve(model, correction)
    if known and not (hull or hull_structures):
        raise UserError("--known is for S.U.N., which needs a hull: give --hull or --hull_structures too")
    journal = Journal(output_dir / outputs.JOURNAL, retry=retry)
    relaxer = Relaxer(model, protocol, added, batch_size, memory_limit_gb=memory_limit_gb)
    run = _Run(relaxer, journal, scheme, timeout_s, num_workers)
    about = {
        "energy_model": model.name, "energy_model_kwargs": model.kwargs, "weights": model.weights,
        "package": model.package, "energy_scale": model.scale, "functional": model.functional, "correction": scheme,
        "mp2020_added": added, "protocol": dataclasses.asdict(protocol), "protocol_text": protocol.text,
    }  # fmt: skip
    others = {str(other): read_other(Path(other), about, mixed_schemes) for other in against}

    entries = read_entries(structures)
    crystals = [entry.crystal for entry in entries if entry.crystal is not None]
    systems = {frozenset(crystal.symbols) for crystal in crystals}
    references = _references(hull, elements, systems, run, mixed_schemes)
    found = iter(run.relax(crystals, "relaxing"))
    relaxations = [next(found) if entry.crystal is not None else _unread(entry) for entry in entries]
    if hull_structures:
        references = _own_hull(hull_structures, systems, run)
    known_crystals = [entry.crystal for entry in read_entries(known) if entry.crystal is not None] if known else []

    rows, candidates, relaxed = [], [], []
    for entry, relaxation in zip(entries, relaxations, strict=True):
        row, candidate = _row(entry, relaxation, run)
        rows.append(row)
        candidates.append(candidate)
        relaxed.append(relaxation.crystal(_named(entry.crystal, entry.uid)) if entry.crystal is not None else None)
    good = [c if row["status"] == "converged" else None for c, row in zip(candidates, rows, strict=True)]
    for row, columns in zip(rows, judge(good, references, tolerances, num_workers=num_workers), strict=True):
        row |= columns
    has_hull = references.mode in ("reference", "self_consistent")
    metrics = set_metrics(rows, tolerances, has_hull=has_hull)
    if has_hull and known_crystals:
        crystals_of = [candidate.crystal if candidate else None for candidate in good]
        metrics |= sun_metrics(rows, crystals_of, known_crystals, num_workers=num_workers)
    comparison = {title: compare_sets(rows, other) for title, other in others.items()}

    about |= {
        "hull": references.mode, "hull_text": MODES[references.mode], "hull_scheme": references.scheme,
        "mixed_schemes": mixed_schemes, "reference_hash": hash_of(references.phases),
        "num_reference_phases": len(references.phases), "reference_left_out": dict(references.left_out),
        "num_reference_phases_without_structure": sum(phase.crystal is None for phase in references.phases),
        "tolerances": {"name": tolerances, **dataclasses.asdict(tolerances_of(tolerances))},
        "structures": [str(p) for p in structures], "structures_hash": content_hash(entries),
        "references": [str(p) for p in [*hull, *elements, *hull_structures]], "known": [str(p) for p in known],
        "num_structures": len(entries), "timeout_s": timeout_s, "memory_limit_gb": memory_limit_gb,
        "batch_size": batch_size,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "relaxation_seconds": round(sum(relaxation.seconds for relaxation in relaxations), 1),
        "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip
    output_dir.mkdir(parents=True, exist_ok=True)
    outputs.write_all(rows, relaxed, metrics, comparison, about, output_dir)
    return Assessed(rows, relaxed, metrics, comparison, about)


def _references(
    hull: Sequence[str | Path],
    elements: Sequence[str | Path],
    systems: Collection[frozenset[str]],
    run: _Run,
    mixed_schemes: bool,
) -> Hull:
    """The hull of modes "reference" and "elements"; "none" where no entries are given."""
    if not hull and not elements:
        return Hull("none", [], run.scheme)
    pressure = run.relaxer.protocol.pressure
    if pressure and not mixed_schemes:
        raise UserError(
            f"--pressure={pressure}: reference entries are at zero pressure; take --hull_structures, which "
            "are relaxed at the same pressure, or ask for the mixture with --mixed_schemes"
        )
    phases, left_out = read_phases([*hull, *elements], systems)
    if elements:
        left_out["not_an_element"] += sum(len(phase.composition) > 1 for phase in phases)
        phases = [phase for phase in phases if len(phase.composition) == 1]
    theirs = scheme_of(phases)
    if run.scheme.startswith("own") and not mixed_schemes:
        raise UserError(
            "--energy_scale=own: the model's energies mean nothing beside reference entries; take --hull_structures, "
            "which are relaxed by the model itself, or ask for the mixture with --mixed_schemes"
        )
    check_schemes(run.scheme, theirs, mixed_schemes)
    return Hull("elements" if elements else "reference", phases, theirs, left_out)


def _own_hull(paths: Sequence[str | Path], systems: Collection[frozenset[str]], run: _Run) -> Hull:
    """The self-consistent hull, of the structures within the candidates' chemical systems."""
    inside, left_out = [], Counter()
    for entry in read_entries(paths):
        if entry.crystal is None:
            left_out[entry.reason] += 1
        elif any(set(entry.crystal.symbols) <= system for system in systems):
            inside.append(entry.crystal)
        else:
            left_out[OUTSIDE] += 1
    phases, failed = as_phases(inside, run.relax(inside, "relaxing the hull"), **run.scale)
    return Hull("self_consistent", phases, run.scheme, left_out + failed)


def _named(crystal: Crystal, uid: str) -> Crystal:
    """A repeated uid has got another in its entry."""
    return dataclasses.replace(crystal, uid=uid)


def _unread(entry: Entry) -> Relaxation:
    return Relaxation("failed", entry.reason, entry.message)


def _row(entry: Entry, relaxation: Relaxation, run: _Run) -> tuple[dict[str, Any], Phase | None]:
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
    energy, reason = total_energy(relaxation, relaxed.volume, **run.scale)
    if energy is None:
        return row | {"energy_status": reason}, None
    row[ENERGY] = energy / start.num_atoms
    return row, dataclasses.replace(phase, uid=entry.uid, energy=energy, crystal=relaxed)
