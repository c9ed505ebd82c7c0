"""DFT by VASP, for users with a licence:

unimat vasp inputs --structures=out --output_dir=dft          the Materials Project's input, a folder a structure
unimat vasp collect --runs=dft --hull=FILE --output_dir=done  finished runs -> the table of `unimat stability`

`inputs` writes runs/FOLDER with INCAR, KPOINTS, POSCAR and POTCAR (POTCAR.spec where pymatgen knows no
PMG_VASP_PSP_DIR), manifest.csv (uid and status of each structure), run_vasp.py (custodian, extra `vasp`: two
relaxations and a static point) and submit.sh (a SLURM array). `collect` takes any directory of runs.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.cli import Parser
from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import Entry
from unimat_jax.evaluation.outputs import prepare_directory
from unimat_jax.stability import outputs
from unimat_jax.stability.command import print_assessed, reference_flags
from unimat_jax.stability.judgement import (
    Assessed,
    References,
    Scale,
    inside_systems,
    judge_all,
    read_standards,
    with_own_hull,
    write,
)
from unimat_jax.stability.vasp.inputs import FUNCTIONALS, MANIFEST, SETTINGS, Inputs, has_potentials, write_inputs
from unimat_jax.stability.vasp.results import Run, read_runs

VERBS = ("inputs", "collect")


def inputs_parser() -> Parser:
    p = Parser(prog="unimat vasp inputs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--structures", nargs="+", action="extend", required=True, metavar="PATH",
                   help="crystal files, directories, zips")  # fmt: skip
    p.add_argument("--output_dir", required=True, type=Path)
    texts = "; ".join(f"{name}: {text}" for name, text in SETTINGS.items())
    p.add_argument("--settings", choices=SETTINGS, default="mp", help=texts)
    p.add_argument("--symprec", type=float, default=Inputs.symprec, help="Angstrom: the primitive standard cell with "
                   "the symmetry found at it; 0: the cell as it is")  # fmt: skip
    p.add_argument("--potcar_functional", choices=FUNCTIONALS, default="PBE", help="the potentials' release; the "
                   "Materials Project has PBE")  # fmt: skip
    p.add_argument("--potcar_spec", action="store_true", help="names of potentials, also where there are POTCARs")
    p.add_argument("--num_workers", type=int, help="processes; default: all cores")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="write what is missing; folders that are there stay")
    existing.add_argument(
        "--overwrite", action="store_true", help="delete the input in --output_dir first; never results"
    )
    return p


def collect_parser() -> Parser:
    p = Parser(prog="unimat vasp collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", required=True, metavar="DIR", help="finished runs: a directory that `inputs` made, or any")
    p.add_argument("--output_dir", required=True, type=Path)
    reference_flags(p, "DIR", "finished runs of elements and known structures")
    p.add_argument("--num_workers", type=int, help="processes; default: all cores")
    p.add_argument("--overwrite", action="store_true", help="delete the run in --output_dir first")
    return p


def collect(
    runs_dir: str | Path,
    references: References,
    *,
    output_dir: Path,
    correction: str = "auto",
    num_workers: int | None = None,
) -> Assessed:
    """Reads finished runs, holds them against the references and writes the files of `unimat stability`.

    correction: "none" leaves MP2020 out, and takes runs with any settings. Raises UserError for what cannot be read or
    must not meet; a run that failed has a status.
    """
    begin = time.monotonic()
    corrected = correction != "none"
    scale = Scale(corrected, "MP2020" if corrected else "none")
    read = functools.partial(read_runs, with_correction=corrected, num_workers=num_workers)
    entries, runs = read(runs_dir)
    about = _about(runs, scale)
    standards = read_standards(references, scale, about, entries)
    if references.hull_structures:
        inside, found, left_out = _own_hull(references.hull_structures, entries, read)
        standards = with_own_hull(standards, inside, [run.relaxation for run in found], left_out)
    assessed = judge_all(entries, [run.relaxation for run in runs], standards, about, num_workers=num_workers)
    for row, run in zip(assessed.rows, runs, strict=True):
        row |= run.settings
    assessed.about.update(structures=[str(runs_dir)], seconds=round(time.monotonic() - begin, 1))
    write(assessed, output_dir)
    return assessed


def _own_hull(
    paths: Sequence[str | Path], entries: Sequence[Entry], read: Any
) -> tuple[list[Entry], list[Run], Counter[str]]:
    """(entries, runs) of the hull that lie in the candidates' chemical systems, and the others by reason."""
    both = [pair for path in paths for pair in zip(*read(path, progress="reading the hull's runs"), strict=True)]
    inside, left_out = inside_systems([entry for entry, _ in both], entries)
    kept = {id(entry) for entry in inside}
    return inside, [run for entry, run in both if id(entry) in kept], left_out


def _about(runs: Sequence[Run], scale: Scale) -> dict[str, Any]:
    """What relaxed, and how, as stability.json has it."""
    types = sorted({run.settings["run_type"] for run in runs if run.settings})
    functional = "PBE(+U), Materials Project settings" if scale.corrected else ", ".join(types)
    return {
        "energy_model": "vasp", "energy_model_kwargs": "{}", "weights": {}, "package": "VASP",
        "energy_scale": "pbe", "functional": functional, "correction": scale.scheme, "mp2020_added": scale.corrected,
        "protocol": {"pressure": 0.0},
        "protocol_text": "as the runs were made: run_type, encut, potentials and hubbards of each are in the table",
        "vasp_versions": sorted({run.version for run in runs if run.version}),
    }  # fmt: skip


def _inputs(arguments: dict[str, Any]) -> int:
    if arguments["symprec"] < 0:
        raise UserError(f"--symprec={arguments['symprec']}: give a length in Angstrom, or 0")
    spec = arguments.pop("potcar_spec") or not has_potentials()
    inputs = Inputs(arguments.pop("settings"), arguments.pop("symprec"), arguments.pop("potcar_functional"), spec)
    output_dir: Path = arguments["output_dir"]
    rows = write_inputs(inputs=inputs, **arguments)
    counts = Counter(row["status"] for row in rows).most_common()
    print(f"{len(rows)} structures: {', '.join(f'{count} {status}' for status, count in counts)}")
    if spec:
        print("potentials by name in POTCAR.spec: with a licence, set PMG_VASP_PSP_DIR and run again with --resume")
    print(f"  {output_dir / MANIFEST}\n  sbatch submit.sh in {output_dir}, once it fits your cluster")
    return 0


def _collect(arguments: dict[str, Any]) -> int:
    names = ("hull", "elements", "hull_structures", "known", "against", "mixed_schemes", "tolerances")
    references = References(*(arguments.pop(name) for name in names))
    output_dir: Path = arguments["output_dir"]
    prepare_directory(output_dir, resume=False, overwrite=arguments.pop("overwrite"), kept=outputs.SUMMARY,
                      made=outputs.MADE, what="a stability run")  # fmt: skip
    print_assessed(collect(arguments.pop("runs"), references, **arguments), output_dir)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parsers: Mapping[str, Any] = {"inputs": (inputs_parser, _inputs), "collect": (collect_parser, _collect)}
    if not argv or argv[0] in ("-h", "--help"):
        for make, _ in parsers.values():
            make().print_help()
        return 0
    if argv[0] not in parsers:
        raise UserError(f"unimat vasp {argv[0]}: choose from {', '.join(VERBS)}")
    make, program = parsers[argv[0]]
    return program(vars(make().parse(argv[1:])))
