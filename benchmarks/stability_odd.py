"""What becomes of odd crystals, hangs and lack of memory under the real potentials: a status each, and all rows there.

python -m benchmarks.stability_odd --energy_model=chgnet --output_dir=benchmarks/stability

Cells of 512 and 1,000 atoms are relaxed for a few steps, and again with too little memory and too little time. Hang:
the process that relaxes one is stopped (SIGSTOP), as by a driver that does not come back, and another is killed
(SIGKILL), as by a system without memory. Writes DIR/odd_MODEL.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.build
import numpy as np

from benchmarks.fingerprints import commit, machine
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.stability.engines import EnergyModel, energy_model
from unimat_jax.stability.journal import Journal, relax_all
from unimat_jax.stability.relaxation import Protocol, Relaxer

CELL = 4.0 * np.eye(3)
ODD = {
    "polonium oxide, radioactive": Crystal.create([84, 8], [[0, 0, 0], [0.5, 0.5, 0.5]], CELL),
    "radium, without data": Crystal.create([88], [[0, 0, 0]], CELL),
    "americium, beyond both": Crystal.create([95], [[0, 0, 0]], CELL),
    "uranium oxide, known to both": Crystal.create([92, 8], [[0, 0, 0], [0.5, 0.5, 0.5]], 4.9 * np.eye(3)),
    "an atom in a box of 50 A": Crystal.create([8], [[0, 0, 0]], 50 * np.eye(3)),
    "an atom in a cell of 3 A": Crystal.create([26], [[0, 0, 0]], 3 * np.eye(3)),
    "two atoms in one place": Crystal.create([11, 17], [[0, 0, 0], [0, 0, 0]], CELL),
    "two atoms 0.12 A apart": Crystal.create([11, 17], [[0, 0, 0], [0.03, 0, 0]], CELL),
    "an atom in a cell of 0.5 A": Crystal.create([29], [[0, 0, 0]], 0.5 * np.eye(3)),
    "a flat cell": Crystal.create([11, 17], [[0, 0, 0], [0.5, 0.5, 0]], np.diag([4, 4, 0.3])),
    "a cell of 300 A with two atoms": Crystal.create([11, 17], [[0, 0, 0], [0, 0, 0.009]], np.diag([4, 4, 300])),
    "helium": Crystal.create([2], [[0, 0, 0]], CELL),
    "salt": Crystal.create([11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], CELL),
}


def salt(repeat: int) -> Crystal:
    """Rock salt of 8 repeat^3 atoms, rattled."""
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True).repeat(repeat)
    atoms.rattle(0.05, seed=repeat)
    return Crystal.from_ase(atoms, f"salt of {len(atoms)} atoms")


def run(model: EnergyModel, crystals: dict[str, Crystal], title: str, **limits: Any) -> list[dict[str, Any]]:
    """A row a crystal, each relaxed by a worker process."""
    limits = {"max_steps": 60, "timeout_s": 200.0, "memory_limit_gb": 8.0} | limits
    relaxer = Relaxer(model, Protocol(max_steps=limits["max_steps"]), False, memory_limit_gb=limits["memory_limit_gb"])
    with tempfile.TemporaryDirectory() as folder:
        found = relax_all(list(crystals.values()), relaxer, Journal(Path(folder) / "journal"), num_workers=1,
                          timeout_s=limits["timeout_s"], progress=title)  # fmt: skip
    assert len(found) == len(crystals)
    return [
        {"crystal": name, "case": title, **limits, "status": one.label, "message": one.message[:160],
         "force_calls": one.force_calls, "seconds": one.seconds}
        for name, one in zip(crystals, found, strict=True)
    ]  # fmt: skip


def signal_worker(number: int) -> None:
    """Sends the signal to this process's youngest child once that has worked for ten processor seconds."""
    while True:
        time.sleep(0.2)
        for child in sorted(children(), reverse=True):
            fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
            if (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") > 10:
                os.kill(child, number)
                return


def children() -> list[int]:
    me = os.getpid()
    return [int(child) for child in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.stability_odd", description=__doc__)
    p.add_argument("--energy_model", required=True)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/stability"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    model = energy_model(arguments.energy_model)
    large = {f"salt of {8 * n**3} atoms": salt(n) for n in (4, 5)}
    (huge,) = [name for name in large if "1000" in name]
    rows = run(model, ODD, "odd")
    rows += run(model, large, "large", max_steps=2)
    rows += run(model, {huge: large[huge], "salt": ODD["salt"]}, "too little memory", memory_limit_gb=1.5)
    rows += run(model, {huge: large[huge], "salt": ODD["salt"]}, "too little time", timeout_s=8.0)
    for title, number in (("hang", signal.SIGSTOP), ("killed", signal.SIGKILL)):
        threading.Thread(target=signal_worker, args=(number,), daemon=True).start()
        rows += run(model, {huge: large[huge], "salt": ODD["salt"]}, title, timeout_s=90.0)
    result = {"commit": commit(), "machine": machine(), "energy_model": model.name, "package": model.package,
              "rows": rows}  # fmt: skip
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / f"odd_{arguments.energy_model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['case']:18} {row['crystal']:32} {row['status']:30} {row['seconds']:8} {row['message'][:60]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
