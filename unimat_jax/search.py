"""Random structure search, alone or against a model: unimat search --formula=SrTiO3 --candidates=20 --output_dir=random

Alone, it writes raw random structures as `unimat generate` does, for `unimat stability --structures=random`.

With --checkpoint and --energy_model it compares: for each composition, --candidates structures of the model and as many
random ones, with the same atoms in a cell, relaxed by the same potential within the same budget of force calls each.
Writes search.json (numbers and curves), per_structure.parquet and .csv (a row a candidate), and what both made and
relaxed. --resume goes on where a killed run was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax import released
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.evaluation.outputs import prepare_directory
from unimat_jax.search_compositions import Composition, compositions
from unimat_jax.stability.assessment import assess
from unimat_jax.stability.command import keyword_arguments, positive
from unimat_jax.stability.engines import ENGINES, SCALES, EnergyModel, energy_model
from unimat_jax.stability.random_search import random_search, require
from unimat_jax.stability.random_structures import GENERATORS
from unimat_jax.stability.relaxation import OPTIMIZERS, Protocol
from unimat_jax.stability.search_results import SUMMARY, candidate_row, shown, write_results
from unimat_jax.structure_files import GENERATED, MANIFEST

PLAN, TIMES = "plan.json", "generation.json"
PIECE = 10
"""Compositions that are relaxed together; after each piece the results are written anew."""


def parser() -> Parser:
    p = Parser(prog="unimat search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--formula", "--formulas", help="SrTiO3,Ti2O4: the atoms of a cell, as written")
    p.add_argument("--compositions_from", metavar="PATH", help="crystal files: the atoms of each structure's cell")
    p.add_argument("--not_in", nargs="+", default=[], metavar="PATH", help="crystal files, as the training set: leaves "
                   "out every composition that they have in any arrangement")  # fmt: skip
    p.add_argument("--num_compositions", type=int, help="that many of --compositions_from, drawn by --seed")
    p.add_argument("--candidates", type=int, default=10, help="of each composition, by each method")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--generator", choices=GENERATORS, default=GENERATORS[0], help="of random structures: ase-ga and "
                   "pyxtal (extra search), or AIRSS's buildcell where it is on PATH")  # fmt: skip
    p.add_argument("--soft_sphere", choices=("fixed", "variable", "none"), default="fixed",
                   help="relaxation by soft spheres before the potential: in a fixed or variable cell")  # fmt: skip
    p.add_argument("--max_soft_calls", type=int, default=20, help="force calls of it; they count in --max_force_calls")
    p.add_argument("--output_dir", required=True, type=Path)
    p.add_argument("--checkpoint", help=f"the model: {released.checkpoint_help()}")
    p.add_argument("--num_steps", type=int, help="of the model's sampler; default: the checkpoint's")
    p.add_argument("--method", help="of the model's sampler; default: the checkpoint's")
    p.add_argument("--energy_model", metavar="NAME",
                   help=f"{', '.join(ENGINES)}, or an ASE calculator, as of unimat stability")  # fmt: skip
    p.add_argument("--energy_model_kwargs", default="{}", metavar="JSON", help="as of unimat stability")
    p.add_argument("--energy_scale", choices=SCALES, help="as of unimat stability")
    p.add_argument("--relax_known", action="store_true", help="relax the structures of --compositions_from too: the "
                   "energies to reach")  # fmt: skip
    p.add_argument("--max_force_calls", type=int, default=150, help="for one candidate")
    p.add_argument("--fmax", type=float, default=Protocol.fmax, help="eV/A")
    p.add_argument("--optimizer", choices=OPTIMIZERS, default=Protocol.optimizer)
    p.add_argument("--timeout_s", type=float, default=600.0, help="seconds for one candidate")
    p.add_argument("--num_workers", type=int, help="processes; default: all cores")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on in --output_dir with what is finished there")
    existing.add_argument("--overwrite", action="store_true", help="delete the search in --output_dir first")
    return p


def generate_model(wanted: Sequence[Composition], arguments: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The model's candidates in `output_dir`, where finished ones are taken as they are; what they took."""
    if (output_dir / TIMES).is_file():
        return json.loads((output_dir / TIMES).read_text(encoding="utf-8"))
    from unimat_jax.generate import run
    from unimat_jax.generator import Generator
    from unimat_jax.requests import Request, check_fits

    begin, cpu = time.monotonic(), time.process_time()
    generator = Generator(arguments.checkpoint)
    loaded, loaded_cpu = time.monotonic(), time.process_time()
    requests = []
    for composition in wanted:
        check_fits(composition.counts, generator.spec, composition.formula)
        request = Request("formula", composition.formula, composition.counts, reference_uid=composition.uid)
        requests += [request] * arguments.candidates
    settings = generator.settings(num_steps=arguments.num_steps, method=arguments.method)
    run(generator, requests, settings, {}, seed=arguments.seed, output_dir=output_dir, overwrite=True)
    times = {
        "candidates": len(requests), "load_seconds": round(loaded - begin, 2),
        "load_cpu_seconds": round(loaded_cpu - cpu, 2), "seconds": round(time.monotonic() - loaded, 2),
        "cpu_seconds": round(time.process_time() - loaded_cpu, 2), "sampler": dataclasses.asdict(settings),
        "parameters_hash": generator.params_hash, "checkpoint_step": generator.step,
    }  # fmt: skip
    return _done(times, output_dir)


