"""Readers of tables of structures: CSV, JSON, Parquet, ASE database and npz.

Each takes a `SourceFile` and yields RawStructures, lazily where the format allows. UserError names what the file has
and what it should have.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import dataclasses
import gzip
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from unimat_jax.errors import UserError
from unimat_jax.structure_parsing import RawStructure, problem

ID_COLUMNS = ("material_id", "uid", "id", "mat_id", "immutable_id", "entry_id", "task_id")
"""Columns that name a structure, the first one present wins."""
_MISSING = {"", "nan", "none", "null", "n/a", "na", "-"}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file on disk or inside a zip. `name`: as shown; `uid`: what a single structure in it is called."""

    name: str
    uid: str
    open: Callable[[], IO[bytes]]
    path: Path | None = None

    @contextlib.contextmanager
    def binary(self) -> Iterator[IO[bytes]]:
        """The decompressed content as a stream."""
        with self.open() as stream:
            if self.name.lower().endswith(".gz"):
                with gzip.GzipFile(fileobj=stream) as unzipped:
                    yield unzipped  # type: ignore[misc]
            elif self.name.lower().endswith(".bz2"):
                with bz2.BZ2File(stream) as unzipped:
                    yield unzipped
            else:
                yield stream

    def read(self) -> bytes:
        with self.binary() as stream:
            return stream.read()

    def text(self) -> str:
        return self.read().decode("utf-8", errors="replace")


