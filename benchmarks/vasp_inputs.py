"""VASP input of many crystals against pymatgen's own sets, every field of every file, and how long writing them takes.

python -m benchmarks.vasp_inputs --structures=$UNIMAT_DATA/perov_5/val.npz --output_dir=DIR

Writes DIR/vasp_inputs.json, and the input beside it. A field that differs ends it with an AssertionError.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fingerprints import commit, machine
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.stability.vasp.inputs import Inputs, write_inputs


def check_input(folder: Path, crystal: Crystal, **settings: Any) -> int:
    """Compares every field of a folder's files with pymatgen's MPRelaxSet and MPStaticSet, made by themselves with
    `settings`; returns the number of fields. Raises AssertionError."""
    from pymatgen.io.vasp import Incar, Kpoints, Poscar
    from pymatgen.io.vasp.sets import MPRelaxSet, MPStaticSet

    relax, static = (kind(crystal.to_pymatgen(), **settings) for kind in (MPRelaxSet, MPStaticSet))
    fields = 0
    for name, expected in (("", relax), (".static", static)):
        incar, wanted = dict(Incar.from_file(folder / f"INCAR{name}")), dict(Incar.from_str(str(expected.incar)))
        assert incar == wanted, f"{folder}/INCAR{name}: {incar} is not {wanted}"
        ours: Any = Kpoints.from_file(folder / f"KPOINTS{name}")
        for field in ("kpts", "style", "kpts_shift", "num_kpts"):
            assert getattr(ours, field) == getattr(expected.kpoints, field), f"{folder}/KPOINTS{name}: {field}"
        fields += len(incar) + 4
    poscar, wanted = Poscar.from_file(folder / "POSCAR", check_for_potcar=False), relax.poscar
    for field in ("site_symbols", "natoms"):
        assert getattr(poscar, field) == getattr(wanted, field), f"{folder}/POSCAR: {field}"
    np.testing.assert_allclose(poscar.structure.lattice.matrix, wanted.structure.lattice.matrix, atol=1e-12)
    np.testing.assert_allclose(poscar.structure.frac_coords, wanted.structure.frac_coords, atol=1e-12)
    assert poscar.comment == crystal.uid, f"{folder}/POSCAR: {poscar.comment}"
    assert (folder / "POTCAR.spec").read_text().split() == relax.potcar_symbols, f"{folder}/POTCAR.spec"
    return fields + 6


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.vasp_inputs", description=__doc__)
    p.add_argument("--structures", required=True)
    p.add_argument("--number", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num_workers", type=int, default=2)
    p.add_argument("--output_dir", type=Path, required=True)
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    warnings.simplefilter("ignore")
    crystals = [entry.crystal for entry in read_entries(arguments.structures) if entry.crystal is not None]
    chosen = np.random.default_rng(arguments.seed).choice(len(crystals), arguments.number, replace=False)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    source = arguments.output_dir / "raw.extxyz"
    source.write_text("".join(crystals[i].to_extxyz() for i in chosen), encoding="utf-8")
    drawn = [entry.crystal for entry in read_entries(source)]
    result: dict[str, Any] = {
        "commit": commit(), "machine": machine(), "seed": arguments.seed,
        "structures": Path(arguments.structures).name, "num_workers": arguments.num_workers,
    }  # fmt: skip
    for symprec, settings in ((0.0, {}), (0.01, {"standardize": True, "sym_prec": 0.01})):
        begin = time.monotonic()
        folder = arguments.output_dir / f"symprec_{symprec}"
        rows = write_inputs([source], Inputs(symprec=symprec), output_dir=folder, num_workers=arguments.num_workers)
        seconds = round(time.monotonic() - begin, 1)
        assert len(rows) == arguments.number
        fields = [
            check_input(folder / row["folder"], crystal, **settings)
            for row, crystal in zip(rows, drawn, strict=True)
            if row["status"] == "written" and crystal is not None
        ]
        result[f"symprec_{symprec}"] = {"status": dict(Counter(row["status"] for row in rows)), "seconds": seconds,
                                        "folders_checked": len(fields), "fields_equal": sum(fields)}  # fmt: skip
    (arguments.output_dir / "vasp_inputs.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
