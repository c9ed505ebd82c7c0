"""One raw structure (text or arrays, as `structure_files.scan` finds it) -> one Crystal, or a CrystalError.

`parse` never guesses: partial occupancies, unknown species, a formula that the listed atoms do not give and the like
are failures; what is taken away (oxidation states, moments, labels, isotopes) is counted in `Changes`.
"""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections import Counter
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.periodic_table import SYMBOLS

Changes = Counter
"""What reading took away from or did to a structure: name -> 1 (summed over structures by whoever reads many)."""

MAX_ATOMS = 100_000
"""Of one structure: what announces, lists or makes more by symmetry is refused before memory is asked for."""
MAX_OPERATION_LENGTH = 100
"""Characters of a symmetry operation such as "-x+1/2, y, z": pymatgen's time grows with the third power."""
MAX_QUOTES = 1000
"""Quotation marks in one line of a CIF, for the same reason."""
MAX_LENGTH = 10_000.0
"""Angstrom, of a cell vector: longer ones are no crystals but numbers gone wrong."""
MAX_FRAC_COORD = 1e6
"""Cells away from the origin: from there on float64 loses the coordinate inside the cell."""
MAX_NAME_LENGTH = 500

_NUMBER_OF = {symbol: z for z, symbol in enumerate(SYMBOLS) if z}
_ISOTOPES = ("D", "T")
_WATER_LIKE = {"Hw", "Ow", "Wat", "wat", "OH", "OH2"}  # CIF labels of real atoms that pymatgen knows


@dataclasses.dataclass(frozen=True)
class RawStructure:
    """One structure as found, not yet parsed.

    origin: "file", "file:row" or "file:frame". format: "cif", "poscar", "extxyz" (payload: text), "pymatgen" (payload:
    a Structure dict), "arrays" (payload: `numbers` or `species`, `frac_coords` or `positions`, `lattice`, `pbc`,
    `dropped`) or "problem" (payload: reason and message). properties: numbers by column; texts: the other columns.
    """

    uid: str
    origin: str
    format: str
    payload: Any
    properties: dict[str, float] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("uid", "origin"):
            object.__setattr__(self, name, printable(str(getattr(self, name)), MAX_NAME_LENGTH))


def printable(text: str, length: int) -> str:
    """The text on one line that any file can hold: no control characters, no halves of surrogate pairs, not empty."""
    if not text.strip():
        return "(no name)"
    if len(text) > length:
        text = text[: length - 3] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" if c > " " else " " for c in text)


def problem(uid: str, origin: str, reason: str, message: str) -> RawStructure:
    """A structure that already failed when it was looked for; `parse` raises it."""
    return RawStructure(uid, origin, "problem", (reason, printable(message, 1000)))


def parse(raw: RawStructure) -> tuple[Crystal, Changes]:
    """The crystal and what was changed. Raises CrystalError: `unparsable`, `disordered`, `bad_element`, `not_finite`,
    `formula_mismatch`, `no_atoms`, `not_periodic`, `cell_degenerate`, `cell_too_large`, `coordinates_too_large`,
    `too_large` and the reasons of a `problem`."""
    changes: Changes = Counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters in them is checked here, and counted or raised
            crystal = _PARSERS[raw.format](raw, changes)
            _check_size(crystal, raw)
    except CrystalError:
        raise
    except Exception as error:  # file readers raise anything at all on broken text
        first_line = (str(error).strip() or "no message").splitlines()[0]
        message = printable(f"{raw.origin}: {type(error).__name__}: {first_line}", 300)
        raise CrystalError("unparsable", message) from error
    return crystal, changes


def _check_size(crystal: Crystal, raw: RawStructure) -> None:
    if crystal.lengths.max() > MAX_LENGTH:
        longest = f"{crystal.lengths.max():.3g}"
        raise CrystalError("cell_too_large", f"{raw.origin}: a cell vector is {longest} A long, limit {MAX_LENGTH:g}")
    if np.abs(crystal.frac_coords).max() > MAX_FRAC_COORD:
        farthest = f"{np.abs(crystal.frac_coords).max():.3g}"
        raise CrystalError(
            "coordinates_too_large",
            f"{raw.origin}: an atom is {farthest} cells away from the origin, the limit is {MAX_FRAC_COORD:g}",
        )


def _check_count(number: int, raw: RawStructure) -> None:
    if number > MAX_ATOMS:
        raise CrystalError("too_large", f"{raw.origin} has {number} atoms, the limit is {MAX_ATOMS}")


