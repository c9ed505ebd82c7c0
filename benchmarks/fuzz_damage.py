"""Damage to bytes and texts, with what the formats of one crystal know of themselves: for `fuzz_files.py`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

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


def pick(random: Random, choices: Sequence[Any]) -> Any:
    return choices[int(random.integers(len(choices)))]


def flip(random: Random, data: bytes) -> bytes:
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
    return flip(random, text.encode()).decode("utf-8", errors="replace")


TEXT = [_lines(_duplicate), _lines(_delete), _lines(_swap_lines), _lines(_overlap), _swap_tokens, _cut, _insert]
TEXT += [_long_line, _number, _number, _number, _species, _flip_text]


def known_damage(*changes: tuple[str, Sequence[str]]) -> list[Callable[[Random, str], str]]:
    """Damage that knows the format: (pattern, replacements), with <1> for the pattern's group."""

    def change(pattern: str, new: Sequence[str]) -> Callable[[Random, str], str]:
        def filled(match: re.Match, chosen: str) -> str:
            return chosen.replace("<1>", match.group(1)) if match.groups() else chosen

        return lambda random, text: _replace_one(pattern, random, text, lambda m: filled(m, pick(random, new)))

    return [change(pattern, new) for pattern, new in changes]


CIF = known_damage(
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
POSCAR = known_damage(
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
EXTXYZ = known_damage(
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


def damaged(text: str, random: Random, damages: int, known: list[Callable[[Random, str], str]]) -> str:
    for _ in range(damages):
        text = pick(random, known if known and random.random() < 0.5 else TEXT)(random, text)
    return text
