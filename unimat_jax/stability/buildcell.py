"""AIRSS's `buildcell` (GPL-2, installed by the user) as an external command: seed file in, random structure out."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from unimat_jax.crystal import Crystal, CrystalError, lattice_from_parameters
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import SYMBOLS, atomic_number

if TYPE_CHECKING:
    from unimat_jax.stability.soft_sphere import Distances

COMMAND = "buildcell"
TIMEOUT_S = 30.0


def require() -> None:
    """Raises UserError where the command is not on PATH."""
    if shutil.which(COMMAND) is None:
        raise UserError(f"--generator={COMMAND}: no {COMMAND} on PATH: install AIRSS, or take the default generator")


def seed_file(counts: Mapping[int, int], operations: int, volume: float, closest: Distances) -> str:
    """The .cell text that asks for one structure. volume: of the cell, A^3; closest: A."""
    edge = volume ** (1 / 3)
    cell = "\n".join(" ".join(f"{edge * (i == j):.6f}" for j in range(3)) for i in range(3))
    symbols = [SYMBOLS[z] for z, number in counts.items() for _ in range(number)]
    atoms = "\n".join(f"{symbol} 0.0 0.0 0.0 # {symbol}{i} % NUM=1" for i, symbol in enumerate(symbols, 1))
    pairs = " ".join(f"{SYMBOLS[a]}-{SYMBOLS[b]}={d:.3f}" for (a, b), d in closest.items() if a <= b)
    return f"""%BLOCK LATTICE_CART
{cell}
%ENDBLOCK LATTICE_CART

#VARVOL={volume:.3f}

%BLOCK POSITIONS_FRAC
{atoms}
%ENDBLOCK POSITIONS_FRAC

#SYMMOPS={operations}
#NFORM=1
#COMPACT
#MINSEP={min(closest.values()):.3f} {pairs}
"""


def parse_cell(text: str) -> Crystal:
    """The crystal of a .cell text with a LATTICE_ABC or LATTICE_CART block and fractional positions.

    Raises CrystalError (`buildcell_output`)."""
    try:
        if lengths := _block(text, "LATTICE_ABC"):
            lattice = lattice_from_parameters(np.array(lengths[0], float), np.array(lengths[1], float))
        else:
            lattice = np.array(_block(text, "LATTICE_CART"), float)
        positions = _block(text, "POSITIONS_FRAC")
        numbers = [atomic_number(row[0]) for row in positions]
        return Crystal.create(numbers, [[float(value) for value in row[1:4]] for row in positions], lattice)
    except (ValueError, IndexError) as error:
        raise CrystalError("buildcell_output", f"{COMMAND} wrote no structure that is understood: {error}") from error


def _block(text: str, name: str) -> list[list[str]]:
    """The words of each line of a block, without comments and units; empty where there is none."""
    found = re.search(rf"%BLOCK\s+{name}\b(.*?)%ENDBLOCK\s+{name}\b", text, re.IGNORECASE | re.DOTALL)
    lines = [line.split("#")[0].split() for line in found[1].splitlines()] if found else []
    return [words for words in lines if words and words[0].lower() not in ("ang", "bohr")]


def build(counts: Mapping[int, int], operations: int, volume: float, closest: Distances) -> Crystal:
    """One structure by `buildcell`, scaled to the volume; each call is another, whatever the seed.

    Raises CrystalError (`buildcell_failed`, `buildcell_output`)."""
    try:
        done = subprocess.run(
            [COMMAND], input=seed_file(counts, operations, volume, closest), capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CrystalError("buildcell_failed", f"{COMMAND}: {error}") from error
    if done.returncode:
        raise CrystalError("buildcell_failed", f"{COMMAND} ended with {done.returncode}: {done.stderr[-200:]}")
    found = parse_cell(done.stdout)
    scale = (volume / found.volume) ** (1 / 3)
    return Crystal.create(found.atomic_numbers, found.frac_coords, found.lattice * scale)
