"""Two methods' relaxed candidates of the same compositions against each other: best energies, curves, who wins."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def candidate_row(
    method: str, index: int, candidates: int, made: Mapping[str, Any], relaxed: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A candidate's row, from its row in the manifest and that of its relaxation, None where it was not made."""
    soft = made.get("soft_calls", 0)
    row = {
        "method": method, "composition": index // candidates, "candidate": index % candidates, "uid": made["uid"],
        "formula": made.get("formula", ""), "generation_status": made["status"], "soft_calls": soft,
        "generation_cpu_seconds": made.get("cpu_seconds"), "soft_cpu_seconds": made.get("soft_cpu_seconds"),
        **{name: made.get(name) for name in ("operations", "space_group", "volume_fraction", "attempts")},
    }  # fmt: skip
    if relaxed is None:
        return {**row, "status": f"failed({made['status']})", "force_calls": soft}
    names = ("status", "message", "reduced_formula", "scaled_energy_per_atom", "seconds", "cpu_seconds", "max_force",
             "max_stress", "volume_per_atom", "volume_change", "relax_rmsd", "space_group_number")  # fmt: skip
    return {**row, **{name: relaxed.get(name) for name in names}, "force_calls": relaxed["force_calls"] + soft}


def write_results(
    rows: Sequence[Mapping[str, Any]],
    known: Mapping[str, Mapping[str, Any]],
    compositions: Sequence[tuple[str, str]],
    plan: Mapping[str, Any],
    output_dir: Path,
) -> None:
    (output_dir / "rows.json").write_text(json.dumps({"rows": list(rows), "known": dict(known), "compositions": list(compositions)}, default=str))
