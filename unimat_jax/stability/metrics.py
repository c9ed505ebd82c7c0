"""What a set of relaxed candidates is worth: shares and means over all that were asked for, failures included."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.metrics import Metric, mean, share
from unimat_jax.evaluation.novelty import KnownStructures, novelty_metrics
from unimat_jax.evaluation.scoring import SPECS

METASTABLE = {"metastable_25": 0.025, "metastable_100": 0.1}
"""eV/atom above the hull: the paper's bound, and that of MatterGen and LeMat-GenBench."""


def set_metrics(rows: Sequence[Mapping[str, Any]], tolerances: str, *, has_hull: bool) -> dict[str, Metric]:
    """Metrics by name. Rows are those of the per-structure table; only converged ones can be stable."""
    converged = [row["status"] == "converged" for row in rows]
    metrics = {
        "converged": share(converged, "relaxed to the forces asked for"),
        "composition_converged": _compositions(rows, converged),
    }
    if has_hull:
        metrics |= _stability(rows, tolerances)
    for name, unit, text in (
        ("formation_energy_per_atom", "eV/atom", "formation energy"),
        (
            "decomposition_energy",
            "eV/atom",
            "E_d: energy above (negative: below) the hull without the candidate itself",
        ),
        ("relax_rmsd", "A", "RMS displacement while relaxing, atom by atom"),
        ("relax_rms_dist", "", "the same over (V / n)^(1/3)"),
        ("volume_change", "", "volume after relaxing over before, minus 1"),
        ("force_calls", "", "energies and forces that the relaxation asked for"),
    ):
        values = [row.get(name) if good else None for row, good in zip(rows, converged, strict=True)]
        there = [float(value) for value in values if value is not None]
        if there:
            metrics[f"mean_{name}"] = mean(there, f"{text}; mean over the converged", unit=unit,
                                           failures=len(values) - len(there))  # fmt: skip
    return metrics


def _compositions(rows: Sequence[Mapping[str, Any]], converged: Sequence[bool]) -> Metric:
    found: dict[str, bool] = defaultdict(bool)
    for row, good in zip(rows, converged, strict=True):
        if row.get("reduced_formula"):
            found[row["reduced_formula"]] |= good
    unknown = sum(not row.get("reduced_formula") for row in rows)
    note = f"{unknown} structures could not be read: their compositions are not counted" if unknown else ""
    metric = share(list(found.values()), "compositions of which at least one candidate converged")
    return Metric(metric.value, metric.n, metric.definition, interval=metric.interval, unit=metric.unit, note=note)


def _stability(rows: Sequence[Mapping[str, Any]], tolerances: str) -> dict[str, Metric]:
    energies = stable_energies(rows)
    unknown = sum(math.isnan(energy) for energy in energies)
    new = [not row.get("same_as") and not row.get("match_reason") for row in rows]
    text = f"matching no reference structure (tolerances of {tolerances})"
    metrics = {
        "stable": share([e < 0 and n for e, n in zip(energies, new, strict=True)], f"E_d < 0 and {text}",
                        failures=unknown),
        "stable_or_known": share([e < 0 for e in energies], "E_d < 0, known structures included", failures=unknown),
    }  # fmt: skip
    for name, limit in METASTABLE.items():
        flags = [e < limit for e in energies]
        metrics[name] = share(flags, f"E_d < {limit} eV/atom, known structures included", failures=unknown)
        new_flags = [flag and n for flag, n in zip(flags, new, strict=True)]
        metrics[f"{name}_new"] = share(new_flags, f"E_d < {limit} eV/atom and {text}", failures=unknown)
    return metrics


def stable_energies(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """E_d of converged candidates, NaN for the others."""
    return [
        math.nan if row["status"] != "converged" or row.get("decomposition_energy") is None
        else float(row["decomposition_energy"])
        for row in rows
    ]  # fmt: skip


def sun_metrics(
    rows: Sequence[Mapping[str, Any]],
    crystals: Sequence[Crystal | None],
    known: Sequence[Crystal],
    *,
    num_workers: int | None,
) -> dict[str, Metric]:
    """S.U.N. and M.S.U.N. of relaxed crystals by both definitions in use, "dng" (MatterGen) and "lemat"."""
    energies = stable_energies(rows)
    result = {}
    for name in ("dng", "lemat"):
        spec = SPECS[name]
        found, _ = novelty_metrics(
            crystals, KnownStructures(known), tolerances=spec.tolerances, e_above_hull=energies, stable=spec.stable,
            metastable=spec.metastable, num_workers=num_workers,
        )  # fmt: skip
        result |= {f"{metric}/{name}": found[metric] for metric in ("unique", "novel", "sun", "msun")}
    return result
