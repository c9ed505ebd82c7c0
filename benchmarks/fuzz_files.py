"""Files of crystals that were valid before they were damaged: what `benchmarks.fuzz` reads."""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.fuzz_damage import (
    CIF,
    EXTXYZ,
    JUNK,
    NUMBERS,
    POSCAR,
    SPECIES,
    Random,
    damaged,
    flip,
    known_damage,
    pick,
)
from unimat_jax.crystal import Crystal


def make(kind: str, crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
    """A file's name and content: crystals in the format `kind`, damaged `damages` times."""
    return FORMATS[kind](crystals, random, damages)


def _text_file(name: str, write: Callable[[Crystal], str], known: list, many: bool = False):
    def content(crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
        text = "".join(write(c) for c in (crystals if many else crystals[:1]))
        data = damaged(text, random, damages, known).encode("utf-8", errors="replace")
        return _packed(name, data, random, damages)

    return content


def _packed(name: str, data: bytes, random: Random, damages: int, suffixes: Sequence[str] = (".gz",)):
    """Sometimes compressed, and then sometimes damaged once more."""
    if random.random() < 0.1:
        suffix = pick(random, suffixes)
        data = gzip.compress(data, mtime=0) if suffix == ".gz" else bz2.compress(data)
        return name + suffix, flip(random, data) if damages and random.random() < 0.5 else data
    return name, flip(random, data) if damages and random.random() < 0.1 else data


# JSON ----------------------------------------------------------------------------------------------------------------


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON tree."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    found = [(value, key) for key in keys]
    return found + [node for key in keys for node in _nodes(value[key])]


def _damage_tree(tree: Any, random: Random) -> None:
    container, key = pick(random, _nodes(tree))
    kind = random.integers(6)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = pick(random, SPECIES)
    elif kind == 2:
        other, other_key = pick(random, _nodes(tree))
        container[key] = copy.deepcopy(other[other_key])
    elif kind == 3 and isinstance(container[key], list):
        container[key] = container[key] * 3
    elif kind == 4 and isinstance(container[key], float | int):
        container[key] = pick(random, [0, -1, 1e-308, 1e308, 1e9, float("nan"), -float("inf"), 10**30, "1", 0.5])
    else:
        container[key] = copy.deepcopy(pick(random, JUNK))


def _json(crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
    structures = [c.to_pymatgen().as_dict() for c in crystals]
    entries: list[Any] = [
        {
            "@class": "ComputedStructureEntry",
            "energy": -1.0,
            "entry_id": None,
            "structure": s,
            "data": {"mat_id": c.uid},
        }
        for s, c in zip(structures, crystals, strict=True)
    ]
    table = {
        "columns": ["structure", "gap"],
        "index": [c.uid for c in crystals],
        "data": [[s, 0.5] for s in structures],
    }
    by_id = {c.uid: s for c, s in zip(crystals, structures, strict=True)}
    tree = pick(
        random,
        [structures, entries, {"entries": entries}, table, by_id, structures[0], {"x": {"structure": structures}}],
    )
    tree = json.loads(json.dumps(tree))
    in_tree = int(random.integers(damages + 1))
    for _ in range(in_tree):
        if _nodes(tree):
            _damage_tree(tree, random)
    lines = isinstance(tree, list) and random.random() < 0.3
    text = "".join(json.dumps(entry) + "\n" for entry in tree) if lines else json.dumps(tree)
    if damages and random.random() < 0.05:
        deep = "[" * 100_000
        text = pick(random, [deep, text.replace("[", deep, 1), '{"a":' * 50_000, text + text, '"' + text, ""])
    text = damaged(text, random, damages - in_tree, [])
    name = "crystals.jsonl" if lines else "crystals.json"
    return _packed(name, text.encode("utf-8", errors="replace"), random, damages, (".gz", ".bz2", ".bz2"))


# Tables and archives -------------------------------------------------------------------------------------------------


def _csv(crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["", "material_id", "band_gap", "cif"])
    in_cells = int(random.integers(damages + 1))
    for number, c in enumerate(crystals):
        cells = [str(number), c.uid, "0.5", c.to_cif()]
        for _ in range(in_cells if number == 0 else 0):
            at = int(random.integers(4))
            cells[at] = (
                pick(random, [*NUMBERS, "", "x" * 300, "-", '"', "a\nb"])
                if at < 3
                else damaged(cells[at], random, 1, CIF)
            )
        writer.writerow(cells)
    text = damaged(
        file.getvalue(), random, damages - in_cells, known_damage((r"cif\b", ["structure", "CIF", '"cif', ""]))
    )
    return _packed("crystals.csv", text.encode("utf-8", errors="replace"), random, damages, (".gz", ".bz2"))


def _arrays(crystals: Sequence[Crystal]) -> dict[str, np.ndarray]:
    return {
        "material_id": np.array([c.uid for c in crystals]),
        "n_atoms": np.array([c.num_atoms for c in crystals]),
        "numbers": np.concatenate([c.atomic_numbers for c in crystals]),
        "frac_coords": np.concatenate([c.frac_coords for c in crystals]),
        "lattice": np.stack([c.lattice for c in crystals]),
        "band_gap": np.linspace(0, 1, len(crystals)),
    }


def _damage_array(array: np.ndarray, random: Random) -> np.ndarray:
    kind = random.integers(8)
    if kind == 0 and array.size and array.dtype.kind in "if":
        array = array.astype(np.float64)
        array.flat[int(random.integers(array.size))] = pick(
            random, [np.nan, np.inf, 0, -1, 1e308, 1e9, 0.5, 300, 2.0**63]
        )
        return array
    if kind == 1:
        return array[:-1]
    if kind == 2:
        return array.reshape(-1)
    if kind == 3:
        return array.astype(object)
    if kind == 4:
        with np.errstate(invalid="ignore", over="ignore"):
            return array.astype(pick(random, ["U5", "f2", "i1", "c16", "?"])) if array.dtype.kind in "if" else array
    if kind == 5:
        return np.zeros_like(array)
    if kind == 6:
        return array[None]
    return np.concatenate([array, array])


def _npz(crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
    arrays = _arrays(crystals)
    in_arrays = int(random.integers(damages + 1))
    for _ in range(in_arrays):
        name = pick(random, sorted(arrays))
        if random.random() < 0.1 and len(arrays) > 1:
            del arrays[name]
        else:
            arrays[name] = _damage_array(arrays[name], random)
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    data = file.getvalue()
    return "crystals.npz", flip(random, data) if damages > in_arrays else data


def _parquet(crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, list] = {"material_id": [c.uid for c in crystals], "band_gap": [0.5] * len(crystals)}
    kind = pick(random, ["cif", "structure", "arrays"])
    if kind == "cif":
        columns["cif"] = [c.to_cif() for c in crystals]
    elif kind == "structure":
        columns["structure"] = [json.dumps(c.to_pymatgen().as_dict()) for c in crystals]
    else:
        columns["numbers"] = [c.atomic_numbers.tolist() for c in crystals]
        columns["frac_coords"] = [c.frac_coords.tolist() for c in crystals]
        columns["lattice"] = [c.lattice.tolist() for c in crystals]
    in_cells = int(random.integers(damages + 1))
    for _ in range(in_cells):
        name = pick(random, sorted(columns))
        cell = columns[name][0]
        if isinstance(cell, str):
            columns[name][0] = damaged(cell, random, 1, CIF if kind == "cif" else [])
        elif isinstance(cell, list) and cell:
            cell = copy.deepcopy(cell)
            container, key = pick(random, _nodes(cell))
            if not isinstance(container[key], list):
                container[key] = pick(random, [0, -1, 300, None])
            columns[name][0] = cell
        else:
            columns[name] = pick(random, [[None] * len(crystals), ["x"] * len(crystals), [1e308] * len(crystals)])
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    data = file.getvalue()
    return "crystals.parquet", flip(random, data) if damages > in_cells else data


def _zip(crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
    file = io.BytesIO()
    in_members = int(random.integers(damages + 1))
    with zipfile.ZipFile(
        file, "w", pick(random, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    ) as archive:
        for number, c in enumerate(crystals):
            text = damaged(c.to_cif(), random, in_members if number == 0 else 0, CIF)
            archive.writestr(f"{c.uid}.cif", text.encode("utf-8", errors="replace"))
        if damages and random.random() < 0.3:
            names = [
                "../up.cif",
                "/etc/x.cif",
                "c:\\x.cif",
                "a/../../b.cif",
                "inside.zip",
                "x.gz",
                "a\x01b.cif",
                "é.cif",
            ]
            names += ["." * 300 + ".cif", "x.cif.gz", "\u202e.cif", "._x.cif", "POSCAR"]
            archive.writestr(pick(random, names), crystals[0].to_cif())
        if damages and random.random() < 0.1:
            link = zipfile.ZipInfo("link.cif")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
    data = file.getvalue()
    for _ in range(damages - in_members):
        data = _damage_header(random, data) if random.random() < 0.6 else flip(random, data)
    return "crystals.zip", data


def _damage_header(random: Random, data: bytes) -> bytes:
    """A field of a zip's local header, its directory or the end of it."""
    signature, size = pick(random, [(b"PK\x03\x04", 30), (b"PK\x01\x02", 46), (b"PK\x05\x06", 22)])
    starts = [m.start() for m in re.finditer(re.escape(signature), data)]
    if not starts:
        return data
    at = pick(random, starts) + int(random.integers(4, size))
    changed = bytearray(data)
    width = pick(random, [1, 2, 4])
    changed[at : at + width] = pick(random, [b"\xff" * width, b"\0" * width, random.bytes(width)])
    return bytes(changed)


FORMATS: dict[str, Callable[[Sequence[Crystal], Random, int], tuple[str, bytes]]] = {
    "cif": _text_file("crystal.cif", Crystal.to_cif, CIF),
    "cif blocks": _text_file("crystals.cif", Crystal.to_cif, CIF, many=True),
    "poscar": _text_file("POSCAR", Crystal.to_poscar, POSCAR),
    "extxyz": _text_file("crystals.extxyz", Crystal.to_extxyz, EXTXYZ, many=True),
    "json": _json,
    "csv": _csv,
    "npz": _npz,
    "parquet": _parquet,
    "zip": _zip,
}
