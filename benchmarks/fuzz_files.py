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

from unimat_jax.crystal import Crystal

Random = np.random.Generator

NUMBERS = ["nan", "inf", "-inf", "1e308", "-1e308", "1e-308", "-0.0", "0", "1e6", "-1", "1e", "--1", "1.2.3", "0x10"]
NUMBERS += ["99999999999999999999", "1_0", "²", "\uff11", "4.1(2)", "1/0", "?", ".", "0.99999999", "1e-9", "9" * 400]
SPECIES = ["Xx", "Vac", "D", "T", "X", "Q7", "Fe3+", "Og", "n", "h", "é", "0", "SrTi", "Sr:Ti", "H" * 300, "-"]
INSERTED = [
    "\x00",
    "\ufeff",
    "\u202e",
    "\U0001f600",
    "\r",
    "\x1a",
    "\ufffd",
    "\t\t",
    '"',
    "'",
    "#",
    ";",
    ",",
    "\\",
    "%s",
]
JUNK: list[Any] = [None, True, [], {}, "", "x", -1, 0, 1e308, float("nan"), float("inf"), 10**400, [[]], [None], [1, 2]]
NUMBER = re.compile(r"-?\d+\.?\d*(?:[eE][-+]?\d+)?")


def make(kind: str, crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
    """A file's name and content: crystals in the format `kind`, damaged `damages` times."""
    return FORMATS[kind](crystals, random, damages)


def pick(random: Random, choices: Sequence[Any]) -> Any:
    return choices[int(random.integers(len(choices)))]


# Text ----------------------------------------------------------------------------------------------------------------


def _replace_one(pattern: str, random: Random, text: str, new: Callable[[re.Match], str]) -> str:
    found = list(re.finditer(pattern, text))
    if not found:
        return text
    match = pick(random, found)
    return text[: match.start()] + new(match) + text[match.end() :]


def _lines(change: Callable[[Random, list[str]], None]) -> Callable[[Random, str], str]:
    def changed(random: Random, text: str) -> str:
        lines = text.splitlines(keepends=True) or [""]
        change(random, lines)
        return "".join(lines)

    return changed


def _duplicate(random: Random, lines: list[str]) -> None:
    lines.insert(int(random.integers(len(lines))), pick(random, lines))


def _delete(random: Random, lines: list[str]) -> None:
    start = int(random.integers(len(lines)))
    del lines[start : start + int(random.integers(1, 4))]


def _swap_lines(random: Random, lines: list[str]) -> None:
    a, b = random.integers(len(lines), size=2)
    lines[a], lines[b] = lines[b], lines[a]


def _overlap(random: Random, lines: list[str]) -> None:
    """The numbers of one line in another: two atoms at one place."""
    a, b = random.integers(len(lines), size=2)
    numbers = iter(NUMBER.findall(lines[a]))
    lines[b] = NUMBER.sub(lambda m: next(numbers, m.group()), lines[b])


def _swap_tokens(random: Random, text: str) -> str:
    tokens = re.split(r"(\s+)", text)
    a, b = random.integers(len(tokens), size=2)
    tokens[a], tokens[b] = tokens[b], tokens[a]
    return "".join(tokens)


def _cut(random: Random, text: str) -> str:
    return text[: int(random.integers(len(text) + 1))]


def _insert(random: Random, text: str) -> str:
    at = int(random.integers(len(text) + 1))
    return text[:at] + pick(random, INSERTED) * int(random.integers(1, 4)) + text[at:]


def _long_line(random: Random, text: str) -> str:
    at = int(random.integers(len(text) + 1))
    return text[:at] + pick(random, ["x", " ", "1 ", "a=b ", "a={", "(", "'", "0", "\n", " \n"]) * 30_000 + text[at:]


def _number(random: Random, text: str) -> str:
    return _replace_one(NUMBER.pattern, random, text, lambda m: pick(random, NUMBERS))


def _species(random: Random, text: str) -> str:
    return _replace_one(r"\b[A-Z][a-z]?\d*\b", random, text, lambda m: pick(random, SPECIES))


def _flip_text(random: Random, text: str) -> str:
    return _flip(random, text.encode()).decode("utf-8", errors="replace")


TEXT = [_lines(_duplicate), _lines(_delete), _lines(_swap_lines), _lines(_overlap), _swap_tokens, _cut, _insert]
TEXT += [_long_line, _number, _number, _number, _species, _flip_text]


def _known(*changes: tuple[str, Sequence[str]]) -> list[Callable[[Random, str], str]]:
    """Damage that knows the format: (pattern, replacements), with <1> for the pattern's group."""

    def change(pattern: str, new: Sequence[str]) -> Callable[[Random, str], str]:
        def filled(match: re.Match, chosen: str) -> str:
            return chosen.replace("<1>", match.group(1)) if match.groups() else chosen

        return lambda random, text: _replace_one(pattern, random, text, lambda m: filled(m, pick(random, new)))

    return [change(pattern, new) for pattern, new in changes]


CIF = _known(
    (r"(_cell_length_[abc]\s+)\S+", [f"<1>{x}" for x in ("0", "-4", "1e9", "1e308", "nan", "4.1(3)", "", "1e-9")]),
    (r"(_cell_angle_\w+\s+)\S+", [f"<1>{x}" for x in ("0", "180", "200", "1e-6", "179.9999", "-90", "?")]),
    (r"(\s)1\n", [f"<1>{x}\n" for x in ("0.5", "0", "-1", "1.01", "2", "?", "", "1e9")]),
    (r"'x, y, z'", ["'x, y, z, w'", "'1/0+x, y, z'", "'x*x, y, z'", "'x, x, x'", "'0, 0, 0'", "'-x, y'", "x", "''"]),
    (r"'x, y, z'", ["'x, y, z'\n" + "\n".join(f"  {i}  '{i}/97+x, -y, z'" for i in range(2, 150))]),
    (r"'?P 1'?", ["'F m -3 m'", "P1", "'nonsense'", "", "\n;text\n;"]),
    (r"_symmetry_Int_Tables_number\s+\d+", ["_symmetry_Int_Tables_number 999", "_symmetry_Int_Tables_number -1", ""]),
    (
        r"_chemical_formula_sum.*",
        ["_chemical_formula_sum 'Xx9'", "_chemical_formula_sum ''", "_chemical_formula_sum H9"],
    ),
    (r"loop_\n", ["", "loop_\nloop_\n", "loop_\n_atom_site_label\n", ";\n", "save_x\n", "data_again\n"]),
    (r"data_\S*", ["data_", "data_a\ndata_b", "", "data_global"]),
    (r"_atom_site_\w+", ["_atom_site_nothing", "_atom_site_occupancy", "_atom_site_fract_x", "_atom_site_Cartn_x", ""]),
)
POSCAR = _known(
    (r"\n1\.0+\n", ["\n0\n", "\n-50\n", "\n-1e300\n", "\nnan\n", "\n1 1 1\n", "\n\n", "\n1e9\n"]),
    (
        r"\n[\d ]+\n",
        ["\n-1 1 3\n", "\n999999999\n", "\n0\n", "\n1.5 2\n", "\n1\n", "\n" + "1 " * 900 + "\n"],
    ),
    (r"(?i)direct", ["Cartesian", "Selective dynamics\nDirect", "", "Selective", "k"]),
    (
        r"\n(?:[A-Z][a-z]? ?)+\n",
        ["\n", "\nSr_pv Ti/12 O\n", "\nVac O\n", "\nSr Sr Sr\n", "\n" + "Sr " * 200 + "\n"],
    ),
)
EXTXYZ = _known(
    (r"(?m)^\d+$", ["0", "-1", "999999999999", "99999999", "²", "1", "3", "1.0", "+5", " ", "99999"]),
    (
        r'Lattice="[^"]*"',
        ['Lattice="0 0 0 0 0 0 0 0 0"', 'Lattice="1 2 3"', 'Lattice="x"', 'Lattice="', "", 'Lattice=""'],
    ),
    (r"pos:R:3", ["pos:R:999999999", "pos:R:-3", "pos:R:0", "pos:S:3", "pos:R", "forces:R:3", "pos:I:3", "pos:L:3"]),
    (r"species:S:1", ["species:S:2", "Z:I:1", "species:R:1", "", "move_mask:L:1", "tags:I:1"]),
    (r'pbc="[^"]*"', ['pbc="F F F"', "pbc=1", 'pbc="T T"', 'pbc="x"', ""]),
    (
        r"pbc=",
        ["uid=\\u202e pbc=", "energy=nan pbc=", "config={[( pbc=", 'x=\\" pbc=', "momenta=1 pbc=", '_JSON {\\" pbc='],
    ),
)


def _damaged(text: str, random: Random, damages: int, known: list[Callable[[Random, str], str]]) -> str:
    for _ in range(damages):
        text = pick(random, known if known and random.random() < 0.5 else TEXT)(random, text)
    return text


def _text_file(name: str, write: Callable[[Crystal], str], known: list, many: bool = False):
    def content(crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
        text = "".join(write(c) for c in (crystals if many else crystals[:1]))
        data = _damaged(text, random, damages, known).encode("utf-8", errors="replace")
        return _packed(name, data, random, damages)

    return content


def _packed(name: str, data: bytes, random: Random, damages: int, suffixes: Sequence[str] = (".gz",)):
    """Sometimes compressed, and then sometimes damaged once more."""
    if random.random() < 0.1:
        suffix = pick(random, suffixes)
        data = gzip.compress(data, mtime=0) if suffix == ".gz" else bz2.compress(data)
        return name + suffix, _flip(random, data) if damages and random.random() < 0.5 else data
    return name, _flip(random, data) if damages and random.random() < 0.1 else data


# Binary --------------------------------------------------------------------------------------------------------------


def _flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 5))):
        kind = random.integers(5)
        at = int(random.integers(len(changed) + 1))
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << int(random.integers(8))
        elif kind == 1:
            changed[at : at + int(random.integers(1, 9))] = random.bytes(int(random.integers(1, 9)))
        elif kind == 2:
            changed[at : at + 4] = pick(random, [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        elif kind == 3:
            del changed[at : at + int(random.integers(1, 200))]
        else:
            changed[at:at] = changed[at : at + int(random.integers(1, 200))]
    return bytes(changed)


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
    text = _damaged(text, random, damages - in_tree, [])
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
                else _damaged(cells[at], random, 1, CIF)
            )
        writer.writerow(cells)
    text = _damaged(file.getvalue(), random, damages - in_cells, _known((r"cif\b", ["structure", "CIF", '"cif', ""])))
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
    return "crystals.npz", _flip(random, data) if damages > in_arrays else data


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
            columns[name][0] = _damaged(cell, random, 1, CIF if kind == "cif" else [])
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
    return "crystals.parquet", _flip(random, data) if damages > in_cells else data


def _zip(crystals: Sequence[Crystal], random: Random, damages: int) -> tuple[str, bytes]:
    file = io.BytesIO()
    in_members = int(random.integers(damages + 1))
    with zipfile.ZipFile(
        file, "w", pick(random, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    ) as archive:
        for number, c in enumerate(crystals):
            text = _damaged(c.to_cif(), random, in_members if number == 0 else 0, CIF)
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
        data = _damage_header(random, data) if random.random() < 0.6 else _flip(random, data)
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
