"""Crystals -> folders of VASP input as the Materials Project makes them: two relaxations and a static point.

The files are pymatgen's own sets, MPRelaxSet and MPStaticSet: INCAR, KPOINTS, POSCAR and POTCAR (or POTCAR.spec) of the
relaxations, INCAR.static and KPOINTS.static of the static point. `run_vasp.py` makes the latter anew, for the relaxed
cell.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import Entry, read_entries
from unimat_jax.evaluation.outputs import prepare_directory
from unimat_jax.evaluation.pool import Failure, map_isolated

RUNS, MANIFEST, FOLDERS, MADE_BY = "runs", "manifest.csv", "folders.txt", "inputs.json"
SCRIPTS = ("run_vasp.py", "submit.sh")
COLUMNS = ("uid", "status", "folder", "formula", "num_atoms", "settings", "potentials", "message")
MIN_DISTANCE = 0.5
"""Angstrom. Nearer atoms are none that a self-consistent cycle would end with."""
NEWER = ("Li", "Na", "Mg", "Ge", "Ga")
SETTINGS = {
    "mp": "the Materials Project's: PBE(+U), 520 eV",
    "unimat": f"the same, but potentials of {', '.join(NEWER)} from PBE_54: the UniMat paper took newer ones for these",
}
FUNCTIONALS = ("PBE", "PBE_52", "PBE_54", "PBE_64")
TIMEOUT_S = 120.0
"""For one structure's files."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How input is made. settings: of SETTINGS; symprec: Angstrom, that the primitive standard cell is found with, 0:
    the cell as it is; functional: the potentials' release; spec: names of potentials in place of potentials."""

    settings: str = "mp"
    symprec: float = 0.01
    functional: str = "PBE"
    spec: bool = True

    def sets(self, crystal: Crystal) -> tuple[Any, Any]:
        """pymatgen's (MPRelaxSet, MPStaticSet) of a crystal.

        Raises CrystalError (`no_potential`, `overlapping_atoms`, `not_symmetrised`).
        """
        from pymatgen.io.vasp.sets import MPRelaxSet, MPStaticSet, standardize_structure

        missing = sorted(set(crystal.symbols) - set(MPRelaxSet.CONFIG["POTCAR"]))
        if missing:
            raise CrystalError("no_potential", f"the Materials Project has no potential for {', '.join(missing)}")
        if crystal.min_distance < MIN_DISTANCE:
            raise CrystalError("overlapping_atoms", f"two atoms are {crystal.min_distance:.3g} A apart")
        structure = crystal.to_pymatgen()
        if self.symprec:
            try:
                structure = standardize_structure(structure, sym_prec=self.symprec)
            except Exception as error:
                raise CrystalError(
                    "not_symmetrised", f"no standard cell at symprec {self.symprec} ({error}): take --symprec=0"
                ) from error
        functional: Any = self.functional
        both = [kind(structure, user_potcar_functional=functional) for kind in (MPRelaxSet, MPStaticSet)]
        return both[0], both[1]

    def functional_of(self, symbol: str) -> str:
        """The release that an element's potential is from."""
        return "PBE_54" if self.settings == "unimat" and symbol in NEWER else self.functional

    def write(self, crystal: Crystal, folder: Path) -> str:
        """Writes a crystal's files into a new folder, all or none, and returns its potentials, as "Ba_sv (PBE) ...". A
        folder that is there only gets the POTCAR that it lacks.

        Raises CrystalError as `sets` does, and `no_potcar` where the user's library lacks one.
        """
        from pymatgen.io.vasp.inputs import Poscar

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            relax, static = self.sets(crystal)
            releases = [self.functional_of(element) for element in relax.poscar.site_symbols]
            potentials = list(zip(relax.potcar_symbols, releases, strict=True))
            texts = {"POTCAR.spec": "\n".join(relax.potcar_symbols)} if self.spec else {"POTCAR": potcar(potentials)}
            if not folder.is_dir():
                poscar = Poscar(relax.poscar.structure, comment=crystal.uid or crystal.formula)
                texts |= {
                    "INCAR": str(relax.incar), "KPOINTS": str(relax.kpoints), "INCAR.static": str(static.incar),
                    "KPOINTS.static": str(static.kpoints), "POSCAR": poscar.get_str(significant_figures=16),
                }  # fmt: skip
        target = folder if folder.is_dir() else folder.with_name(f".{folder.name}.part")
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (target / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        if target != folder:
            target.rename(folder)
        return " ".join(f"{symbol} ({release})" for symbol, release in potentials)


def potcar(potentials: Sequence[tuple[str, str]]) -> str:
    """The POTCAR of (symbol, release) pairs from the user's library. Raises CrystalError (`no_potcar`)."""
    from pymatgen.io.vasp.inputs import PotcarSingle

    texts = []
    for symbol, release in potentials:
        try:
            functional: Any = release
            texts.append(str(PotcarSingle.from_symbol_and_functional(symbol, functional)).rstrip("\n") + "\n")
        except Exception as error:
            raise CrystalError("no_potcar", f"{symbol} of {release}: {error}") from error
    return "".join(texts)


def has_potentials() -> bool:
    """Whether pymatgen knows where the user's POTCARs are."""
    from pymatgen.core import SETTINGS as pymatgen_settings

    return bool(pymatgen_settings.get("PMG_VASP_PSP_DIR"))


def folder_name(number: int, uid: str) -> str:
    """A name that every file system takes, with a number that makes it the only one: "00017-sample_3"."""
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", uid).strip("._")[:60]
    return f"{number:05d}-{safe}" if safe else f"{number:05d}"


@dataclasses.dataclass(frozen=True)
class _Write:
    """For the pool: (crystal, folder) -> potentials."""

    inputs: Inputs

    def __call__(self, task: tuple[Crystal, Path]) -> str:
        return self.inputs.write(*task)


def write_inputs(
    structures: Sequence[str | Path],
    inputs: Inputs,
    *,
    output_dir: Path,
    resume: bool = False,
    overwrite: bool = False,
    num_workers: int | None = None,
) -> list[dict[str, Any]]:
    """Writes `output_dir`/runs/FOLDER for each structure, manifest.csv (a row a structure, those without input too),
    folders.txt, run_vasp.py and submit.sh, and returns the manifest's rows.

    resume: folders that are there stay as they are, but for a POTCAR that they lack. Raises UserError for inputs that
    cannot be read, other structures or flags than were there before, and an `overwrite` of results.
    """
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    entries = read_entries(structures)
    runs = output_dir / RUNS
    before = _before(output_dir, entries, inputs, resume=resume, overwrite=overwrite)
    if not before:
        made = (MANIFEST, FOLDERS, MADE_BY, *SCRIPTS)
        prepare_directory(output_dir, resume=resume, overwrite=overwrite, kept=RUNS, made=made, what="VASP input")
    runs.mkdir(parents=True, exist_ok=True)
    (output_dir / MADE_BY).write_text(json.dumps(dataclasses.asdict(inputs), indent=1) + "\n", encoding="utf-8")
    folders = [runs / folder_name(number, entry.uid) for number, entry in enumerate(entries, 1)]
    todo = [
        (entry.crystal, folder)
        for entry, folder in zip(entries, folders, strict=True)
        if entry.crystal is not None and not _complete(folder, inputs)
    ]
    found = map_isolated(_Write(inputs), todo, num_workers=num_workers, timeout_s=TIMEOUT_S, progress="writing")
    answers = {folder: answer for (_, folder), answer in zip(todo, found, strict=True)}
    rows = []
    for entry, folder in zip(entries, folders, strict=True):
        row = _row(entry, folder, answers.get(folder), inputs)
        rows.append({**row, "potentials": row["potentials"] or before.get(row["folder"], {}).get("potentials", "")})
    with (output_dir / MANIFEST).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [str(name) for name in COLUMNS])
        writer.writeheader()
        writer.writerows(rows)
    written = [row["folder"] for row in rows if row["status"] == "written"]
    (output_dir / FOLDERS).write_text("".join(f"{folder}\n" for folder in written), encoding="utf-8")
    for name in SCRIPTS:
        shutil.copy(Path(__file__).with_name(name), output_dir / name)
    return rows


