"""GPAW (projector-augmented waves, plane waves, PBE or PBE+U) as an energy model: relaxations, then a static point.

Of each crystal there is a folder with what a killed run goes on from, and with GPAW's own log.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.geometry import shells
from unimat_jax.periodic_table import SYMBOLS
from unimat_jax.stability.dft import DftSettings, hubbard_u, kpoint_mesh, starting_moments, symmetrised
from unimat_jax.stability.engines import load
from unimat_jax.stability.journal import key_of
from unimat_jax.stability.relaxation import MAX_NEAREST, Relaxation, Relaxer, relax

if TYPE_CHECKING:
    from ase import Atoms

STATE, LOG = "state.json", "gpaw.txt"


class ScfNotConverged(Exception):
    reason = "scf_not_converged"


class Gpaw(Calculator):
    """GPAW at DftSettings. `begin` says for which crystal: its k-points, U and moments stay until the next one. So does
    the cutoff, and at each step of a relaxation the plane waves are those of the cell as it is then."""

    implemented_properties = ["energy", "forces", "stress", "magmoms"]  # noqa: RUF012

    def __init__(self, **settings: Any):
        super().__init__()
        import gpaw.cgpaw  # pyright: ignore[reportMissingImports]

        self.settings = DftSettings(**settings)
        self._data_sets = [Path(folder) for folder in gpaw.setup_paths]
        self._crystal: Crystal | None = None
        self._kpoints = (1, 1, 1)
        self._moments: list[float] | None = None
        self._log: Path | None = None
        self._observe: Callable[[Atoms], None] | None = None
        self._gpaw: Any = None

    @functools.cached_property
    def elements(self) -> frozenset[int]:
        """Those with a PBE data set."""
        names = {path.name.removesuffix(".gz") for folder in self._data_sets for path in folder.glob("*.PBE*")}
        return frozenset(number for number, symbol in enumerate(SYMBOLS) if f"{symbol}.PBE" in names)

    def begin(
        self,
        crystal: Crystal,
        kpoints: tuple[int, int, int],
        log: Path | None = None,
        observe: Callable[[Atoms], None] | None = None,
    ) -> None:
        """kpoints: divisions of the mesh; log: where GPAW's own text is added; observe: sees the atoms at each step."""
        self.reset()
        self._crystal, self._kpoints, self._log, self._observe = crystal, kpoints, log, observe
        self._moments = starting_moments(crystal, self.settings.spin)

    def reset(self) -> None:
        super().reset()
        self._gpaw = None  # GPAW ends its log here, and not where Python ends and complains

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        """Everything at once: the stress costs little beside the density."""
        from gpaw import KohnShamConvergenceError  # pyright: ignore[reportMissingImports]

        super().calculate(atoms, properties, system_changes)
        assert atoms is not None
        start = atoms.copy()
        if self._moments is not None:
            start.set_initial_magnetic_moments(self._moments)
        if self._gpaw is None:
            self._gpaw = self._make()
        try:
            self.results = {
                "energy": float(self._gpaw.get_potential_energy(start)),
                "forces": np.array(self._gpaw.get_forces(start)),
                "stress": np.array(self._gpaw.get_stress(start)),
            }
        except KohnShamConvergenceError as error:
            raise ScfNotConverged(f"the density did not converge in {self.settings.max_scf_steps} steps") from error
        if self._moments is not None:
            self.results["magmom"] = float(self._gpaw.get_magnetic_moment(start))
            self.results["magmoms"] = np.array(self._gpaw.get_magnetic_moments(start))
        if self._observe is not None:
            self._observe(atoms)

    def _make(self) -> Any:
        from gpaw import GPAW, PW, FermiDirac  # pyright: ignore[reportMissingImports]

        assert self._crystal is not None, "begin() first"
        settings = self.settings
        values = hubbard_u(self._crystal) if settings.hubbard_u else {}
        return GPAW(
            mode=PW(settings.cutoff),
            xc="PBE",
            kpts={"size": self._kpoints, "gamma": True},
            occupations=FermiDirac(settings.smearing),
            convergence={"energy": settings.energy_tolerance},
            maxiter=settings.max_scf_steps,
            spinpol=self._moments is not None,
            # The last number: occupations are not normalised to the atom's, as VASP's are not.
            setups={symbol: f":d,{u},0" for symbol, u in values.items()},
            txt=None if self._log is None else self._log.open("a", encoding="utf-8"),
        )


