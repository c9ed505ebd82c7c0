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
MAX_ATOMS_BFGS = 500
"""In larger cells BFGS gives way to FIRE: its own work grows with the cube of the atoms, and overtakes the forces'."""
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
    optimizer: str = "bfgs"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer = {self.optimizer!r}: choose from {', '.join(OPTIMIZERS)}")

    @property
    def text(self) -> str:
        name = f"BFGS (FIRE beyond {MAX_ATOMS_BFGS} atoms)" if self.optimizer == "bfgs" else "FIRE"
        return f"ASE {name}, UnitCellFilter, fmax {self.fmax} eV/A, {self.max_steps} steps, {self.pressure} GPa"


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


class Stopped(Exception):
    """Raised by a calculator whose engine failed in another process."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


@dataclasses.dataclass(frozen=True)
class OnEngine:
    """A function for the pool whose process has the engine loaded before the clock of its first item runs.

    memory_limit_gb: what the process may take at most; 0: whatever there is.
    """

    model: EnergyModel
    memory_limit_gb: float = dataclasses.field(default=0.0, kw_only=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with contextlib.suppress(OSError):  # where memory runs out, Linux then ends this process and not its parent
            Path("/proc/self/oom_score_adj").write_text("1000")
        for module in ("ase.filters", "ase.optimize", "pymatgen.io.vasp.sets"):
            importlib.import_module(module)
        with contextlib.suppress(UserError):  # the item will say it
            load(self.model)
        if self.memory_limit_gb:
            import resource

            size = int(self.memory_limit_gb * 1e9)
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))


@dataclasses.dataclass(frozen=True)
class Probe(OnEngine):
    """Whether the engine can be loaded, and evaluates batches where it has to: returns "" or what is wrong."""

    batches: bool = False

    def __call__(self, _: Any) -> str:
        try:
            calculator = load(self.model)
        except UserError as error:
            return str(error)
        if self.batches and not hasattr(calculator, "calculate_batch"):
            return (
                f"--batch_size: {self.model.name} evaluates one crystal at a time: leave --batch_size out, or give the "
                "calculator a method calculate_batch(list of Atoms) -> list of results"
            )
        return ""


@dataclasses.dataclass(frozen=True)
class Relaxer(OnEngine):
    """Crystal -> Relaxation. batch_size: crystals that `relax_all` lets a process evaluate in one call."""

    protocol: Protocol
    with_correction: bool
    batch_size: int = 1

    def __call__(self, crystal: Crystal) -> Relaxation:
        begin, cpu = time.monotonic(), time.process_time()
        if refused := self.refusal(crystal):
            return refused
        found = self.finished(crystal, self.relax(crystal))
        clocks = {"seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - cpu}
        return dataclasses.replace(found, **{name: round(value, 3) for name, value in clocks.items()})

    def refusal(self, crystal: Crystal) -> Relaxation | None:
        """In the place of a relaxation that has no sense."""
        missing = unsupported(self.model, crystal.atomic_numbers.tolist())
        if missing:
            return Relaxation("failed", "unsupported_element", f"{self.model.name} does not know {', '.join(missing)}")
        if crystal.num_atoms > 1 and crystal.min_distance < MIN_DISTANCE:
            return Relaxation("failed", "overlapping_atoms", f"{crystal.min_distance:.3g} A apart")
        return None

    def finished(self, start: Crystal, found: Relaxation) -> Relaxation:
        """What `relax` found, with its correction, unless an atom has left the others."""
        relaxed = found.crystal(start)
        if relaxed is None:
            return found
        if (farthest := float(shells(relaxed).nearest.max())) > MAX_NEAREST:
            message = f"an atom is {farthest:.1f} A from the nearest other"
            return Relaxation("failed", "isolated_atom", message, force_calls=found.force_calls)
        if not self.with_correction:
            return found
        try:
            return dataclasses.replace(found, correction=mp2020_correction(relaxed))
        except Exception as error:  # the relaxation is good without it
            return dataclasses.replace(found, message=f"no MP2020 correction: {type(error).__name__}: {error}")

    def relax(self, crystal: Crystal) -> Relaxation:
        return relax(crystal, load(self.model), self.protocol)


def relax(crystal: Crystal, calculator: Calculator, protocol: Protocol) -> Relaxation:
    """The crystal at its minimum under the pressure asked for, or how far it came. What the calculator raises is a
    status too."""
    import ase.optimize
    from ase.filters import UnitCellFilter
    from ase.units import GPa

    atoms = crystal.to_ase()
    calls = 0
    try:
        if hasattr(calculator, "reset"):  # it may have been stopped in the middle of the crystal before
            calculator.reset()
        atoms.calc = calculator
        atoms.get_forces()  # ASE would ask first in a functools.cached_property, whose lock threads share before 3.12
        both: Any = UnitCellFilter(atoms, scalar_pressure=protocol.pressure * GPa)
        converged = False
        name = protocol.optimizer if crystal.num_atoms <= MAX_ATOMS_BFGS else "fire"
        optimizer: Any = getattr(ase.optimize, OPTIMIZERS[name])(both, logfile=None)
        for done in optimizer.irun(fmax=protocol.fmax, steps=protocol.max_steps):
            calls, converged = calls + 1, bool(done)
            if problem := _explosion(atoms, crystal.volume, protocol):
                return Relaxation("exploded", message=problem, force_calls=calls)
    except Stopped as error:
        return dataclasses.replace(Relaxation.of_failure(error.failure), force_calls=calls)
    except Exception as error:
        if problem := _explosion(atoms, crystal.volume, protocol, geometry_only=True):
            return Relaxation("exploded", message=problem, force_calls=calls)
        return Relaxation("failed", reason_of(error), f"{type(error).__name__}: {error}"[:500], force_calls=calls)
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


def reason_of(error: Exception) -> str:
    """What the exception says of itself as its `reason`, else the little that its text tells."""
    if reason := getattr(error, "reason", ""):
        return str(reason)
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