def _symbol(text: str, raw: RawStructure, changes: Changes) -> str:
    """The element of a species text such as "Fe3+", "Sr2", "D"; CrystalError where it is none (vacancies, dummies)."""
    letters = re.match(r"[A-Za-z]*", text.strip()).group()  # type: ignore[union-attr]
    if letters in _ISOTOPES:
        changes["isotopes_read_as_H"] = 1
        return "H"
    if re.search(r"\d*[+-]\d*$", text.strip()):
        changes["oxidation_states_stripped"] = 1
    if letters.capitalize() not in _NUMBER_OF:
        raise CrystalError(
            "bad_element", f"{raw.origin}: species {text!r} is no chemical element: take vacancies and dummies out"
        )
    return letters.capitalize()


def _finish(numbers, frac, lattice, raw: RawStructure, changes: Changes) -> Crystal:
    lattice = np.asarray(lattice, np.float64)
    if lattice.shape == (3, 3) and np.isfinite(lattice).all() and np.linalg.det(lattice) < 0:
        changes["left_handed_cell_inverted"] = 1
    return Crystal.create(numbers, frac, lattice, raw.uid, raw.properties)


def _from_structure(structure, raw: RawStructure, changes: Changes) -> Crystal:
    """A pymatgen Structure; what it holds beyond elements, coordinates and cell is counted and left behind."""
    if not all(structure.lattice.pbc):
        raise CrystalError("not_periodic", f"{raw.origin} is not periodic in three directions: give its cell")
    for site in structure:
        for species in site.species:
            if getattr(species, "oxi_state", None) is not None:
                changes["oxidation_states_stripped"] = 1
            if getattr(species, "spin", None) is not None:
                changes["magnetic_moments_dropped"] = 1
        if site.is_ordered:
            symbol = "[HDT]" if site.specie.symbol == "H" else site.specie.symbol
            if not re.fullmatch(rf"{symbol}[\d.+-]*", site.label or site.specie.symbol):
                changes["labels_dropped"] = 1
    for name, values in structure.site_properties.items():
        if any(value is not None for value in values):
            changes["magnetic_moments_dropped" if name == "magmom" else "site_properties_dropped"] = 1
    if getattr(structure, "_charge", None):
        changes["charge_dropped"] = 1
    if np.linalg.det(structure.lattice.matrix) < 0:
        changes["left_handed_cell_inverted"] = 1
    return Crystal.from_pymatgen(structure, raw.uid, raw.properties)


def _parse_cif(raw: RawStructure, changes: Changes) -> Crystal:
    from pymatgen.core import Composition
    from pymatgen.io.cif import CifFile, CifParser

    text = _cif_without_traps(raw)
    block = next((b for b in CifFile.from_str(text).data.values() if "_cell_length_a" in b.data), None)
    if block is None:
        raise CrystalError(
            "no_structure", f"{raw.origin}: no CIF block with a cell (_cell_length_a): is the file cut off?"
        )
    data = block.data
    _check_symmetry(data, raw)
    for key in ("_length_a", "_length_b", "_length_c", "_angle_alpha", "_angle_beta", "_angle_gamma"):
        if re.search(r"nan|inf", str(data[f"_cell{key}"]), re.IGNORECASE):
            raise CrystalError("not_finite", f"{raw.origin}: _cell{key} is {data[f'_cell{key}']!r}: give a number")
    # pymatgen reads a type symbol "Vac" as vanadium, so the symbols are checked first.
    types = data.get("_atom_site_type_symbol")
    if types is None:
        types = [label for label in data["_atom_site_label"] if label not in _WATER_LIKE]
        for label in types:  # a label may go on with letters ("CA1"), so only a wholly unknown one is refused
            letters = re.match(r"[A-Za-z]*", label).group()  # type: ignore[union-attr]
            known = letters[:2].capitalize() in _NUMBER_OF or letters[:1].upper() in (*_NUMBER_OF, *_ISOTOPES)
            if not known or re.match(r"va(c|$)", letters, re.IGNORECASE):
                _symbol(letters or label, raw, changes)
            elif letters in _ISOTOPES:
                changes["isotopes_read_as_H"] = 1
    else:
        for symbol in set(types):
            if symbol not in _WATER_LIKE:
                _symbol(symbol, raw, changes)
    occupancies = [re.sub(r"\(.*", "", str(o)) for o in data.get("_atom_site_occupancy", ())]
    if any(re.fullmatch(r"-?0*\.?0*", o) and o for o in occupancies):
        changes["zero_occupancy_sites_dropped"] = 1
    # Only symmetry operations need coordinates as exact as 1/3; in P1 they are kept as they stand.
    tolerance = 0.0 if _is_p1(data) else 1e-4
    parser = CifParser.from_str(text, frac_tolerance=tolerance, check_cif=False)
    try:
        structure = parser.parse_structures(primitive=False, on_error="raise")[0]
    except ValueError as error:
        if "ccupanc" in str(error):
            raise CrystalError(
                "bad_occupancy", f"{raw.origin}: occupancies on one site add up to more than 1: two atoms at one place?"
            ) from error
        raise
    if any("rounded to ideal" in str(message) for message in parser.warnings):
        changes["coordinates_rounded_to_ideal"] = 1
    crystal = _from_structure(structure, raw, changes)
    stated = str(data.get("_chemical_formula_sum", "")).strip().strip("'\"")
    if re.fullmatch(r"([A-Z][a-z]?[\d.]*\s*)+", stated):
        expected = Composition(re.sub(r"\b[DT](?=[\d.\s]|$)", "H", stated)).fractional_composition
        if not expected.almost_equals(structure.composition.element_composition.fractional_composition, 0.01, 0.002):
            raise CrystalError(
                "formula_mismatch",
                f"{raw.origin}: its atoms give {crystal.formula}, its _chemical_formula_sum says {stated!r}: "
                "the file is cut off or atoms (often H) are not listed",
            )
    return crystal


