"""A run as files: relaxed.extxyz, per_structure.parquet and .csv, candidates.csv with CIFs, stability.json."""

from __future__ import annotations

import csv
import json
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.metrics import Metric
from unimat_jax.evaluation.outputs import CSV, PARQUET, full_rows, write_rows
from unimat_jax.evaluation.structure_statistics import SYMPREC_LOOSE

SUMMARY, RELAXED, CANDIDATES, CIFS = "stability.json", "relaxed.extxyz", "candidates.csv", "candidates_cif.zip"
JOURNAL = "relaxations.jsonl"
DFT = "dft"
"""The folder of GPAW's logs, and of what its relaxations go on from."""
MADE = (SUMMARY, RELAXED, CANDIDATES, CIFS, PARQUET, CSV)
FIRST_COLUMNS = ("uid", "formula", "status", "formation_energy_per_atom", "decomposition_energy", "e_above_hull")
RANKED_COLUMNS = (
    "rank", "uid", "formula", "formation_energy_per_atom", "decomposition_energy", "e_above_hull",
    "decomposition_energy_among_candidates", "decomposition", "nearest_known", "same_as", "space_group_number",
    "space_group_number_loose", "volume_per_atom", "magnetic_moment", "energy_model", "correction", "hull",
)  # fmt: skip
_IN_EXTXYZ = ("energy_per_atom", "formation_energy_per_atom", "decomposition_energy", "e_above_hull")


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The converged rows, the most stable first: by E_d, then by formation energy, then by uid."""

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        energies = [row.get(name) for name in ("decomposition_energy", "formation_energy_per_atom")]
        return (*((value is None, value or 0.0) for value in energies), row["uid"])

    good = sorted((row for row in rows if row["status"] == "converged"), key=place)
    return [{"rank": rank, **row} for rank, row in enumerate(good, 1)]


def write_all(
    rows: Sequence[Mapping[str, Any]],
    relaxed: Sequence[Crystal | None],
    metrics: Mapping[str, Metric],
    comparison: Mapping[str, Mapping[str, Metric]],
    about: Mapping[str, Any],
    output_dir: Path,
) -> None:
    """Every file but the journal. rows and relaxed: one a structure, in order; relaxed is None where there is none."""
    labels = {name: about[name] for name in ("energy_model", "correction", "hull")}
    full = full_rows([{**row, **labels} for row in rows], FIRST_COLUMNS)
    write_rows(full, output_dir)
    with (output_dir / RELAXED).open("w", encoding="utf-8") as file:
        for row, crystal in zip(full, relaxed, strict=True):
            if crystal is not None:
                values = {name: row[name] for name in _IN_EXTXYZ if row.get(name) is not None}
                numbers, frac, lattice = crystal.atomic_numbers, crystal.frac_coords, crystal.lattice
                file.write(Crystal.create(numbers, frac, lattice, crystal.uid, values).to_extxyz())
    best = ranked(full)
    with (output_dir / CANDIDATES).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [str(name) for name in RANKED_COLUMNS], extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(best)
    by_uid = {row["uid"]: crystal for row, crystal in zip(full, relaxed, strict=True)}
    _write_cifs([by_uid[row["uid"]] for row in best], output_dir / CIFS)
    values = {
        **about,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "status": dict(Counter(row["status"] for row in rows).most_common()),
        "energy_status": dict(Counter(row["energy_status"] for row in rows if row.get("energy_status")).most_common()),
        "metrics": {name: metric.to_json() for name, metric in metrics.items()},
        "comparison": {
            title: {name: metric.to_json() for name, metric in other.items()} for title, other in comparison.items()
        },
    }
    (output_dir / SUMMARY).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _write_cifs(crystals: Sequence[Crystal | None], path: Path) -> None:
    """UID.cif as relaxed, in P1, and UID_symmetrised.cif, with the symmetry found at 0.1 A, where spglib finds one."""
    from tqdm import tqdm

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        bar = {"desc": "writing CIFs", "unit": "structure", "file": sys.stderr, "leave": False}
        for crystal in tqdm([crystal for crystal in crystals if crystal is not None], **bar):
            name = crystal.uid.replace("/", "_")
            archive.writestr(zipfile.ZipInfo(f"{name}.cif"), crystal.to_cif())  # with no date: the same bytes again
            if text := _symmetrised(crystal):
                archive.writestr(zipfile.ZipInfo(f"{name}_symmetrised.cif"), text)


def _symmetrised(crystal: Crystal) -> str:
    from pymatgen.io.cif import CifWriter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return str(CifWriter(crystal.to_pymatgen(), symprec=SYMPREC_LOOSE, refine_struct=True))
        except Exception:  # spglib finds none: the raw one has to do
            return ""
