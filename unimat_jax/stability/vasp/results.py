"""Finished VASP runs -> the same Relaxations that an energy model gives, with the settings that they were made by."""

from __future__ import annotations

import dataclasses
import gzip
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import Entry
from unimat_jax.evaluation.pool import Failure, map_isolated
from unimat_jax.stability.relaxation import Relaxation
from unimat_jax.stability.vasp.inputs import MANIFEST, read_manifest

TIMEOUT_S = 600.0
"""For one run's files."""
ENCUT = 520.0
"""eV, the Materials Project's cutoff."""


@dataclasses.dataclass(frozen=True)
class Run:
    """crystal: that the run began with; settings: columns of the table; version: of VASP."""

    relaxation: Relaxation
    crystal: Crystal | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    version: str = ""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A run's folder -> Run. with_correction: MP2020 is added, and a run that it does not hold for has failed."""

    with_correction: bool

    def __call__(self, folder: Path) -> Run:
        files = vaspruns(folder)
        crystal = _start(folder)
        if not files:
            return Run(Relaxation("failed", "no_vasprun", f"no vasprun.xml in {folder}"), crystal)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stages = []
            for name, path in files:
                try:
                    stages.append((name, _parse(path, last=path == files[-1][1])))
                except Exception as error:
                    text = f"{path.name} cannot be read: {type(error).__name__}: {error}"
                    return Run(Relaxation("failed", "unreadable_vasprun", text[:500]), crystal)
            first, last = stages[0][1], stages[-1][1]
            began = Crystal.from_pymatgen(first.initial_structure)
            if crystal is None or crystal.symbols != began.symbols:
                crystal = began
            settings = {"stage": stages[-1][0]} | settings_of(last)
            return Run(self._relaxation(stages, crystal), crystal, settings, str(last.vasp_version or ""))

    def _relaxation(self, stages: list[tuple[str, Any]], start: Crystal) -> Relaxation:
        name, last = stages[-1]
        energy = float(last.final_energy)
        if not np.isfinite(energy):
            return Relaxation("failed", "no_energy", f"{name or 'the run'} has no total energy")
        step = last.ionic_steps[-1]
        end = last.final_structure
        moved = end.frac_coords - start.frac_coords
        found = Relaxation(
            "converged",
            lattice=end.lattice.matrix.tolist(),
            frac_coords=(start.frac_coords + moved - np.round(moved)).tolist(),
            energy=energy,
            max_force=float(np.linalg.norm(step["forces"], axis=1).max()),
            max_stress=float(np.abs(step["stress"]).max()) / 10 if step.get("stress") is not None else None,  # from kB
            magnetic_moment=magnetic_moment(last),
            force_calls=sum(len(run.ionic_steps) for _, run in stages),
        )
        if problem := unconverged(stages):
            return dataclasses.replace(found, status="not_converged", message=problem)
        if pressure := last.parameters.get("PSTRESS", 0.0):
            problem = f"PSTRESS = {pressure} kB: its energies are enthalpies"
            return dataclasses.replace(found, status="failed", reason="incompatible_settings", message=problem)
        if not self.with_correction:
            return found
        correction, problem = mp2020_of_run(last)
        if problem:
            return dataclasses.replace(found, status="failed", reason="incompatible_settings", message=problem)
        return dataclasses.replace(found, correction=correction)