def _cif_without_traps(raw: RawStructure) -> str:
    """The text without what pymatgen's regular expressions take quadratic time for: blank lines, and many quotes."""
    lines = [line for line in raw.payload.splitlines() if line.strip()]
    quotes = max((line.count("'") + line.count('"') for line in lines), default=0)
    if quotes > MAX_QUOTES:
        raise CrystalError(
            "unparsable", f"{raw.origin}: a line has {quotes} quotation marks, the limit is {MAX_QUOTES}"
        )
    return "\n".join(lines) + "\n"


def _check_symmetry(data, raw: RawStructure) -> None:
    """Operations that pymatgen could take hours for, or that make too many atoms of the listed ones."""
    found = [value for key, value in data.items() if key.rstrip("_").endswith("xyz")]
    operations = [op for value in found for op in (value if isinstance(value, list) else [value])]
    longest = max(map(len, map(str, operations)), default=0)
    if longest > MAX_OPERATION_LENGTH:
        raise CrystalError(
            "unparsable",
            f"{raw.origin}: a symmetry operation has {longest} characters, the limit is {MAX_OPERATION_LENGTH}",
        )
    listed = [len(value) for key, value in data.items() if key.startswith("_atom_site_") and isinstance(value, list)]
    _check_count(max(listed, default=0) * max(len(operations), 1), raw)


def _is_p1(data) -> bool:
    for key in ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz", "_space_group_symop.operation_xyz"):
        if key in data:
            return isinstance(data[key], str) or len(data[key]) == 1
    name = data.get("_symmetry_space_group_name_H-M", data.get("_space_group_name_H-M_alt", "P1"))
    return str(name).replace(" ", "").strip("'\"") == "P1"


def _parse_poscar(raw: RawStructure, changes: Changes) -> Crystal:
    from pymatgen.io.vasp import Poscar

    lines = raw.payload.splitlines()
    if len(lines) < 8:
        raise CrystalError(
            "unparsable", f"{raw.origin} has {len(lines)} lines, a POSCAR has at least 8: is it cut off?"
        )
    symbols = lines[5].split()
    if all(re.fullmatch(r"\d+", s) for s in symbols):
        # pymatgen would take H, He, Li, ... for a VASP 4 file without symbols.
        raise CrystalError("no_symbols", f"{raw.origin}: POSCAR without element symbols on line 6: write them there")
    # "Fe_pv" and "Fe/0ab3" name potentials.
    counts = re.findall(r"\d+", re.sub(r"[!#].*", "", lines[6]), re.ASCII)
    _check_count(sum(int(count[:18]) for count in counts), raw)
    clean = [_symbol(re.split(r"[_/]", s)[0], raw, changes) for s in symbols]
    lines[5] = " ".join(clean)
    poscar = Poscar.from_str("\n".join(lines) + "\n", read_velocities=False)
    return _from_structure(poscar.structure, raw, changes)