def _row(entry: Entry, folder: Path, answer: str | Failure | None, inputs: Inputs) -> dict[str, Any]:
    """The manifest's row; answer: None where the folder was there before."""
    row = dict.fromkeys(COLUMNS, "") | {"uid": entry.uid, "settings": inputs.settings}
    if entry.crystal is None:
        return row | {"status": f"failed({entry.reason})", "message": entry.message}
    row |= {"formula": entry.crystal.formula, "num_atoms": entry.crystal.num_atoms}
    row |= {"folder": f"{RUNS}/{folder.name}"} if folder.is_dir() else {}
    if isinstance(answer, Failure):
        return row | {"status": f"failed({answer.reason})", "message": answer.message}
    return row | {"status": "written", "potentials": answer or ""}


def read_manifest(path: Path) -> list[dict[str, str]]:
    """The rows of a manifest.csv. Raises UserError where it is none of ours."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"uid", "status", "folder"} <= set(rows[0]):
        raise UserError(f"{path} has no columns uid, status and folder: it is no manifest of `unimat vasp inputs`")
    return rows


def _complete(folder: Path, inputs: Inputs) -> bool:
    return folder.is_dir() and (inputs.spec or (folder / "POTCAR").is_file())


def _before(
    output_dir: Path, entries: Sequence[Entry], inputs: Inputs, *, resume: bool, overwrite: bool
) -> dict[str, dict[str, str]]:
    """The rows of the manifest that is gone on with, by folder. Keeps a manifest true to its folders, and runs that
    cost processor time from an overwrite."""
    if overwrite and (output_dir / RUNS).is_dir():
        results = next((output_dir / RUNS).glob("*/vasprun.xml*"), None)
        if results is not None:
            raise UserError(f"--overwrite would delete results ({results}): name another --output_dir")
        for folder in (output_dir / RUNS).iterdir():
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    if not resume:
        return {}
    if (output_dir / MADE_BY).is_file():
        there = json.loads((output_dir / MADE_BY).read_text(encoding="utf-8")) | {"spec": inputs.spec}
        if there != dataclasses.asdict(inputs):
            raise UserError(f"--resume: {output_dir} was made by {there}: give the same flags, or another --output_dir")
    rows = read_manifest(output_dir / MANIFEST) if (output_dir / MANIFEST).is_file() else []
    uids = [entry.uid for entry in entries]
    if [row["uid"] for row in rows] != uids[: len(rows)]:
        raise UserError(
            f"--resume: {output_dir / MANIFEST} is of other structures: name the same ones, in order (more may "
            "follow), or another --output_dir"
        )
    return {row["folder"]: row for row in rows}
