"""Which split a crystal belongs to (a file of ids, or a seeded hash of its id or formula), and more columns by id."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from unimat_jax.errors import UserError
from unimat_jax.periodic_table import ATOMIC_NUMBERS, SYMBOLS
from unimat_jax.structure_tables import ID_COLUMNS, split_columns

_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}


def reduced_formula(slots: np.ndarray) -> str:
    """Reduced formula of a record's slots [N, 3], elements by atomic number: "Sr1O3..." is no pretty name but a key."""
    numbers, counts = np.unique(ATOMIC_NUMBERS[slots[:, 1], slots[:, 2]], return_counts=True)
    divisor = reduce(math.gcd, counts.tolist())
    return "".join(f"{SYMBOLS[z]}{count // divisor}" for z, count in zip(numbers, counts, strict=True))


def split_of_hash(key: str, fractions: Sequence[float], seed: int) -> int:
    """0, 1 or 2 (train, validation, test); the same key and seed give the same split on every machine."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64 * sum(fractions)
    return 0 if place < fractions[0] else 1 if place < fractions[0] + fractions[1] else 2


def read_split_ids(path: str | Path) -> dict[str, int]:
    """id -> 0, 1, 2 from CSV (columns id and split, with or without a header), JSON ({id: split} or {split: [ids]}) or
    lines of "id split". Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--split_ids={path} does not exist: give a file with an id and a split on each line")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        try:
            pairs = _pairs_of_json(json.loads(text))
        except ValueError as error:
            raise UserError(f"--split_ids={path} is no valid JSON: {error}") from error
    else:
        rows = list(csv.reader(text.splitlines())) if "," in text else [line.split() for line in text.splitlines()]
        rows = [[cell.strip() for cell in row] for row in rows if row]
        if rows and len(rows[0]) > 1 and _NAMES.get(rows[0][-1].lower()) is None:
            header = [cell.lower() for cell in rows.pop(0)]
            if "split" not in header:
                raise UserError(f"--split_ids={path}: no 'split' column among {', '.join(header)}")
            split = header.index("split")
            identity = next((i for i, c in enumerate(header) if c in ("id", "material_id", "uid")), 1 - min(split, 1))
            rows = [[row[identity], row[split]] for row in rows]
        pairs = [(row[0], row[-1]) for row in rows]
    splits = {}
    for uid, name in pairs:
        if str(name).lower() not in _NAMES:
            raise UserError(f"--split_ids={path}: {uid!r} has split {name!r}: write train, validation or test")
        if splits.setdefault(uid, _NAMES[str(name).lower()]) != _NAMES[str(name).lower()]:
            raise UserError(f"--split_ids={path}: {uid!r} stands in two splits: keep one")
    if not splits:
        raise UserError(f"--split_ids={path} holds no ids")
    return splits


def read_property_table(path: str | Path) -> dict[str, dict[str, float]]:
    """id -> numbers by column, from a CSV with a header and an id column (the first where none has a known name).
    Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--property_table={path} does not exist: give a CSV with an id column and columns of numbers")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        identity = next((c for c in ID_COLUMNS if c in columns), columns[0] if columns else "")
        table: dict[str, dict[str, float]] = {}
        for row in reader:
            uid = row.pop(identity)
            if uid in table:
                raise UserError(f"--property_table={path}: the id {uid!r} stands there twice: keep one")
            table[uid] = split_columns(row)[0]
    if not any(table.values()):
        raise UserError(
            f"--property_table={path} has no numbers (columns: {', '.join(columns)}): the header comes first"
        )
    return table


def _pairs_of_json(content: object) -> list[tuple[str, str]]:
    if not isinstance(content, Mapping):
        raise ValueError("give an object {id: split} or {split: [ids]}")
    if all(isinstance(ids, list) for ids in content.values()):
        return [(str(uid), str(split)) for split, ids in content.items() for uid in ids]
    return [(str(uid), str(split)) for uid, split in content.items()]
