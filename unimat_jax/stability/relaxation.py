"""One crystal relaxed, atoms and cell together, by an optimiser of ASE's; every end that this can have is a status."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.geometry import shells
from unimat_jax.evaluation.pool import Failure
from unimat_jax.stability.corrections import mp2020_correction
from unimat_jax.stability.engines import EnergyModel, load, unsupported

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

OPTIMIZERS = {"bfgs": "BFGS", "fire": "FIRE"}
"""The names of `ase.optimize`."""
STATUSES = ("converged", "not_converged", "exploded", "timeout", "failed")
MIN_DISTANCE = 0.1
"""Angstrom. Atoms nearer than this lie on one another, where no potential has a meaning."""
MAX_NEAREST = 6.0
"""Angstrom. An atom farther than this from all others is beyond what potentials see: its energy says nothing."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How crystals are relaxed. fmax: eV/Angstrom, of atoms and cell; max_steps: of the optimiser; pressure: GPa;
    max_volume_ratio: a cell that has grown or shrunk by more has exploded; optimizer: one of OPTIMIZERS."""

    fmax: float = 0.05
    max_steps: int = 500
    pressure: float = 0.0
    max_volume_ratio: float = 5.0
    optimizer: str = "fire"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer = {self.optimizer!r}: choose from {', '.join(OPTIMIZERS)}")

    @property
    def text(self) -> str:
        name = OPTIMIZERS[self.optimizer]
        return f"ASE {name}, FrechetCellFilter, fmax {self.fmax} eV/A, {self.max_steps} steps, {self.pressure} GPa"


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """What came out. status: one of STATUSES, `reason` says which failure.

    lattice [3, 3] in Angstrom and frac_coords [N, 3] (not wrapped, so that they show how far an atom went) of the last
    step, None where there was none. energy: eV a cell, as the model has it; correction: MP2020's, eV a cell, None
    where not asked for or without an answer. max_force: eV/Angstrom; max_stress: GPa, deviation from the pressure asked
    for; magnetic_moment: Bohr magnetons a cell, None for a model without. force_calls: energies and forces asked for.
    seconds: by the clock; cpu_seconds: of the processor, which other programs disturb less.
    """

    status: str
    reason: str = ""
    message: str = ""
    lattice: list[list[float]] | None = None
    frac_coords: list[list[float]] | None = None
    energy: float | None = None
    correction: float | None = None
    max_force: float | None = None
    max_stress: float | None = None
    magnetic_moment: float | None = None
    force_calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def label(self) -> str:
        return f"failed({self.reason})" if self.status == "failed" else self.status

    def crystal(self, start: Crystal) -> Crystal | None:
        """The relaxed crystal, with the uid of the one it began as."""
        if self.lattice is None or self.frac_coords is None:
            return None
        return Crystal.create(start.atomic_numbers, self.frac_coords, self.lattice, start.uid)

    @classmethod
    def of_failure(cls, failure: Failure) -> Relaxation:
        """In the place of what the pool could not do."""
        if failure.reason == "timeout":
            return cls("timeout", message=failure.message)
        return cls("failed", failure.reason, failure.message)


@dataclasses.dataclass(frozen=True)
class _OnEngine:
    """A function for the pool whose process has the engine loaded before the clock of its first item runs."""

    model: EnergyModel

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with contextlib.suppress(OSError):  # where memory runs out, Linux then ends this process and not its parent
            Path("/proc/self/oom_score_adj").write_text("1000")
        for module in ("ase.filters", "ase.optimize", "pymatgen.io.vasp.sets"):
            importlib.import_module(module)
        with contextlib.suppress(UserError):  # the item will say it
            load(self.model)


@dataclasses.dataclass(frozen=True)
class Probe(_OnEngine):
    """Whether the engine can be loaded: returns "" or what is wrong."""

    def __call__(self, _: Any) -> str:
        try:
            load(self.model)
        except UserError as error:
            return str(error)
        return ""


@dataclasses.dataclass(frozen=True)
class Relaxer(_OnEngine):
    """Crystal -> Relaxation. memory_limit_gb: what the process may take at most; 0: whatever there is."""

    protocol: Protocol
    with_correction: bool
    memory_limit_gb: float = 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.memory_limit_gb:
            import resource

            size = int(self.memory_limit_gb * 1e9)
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    def __call__(self, crystal: Crystal) -> Relaxation:
        begin, cpu = time.monotonic(), time.process_time()
        missing = unsupported(self.model, crystal.atomic_numbers.tolist())
        if missing:
            return Relaxation("failed", "unsupported_element", f"{self.model.name} does not know {', '.join(missing)}")
        if crystal.num_atoms > 1 and crystal.min_distance < MIN_DISTANCE:
            return Relaxation("failed", "overlapping_atoms", f"{crystal.min_distance:.3g} A apart")
        found = relax(crystal, load(self.model), self.protocol)
        relaxed = found.crystal(crystal)
        if relaxed is not None and (farthest := float(shells(relaxed).nearest.max())) > MAX_NEAREST:
            found = Relaxation("failed", "isolated_atom", f"an atom is {farthest:.1f} A from the nearest other",
                               force_calls=found.force_calls)  # fmt: skip
        elif relaxed is not None and self.with_correction:
            try:
                found = dataclasses.replace(found, correction=mp2020_correction(relaxed))
            except Exception as error:  # the relaxation is good without it
                found = dataclasses.replace(found, message=f"no MP2020 correction: {type(error).__name__}: {error}")
        clocks = {"seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - cpu}
        return dataclasses.replace(found, **{name: round(value, 3) for name, value in clocks.items()})


def relax(crystal: Crystal, calculator: Calculator, protocol: Protocol) -> Relaxation:
    """The crystal at its minimum under the pressure asked for, or how far it came. What the calculator raises is a
    status too."""
    import ase.optimize
    from ase.filters import FrechetCellFilter
    from ase.units import GPa

    atoms = crystal.to_ase()
    calls = 0
    try:
        if hasattr(calculator, "reset"):  # it may have been stopped in the middle of the crystal before
            calculator.reset()
        atoms.calc = calculator
        both: Any = FrechetCellFilter(atoms, scalar_pressure=protocol.pressure * GPa)
        converged = False
        optimizer: Any = getattr(ase.optimize, OPTIMIZERS[protocol.optimizer])(both, logfile=None)
        for done in optimizer.irun(fmax=protocol.fmax, steps=protocol.max_steps):
            calls, converged = calls + 1, bool(done)
            if problem := _explosion(atoms, crystal.volume, protocol):
                return Relaxation("exploded", message=problem, force_calls=calls)
    except Exception as error:
        if problem := _explosion(atoms, crystal.volume, protocol, geometry_only=True):
            return Relaxation("exploded", message=problem, force_calls=calls)
        return Relaxation("failed", _reason(error), f"{type(error).__name__}: {error}"[:500], force_calls=calls)
    stress = np.asarray(atoms.get_stress(voigt=False)) / GPa
    moments = getattr(calculator, "results", {}).get("magmoms")
    cell = atoms.cell.array
    return Relaxation(
        "converged" if converged else "not_converged",
        lattice=cell.tolist(),
        frac_coords=np.linalg.solve(cell.T, atoms.positions.T).T.tolist(),
        energy=float(atoms.get_potential_energy()),
        max_force=float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
        max_stress=float(np.abs(stress + protocol.pressure * np.eye(3)).max()),
        magnetic_moment=None if moments is None else float(np.sum(moments)),
        force_calls=calls,
    )


def _explosion(atoms: Atoms, start_volume: float, protocol: Protocol, geometry_only: bool = False) -> str:
    """What is not finite or far too large or small, "" where all is well."""
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        return "a position or the cell is not finite"
    ratio = atoms.get_volume() / start_volume
    if not 1 / protocol.max_volume_ratio <= ratio <= protocol.max_volume_ratio:
        return f"the volume is {ratio:.3g} times that of the start"
    if geometry_only:
        return ""
    if not math.isfinite(atoms.get_potential_energy()) or not np.isfinite(atoms.get_forces()).all():
        return "the energy or a force is not finite"
    return ""


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out_of_memory"
    return "calculator_error"


def displacement(start: Crystal, end: Relaxation) -> tuple[float, float]:
    """How far the atoms went: (RMSD in Angstrom, the same over (V / n)^(1/3)), atom by atom, in the mean of the two
    cells, without the shift of all atoms together. `end` must have a structure."""
    shift = np.asarray(end.frac_coords) - start.frac_coords
    cell = (start.lattice + np.asarray(end.lattice)) / 2
    vectors = (shift - shift.mean(0)) @ cell
    rmsd = float(np.sqrt((vectors**2).sum(1).mean()))
    return rmsd, rmsd / float((abs(np.linalg.det(cell)) / start.num_atoms) ** (1 / 3))
