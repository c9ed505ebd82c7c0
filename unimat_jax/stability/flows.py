"""`unimat stability` as a flow of an existing workflow engine, jobflow (extra `workflow`): on a laptop, or a cluster
through jobflow-remote or FireWorks.

`stability_flow` makes the Flow: jobs that relax a handful of crystals each, and a last one that holds them against the
references and writes the files. What goes in and out of a job is JSON.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import Entry, read_entries
from unimat_jax.stability import outputs
from unimat_jax.stability.assessment import about_model, relax_entries, relaxer_of
from unimat_jax.stability.corrections import resolve
from unimat_jax.stability.engines import EnergyModel
from unimat_jax.stability.journal import Journal, relax_all
from unimat_jax.stability.judgement import (
    References,
    Scale,
    inside_systems,
    judge_all,
    read_standards,
    with_own_hull,
    write,
)
from unimat_jax.stability.relaxation import Protocol, Relaxation

if TYPE_CHECKING:
    from jobflow import Flow, Job  # pyright: ignore[reportMissingImports]


def stability_flow(
    structures: Sequence[str | Path],
    model: EnergyModel,
    *,
    output_dir: str | Path,
    references: References | None = None,
    protocol: Protocol | None = None,
    correction: str = "auto",
    chunk_size: int = 10,
    timeout_s: float = 600.0,
    num_workers: int = 1,
) -> Flow:
    """A jobflow Flow that relaxes the structures in files and writes what `unimat stability` does into `output_dir`.

    chunk_size: crystals a job; timeout_s: for one crystal; num_workers: processes of a job. Paths are made absolute:
    the machine that runs the last job must have the references and write `output_dir`. A job that fails costs its own
    crystals a row failed(job_failed); run again in its folder, it goes on with what it had finished. Raises UserError
    for inputs that cannot be read or must not meet.
    """
    from jobflow import Flow, Job, JobConfig, OnMissing  # pyright: ignore[reportMissingImports]

    if chunk_size < 1:
        raise UserError(f"chunk_size = {chunk_size}: give the number of crystals for one job")
    protocol, references = protocol or Protocol(), _absolute(references or References())
    scale = Scale(*resolve(model, correction), protocol.pressure)
    about = about_model(model, protocol, scale) | {
        "structures": [str(path) for path in structures], "workflow_engine": "jobflow", "timeout_s": timeout_s,
    }  # fmt: skip
    entries = read_entries(structures)
    read_standards(references, scale, about, entries)  # what is wrong with them is said before anything is relaxed
    hull_entries, left_out = [], Counter()
    if references.hull_structures:
        hull_entries, left_out = inside_systems(read_entries(references.hull_structures), entries)
    how = {
        "model": dataclasses.asdict(model), "protocol": dataclasses.asdict(protocol),
        "with_correction": scale.corrected, "timeout_s": timeout_s, "num_workers": num_workers,
    }  # fmt: skip

    def relaxing(some: Sequence[Entry], name: str) -> list[Job]:
        crystals = [_crystal_json(entry.crystal) for entry in some if entry.crystal is not None]
        starts = range(0, len(crystals), chunk_size)
        chunks = [crystals[start : start + chunk_size] for start in starts]
        return [
            Job(relax_chunk, function_kwargs={"crystals": chunk, **how}, name=f"{name} {start + 1}")
            for start, chunk in zip(starts, chunks, strict=True)
        ]

    candidates, hull = relaxing(entries, "relax"), relaxing(hull_entries, "relax hull")
    last = Job(
        conclude,
        function_kwargs={
            "entries": [_entry_json(entry) for entry in entries],
            "relaxations": [job.output for job in candidates],
            "hull_entries": [_entry_json(entry) for entry in hull_entries],
            "hull_relaxations": [job.output for job in hull],
            "hull_left_out": dict(left_out),
            "chunk_size": chunk_size,
            "num_workers": num_workers,
            "references": dataclasses.asdict(references),
            "scale": dataclasses.asdict(scale),
            "about": about,
            "output_dir": str(Path(output_dir).resolve()),
        },
        config=JobConfig(on_missing_references=OnMissing.NONE),  # the jobs that failed, and it runs all the same
        name="stability",
    )
    return Flow([*candidates, *hull, last], output=last.output, name="stability")


def relax_chunk(
    crystals: Sequence[dict[str, Any]],
    model: dict[str, Any],
    protocol: dict[str, Any],
    with_correction: bool,
    timeout_s: float,
    num_workers: int,
) -> list[dict[str, Any]]:
    """A job: one Relaxation, as a dict, a crystal. Each is written down in the job's folder as soon as it is done."""
    relaxer = relaxer_of(EnergyModel(**model), Protocol(**protocol), with_correction, output_dir=Path())
    found = relax_all([_crystal(values) for values in crystals], relaxer, Journal(Path(outputs.JOURNAL)),
                      timeout_s=timeout_s, num_workers=num_workers)  # fmt: skip
    return [dataclasses.asdict(relaxation) for relaxation in found]


