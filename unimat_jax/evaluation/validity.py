"""CDVAE's structure validity and SMACT composition validity of crystals, each with the reason; `unimat check PATH...`.

The rules are those of CDVAE's `scripts/eval_utils.py` (Xie et al. 2022, arXiv 2110.06197), which the UniMat paper
reports (section 3.1): no two atoms nearer than 0.5 A, a cell of at least 0.1 A3, and a formula that SMACT calls neutral
with anions more electronegative than cations. They are loose on purpose; a valid crystal need not be a good one.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.composition import composition_reason

MIN_DISTANCE = 0.5
"""Angstrom, between different atoms of the cell and their images."""
MIN_VOLUME = 0.1
"""Cubic Angstrom."""


@dataclasses.dataclass(frozen=True)
class Validity:
    """One crystal's verdicts. An empty reason means valid.

    struct_reason: `atoms_too_close`, `volume_too_small`. comp_reason: see `composition_reason`. A structure that never
    became a crystal has its failure as both reasons. min_distance: Angstrom, between different atoms (None for one);
    volume: cubic Angstrom.
    """

    uid: str
    formula: str
    num_atoms: int
    struct_reason: str
    comp_reason: str
    comp_reason_icsd24: str
    min_distance: float | None
    volume: float | None

    @property
    def struct_valid(self) -> bool:
        return not self.struct_reason

    @property
    def comp_valid(self) -> bool:
        return not self.comp_reason

    @property
    def valid(self) -> bool:
        return self.struct_valid and self.comp_valid

    @property
    def status(self) -> str:
        """`valid`, or the reasons joined by "+"."""
        return "+".join(dict.fromkeys(reason for reason in (self.struct_reason, self.comp_reason) if reason)) or "valid"

    @classmethod
    def failed(cls, uid: str, reason: str) -> Validity:
        """The row of a structure that could not be read, decoded or checked: it stays in every denominator."""
        return cls(uid, "", 0, reason, reason, reason, None, None)

    def to_json(self) -> dict[str, Any]:
        """The fields and the verdicts, flat."""
        verdicts = {name: getattr(self, name) for name in ("status", "valid", "struct_valid", "comp_valid")}
        return {**dataclasses.asdict(self), **verdicts}


def check(crystal: Crystal) -> Validity:
    """Both verdicts on a crystal. Never raises: what cannot be checked comes back with the reason `check_failed`."""
    try:
        numbers, counts = np.unique(crystal.atomic_numbers, return_counts=True)
        composition = tuple(zip(numbers.tolist(), counts.tolist(), strict=True))
        distance = min_pair_distance(crystal)
        return Validity(
            crystal.uid,
            crystal.formula,
            crystal.num_atoms,
            structure_reason(distance, crystal.volume),
            composition_reason(composition),
            composition_reason(composition, "icsd24"),
            distance,
            crystal.volume,
        )
    except Exception as error:  # one odd crystal must not end a run over ten thousand
        print(f"check of {crystal.uid or 'a crystal'} failed: {type(error).__name__}: {error}", file=sys.stderr)
        return Validity.failed(crystal.uid, "check_failed")


def min_pair_distance(crystal: Crystal) -> float | None:
    """The shortest distance between different atoms (Angstrom), images included, as pymatgen's `distance_matrix`.

    Unlike `Crystal.min_distance`, an atom's own images do not count, as in CDVAE. None for one atom.
    """
    from pymatgen.core import Lattice
    from pymatgen.util.coord import pbc_shortest_vectors

    if crystal.num_atoms < 2:
        return None
    frac = np.ascontiguousarray(crystal.frac_coords)
    _, squared = pbc_shortest_vectors(Lattice(crystal.lattice), frac, frac, return_d2=True)
    return float(np.sqrt(squared[np.triu_indices(crystal.num_atoms, 1)].min()))


def structure_reason(min_distance: float | None, volume: float) -> str:
    """Why a structure is invalid, "" where it is valid; `min_distance` (A) from `min_pair_distance`, `volume` in A3."""
    if not volume >= MIN_VOLUME:  # also for NaN
        return "volume_too_small"
    if min_distance is not None and not min_distance >= MIN_DISTANCE:
        return "atoms_too_close"
    return ""


def summary(rows: Iterable[Validity]) -> dict[str, Any]:
    """Shares of valid structures in 0..1 over all rows, failures included, and counts by status (they add up)."""
    rows = list(rows)

    def share(name: str) -> float | None:
        return sum(bool(getattr(row, name)) for row in rows) / len(rows) if rows else None

    return {
        "num_structures": len(rows),
        "struct_valid": share("struct_valid"),
        "comp_valid": share("comp_valid"),
        "valid": share("valid"),
        "comp_valid_icsd24": sum(not row.comp_reason_icsd24 for row in rows) / len(rows) if rows else None,
        "status": dict(Counter(row.status for row in rows).most_common()),
    }


def format_summary(values: Mapping[str, Any]) -> str:
    """`summary`'s numbers as a table to print."""
    number = values["num_structures"]
    if not number:
        return "no structures to check"
    names = {
        "struct_valid": f"struct_valid  (atoms >= {MIN_DISTANCE} A apart, cell >= {MIN_VOLUME} A3)",
        "comp_valid": "comp_valid    (SMACT, oxidation states of smact14 as in CDVAE)",
        "comp_valid_icsd24": "              (SMACT, oxidation states of ICSD 2024)",
        "valid": "valid         (both, smact14)",
    }
    lines = [f"{number} structures"]
    lines += [f"  {text:<66}{100 * values[name]:6.1f} %" for name, text in names.items()]
    lines += ["by status"]
    lines += [f"  {status:<64}{count:8d}  {100 * count / number:5.1f} %" for status, count in values["status"].items()]
    return "\n".join(lines)


def write_report(rows: Sequence[Validity], output_dir: Path) -> None:
    """Writes validity.csv, one row a structure, and validity.json, the summary, into `output_dir` (made if absent)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    columns = list(Validity.failed("", "").to_json())
    with (output_dir / "validity.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row.to_json() for row in rows)
    (output_dir / "validity.json").write_text(json.dumps(summary(rows), indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Structure validity (CDVAE) and composition validity (SMACT) of every structure in crystal files."""
    parser = Parser(prog="unimat check", description=main.__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a crystal file, table, directory or zip of them")
    parser.add_argument("--output_dir", type=Path, help="write validity.csv (a row a structure) and validity.json here")
    arguments = parser.parse(sys.argv[1:] if argv is None else argv)

    from tqdm import tqdm

    from unimat_jax.structure_files import read_structures

    if arguments.output_dir is not None and arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise UserError(f"--output_dir={arguments.output_dir} is a file: name a directory")
    rows = []
    for path in arguments.paths:
        for found in tqdm(read_structures(path), desc=f"checking {Path(path).name}", unit="structure", file=sys.stderr):
            rows.append(check(found) if isinstance(found, Crystal) else Validity.failed(found.uid, found.reason))
    if not rows:
        raise UserError(f"no structures in {', '.join(arguments.paths)}: give crystal files, or a directory of them")
    print(format_summary(summary(rows)))
    if arguments.output_dir is not None:
        write_report(rows, arguments.output_dir)
        print(f"written: {arguments.output_dir / 'validity.csv'}, {arguments.output_dir / 'validity.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
