"""Random structure search, alone or against a model: unimat search --formula=SrTiO3 --candidates=20 --output_dir=random

Alone, it writes raw random structures as `unimat generate` does, for `unimat stability --structures=random`.

With --checkpoint and --energy_model it compares: for each composition, --candidates structures of the model and as many
random ones, relaxed by the same potential under the same budget of force calls each. Writes search.json (the numbers and
curves), candidates.csv (a row a candidate) and the runs of both. --resume goes on where a killed run was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.requests import parse_formula
from unimat_jax.stability.assessment import assess
from unimat_jax.stability.engines import SCALES, EnergyModel, energy_model
from unimat_jax.stability.random_search import generate
from unimat_jax.stability.relaxation import OPTIMIZERS, Protocol
from unimat_jax.stability.search_results import candidate_row, write_results
from unimat_jax.structure_files import GENERATED, MANIFEST

PLAN, TIMES = "plan.json", "generation.json"
PIECE = 10
"""Compositions that are relaxed together: a killed run has results of all pieces before."""


@dataclasses.dataclass(frozen=True)
class Composition:
    """counts: atoms of each element (atomic number) in the cell; uid and crystal: of the known one that it was read
    from, "" and None where it was written as a formula."""

    formula: str
    counts: dict[int, int]
    uid: str = ""
    crystal: Crystal | None = None


def parser() -> Parser:
    p = Parser(prog="unimat search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--formula", "--formulas", help="SrTiO3,Ti2O4: the atoms of a cell as written")
    p.add_argument("--compositions_from", metavar="PATH", help="crystal files: the cell contents of each structure")
    p.add_argument("--not_in", nargs="+", default=[], metavar="PATH", help="crystal files: without their compositions, "
                   "whatever the arrangement, as of the training set")  # fmt: skip
    p.add_argument("--num_compositions", type=int, help="that many of --compositions_from, drawn by --seed")
    p.add_argument("--candidates", type=int, default=10, help="of each composition, by each method")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--soft_sphere", choices=("fixed", "variable", "none"), default="fixed", help="cell, or not at all")
    p.add_argument("--max_soft_calls", type=int, default=20, help="force calls of the soft spheres; they count")
    p.add_argument("--output_dir", required=True, type=Path)
    p.add_argument("--checkpoint", help="compare with this model")
    p.add_argument("--num_steps", type=int, help="of the model's sampler; default: the checkpoint's")
    p.add_argument("--method", help="of the model's sampler; default: the checkpoint's")
    p.add_argument("--energy_model", metavar="NAME", help="as of unimat stability")
    p.add_argument("--energy_scale", choices=SCALES)
    p.add_argument("--relax_known", action="store_true", help="relax the structures of --compositions_from too: the "
                   "energies to reach")  # fmt: skip
    p.add_argument("--max_force_calls", type=int, default=150, help="for one candidate")
    p.add_argument("--fmax", type=float, default=Protocol.fmax, help="eV/A")
    p.add_argument("--optimizer", choices=OPTIMIZERS, default="bfgs")
    p.add_argument("--timeout_s", type=float, default=600.0, help="seconds for one candidate")
    p.add_argument("--num_workers", type=int, help="processes; default: all cores")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on in --output_dir with what is finished there")
    existing.add_argument("--overwrite", action="store_true", help="begin anew in --output_dir")
    return p


def compositions(arguments: argparse.Namespace) -> list[Composition]:
    """What to search for, each composition once. Raises UserError."""
    if bool(arguments.formula) == bool(arguments.compositions_from):
        raise UserError("give --formula or --compositions_from, one of them")
    if arguments.formula:
        formulas = [text.strip() for text in arguments.formula.split(",")]
        found = [Composition(text, parse_formula(text)) for text in formulas]
    else:
        found = [
            Composition(e.crystal.formula, dict(sorted(Counter(e.crystal.atomic_numbers.tolist()).items())), e.uid, e.crystal)
            for e in read_entries(arguments.compositions_from)
            if e.crystal is not None
        ]  # fmt: skip
    taken = {_reduced(Counter(entry.crystal.atomic_numbers.tolist()))
             for entry in (read_entries(arguments.not_in) if arguments.not_in else []) if entry.crystal is not None}  # fmt: skip
    unique: dict[Any, Composition] = {}
    for composition in found:
        key = _reduced(composition.counts)
        if key not in taken:
            unique.setdefault(key, composition)
    kept = list(unique.values())
    number = arguments.num_compositions
    if number is not None and number < len(kept):
        kept = random.Random(arguments.seed).sample(kept, number)
    if not kept or (number or 0) > len(kept):
        raise UserError(
            f"--num_compositions={number}: {len(found)} structures have {len(kept)} compositions outside --not_in"
        )
    return kept


def _reduced(counts: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
    import math

    unit = math.gcd(*counts.values())
    return tuple(sorted((z, n // unit) for z, n in counts.items()))


def generate_model(wanted: Sequence[Composition], arguments: argparse.Namespace, output_dir: Path) -> None:
    """The model's candidates in `output_dir`, where a finished run is taken as it is."""
    from unimat_jax.generate import run
    from unimat_jax.generator import Generator
    from unimat_jax.requests import Request, check_fits

    if (output_dir / TIMES).is_file():
        return
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
    (output_dir / TIMES).write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")