def conclude(
    entries: Sequence[dict[str, Any]],
    relaxations: Sequence[list[dict[str, Any]] | None],
    hull_entries: Sequence[dict[str, Any]],
    hull_relaxations: Sequence[list[dict[str, Any]] | None],
    hull_left_out: dict[str, int],
    chunk_size: int,
    num_workers: int,
    references: dict[str, Any],
    scale: dict[str, Any],
    about: dict[str, Any],
    output_dir: str,
) -> dict[str, Any]:
    """The last job: writes the files of `unimat stability`; returns counts by status, metrics and the directory."""
    ours, hulls = [[_entry(values) for values in some] for some in (entries, hull_entries)]
    standards = read_standards(References(**references), Scale(**scale), about, ours)
    if standards.references.hull_structures:
        found = relax_entries(hulls, lambda crystals: _joined(hull_relaxations, len(crystals), chunk_size))
        standards = with_own_hull(standards, hulls, found, Counter(hull_left_out))
    found = relax_entries(ours, lambda crystals: _joined(relaxations, len(crystals), chunk_size))
    assessed = judge_all(ours, found, standards, about, num_workers=num_workers)
    write(assessed, Path(output_dir))
    return {
        "output_dir": output_dir,
        "status": dict(Counter(row["status"] for row in assessed.rows)),
        "metrics": {name: metric.value for name, metric in assessed.metrics.items()},
    }


def _joined(chunks: Sequence[list[dict[str, Any]] | None], number: int, chunk_size: int) -> list[Relaxation]:
    """One Relaxation for each of `number` crystals; None is in the place of what a job that failed would have given."""
    lost = Relaxation("failed", "job_failed", "its job in the workflow engine failed: see the engine's log")
    found: list[Relaxation] = []
    for chunk in chunks:
        size = min(chunk_size, number - len(found))
        found += [lost] * size if chunk is None else [Relaxation(**values) for values in chunk]
    return found


def _absolute(references: References) -> References:
    names = ("hull", "elements", "hull_structures", "known", "against")
    return dataclasses.replace(
        references, **{name: [str(Path(path).resolve()) for path in getattr(references, name)] for name in names}
    )


def _crystal_json(crystal: Crystal) -> dict[str, Any]:
    arrays = {name: getattr(crystal, name).tolist() for name in ("atomic_numbers", "frac_coords", "lattice")}
    return {**arrays, "uid": crystal.uid, "properties": crystal.properties}


def _crystal(values: dict[str, Any]) -> Crystal:
    return Crystal.create(**values)


def _entry_json(entry: Entry) -> dict[str, Any]:
    values = {name: getattr(entry, name) for name in ("uid", "reason", "message", "reference_uid")}
    return {**values, "crystal": None if entry.crystal is None else _crystal_json(entry.crystal)}


def _entry(values: dict[str, Any]) -> Entry:
    return Entry(**{**values, "crystal": values["crystal"] and _crystal(values["crystal"])})
