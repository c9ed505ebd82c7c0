"""A set of structures against a reference, the training set and known structures: all metrics and all rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.csp import csp_metrics
from unimat_jax.evaluation.entries import Entry
from unimat_jax.evaluation.matching import reduced_composition
from unimat_jax.evaluation.measure import Measured, measure
from unimat_jax.evaluation.metrics import Metric, mean, share
from unimat_jax.evaluation.novelty import KnownStructures, novelty_metrics
from unimat_jax.evaluation.proxy import proxy_metrics, validity_metrics


@dataclasses.dataclass(frozen=True)
class Spec:
    """A protocol. groups: what is scored where the inputs allow it; needs: inputs without which it makes no sense.

    tolerances: of StructureMatcher for uniqueness and novelty. stable, metastable: eV/atom above the hull.
    """

    name: str
    text: str
    groups: tuple[str, ...]
    needs: tuple[str, ...]
    tolerances: str
    stable: float = 0.0
    metastable: float = 0.1


SPECS = {
    "cdvae": Spec("cdvae", "CDVAE (Xie et al. 2022): validity, coverage, property distributions",
                  ("proxy", "novelty", "ood"), ("reference",), "cdvae"),
    "csp": Spec("csp", "crystal structure prediction (DiffCSP, Jiao et al. 2023), METRe and cRMSE",
                ("csp",), ("reference",), "cdvae"),
    "dng": Spec("dng", "de novo generation as MatterGen (Zeni et al. 2025) counts it, ordered structures only",
                ("novelty", "proxy", "ood"), ("known",), "mattergen", stable=0.1),
    "lemat": Spec("lemat", "LeMat-GenBench's tolerances and thresholds",
                  ("novelty", "proxy", "ood"), ("known",), "lemat"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """What a set is scored against. reference, training: measured; known: for novelty; energy_column: e_above_hull;
    with_metre: see `csp_metrics`."""

    spec: Spec
    reference: list[Measured]
    training: list[Entry]
    known: KnownStructures | None
    cutoffs: tuple[float, float]
    energies: tuple[str, ...] = ()
    e_above_hull: str = ""
    with_metre: bool = True
    num_workers: int | None = None
    cache_dir: Path | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """metrics by name; measured: one a structure, its row complete; nearest: reference number by structure number."""

    metrics: dict[str, Metric]
    measured: list[Measured]
    nearest: dict[int, int]


def score(entries: Sequence[Entry], task: Task, what: str = "structures") -> Scored:
    """All metrics of the spec's groups that the task's inputs allow."""
    measured = measure(entries, num_workers=task.num_workers, cache_dir=task.cache_dir, what=what)
    metrics = validity_metrics(measured)
    columns: list[dict[str, Any]] = [{} for _ in measured]
    nearest: dict[int, int] = {}
    groups = task.spec.groups
    if "proxy" in groups and task.reference:
        result = proxy_metrics(measured, task.reference, cutoffs=task.cutoffs, energies=task.energies)
        metrics |= result.metrics
        if result.coverage is not None:
            nearest = _nearest_columns(columns, measured, task.reference, result.coverage)
    if "csp" in groups:
        metrics |= _csp(columns, measured, task)
    if "novelty" in groups:
        energies = [m.row.get(task.e_above_hull, np.nan) for m in measured] if task.e_above_hull else None
        found, rows = novelty_metrics(
            [m.crystal for m in measured], task.known, tolerances=task.spec.tolerances, e_above_hull=energies,
            stable=task.spec.stable, metastable=task.spec.metastable, num_workers=task.num_workers,
        )  # fmt: skip
        metrics |= found
        for column, row in zip(columns, rows, strict=True):
            column |= row
    metrics |= symmetry_metrics(measured)
    full = [dataclasses.replace(m, row=m.row | column) for m, column in zip(measured, columns, strict=True)]
    if "ood" in groups and task.training:
        metrics |= out_of_distribution(full, task)
    return Scored(metrics, full, nearest)


def _nearest_columns(columns, measured: Sequence[Measured], reference: Sequence[Measured], coverage) -> dict[int, int]:
    nearest = {}
    found = coverage.generated
    covered_ones = found.within(coverage.struct_cutoff, coverage.comp_cutoff)
    rows = zip(found.struct_index, found.struct_distance, covered_ones, strict=True)
    for i, (index, distance, covered) in enumerate(rows):
        if index >= 0:
            nearest[i] = int(index)
            columns[i] |= {"nearest_uid": reference[int(index)].entry.uid, "nearest_distance": float(distance)}
        columns[i]["covered"] = bool(covered)
    return nearest


def _csp(columns: list[dict[str, Any]], measured: Sequence[Measured], task: Task) -> dict[str, Metric]:
    references = {m.entry.uid: m for m in task.reference}
    pairs = pair_up([m.entry for m in measured], references)
    result = csp_metrics(
        {uid: m.crystal for uid, m in references.items() if m.crystal is not None},
        [m.crystal for m in measured],
        pairs,
        sample_valid=[m.valid for m in measured],
        reference_valid={uid: m.valid for uid, m in references.items()},
        with_metre=task.with_metre,
        num_workers=task.num_workers,
    )
    for column, row in zip(columns, result.rows, strict=True):
        column |= row
    return result.metrics


def pair_up(entries: Sequence[Entry], references: Collection[str]) -> list[str]:
    """The uid of the structure that each one predicts: the file's `reference_uid`, else its own uid where a reference
    has it. Raises UserError where neither is among `references`."""
    pairs = []
    for entry in entries:
        uid = entry.reference_uid or entry.uid
        if uid not in references:
            raise UserError(
                f"--spec=csp: {entry.uid!r} predicts {uid!r}, which --reference does not hold: generate with "
                "--compositions_from=REFERENCE, or name in each structure's reference_uid (a column, or a key of the "
                "extxyz comment) the reference that it predicts"
            )
        pairs.append(uid)
    return pairs


def symmetry_metrics(measured: Sequence[Measured]) -> dict[str, Metric]:
    """Shares of structures with symmetry (not P1) at two tolerances and after symmetrisation."""
    result = {}
    for suffix, text in (("", "at 0.01 A"), ("_loose", "at 0.1 A"),
                         ("_symmetrised", "at 0.01 A, atoms moved onto the symmetry found at 0.1 A")):  # fmt: skip
        numbers = [m.row.get(f"space_group_number{suffix}") for m in measured]
        missing = sum(number is None for number in numbers)
        flags = [number is not None and number > 1 for number in numbers]
        result[f"symmetric{suffix}"] = share(flags, f"structures with a space group above P1, {text}", failures=missing)
    coordination = [m.row.get("mean_coordination", np.nan) for m in measured]
    result["mean_coordination"] = mean(coordination, "mean number of atoms within 1.2 times the nearest distance")
    return result


def out_of_distribution(measured: Sequence[Measured], task: Task) -> dict[str, Metric]:
    """The same metrics for the structures whose composition, and whose chemical system, no training structure has."""
    crystals = [entry.crystal for entry in task.training if entry.crystal is not None]
    seen = {
        "composition": {reduced_composition(crystal) for crystal in crystals},
        "system": {frozenset(crystal.atomic_numbers.tolist()) for crystal in crystals},
    }
    result: dict[str, Metric] = {}
    for kind, known in seen.items():

        def key(crystal: Crystal, kind: str = kind) -> Any:
            return reduced_composition(crystal) if kind == "composition" else frozenset(crystal.atomic_numbers.tolist())

        part = [m for m in measured if m.crystal is not None and key(m.crystal) not in known]
        what = {"composition": "reduced composition", "system": "chemical system"}[kind]
        flags = np.zeros(len(measured), bool)
        flags[: len(part)] = True
        result[f"ood_{kind}"] = share(flags, f"structures whose {what} no training structure has")
        metrics = validity_metrics(part)
        if task.reference and part:
            metrics |= proxy_metrics(part, task.reference, cutoffs=task.cutoffs).metrics
        for name in ("unique_cluster", "novel"):
            if part and name in part[0].row:
                values = [m.row[name] for m in part]
                if name == "novel":
                    metrics["novel"] = share([bool(v) for v in values], f"of them, novel ({what} out of training)")
                else:
                    metrics["unique"] = Metric(len(set(values) - {None}) / len(part), len(part), "clusters of them / n")
        result |= {f"ood_{kind}/{name}": metric for name, metric in metrics.items()}
    return result
