"""GNoME as Google published it: a CSV of properties and a zip with a CIF for each id, joined while both are read.

In memory are the zip's index and the ids (600 MiB for 520,000 members, measured) and one row with one CIF at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from unimat_jax.errors import UserError
from unimat_jax.structure_files import open_zip, scan_file
from unimat_jax.structure_parsing import RawStructure, problem
from unimat_jax.structure_streams import SourceFile, TooLarge
from unimat_jax.structure_tables import open_csv, split_columns

SUMMARY, ARCHIVE = "stable_materials_summary.csv", "by_id.zip"
ID = "MaterialId"
COLUMNS = {
    "Formation Energy Per Atom": "formation_energy_per_atom",
    "Decomposition Energy Per Atom": "decomposition_energy_per_atom",
    "Decomposition Energy Per Atom All": "decomposition_energy_per_atom_all",
    "Decomposition Energy Per Atom Relative": "decomposition_energy_per_atom_relative",
    "Decomposition Energy Per Atom MP": "decomposition_energy_per_atom_mp",
    "Decomposition Energy Per Atom MP OQMD": "decomposition_energy_per_atom_mp_oqmd",
    "Bandgap": "band_gap",
}
"""Columns of the CSV that become properties, and their names here."""


def scan_gnome(directory: Path) -> Iterator[RawStructure]:
    """A structure a row of the CSV, in its order; then the CIFs that no row names.

    Failures: `no_cif` and `no_row` for what stands in one of the two only, and those of structure_files. UserError at
    once where the CSV or the zip is broken from its start.
    """
    members = {PurePosixPath(file.name).stem: (file, refusal) for file, refusal in open_zip(directory / ARCHIVE)}

    def joined(summary: SourceFile) -> Iterator[RawStructure]:
        header, rows = open_csv(summary)
        if ID not in header:
            raise UserError(f"{SUMMARY} has no column {ID!r} (columns: {', '.join(header)}): download it again")
        named: set[str] = set()
        for number, cells in enumerate(rows):
            origin = f"{SUMMARY}:row {number}"
            if len(cells) != len(header):
                message = f"{origin} has {len(cells)} cells, the header {len(header)}: is the file cut off?"
                yield problem(f"{SUMMARY}-{number}", origin, "unparsable", message)
                continue
            row = dict(zip(header, cells, strict=True))
            file, refusal = members.get(row[ID], (None, None))
            named.add(row[ID])
            if file is None:
                yield problem(row[ID], origin, "no_cif", f"{origin}: {ARCHIVE} holds no CIF named {row[ID]!r}")
            else:
                yield refusal or _cif(file, row)
        for uid, (file, refusal) in members.items():
            if uid not in named:
                yield refusal or problem(uid, f"{ARCHIVE}:{file.name}", "no_row", f"{SUMMARY} has no row {uid!r}")

    return scan_file(directory / SUMMARY, joined)


def _cif(file: SourceFile, row: dict[str, str]) -> RawStructure:
    uid, origin = row[ID], f"{ARCHIVE}:{file.name}"
    try:
        text = file.text()
    except Exception as error:  # decompression raises half a dozen kinds
        reason = "too_large" if isinstance(error, TooLarge) else "unreadable_file"
        return problem(uid, origin, reason, f"{origin} cannot be read ({error})")
    numbers, texts = split_columns({name: row[column] for column, name in COLUMNS.items() if column in row})
    return RawStructure(uid, origin, "cif", text, numbers, texts)