def generate_random(wanted: Sequence[Composition], arguments: argparse.Namespace, output_dir: Path) -> Counter[str]:
    """The random candidates in `output_dir`, where a finished run is taken as it is; how many have each status."""
    if not (output_dir / TIMES).is_file():
        output_dir.mkdir(parents=True, exist_ok=True)
        times = generate(
            [(composition.counts, composition.uid) for composition in wanted], arguments.candidates, output_dir,
            seed=arguments.seed, soft_sphere=arguments.soft_sphere, max_soft_calls=arguments.max_soft_calls,
            num_workers=arguments.num_workers, timeout_s=arguments.timeout_s,
        )  # fmt: skip
        (output_dir / TIMES).write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
    rows = [json.loads(line) for line in (output_dir / MANIFEST).read_text(encoding="utf-8").splitlines()]
    return Counter(row["status"] for row in rows)


def compare(
    wanted: Sequence[Composition], arguments: argparse.Namespace, model: EnergyModel, plan: Mapping[str, Any]
) -> None:
    """Both methods' candidates made, relaxed in pieces of some compositions, and held against each other: the results
    are written anew after each piece."""
    directory: Path = arguments.output_dir
    soft = 0 if arguments.soft_sphere == "none" else arguments.max_soft_calls
    if arguments.max_force_calls - soft < 2:
        raise UserError(
            f"--max_force_calls={arguments.max_force_calls}: must be more than --max_soft_calls={soft} and one"
        )
    generate_model(wanted, arguments, directory / "model")
    generate_random(wanted, arguments, directory / "random")
    # The first force call comes before the first step.
    steps = {"model": arguments.max_force_calls - 1, "random": arguments.max_force_calls - 1 - soft}
    protocols = {name: Protocol(arguments.fmax, number, optimizer=arguments.optimizer) for name, number in steps.items()}
    candidates = {name: read_candidates(directory / name) for name in steps}

    def relax(crystals: Sequence[Crystal], name: str, where: Path) -> dict[str, dict[str, Any]]:
        """Rows by uid."""
        where.parent.mkdir(parents=True, exist_ok=True)
        structures = where.with_name(where.name + ".extxyz")
        structures.write_text("".join(crystal.to_extxyz() for crystal in crystals), encoding="utf-8")
        found = assess([structures], model, output_dir=where, protocol=protocols[name],
                       timeout_s=arguments.timeout_s, num_workers=arguments.num_workers)  # fmt: skip
        return {row["uid"]: row for row in found.rows}

    known: dict[str, dict[str, Any]] = {}
    if arguments.relax_known:
        crystals = [dataclasses.replace(c.crystal, uid=c.uid, properties={}) for c in wanted if c.crystal]
        known = relax(crystals, "model", directory / "known_relaxed")
    rows: list[dict[str, Any]] = []
    for first in range(0, len(wanted), PIECE):
        piece = range(first * arguments.candidates, min(first + PIECE, len(wanted)) * arguments.candidates)
        for name, (manifest, crystals) in candidates.items():
            uids = [manifest[i]["uid"] for i in piece]
            there = [crystals[uid] for uid in uids if uid in crystals]
            where = directory / "pieces" / f"{first // PIECE:03d}" / name
            relaxed = relax(there, name, where) if there else {}
            for i, uid in zip(piece, uids, strict=True):
                rows.append(candidate_row(name, i, arguments.candidates, manifest[i], relaxed.get(uid)))
        done = min(first + PIECE, len(wanted))
        print(f"{done} of {len(wanted)} compositions are done", file=sys.stderr)
        write_results(rows, known, [(c.formula, c.uid) for c in wanted[:done]], plan, directory)


