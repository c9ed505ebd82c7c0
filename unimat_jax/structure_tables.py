"""Readers of tables of structures: CSV, Parquet, ASE database and npz.

Each takes a `SourceFile` and yields RawStructures, a row at a time except for npz. UserError names what the file has
and what it should have. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unimat_jax.errors import UserError
from unimat_jax.structure_parsing import RawStructure, problem
from unimat_jax.structure_streams import MAX_ARRAYS_BYTES, MAX_TEXT_BYTES, SourceFile, TooLarge, too_large

ROWS_AT_ONCE = 256
"""Rows of a Parquet file or an ASE database in memory."""
ID_COLUMNS = ("material_id", "uid", "id", "mat_id", "immutable_id", "entry_id", "task_id")
"""Columns that name a structure, the first one present wins."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MISSING = {"", "nan", "none", "null", "n/a", "na", "-"}


def split_columns(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """The numeric columns of a row (missing values left out) and the text columns; lists and objects are ignored.

    A number that float32 cannot hold is text, so that the report counts it.
    """
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in row.items():
        if not name or name in ID_COLUMNS or name.startswith("Unnamed:"):
            continue
        if isinstance(value, str):
            if value.strip().lower() in _MISSING:
                continue
            number = _float32(value) if "_" not in value else None  # Python reads "1_0" as 10
        elif isinstance(value, bool | np.bool_):
            number = None
        elif isinstance(value, int | float | np.number):
            number = _float32(value)
            if number is None and value != value:
                continue
        else:
            continue
        if number is None:
            texts[name] = str(value)[:200] if not isinstance(value, int) or isinstance(value, bool) else "a huge number"
        else:
            numbers[name] = number
    return numbers, texts


def _float32(value: Any) -> float | None:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= _FLOAT32_MAX else None


def uid_of(row: Mapping[str, Any], fallback: str) -> str:
    return next((str(row[c]) for c in ID_COLUMNS if row.get(c) not in (None, "")), fallback)


def scan_csv(file: SourceFile) -> Iterator[RawStructure]:
    """CSV with a `cif` column (the CDVAE layout) or a `structure` column of pymatgen JSON."""
    header, rows = open_csv(file)
    key = "cif" if "cif" in header else "structure"
    if key not in header:
        found = ", ".join(c or "(unnamed)" for c in header) or "none"
        raise UserError(
            f"{file.name} has no 'cif' column (columns: {found}): rename the column that holds the CIF texts"
        )
    for index, cells in enumerate(rows):
        if len(cells) != len(header):
            uid, origin = f"{file.uid}-{index}", f"{file.name}:row {index}"
            message = f"{origin} has {len(cells)} cells, the header {len(header)}: is the file cut off?"
            yield problem(uid, origin, "unparsable", message)
            continue
        row = dict(zip(header, cells, strict=True))
        others = {k: v for k, v in row.items() if k not in (key, "cif.conv")}
        yield _cell_of_table(file, index, row[key], others, key)


def open_csv(file: SourceFile) -> tuple[list[str], Iterator[list[str]]]:
    """The column names and the rows. Raises TooLarge and csv.Error, also while the rows are read."""
    csv.field_size_limit(MAX_TEXT_BYTES)

    def rows() -> Iterator[list[str]]:
        try:
            yield from filter(None, csv.reader(file.lines(newline="")))
        except csv.Error as error:
            raise too_large(f"a cell of {file.name}") if "field limit" in str(error) else error from error

    read = rows()
    return next(read, []), read


def _cell_of_table(file: SourceFile, index: int, value: Any, row: Mapping[str, Any], key: str) -> RawStructure:
    uid, origin = uid_of(row, f"{file.uid}-{index}"), f"{file.name}:row {index}"
    numbers, texts = split_columns(row)
    if value is None or (isinstance(value, str) and not value.strip()):
        return problem(uid, origin, "no_structure", f"{origin}: the {key!r} cell is empty")
    if isinstance(value, str | bytes) and len(value) > MAX_TEXT_BYTES:
        return problem(uid, origin, "too_large", str(too_large(f"the {key!r} cell of {origin}")))
    if key == "cif":
        return RawStructure(uid, origin, "cif", str(value), numbers, texts)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            return problem(uid, origin, "unparsable", f"{origin}: the 'structure' cell is no JSON: {error}")
    return RawStructure(uid, origin, "pymatgen", value, numbers, texts)


_NAMES = {
    "numbers": ("numbers", "atomic_numbers"),
    "species": ("species", "species_at_sites", "elements"),
    "frac_coords": ("frac_coords", "fractional_coordinates"),
    "positions": ("positions", "cartesian_site_positions", "cart_coords"),
    "lattice": ("lattice", "lattice_vectors", "cell"),
}


def scan_parquet(file: SourceFile) -> Iterator[RawStructure]:
    """Parquet with a `cif`, a `structure` (pymatgen JSON or struct) or numbers / frac_coords / lattice columns."""
    import pyarrow.parquet

    content = file.path if file.path else io.BytesIO(file.read(MAX_ARRAYS_BYTES))
    table = pyarrow.parquet.ParquetFile(content, pre_buffer=False)  # pre_buffer holds a whole row group
    columns = table.schema_arrow.names
    key = next((k for k in ("cif", "structure") if k in columns), None)
    names = {part: next((c for c in choices if c in columns), None) for part, choices in _NAMES.items()}
    if key is None:
        if names["numbers"] or not names["species"]:
            names["species"] = None
        has_all = (
            names["lattice"] and (names["numbers"] or names["species"]) and (names["frac_coords"] or names["positions"])
        )
        if not has_all:
            raise UserError(
                f"{file.name} has columns {', '.join(columns)}: give a 'cif' column, a 'structure' column of pymatgen "
                "JSON, or 'numbers', 'frac_coords' and 'lattice'"
            )
    index = 0
    for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
        for row in batch.to_pylist():
            if key:
                others = {k: v for k, v in row.items() if k not in (key, "cif.conv")}
                yield _cell_of_table(file, index, row[key], others, key)
            else:
                payload = {part: row[name] for part, name in names.items() if name and row[name] is not None}
                origin = f"{file.name}:row {index}"
                others = {k: v for k, v in row.items() if k not in names.values()}
                yield RawStructure(
                    uid_of(row, f"{file.uid}-{index}"), origin, "arrays", payload, *split_columns(others)
                )
            index += 1


def scan_npz(file: SourceFile) -> Iterator[RawStructure]:
    """npz with `n_atoms`, `numbers`, `frac_coords`, `lattice` and arrays by name, one value a structure.

    The arrays are in memory as a whole: TooLarge above MAX_ARRAYS_BYTES.
    """
    try:
        content = file.path if file.path else io.BytesIO(file.read(MAX_ARRAYS_BYTES))
        with zipfile.ZipFile(content) as members:
            if sum(member.file_size for member in members.infolist()) > MAX_ARRAYS_BYTES:
                raise too_large(file.name, MAX_ARRAYS_BYTES)
        with np.load(content, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, MemoryError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, TooLarge):
            raise
        raise UserError(f"{file.name} cannot be read as npz without pickle: {error}") from error
    missing = {"n_atoms", "numbers", "frac_coords", "lattice"} - arrays.keys()
    if missing:
        raise UserError(
            f"{file.name} lacks {sorted(missing)} (it has {sorted(arrays)}): see the npz layout in the README"
        )
    n_atoms = arrays.pop("n_atoms")
    numbers, frac, lattice = arrays.pop("numbers"), arrays.pop("frac_coords"), arrays.pop("lattice")
    if n_atoms.ndim != 1 or n_atoms.dtype.kind not in "iu" or (n_atoms < 0).any():
        raise UserError(f"{file.name}: n_atoms must be counts, one a structure: remake it")
    n_atoms = n_atoms.astype(np.int64)
    stops = np.cumsum(n_atoms)
    shapes = (numbers.shape, frac.shape, lattice.shape)
    if shapes != ((stops[-1:].sum(),), (stops[-1:].sum(), 3), (len(n_atoms), 3, 3)):
        raise UserError(
            f"{file.name}: n_atoms has {len(n_atoms)} structures with {stops[-1:].sum()} atoms, but numbers, "
            f"frac_coords and lattice have the shapes {shapes}: remake it"
        )
    columns = {name: a.tolist() for name, a in arrays.items() if a.ndim == 1 and len(a) == len(n_atoms)}
    for index, stop in enumerate(stops):
        atoms = slice(stop - n_atoms[index], stop)
        payload = {"numbers": numbers[atoms], "frac_coords": frac[atoms], "lattice": lattice[index]}
        row = {name: values[index] for name, values in columns.items()}
        uid = uid_of(row, f"{file.uid}-{index}")
        yield RawStructure(uid, f"{file.name}:{index}", "arrays", payload, *split_columns(row))


def scan_ase_db(file: SourceFile) -> Iterator[RawStructure]:
    """An ASE SQLite database; key-value pairs and the energy become columns."""
    if file.path is None:
        yield problem(
            file.uid, file.name, "not_in_zip", f"{file.name}: an ASE database is not read inside a zip: unpack it"
        )
        return
    import ase.db

    database, last = ase.db.connect(str(file.path), use_lock_file=False), 0
    while rows := list(database.select(f"id>{last}", limit=ROWS_AT_ONCE, sort="id")):  # a plain select holds all rows
        last = rows[-1].id
        yield from (_row_of_ase_db(file, row) for row in rows)


def _row_of_ase_db(file: SourceFile, row: Any) -> RawStructure:
    columns = dict(row.key_value_pairs)
    if row.get("energy") is not None:
        columns["energy"] = row.get("energy")
    dropped = [k for k in ("initial_magmoms", "magmoms", "forces", "initial_charges", "charges", "tags") if k in row]
    payload = {
        **{"numbers": row.numbers, "positions": row.positions, "lattice": row.cell, "pbc": row.pbc},
        "dropped": dropped + (["constraints"] if row.get("constraints") else []),
    }
    uid = uid_of(columns, f"{file.uid}-{row.id}")
    return RawStructure(uid, f"{file.name}:row {row.id}", "arrays", payload, *split_columns(columns))
