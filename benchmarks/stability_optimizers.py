"""Which optimiser relaxes crystals with the fewest forces, near a minimum and far from one, and what it costs itself.

python -m benchmarks.stability_optimizers --structures $UNIMAT_DATA/perov_5/val.npz $UNIMAT_DATA/mp_20/val.npz \
    --energy_model=chgnet --output_dir=benchmarks/stability

The same crystals by each optimiser: `near`, as samples of a good generator are (benchmarks/stability.py), and `far`,
10 % too long and rattled by 0.4 A. Then the seconds of a step beside those of the forces, by the number of atoms, with
EMT. Resumable: the relaxations are in DIR/optimizers_MODEL.jsonl. Writes DIR/optimizers_MODEL.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fingerprints import commit, machine
from benchmarks.stability import RATTLE, STRAIN, raw
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.stability.engines import energy_model
from unimat_jax.stability.journal import Journal, relax_all
from unimat_jax.stability.relaxation import OPTIMIZERS, Protocol, Relaxation, Relaxer

FAR_STRAIN, FAR_RATTLE = 0.10, 0.4
SAME = 0.002
"""eV/atom: nearer energies are of one minimum."""


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.stability_optimizers", description=__doc__)
    p.add_argument("--structures", required=True, nargs="+", help="as many are drawn of each")
    p.add_argument("--energy_model", required=True)
    p.add_argument("--number", type=int, default=24, help="crystals in each of the two sets")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max_steps", type=int, default=500)
    p.add_argument("--timeout_s", type=float, default=600.0)
    p.add_argument("--num_workers", type=int, default=1)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/stability"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    sources = [[e.crystal for e in read_entries(path) if e.crystal is not None] for path in arguments.structures]
    model = energy_model(arguments.energy_model)
    share = arguments.number // len(sources)
    title = f"optimizers_{arguments.energy_model}"
    result: dict[str, Any] = {
        "commit": commit(), "machine": machine(), "seed": arguments.seed, "energy_model": model.name,
        "package": model.package, "structures": [Path(path).parent.name for path in arguments.structures], "sets": {},
    }  # fmt: skip
    for name, strain, rattle in (("near", STRAIN, RATTLE), ("far", FAR_STRAIN, FAR_RATTLE)):
        rng = np.random.default_rng(arguments.seed)
        drawn = [
            raw(crystals[i], rng, strain, rattle)
            for crystals in sources
            for i in rng.choice(len(crystals), share, replace=False)
        ]
        found: dict[str, list[Relaxation]] = {}
        for optimizer in OPTIMIZERS:
            protocol = Protocol(max_steps=arguments.max_steps, optimizer=optimizer)
            journal = Journal(arguments.output_dir / f"{title}.jsonl")
            found[optimizer] = relax_all(
                drawn, Relaxer(model, protocol, with_correction=False), journal, timeout_s=arguments.timeout_s,
                num_workers=arguments.num_workers, progress=f"{name}, {optimizer}",
            )  # fmt: skip
        result["sets"][name] = {"strain": strain, "rattle_a": rattle} | compared(drawn, found)
    result["step_seconds"] = [step_seconds(repeat) for repeat in (1, 2, 3, 4, 5, 6)]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / f"{title}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


def compared(crystals: Sequence[Crystal], found: dict[str, list[Relaxation]]) -> dict[str, Any]:
    """What each optimiser took and reached; lower: in how many crystals its minimum lies below the other's."""
    both = [
        [one.energy / crystal.num_atoms for one in each if one.energy is not None]
        for crystal, *each in zip(crystals, *found.values(), strict=True)
        if all(one.status == "converged" for one in each)
    ]
    energies = dict(zip(found, np.array(both).reshape(-1, len(found)).T, strict=True))
    result: dict[str, Any] = {"crystals": len(crystals), "atoms": [crystal.num_atoms for crystal in crystals],
                              "converged_by_all": len(both), "by": {}}  # fmt: skip
    for name, relaxations in found.items():
        others = np.min([values for other, values in energies.items() if other != name], axis=0)
        result["by"][name] = {
            "status": dict(Counter(one.label for one in relaxations)),
            "force_calls": sum(one.force_calls for one in relaxations),
            "force_calls_median": float(np.median([one.force_calls for one in relaxations])),
            "cpu_seconds": round(sum(one.cpu_seconds for one in relaxations), 1),
            "lower": int((energies[name] < others - SAME).sum()),
            "energy_per_atom_mean": round(float(energies[name].mean()), 5),
        }
    return result


def step_seconds(repeat: int) -> dict[str, Any]:
    """Of a cubic cell of copper and gold with 4 repeat^3 atoms: EMT's forces, and what each optimiser adds a step."""
    import ase.build
    import ase.optimize
    from ase.calculators.emt import EMT
    from ase.filters import FrechetCellFilter

    class Timed(EMT):
        seconds = 0.0

        def calculate(self, *args: Any, **kwargs: Any) -> None:
            begin = time.process_time()
            super().calculate(*args, **kwargs)
            self.seconds += time.process_time() - begin

    result: dict[str, Any] = {}
    for name, attribute in OPTIMIZERS.items():
        atoms = ase.build.bulk("Cu", cubic=True).repeat(repeat)
        atoms.rattle(0.1, seed=0)
        atoms.calc = calculator = Timed()
        optimizer: Any = getattr(ase.optimize, attribute)(FrechetCellFilter(atoms), logfile=None)
        optimizer.run(fmax=0.0, steps=2)
        steps, begin, before = 5, time.process_time(), calculator.seconds
        optimizer.run(fmax=0.0, steps=steps)
        forces = calculator.seconds - before
        result |= {"atoms": len(atoms), "emt": forces / steps}
        result[name] = (time.process_time() - begin - forces) / steps
    return {key: round(value, 4) for key, value in result.items()}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run_program(main, sys.argv[1:]))