def generate_random(wanted: Sequence[Composition], arguments: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The random candidates in `output_dir`, where finished ones are taken as they are; what they took."""
    if (output_dir / TIMES).is_file():
        return json.loads((output_dir / TIMES).read_text(encoding="utf-8"))
    output_dir.mkdir(parents=True, exist_ok=True)
    names = ("seed", "soft_sphere", "max_soft_calls", "generator", "num_workers", "timeout_s")
    settings = {name: getattr(arguments, name) for name in names}
    times = random_search([(c.counts, c.uid) for c in wanted], arguments.candidates, output_dir, **settings)
    return _done(times, output_dir)


def _done(times: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    (output_dir / TIMES).write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
    return times


def compare(
    wanted: Sequence[Composition], arguments: argparse.Namespace, model: EnergyModel, plan: Mapping[str, Any]
) -> None:
    """Both methods' candidates made, relaxed in pieces of some compositions, and held against each other."""
    directory, candidates = arguments.output_dir, arguments.candidates
    soft = 0 if arguments.soft_sphere == "none" else arguments.max_soft_calls
    # The first force call comes before the first step.
    steps = {"model": arguments.max_force_calls - 1, "random": arguments.max_force_calls - 1 - soft}
    protocols = {name: Protocol(arguments.fmax, most, optimizer=arguments.optimizer) for name, most in steps.items()}
    times = {
        "model": generate_model(wanted, arguments, directory / "model"),
        "random": generate_random(wanted, arguments, directory / "random"),
    }
    # Loading the model and compiling its sampler are the model's expense too.
    shared = times["model"]["load_cpu_seconds"] + times["model"]["cpu_seconds"]
    shares = {"model": shared / len(wanted) / candidates}
    made = {name: read_candidates(directory / name) for name in steps}

    def relax(crystals: Sequence[Crystal], name: str, where: Path) -> dict[str, dict[str, Any]]:
        """Rows by uid."""
        if not crystals:
            return {}
        where.parent.mkdir(parents=True, exist_ok=True)
        structures = where.with_name(f"{where.name}.extxyz")
        structures.write_text("".join(crystal.to_extxyz() for crystal in crystals), encoding="utf-8")
        found = assess([structures], model, output_dir=where, protocol=protocols[name],
                       timeout_s=arguments.timeout_s, num_workers=arguments.num_workers)  # fmt: skip
        return {row["uid"]: row for row in found.rows}

    known: dict[int, dict[str, Any]] = {}
    if arguments.relax_known:
        crystals = {
            i: dataclasses.replace(c.crystal, uid=c.uid, properties={}) for i, c in enumerate(wanted) if c.crystal
        }
        found = relax(list(crystals.values()), "model", directory / "known_relaxed")
        known = {i: found[crystal.uid] for i, crystal in crystals.items()}
    about = {"plan": plan, "protocols": {name: protocol.text for name, protocol in protocols.items()},
             "generation": times, "energy_model": model.name, "package": model.package}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for first in range(0, len(wanted), PIECE):
        end = min(first + PIECE, len(wanted))
        for name, (manifest, crystals) in made.items():
            piece = range(first * candidates, end * candidates)
            there = [crystals[manifest[i]["uid"]] for i in piece if manifest[i]["uid"] in crystals]
            relaxed = relax(there, name, directory / "pieces" / f"{first // PIECE:03d}" / name)
            for i in piece:
                place = (i // candidates, i % candidates, wanted[i // candidates].reduced_formula)
                seconds = shares.get(name, manifest[i].get("cpu_seconds", 0.0))
                rows.append(candidate_row(name, place, manifest[i], relaxed.get(manifest[i]["uid"]), seconds))
        print(f"{end} of {len(wanted)} compositions are done", file=sys.stderr)
        inside = {i: row for i, row in known.items() if i < end}
        write_results(rows, inside, [c.formula for c in wanted[:end]], candidates, about, directory)
    print(shown(rows, known, len(wanted)))
    for name in (SUMMARY, "per_structure.csv"):
        print(f"  {directory / name}")


def read_candidates(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Crystal]]:
    """The manifest's rows in order, and the crystals by uid."""
    manifest = [json.loads(line) for line in (directory / MANIFEST).read_text(encoding="utf-8").splitlines()]
    made = any("formula" in row for row in manifest)
    entries = read_entries(directory / GENERATED, progress=False) if made else []
    return manifest, {entry.uid: entry.crystal for entry in entries if entry.crystal is not None}


def _plan(arguments: argparse.Namespace, wanted: Sequence[Composition], model: EnergyModel | None) -> dict[str, Any]:
    """What decides the result: a run goes on only with the same."""
    left_out = ("resume", "overwrite", "output_dir", "num_workers", "timeout_s", "energy_model", "energy_model_kwargs")
    settings = {name: value for name, value in vars(arguments).items() if name not in left_out}
    identity = None if model is None else json.loads(model.identity)
    return {**settings, "energy_model": identity, "compositions": [[c.formula, c.uid] for c in wanted]}


def _prepare(directory: Path, plan: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """An empty directory, or one with an interrupted search of the same plan. Raises UserError."""
    path = directory / PLAN
    if resume and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in plan if before.get(name) != plan[name]]
        if changed:
            raise UserError(f"--resume: {directory} was begun with another {', '.join(changed)}: use the same")
    prepare_directory(directory, resume=resume, overwrite=overwrite, kept=PLAN, made=(SUMMARY,), what="a search")
    if overwrite:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


def _check(arguments: argparse.Namespace) -> None:
    positive(vars(arguments), "candidates", "max_force_calls", "timeout_s", "fmax")
    if arguments.soft_sphere != "none" and not 0 < arguments.max_soft_calls < arguments.max_force_calls:
        raise UserError(
            f"--max_soft_calls={arguments.max_soft_calls}: must be positive and below "
            f"--max_force_calls={arguments.max_force_calls}, which it is a part of; or take --soft_sphere=none"
        )
    if bool(arguments.checkpoint) != bool(arguments.energy_model):
        raise UserError("--checkpoint and --energy_model go together: they ask for the comparison")
    if arguments.relax_known and not (arguments.compositions_from and arguments.checkpoint):
        raise UserError("--relax_known is for a comparison with --compositions_from, whose structures it relaxes")
    require(arguments.generator)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse(sys.argv[1:] if argv is None else argv)
    _check(arguments)
    model = None
    if arguments.energy_model:
        kwargs = keyword_arguments(arguments.energy_model_kwargs)
        model = energy_model(arguments.energy_model, kwargs=kwargs, scale=arguments.energy_scale)
    wanted = compositions(
        arguments.formula, arguments.compositions_from, not_in=arguments.not_in, number=arguments.num_compositions,
        seed=arguments.seed,
    )  # fmt: skip
    plan = _plan(arguments, wanted, model)
    _prepare(arguments.output_dir, plan, resume=arguments.resume, overwrite=arguments.overwrite)
    if model is not None:
        compare(wanted, arguments, model, plan)
        return 0
    generate_random(wanted, arguments, arguments.output_dir)
    rows = [json.loads(line) for line in (arguments.output_dir / MANIFEST).read_text(encoding="utf-8").splitlines()]
    statuses = ", ".join(f"{number} {status}" for status, number in Counter(r["status"] for r in rows).most_common())
    print(f"{len(wanted)} compositions, {arguments.candidates} candidates each: {statuses}")
    print(f"  {arguments.output_dir / GENERATED}\n  {arguments.output_dir / MANIFEST}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
