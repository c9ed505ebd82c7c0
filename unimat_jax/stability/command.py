"""How stable crystals are: unimat stability --structures=out --energy_model=sevennet --output_dir=relaxed

--hull=FILE             reference entries (pymatgen ComputedEntry): formation energies and distances to their hull
--elements=FILE         elemental reference entries alone: formation energies
--hull_structures=PATH  elements and known structures, relaxed by the same model: a hull of the model's own

Writes relaxed.extxyz, per_structure.parquet and .csv (a row a structure, failures too), candidates.csv (ranked) with
candidates_cif.zip, and stability.json. --resume does nothing twice that is finished.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.cli import Parser
from unimat_jax.errors import UserError
from unimat_jax.evaluation.alignment import TOLERANCES
from unimat_jax.evaluation.outputs import prepare_directory, table
from unimat_jax.stability import outputs
from unimat_jax.stability.assessment import assess
from unimat_jax.stability.corrections import CORRECTIONS, resolve
from unimat_jax.stability.engines import ENGINES, GPAW, SCALES, energy_model
from unimat_jax.stability.judgement import Assessed
from unimat_jax.stability.relaxation import OPTIMIZERS, Protocol

TIMEOUT_S = {"": 600.0, GPAW: 86400.0}
"""By energy model."""


def parser() -> Parser:
    p = Parser(prog="unimat stability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--structures", nargs="+", action="extend", required=True, metavar="PATH",
                   help="crystal files, directories, zips")  # fmt: skip
    p.add_argument("--energy_model", required=True, metavar="NAME",
                   help=f"{', '.join([*ENGINES, GPAW])} (extras), or any ASE calculator as "
                   "package.module:Callable")  # fmt: skip
    p.add_argument("--energy_model_kwargs", default="{}", metavar="JSON",
                   help='as {"device": "cuda"}; for gpaw as {"cutoff": 900}')  # fmt: skip
    p.add_argument("--energy_scale", choices=SCALES, help="what the energies of a package.module:Callable are")
    p.add_argument("--functional", default="", help="that the model was fitted to; only recorded")
    p.add_argument("--output_dir", required=True, type=Path)
    reference_flags(p, "PATH", "to be relaxed too; only those within the candidates' chemical systems are")
    p.add_argument("--fmax", type=float, default=Protocol.fmax, help="eV/A, of atoms and cell")
    p.add_argument("--max_steps", type=int, default=Protocol.max_steps)
    p.add_argument("--optimizer", choices=OPTIMIZERS, default=Protocol.optimizer, help="fire takes 1.6 times as "
                   "many forces, and is what large cells get")  # fmt: skip
    p.add_argument("--pressure", type=float, default=Protocol.pressure, help="GPa")
    p.add_argument("--timeout_s", type=float, help="seconds for one structure; default: 600, for gpaw a day")
    p.add_argument("--memory_limit_gb", type=float, default=0.0, help="for one process; 0: no limit")
    p.add_argument("--num_workers", type=int, help="processes; default: all cores")
    p.add_argument("--batch_size", type=int, default=1, help="structures that a process evaluates in one call of the "
                   "network; more than 1 is for a GPU")  # fmt: skip
    p.add_argument("--retry", action="store_true", help="with --resume: relax again what ran out of time or memory, or "
                   "whose process died")  # fmt: skip
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on in --output_dir with what is finished there")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in --output_dir first")
    return p


def reference_flags(p: Parser, metavar: str, hull_structures: str) -> None:
    """What relaxed crystals are held against: the fields of `References`, and --correction."""
    hull = p.add_mutually_exclusive_group()
    hull.add_argument("--hull", nargs="+", metavar="FILE", default=[], help="reference entries, elements included")
    hull.add_argument("--elements", nargs="+", metavar="FILE", default=[], help="elemental reference entries")
    hull.add_argument("--hull_structures", nargs="+", metavar=metavar, default=[], help=hull_structures)
    p.add_argument("--known", nargs="+", metavar="PATH", default=[], help="structures that are not novel: S.U.N.")
    p.add_argument("--against", nargs="+", type=Path, default=[], metavar="DIR", help="output directories of other "
                   "runs: energy differences and reduction rates by composition")  # fmt: skip
    p.add_argument("--correction", choices=CORRECTIONS, default="auto", help="auto: MP2020 is added to the scale pbe")
    p.add_argument("--mixed_schemes", action="store_true", help="let energies of unlike schemes meet")
    p.add_argument("--tolerances", choices=TOLERANCES, default="mattergen", help="for being one structure")


def print_assessed(assessed: Assessed, output_dir: Path) -> None:
    """The metrics, the counts and the files of a run."""
    about = assessed.about
    print(table(assessed.metrics, {}, list(assessed.metrics)))
    for title, other in assessed.comparison.items():
        print(f"\nA: these, B: {title}")
        print(table(other, {}, list(other)))
    counts = Counter(row["status"] for row in assessed.rows).most_common()
    statuses = ", ".join(f"{count} {status}" for status, count in counts)
    print(f"\n{len(assessed.rows)} structures: {statuses}; {about['seconds']} s")
    print(
        f"model {about['energy_model']} ({about['package']}), energies {about['correction']}, "
        f"hull: {about['hull_text']}"
    )
    for name in outputs.MADE:
        print(f"  {output_dir / name}")


def keyword_arguments(text: str) -> dict[str, Any]:
    """Of --energy_model_kwargs. Raises UserError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(
            f'--energy_model_kwargs={text}: no JSON ({error}); write it as \'{{"device": "cuda"}}\''
        ) from error
    if not isinstance(values, dict):
        raise UserError(f'--energy_model_kwargs={text}: write a JSON object, as \'{{"device": "cuda"}}\'')
    return values


def positive(arguments: Mapping[str, Any], *names: str) -> None:
    """Raises UserError where a flag's value is not."""
    for name in names:
        if not arguments[name] > 0:
            raise UserError(f"--{name}={arguments[name]}: must be positive")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parser().parse(sys.argv[1:] if argv is None else argv))
    if arguments["timeout_s"] is None:
        arguments["timeout_s"] = TIMEOUT_S[GPAW if arguments["energy_model"] == GPAW else ""]
    positive(arguments, "fmax", "max_steps", "timeout_s", "batch_size")
    model = energy_model(
        arguments.pop("energy_model"), kwargs=keyword_arguments(arguments.pop("energy_model_kwargs")),
        scale=arguments.pop("energy_scale"), functional=arguments.pop("functional"),
    )  # fmt: skip
    resolve(model, arguments["correction"])
    protocol = Protocol(**{name: arguments.pop(name) for name in ("fmax", "max_steps", "optimizer", "pressure")})
    overwrite = arguments.pop("overwrite")
    prepare_directory(
        arguments["output_dir"], resume=arguments.pop("resume"), overwrite=overwrite,
        kept=outputs.JOURNAL, made=outputs.MADE, what="a stability run",
    )  # fmt: skip
    if overwrite:
        shutil.rmtree(arguments["output_dir"] / outputs.DFT, ignore_errors=True)
    print_assessed(assess(model=model, protocol=protocol, **arguments), arguments["output_dir"])
    return 0