def read_candidates(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Crystal]]:
    """The manifest's rows in order, and the crystals by uid."""
    manifest = [json.loads(line) for line in (directory / MANIFEST).read_text(encoding="utf-8").splitlines()]
    entries = read_entries(directory / GENERATED)
    return manifest, {entry.uid: entry.crystal for entry in entries if entry.crystal is not None}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse(sys.argv[1:] if argv is None else argv)
    for name in ("candidates", "max_force_calls", "timeout_s", "fmax"):
        if not getattr(arguments, name) > 0:
            raise UserError(f"--{name}={getattr(arguments, name)}: must be positive")
    if bool(arguments.checkpoint) != bool(arguments.energy_model):
        raise UserError("--checkpoint and --energy_model go together: they ask for the comparison")
    model = energy_model(arguments.energy_model, scale=arguments.energy_scale) if arguments.energy_model else None
    wanted = compositions(arguments)
    plan = _plan(arguments, wanted, model)
    _prepare(arguments.output_dir, plan, resume=arguments.resume, overwrite=arguments.overwrite)
    if model is None:
        statuses = generate_random(wanted, arguments, arguments.output_dir)
        shown = ", ".join(f"{number} {status}" for status, number in statuses.most_common())
        print(f"{len(wanted)} compositions, {arguments.candidates} candidates each: {shown}")
        print(f"  {arguments.output_dir / GENERATED}\n  {arguments.output_dir / MANIFEST}")
        return 0
    compare(wanted, arguments, model, plan)
    return 0


def _plan(arguments: argparse.Namespace, wanted: Sequence[Composition], model: EnergyModel | None) -> dict[str, Any]:
    """What decides the result: a run goes on only with the same."""
    left_out = ("resume", "overwrite", "output_dir", "num_workers", "timeout_s", "energy_model")
    settings = {name: value for name, value in vars(arguments).items() if name not in left_out}
    identity = None if model is None else json.loads(model.identity)
    plan = {**settings, "energy_model": identity, "compositions": [[c.formula, c.uid] for c in wanted]}
    return json.loads(json.dumps(plan, default=str))


def _prepare(directory: Path, plan: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    path = directory / PLAN
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output_dir={directory} is a file: name a directory")
    if directory.is_dir() and any(directory.iterdir()):
        if not path.is_file():
            raise UserError(f"--output_dir={directory} holds something else than a search: name another")
        if overwrite:
            import shutil

            for child in directory.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        elif not resume:
            raise UserError(f"--output_dir={directory} is not empty: add --resume or --overwrite, or name another")
        else:
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in plan if before.get(name) != plan[name]]
            if changed:
                raise UserError(f"--resume: {directory} was begun with another {', '.join(changed)}: use the same")
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