def split_columns(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """The numeric columns of a row (missing values left out) and the text columns; lists and objects are ignored."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in row.items():
        if not name or name in ID_COLUMNS or name.startswith("Unnamed:"):
            continue
        if isinstance(value, str):
            if value.strip().lower() in _MISSING:
                continue
            try:
                numbers[name] = float(value)
            except ValueError:
                texts[name] = value[:200]
        elif isinstance(value, bool | np.bool_):
            texts[name] = str(value)
        elif isinstance(value, int | float | np.number) and not math.isnan(value):
            numbers[name] = float(value)
    return numbers, texts


def uid_of(row: Mapping[str, Any], fallback: str) -> str:
    return next((str(row[c]) for c in ID_COLUMNS if row.get(c) not in (None, "")), fallback)


def scan_csv(file: SourceFile) -> Iterator[RawStructure]:
    """CSV with a `cif` column (the CDVAE layout) or a `structure` column of pymatgen JSON."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.binary() as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=""))
        columns = reader.fieldnames or []
        if "cif" not in columns and "structure" not in columns:
            found = ", ".join(c or "(unnamed)" for c in columns) or "none"
            raise UserError(
                f"{file.name} has no 'cif' column (columns: {found}): rename the column that holds the CIF texts"
            )
        key = "cif" if "cif" in columns else "structure"
        for index, row in enumerate(reader):
            skip = (key, "cif.conv", None)
            yield _cell_of_table(file, index, row[key], {k: v for k, v in row.items() if k not in skip}, key)


def _cell_of_table(file: SourceFile, index: int, value: Any, row: Mapping[str, Any], key: str) -> RawStructure:
    uid, origin = uid_of(row, f"{file.uid}-{index}"), f"{file.name}:row {index}"
    numbers, texts = split_columns(row)
    if value is None or (isinstance(value, str) and not value.strip()):
        return problem(uid, origin, "no_structure", f"{origin}: the {key!r} cell is empty")
    if key == "cif":
        return RawStructure(uid, origin, "cif", str(value), numbers, texts)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
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

    table = pyarrow.parquet.ParquetFile(file.path if file.path else io.BytesIO(file.read()))
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
    for batch in table.iter_batches(batch_size=1024):
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


def scan_json(file: SourceFile) -> Iterator[RawStructure]:
    """pymatgen JSON: a Structure, a list of Structures or entries, an object id -> either, or a table with columns."""
    try:
        if re.search(r"\.jsonl(\.|$)", file.name.lower()):
            content: Any = [json.loads(line) for line in file.text().splitlines() if line.strip()]
        else:
            content = json.loads(file.text())
    except ValueError as error:
        raise UserError(f"{file.name} is no valid JSON ({error}): is the file cut off?") from error
    if isinstance(content, dict) and {"columns", "data"} <= content.keys():  # pandas orient="split", as matbench has it
        ids = content.get("index", range(len(content["data"])))
        content = {
            str(i): dict(zip(content["columns"], row, strict=True)) for i, row in zip(ids, content["data"], strict=True)
        }
    if isinstance(content, dict) and ("sites" in content or "structure" in content):
        content = {file.uid: content}
    if isinstance(content, dict):
        items = [(str(key), f"{file.name}:{key}", value) for key, value in content.items() if not key.startswith("@")]
    elif isinstance(content, list):
        items = [(f"{file.uid}-{i}", f"{file.name}:{i}", value) for i, value in enumerate(content)]
    else:
        raise UserError(
            f"{file.name} holds a {type(content).__name__}: give a list or an object of pymatgen Structures"
        )
    found = []
    for uid, origin, value in items:
        structures = value.get("structure") if isinstance(value, dict) else None
        if isinstance(structures, list):  # columns of equal length under one key
            for i in range(len(structures)):
                row = {k: v[i] if isinstance(v, list) and len(v) == len(structures) else v for k, v in value.items()}
                found.append(_json_entry(f"{uid}-{i}", f"{origin}:{i}", row, keyed=True))
        else:
            found.append(_json_entry(uid, origin, value, keyed=isinstance(content, dict)))
    if all(raw.format == "problem" for raw in found):
        reason = found[0].payload[1] if found else f"{file.name} is empty"
        raise UserError(f"{file.name} holds no pymatgen Structure: {reason}")
    yield from found


def _json_entry(uid: str, origin: str, value: Any, keyed: bool) -> RawStructure:
    if not isinstance(value, dict):
        return problem(uid, origin, "no_structure", f"{origin} is a {type(value).__name__}, not a structure")
    structure = value if "sites" in value else value.get("structure")
    if isinstance(structure, str):
        try:
            structure = json.loads(structure)
        except ValueError:
            structure = None
    if not isinstance(structure, dict):
        keys = ", ".join(list(value)[:8])
        return problem(uid, origin, "no_structure", f"{origin} has no pymatgen Structure (keys: {keys})")
    if structure is value:
        return RawStructure(uid, origin, "pymatgen", value)
    row = {k: v for k, v in value.items() if k != "structure"}
    for nested in ("data", "parameters"):  # a ComputedStructureEntry's own columns
        if isinstance(value.get(nested), dict):
            row = {**value[nested], **row}
    uid = uid if keyed else uid_of(row, uid)
    row = {
        k: v
        for k, v in row.items()
        if not k.startswith("@") and not (k == "correction" and "energy_adjustments" in row)
    }
    return RawStructure(uid, origin, "pymatgen", structure, *split_columns(row))


def scan_npz(file: SourceFile) -> Iterator[RawStructure]:
    """npz with `n_atoms`, `numbers`, `frac_coords`, `lattice` and arrays by name, one value a structure."""
    try:
        with np.load(io.BytesIO(file.read()), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file.name} cannot be read as npz without pickle: {error}") from error
    missing = {"n_atoms", "numbers", "frac_coords", "lattice"} - arrays.keys()
    if missing:
        raise UserError(
            f"{file.name} lacks {sorted(missing)} (it has {sorted(arrays)}): see the npz layout in the README"
        )
    n_atoms = arrays.pop("n_atoms").astype(np.int64)
    stops = np.cumsum(n_atoms)
    numbers, frac, lattice = arrays.pop("numbers"), arrays.pop("frac_coords"), arrays.pop("lattice")
    if not (stops[-1:].sum() == len(numbers) == len(frac) and len(lattice) == len(n_atoms)):
        raise UserError(
            f"{file.name}: n_atoms adds up to {stops[-1:].sum()}, but there are {len(numbers)} atoms: remake it"
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

    for row in ase.db.connect(str(file.path)).select():
        columns = dict(row.key_value_pairs)
        if row.get("energy") is not None:
            columns["energy"] = row.get("energy")
        dropped = [
            k for k in ("initial_magmoms", "magmoms", "forces", "initial_charges", "charges", "tags") if k in row
        ]
        payload = {
            **{"numbers": row.numbers, "positions": row.positions, "lattice": row.cell, "pbc": row.pbc},
            "dropped": dropped + (["constraints"] if row.get("constraints") else []),
        }
        uid = uid_of(columns, f"{file.uid}-{row.id}")
        yield RawStructure(uid, f"{file.name}:row {row.id}", "arrays", payload, *split_columns(columns))
