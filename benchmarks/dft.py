"""From a directory of `unimat generate` to a table by real DFT: GPAW's relaxations and static point of each crystal.

unimat generate --checkpoint=runs/perov_slots --formula=KMgF3,SrTiO3,NaNbO3 --num_samples=3 --output_dir=generated
python -m benchmarks.dft --structures=generated --data_dir=$UNIMAT_DATA --output_dir=DIR

Formation energies are against the elements by the same DFT, and distances against a hull of them and --hull_structures
alone: it is incomplete. Run again, the same command goes on where it was killed, in the middle of a relaxation too.
Writes DIR/dft.json, first without and then with the hull, and the run beside it. GPAW: bash docs/install_gpaw.sh.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fingerprints import commit, machine
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.stability.assessment import assess
from unimat_jax.stability.command import TIMEOUT_S
from unimat_jax.stability.dft import DftSettings, hubbard_u, kpoint_mesh, starting_moments
from unimat_jax.stability.energies import composition_of
from unimat_jax.stability.engines import GPAW, energy_model
from unimat_jax.stability.references import Phase
from unimat_jax.stability.relaxation import Protocol

COLUMNS = (
    "uid", "formula", "status", "message", "energy_per_atom", "formation_energy_per_atom", "decomposition_energy",
    "decomposition", "energy_status", "max_force", "max_stress", "magnetic_moment", "space_group_number",
    "volume_per_atom", "volume_change", "relax_rmsd", "force_calls", "seconds", "cpu_seconds",
)  # fmt: skip
MAX_ATOMS = 4
"""Of an element's cell: the lowest of the Materials Project's structures that are not larger."""


def elements(path: Path, symbols: set[str]) -> dict[str, Any]:
    """Structures in pymatgen's JSON by symbol, from MP-PBE-Element-Refs.json.gz (matcalc, BSD-3)."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        content = json.load(file)
    result = {}
    for symbol in sorted(symbols):
        pairs = zip(content[symbol]["energy_per_atom"], content[symbol]["structure"], strict=True)
        result[symbol] = min((p for p in pairs if len(p[1]["sites"]) <= MAX_ATOMS), key=lambda p: p[0])[1]
    return result


def crystals(paths: Sequence[str | Path]) -> list[Crystal]:
    return [entry.crystal for entry in read_entries(paths) if entry.crystal is not None]


def formula(crystal: Crystal) -> str:
    """As the table's reduced_formula."""
    return Phase("", composition_of(crystal), 0.0).formula


def row_of(row: Mapping[str, Any], relaxed: Crystal | None, settings: DftSettings, trained: set[str]) -> dict[str, Any]:
    """The row's numbers, and what they were computed with."""
    values = {name: row.get(name) for name in COLUMNS}
    values["composition_in_training_set"] = row["reduced_formula"] in trained
    if relaxed is not None:
        values |= {
            "lengths": relaxed.lengths.round(4).tolist(), "angles": relaxed.angles.round(3).tolist(),
            "kpoints": kpoint_mesh(relaxed, settings.kpoint_density),
            "static_kpoints": kpoint_mesh(relaxed, settings.static_kpoint_density),
            "hubbard_u": hubbard_u(relaxed) if settings.hubbard_u else {},
            "spin": starting_moments(relaxed, settings.spin) is not None,
        }  # fmt: skip
    return values


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.dft", description=__doc__)
    p.add_argument("--structures", required=True, help="of `unimat generate`")
    p.add_argument(
        "--data_dir", type=Path, required=True, help="the elements and Perov-5's training set are taken from"
    )
    p.add_argument("--hull_structures", nargs="+", default=[], help="known phases beside the elements")
    p.add_argument("--cutoff", type=float, default=DftSettings.cutoff)
    p.add_argument("--kpoint_density", type=float, default=10.0)
    p.add_argument("--static_kpoint_density", type=float, default=27.0)
    p.add_argument("--fmax", type=float, default=Protocol.fmax)
    p.add_argument("--num_workers", type=int, default=1)
    p.add_argument("--output_dir", type=Path, required=True)
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    generated = crystals([arguments.structures])
    path = arguments.output_dir / "elements.json"
    found = elements(arguments.data_dir / "hull_refs" / "MP-PBE-Element-Refs.json.gz",
                     {symbol for crystal in generated for symbol in crystal.symbols})  # fmt: skip
    path.write_text(json.dumps(found), encoding="utf-8")
    trained = {formula(crystal) for crystal in crystals([arguments.data_dir / "perov_5" / "train.npz"])}
    kwargs = {name: getattr(arguments, name) for name in ("cutoff", "kpoint_density", "static_kpoint_density")}
    model = energy_model(GPAW, kwargs=kwargs)
    settings = DftSettings.of(kwargs)
    for hull in ([], [*arguments.hull_structures, path]):  # what the crystals gave is there before the hull is
        done = assess([arguments.structures], model, output_dir=arguments.output_dir / "run", hull_structures=hull,
                      num_workers=arguments.num_workers, retry=True, timeout_s=TIMEOUT_S[GPAW],
                      protocol=Protocol(fmax=arguments.fmax))  # fmt: skip
        assert len(done.rows) == len(read_entries([arguments.structures])), "a row a structure"
        rows = zip(done.rows, done.relaxed, strict=True)
        result = {
            "commit": commit(), "machine": machine(), "package": model.package, "settings": json.loads(model.kwargs),
            "protocol": done.about["protocol_text"], "hull": done.about["hull_text"],
            "num_reference_phases": done.about["num_reference_phases"],
            "reference_left_out": done.about["reference_left_out"],
            "status": dict(Counter(row["status"] for row in done.rows)),
            "cpu_seconds": round(sum(row["cpu_seconds"] for row in done.rows), 1),
            "rows": [row_of(row, relaxed, settings, trained) for row, relaxed in rows],
        }  # fmt: skip
        (arguments.output_dir / "dft.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