@dataclasses.dataclass(frozen=True)
class State:
    """Where a crystal's relaxation is. stage: relaxations that are finished; the geometry is the last one computed, in
    the middle of the next relaxation where `kpoints` are its mesh. force_calls, seconds: spent so far."""

    stage: int
    lattice: list[list[float]]
    frac_coords: list[list[float]]
    kpoints: tuple[int, int, int] | None = None
    force_calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """None where there is none."""
        try:
            values = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return cls(**{**values, "kpoints": values["kpoints"] and tuple(values["kpoints"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, folder: Path) -> None:
        """At once or not at all."""
        new = folder / f"{STATE}.new"
        new.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        new.replace(folder / STATE)

    def crystal(self, start: Crystal) -> Crystal:
        return Crystal.create(start.atomic_numbers, self.frac_coords, self.lattice, start.uid)


@dataclasses.dataclass(frozen=True)
class GpawRelaxer(Relaxer):
    """Crystal -> Relaxation by GPAW. work_dir: the folders of the crystals are made in it, by formula and key."""

    work_dir: str = ""

    def folder(self, crystal: Crystal) -> Path:
        return Path(self.work_dir) / f"{crystal.formula}-{key_of(crystal, self)}"

    def __call__(self, crystal: Crystal) -> Relaxation:
        before = State.read(self.folder(crystal))
        found = super().__call__(crystal)
        if before is not None:  # the time of the runs before counts too
            spent = {
                name: round(getattr(found, name) + getattr(before, name), 3) for name in ("seconds", "cpu_seconds")
            }
            found = dataclasses.replace(found, **spent)
        return found

    def relax(self, crystal: Crystal) -> Relaxation:
        """Relaxations one after the other, each anew from where the last ended: the cell made symmetric, a new mesh of
        k-points, the magnetic start again. Then the energy and forces of the static point."""
        if (farthest := float(shells(crystal).nearest.max())) > MAX_NEAREST:
            return Relaxation("failed", "isolated_atom", f"an atom is {farthest:.1f} A from the nearest other")
        engine: Any = load(self.model)
        settings, folder = engine.settings, self.folder(crystal)
        folder.mkdir(parents=True, exist_ok=True)
        state = State.read(folder) or State(0, crystal.lattice.tolist(), crystal.frac_coords.tolist())
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(f"# {crystal.uid} {crystal.formula}, stage {state.stage}, {state.force_calls} steps done\n")
        try:
            while state.stage < settings.num_relaxations:
                state, found = self._stage(crystal, state, engine, folder)
                if found.status != "converged":
                    return dataclasses.replace(found, force_calls=state.force_calls)
            return self._static(crystal, state, engine, folder)
        finally:
            engine.reset()

    def _stage(self, crystal: Crystal, state: State, engine: Gpaw, folder: Path) -> tuple[State, Relaxation]:
        start = state.crystal(crystal)
        if state.kpoints is None:
            start = symmetrised(start, engine.settings.symprec)
        mesh = state.kpoints or kpoint_mesh(start, engine.settings.kpoint_density)
        begin, cpu, calls = time.monotonic(), time.process_time(), 0

        def now(atoms: Atoms) -> State:
            cell = atoms.cell.array
            return State(
                state.stage, cell.tolist(), np.linalg.solve(cell.T, atoms.positions.T).T.tolist(), mesh,
                state.force_calls + calls, state.seconds + time.monotonic() - begin,
                state.cpu_seconds + time.process_time() - cpu,
            )  # fmt: skip

        last = state

        def observe(atoms: Atoms) -> None:
            nonlocal calls, last
            calls += 1
            last = now(atoms)
            last.write(folder)

        engine.begin(start, mesh, folder / LOG, observe)
        steps = max(self.protocol.max_steps - state.force_calls, 0)
        found = relax(start, engine, dataclasses.replace(self.protocol, max_steps=steps))
        if found.status == "converged":
            last = dataclasses.replace(last, stage=state.stage + 1, kpoints=None)
            last.write(folder)
        return last, found

    def _static(self, crystal: Crystal, state: State, engine: Gpaw, folder: Path) -> Relaxation:
        end = state.crystal(crystal)
        if not engine.settings.num_relaxations:
            end = symmetrised(end, engine.settings.symprec)
        engine.begin(end, kpoint_mesh(end, engine.settings.static_kpoint_density), folder / LOG)
        found = relax(end, engine, dataclasses.replace(self.protocol, fmax=math.inf, max_steps=0))
        moment = engine.results.get("magmom")  # of the cell; those of the atoms are only what is near them
        return dataclasses.replace(found, force_calls=state.force_calls + found.force_calls, magnetic_moment=moment)