def _parse_extxyz(raw: RawStructure, changes: Changes) -> Crystal:
    import ase.io

    lines = raw.payload.splitlines()
    columns = re.search(r'Properties="?([^\s"]+)', lines[1], re.IGNORECASE)
    index, names = 0, columns.group(1).split(":") if columns else ["species", "S", "1"]
    sizes = [int(size) for size in names[2::3]]
    announced, there = sum(sizes), len(lines[2].split()) if len(lines) > 2 else 0
    if min(sizes) < 1 or announced > there:  # ase makes as many columns as are announced
        raise CrystalError(
            "unparsable", f"{raw.origin}: Properties announces {announced} columns, the first atom has {there}"
        )
    for name, size in zip(names[::3], sizes, strict=True):
        if name.lower() in ("species", "symbols"):
            break
        index += size
    else:
        index = 0  # atomic numbers, or nothing that ase will take
    for number in range(2, len(lines)):
        fields = lines[number].split()
        if len(fields) <= index:
            raise CrystalError("unparsable", f"{raw.origin}: atom line {number - 1} is cut off: {lines[number]!r}")
        if not fields[index].isdigit():
            fields[index] = _symbol(fields[index], raw, changes)
            lines[number] = " ".join(fields)
    # A list, because a file name is what ase.io.read would take a string for.
    atoms = ase.io.read(io.StringIO("\n".join(lines) + "\n"), format="extxyz", index=0)
    assert not isinstance(atoms, list)
    if atoms.has("initial_magmoms") or (atoms.calc is not None and "magmoms" in atoms.calc.results):
        changes["magnetic_moments_dropped"] = 1
    per_atom = set(atoms.arrays) - {"numbers", "positions", "initial_magmoms"}
    if atoms.calc is not None:
        per_atom |= {k for k in atoms.calc.results if k not in ("energy", "free_energy", "magmoms", "stress", "magmom")}
    if per_atom or atoms.constraints:
        changes["site_properties_dropped"] = 1
    if not np.isfinite(atoms.cell.array).all():
        raise CrystalError("not_finite", f"{raw.origin}: the lattice is NaN or infinite")
    if atoms.cell.rank == 3 and np.linalg.det(atoms.cell.array) < 0:
        changes["left_handed_cell_inverted"] = 1
    return Crystal.from_ase(atoms, raw.uid, raw.properties)


def _parse_pymatgen(raw: RawStructure, changes: Changes) -> Crystal:
    from pymatgen.core import Structure

    data = raw.payload
    if "sites" not in data or "lattice" not in data:
        raise CrystalError("no_structure", f"{raw.origin}: no pymatgen Structure in it (keys 'lattice' and 'sites')")
    if not np.isfinite(np.asarray(data["lattice"].get("matrix", 0.0), np.float64)).all():
        raise CrystalError("not_finite", f"{raw.origin}: the lattice is NaN or infinite")
    _check_count(len(data["sites"]), raw)
    for site in data["sites"]:
        for species in site.get("species", ()):
            _symbol(str(species["element"]), raw, changes)
            if species.get("spin") is not None or (species.get("properties") or {}).get("spin") is not None:
                changes["magnetic_moments_dropped"] = 1
    return _from_structure(Structure.from_dict(data), raw, changes)


def _parse_arrays(raw: RawStructure, changes: Changes) -> Crystal:
    data = raw.payload
    if not np.all(data.get("pbc", True)):
        raise CrystalError("not_periodic", f"{raw.origin} is not periodic in three directions: give its cell")
    for name in data.get("dropped", ()):
        changes["magnetic_moments_dropped" if "magmom" in name else "site_properties_dropped"] = 1
    numbers = data.get("numbers")
    if numbers is None:
        numbers = [_NUMBER_OF[_symbol(str(s), raw, changes)] for s in data["species"]]
    lattice = np.asarray(data["lattice"], np.float64).reshape(3, 3)
    if "frac_coords" in data:
        frac = np.asarray(data["frac_coords"], np.float64).reshape(-1, 3)
    elif not np.isfinite(lattice).all() or abs(np.linalg.det(lattice)) < 1e-12:
        frac = np.zeros((len(numbers), 3))  # Crystal.create names what is wrong with the lattice
    else:
        frac = np.linalg.solve(lattice.T, np.asarray(data["positions"], np.float64).reshape(-1, 3).T).T
    return _finish(numbers, frac, lattice, raw, changes)


def _parse_problem(raw: RawStructure, changes: Changes) -> Crystal:
    raise CrystalError(*raw.payload)


_PARSERS = {
    "cif": _parse_cif,
    "poscar": _parse_poscar,
    "extxyz": _parse_extxyz,
    "pymatgen": _parse_pymatgen,
    "arrays": _parse_arrays,
    "problem": _parse_problem,
}
