"""ASE calculators for the stability tests: imported by name, also in worker processes."""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

EMT_PATH = "ase.calculators.emt:EMT"


class Misbehaving(EMT):
    """EMT, but some elements bring trouble: Ag hangs, Pd raises, Pt takes memory, Ni ends the process, Al is nan."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        assert atoms is not None
        symbols = set(atoms.symbols)
        if "Ag" in symbols:
            ctypes.CDLL(None).sleep(600)  # in C, deaf to signals' handlers
        if "Pd" in symbols:
            raise ValueError("no palladium today")
        if "Pt" in symbols:
            np.ones(4_000_000_000)
        if "Ni" in symbols:
            os._exit(3)
        super().calculate(atoms, properties, system_changes)
        if "Al" in symbols:
            self.results["energy"] = float("nan")


class InBatches(Misbehaving):
    """Evaluates up to `most` crystals in one call, and writes down how many those were, in the file `log`."""

    def __init__(self, log: str, most: int = 1000):
        super().__init__()
        self.log, self.most = Path(log), most

    def calculate_batch(self, many):
        with self.log.open("a") as file:
            file.write(f"{len(many)}\n")
        if len(many) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        results = []
        for atoms in many:
            self.calculate(atoms)
            results.append({name: self.results[name] for name in ("energy", "forces", "stress")})
        return results


class Logged(EMT):
    """EMT that takes its time, and writes down each crystal that it begins, in a file in the folder `log`."""

    def __init__(self, log: str, seconds: float):
        super().__init__()
        self.log, self.seconds, self.last = Path(log) / "log", seconds, ""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        assert atoms is not None
        name = f"{atoms.symbols} {atoms.info.get('uid', '')}"
        if name != self.last:
            with self.log.open("a") as file:
                file.write(name + "\n")
            time.sleep(self.seconds)
            self.last = name
        super().calculate(atoms, properties, system_changes)


class Noble(LennardJones):
    """Lennard-Jones atoms of one size, whatever the element: crystals of anything come to rest."""

    def __init__(self):
        super().__init__(sigma=2.4, epsilon=0.2, rc=6.0, smooth=True)


class Tabulated(Calculator):
    """Every crystal is at rest, with the energy an atom that a JSON file has for its reduced formula."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, table: str):
        super().__init__()
        self.table = json.loads(Path(table).read_text())

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        assert atoms is not None
        formula = atoms.symbols.formula.reduce()[0].format("hill")
        energy = self.table[formula] * len(atoms)
        self.results = {"energy": energy, "forces": np.zeros((len(atoms), 3)), "stress": np.zeros(6)}