def vaspruns(folder: Path) -> list[tuple[str, Path]]:
    """(stage, path) of a folder's vasprun.xml files in the order of their making: .relax1, .relax2, ..., .static, plain
    or .gz. One without a stage counts where it is alone: beside others it is of a stage that has not ended."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("vasprun.xml*")):
        match = re.fullmatch(r"vasprun\.xml(?:\.(relax\d*|static))?(?:\.gz)?", path.name)
        if match:
            found.setdefault(match[1] or "", path)
    if len(found) > 1:
        found.pop("", None)
    return sorted(found.items(), key=lambda item: (item[0] == "static", int(re.sub(r"\D", "", item[0]) or 0)))


def _parse(path: Path, *, last: bool) -> Any:
    """eigenvalues: of the last stage alone, which the magnetic moment is from."""
    from pymatgen.io.vasp import Vasprun

    settings = {"parse_dos": False, "parse_potcar_file": False, "exception_on_bad_xml": True}
    run = Vasprun(str(path), parse_eigen=last, **settings)
    if not run.ionic_steps:
        raise ValueError("it has no ionic step")
    return run


def _start(folder: Path) -> Crystal | None:
    """The crystal that a run began with, as its POSCAR has it; custodian keeps the first as POSCAR.orig."""
    from pymatgen.io.vasp import Poscar

    for name in ("POSCAR.orig", "POSCAR.orig.gz", "POSCAR", "POSCAR.gz"):
        path = folder / name
        if path.is_file():
            try:
                text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return Crystal.from_pymatgen(Poscar.from_str(text).structure)
            except Exception:  # vasprun.xml has it too
                return None
    return None


def unconverged(stages: Sequence[tuple[str, Any]]) -> str:
    """What did not converge: the electrons of the last stage, or the last relaxation; "" where all did."""
    name, last = stages[-1]
    if not last.converged_electronic:
        return f"the electronic steps of {name or 'the run'} reached NELM = {last.parameters.get('NELM')}"
    name, relaxed = stages[-2] if name == "static" and len(stages) > 1 else stages[-1]
    if not relaxed.converged_ionic:
        return f"the ionic steps of {name or 'the run'} reached NSW = {relaxed.parameters.get('NSW')}"
    return ""


def magnetic_moment(run: Any) -> float | None:
    """Bohr magnetons a cell, from the occupations of both spins; None for a run without spin."""
    from pymatgen.electronic_structure.core import Spin

    if not run.is_spin or not run.eigenvalues or Spin.down not in run.eigenvalues:
        return None
    weights = np.asarray(run.actual_kpoints_weights)
    up, down = (run.eigenvalues[spin][:, :, 1].sum(1) for spin in (Spin.up, Spin.down))
    return float(weights @ (up - down) / weights.sum())


def settings_of(run: Any) -> dict[str, Any]:
    """What a run's energy depends on, as columns."""
    hubbards = {symbol: value for symbol, value in run.hubbards.items() if value}
    return {
        "run_type": run.run_type, "encut": float(run.parameters.get("ENMAX") or run.incar.get("ENCUT") or 0.0),
        "potentials": "; ".join(run.potcar_symbols),
        "hubbards": " ".join(f"{symbol}={value:g}" for symbol, value in hubbards.items()),
    }  # fmt: skip


def mp2020_of_run(run: Any) -> tuple[float | None, str]:
    """(MP2020 correction in eV a cell, "") by the run's own U values and potentials, or (None, what of its settings is
    not the Materials Project's)."""
    from pymatgen.analysis.compatibility import CompatibilityError, MaterialsProject2020Compatibility
    from pymatgen.entries.computed_entries import ComputedStructureEntry

    run_type = run.run_type.replace("PBE", "GGA", 1) if run.run_type in ("PBE", "PBE+U") else run.run_type
    parameters: dict[str, Any] = {"run_type": run_type, "is_hubbard": run.is_hubbard, "hubbards": run.hubbards,
                                  "potcar_symbols": run.potcar_symbols}  # fmt: skip
    cutoff = settings_of(run)["encut"]
    if cutoff < ENCUT:
        return None, f"ENCUT = {cutoff:g} eV is below the Materials Project's {ENCUT:g}"
    entry = ComputedStructureEntry(run.final_structure, float(run.final_energy), parameters=parameters)
    try:
        adjustments = MaterialsProject2020Compatibility().get_adjustments(entry)
    except CompatibilityError as error:
        return None, str(error).partition(" for {")[0][:500]
    return float(sum(adjustment.value for adjustment in adjustments)), ""


def read_runs(
    runs_dir: str | Path, *, with_correction: bool, num_workers: int | None = None, progress: str = "reading runs"
) -> tuple[list[Entry], list[Run]]:
    """The runs of a directory, one entry and one Run each, in order.

    With a manifest.csv of `unimat vasp inputs` there is one for each of its rows, those without input included; without
    one each folder below that has a vasprun.xml is a run, and its path below `runs_dir` the uid. Raises UserError where
    there is none.
    """
    runs_dir = Path(runs_dir)
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is no directory: give one of finished VASP runs")
    rows = read_manifest(runs_dir / MANIFEST) if (runs_dir / MANIFEST).is_file() else _folders(runs_dir)
    if not rows:
        raise UserError(f"no vasprun.xml below {runs_dir}: give the directory of finished VASP runs")
    folders = [runs_dir / row["folder"] for row in rows if row["folder"]]
    found = map_isolated(
        Reader(with_correction), folders, num_workers=num_workers, timeout_s=TIMEOUT_S, progress=progress, unit="run"
    )
    entries, runs = [], []
    for row in rows:
        if row["folder"]:
            run = next(found)
            run = Run(Relaxation.of_failure(run)) if isinstance(run, Failure) else run
        else:
            reason = row["status"].removeprefix("failed(").removesuffix(")")
            run = Run(Relaxation("failed", reason, row.get("message", "")))
        crystal = None if run.crystal is None else dataclasses.replace(run.crystal, uid=row["uid"])
        entries.append(Entry(row["uid"], crystal, run.relaxation.reason, run.relaxation.message))
        runs.append(run)
    return entries, runs


def _folders(runs_dir: Path) -> list[dict[str, str]]:
    """As a manifest's rows."""
    folders = sorted({path.parent for path in runs_dir.rglob("vasprun.xml*") if vaspruns(path.parent)})
    names = [folder.relative_to(runs_dir).as_posix() for folder in folders]
    return [{"uid": name if name != "." else runs_dir.resolve().name, "folder": name, "status": ""} for name in names]
