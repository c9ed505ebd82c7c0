"""Does a UniMat U-Net learn Perov-5? One generated sample for each of 500 validation compositions, in four columns.

    python -m benchmarks.perov_unet --reference=perov_5/val.npz --generated=DIR --untrained=DIR --output_dir=OUT

`--generated` and `--untrained` are output directories of `unimat generate`. Without them only the two outer columns are
made: random coordinates in the true cell, and the real data, which tell how hard the table is to fool.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import crystal_picture
from unimat_jax.cli import run_program
from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.errors import UserError
from unimat_jax.evaluation.matching import MATCHER_SETTINGS, match_pairs, reduced_composition
from unimat_jax.evaluation.structure_statistics import describe
from unimat_jax.evaluation.validity import check

MIN_DISTANCE = 1.3
"""Angstrom: every real Perov-5 crystal of the 500 keeps it."""
VOLUME_TOLERANCE = 0.15

ROWS = {
    "num_samples": "samples",
    "num_failures": "failures",
    "min_distance": f"min distance >= {MIN_DISTANCE} A",
    "volume_per_atom": f"volume per atom within {VOLUME_TOLERANCE:.0%}",
    "match_rate": "match rate",
    "rms_dist": "RMSE of the matched",
    "match_rate_valid": "match rate, valid samples only (CDVAE)",
    "struct_valid": "struct_valid",
    "comp_valid": "comp_valid",
    "loss": "validation loss",
}
SHARES = ("min_distance", "volume_per_atom", "match_rate", "match_rate_valid", "struct_valid", "comp_valid")


@dataclasses.dataclass
class Sample:
    """One sample and the crystal that it is compared with; `crystal` None: a failure, whose reason is `status`."""

    reference: Crystal
    crystal: Crystal | None
    status: str


def read_reference(path: Path) -> dict[str, Crystal]:
    """The crystals of an npz of a data set (material_id, n_atoms, numbers, frac_coords, lattice) by their id."""
    try:
        with np.load(path) as file:
            data = {name: file[name] for name in ("material_id", "n_atoms", "numbers", "frac_coords", "lattice")}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--reference={path}: {error}; give the npz of a validation split, as perov_5/val.npz"
        ) from error
    ends = np.cumsum(data["n_atoms"].astype(int))
    return {
        uid: Crystal.create(data["numbers"][end - n : end], data["frac_coords"][end - n : end], lattice, uid)
        for uid, n, end, lattice in zip(
            data["material_id"].tolist(), data["n_atoms"].astype(int), ends, data["lattice"], strict=True
        )
    }


def read_generated(directory: Path, reference: Mapping[str, Crystal]) -> list[Sample]:
    """The samples of an output directory of `unimat generate`, failures included, in the manifest's order."""
    import ase.io

    manifest, frames = directory / "manifest.jsonl", directory / "generated_crystals.extxyz"
    if not manifest.is_file():
        raise UserError(f"{manifest} is missing: give an output directory of `unimat generate`")
    crystals: dict[str, Crystal] = {}
    if frames.is_file() and frames.stat().st_size:
        for atoms in ase.io.iread(frames, index=":", format="extxyz"):
            try:
                crystals[str(atoms.info["uid"])] = Crystal.from_ase(atoms)
            except CrystalError as error:
                print(f"{frames}: {error}", file=sys.stderr)
    samples = []
    for line in manifest.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("reference_uid") not in reference:
            raise UserError(
                f"{manifest}: sample {row.get('uid')} has reference_uid = {row.get('reference_uid')!r}, which the "
                "reference file does not hold: generate for the compositions of that file"
            )
        crystal = crystals.get(str(row["uid"]))
        status = str(row.get("status", "unknown")) if crystal is None else "crystal"
        samples.append(Sample(reference[row["reference_uid"]], crystal, status))
    return samples


def random_coordinates(references: Sequence[Crystal], seed: int) -> list[Sample]:
    """The true cell and composition with each atom anywhere: what a model that learnt nothing of places would give."""
    rng = np.random.default_rng(seed)
    return [
        Sample(ref, Crystal.create(ref.atomic_numbers, rng.random((ref.num_atoms, 3)), ref.lattice, ref.uid), "crystal")
        for ref in references
    ]


def perfect_sampler(references: Sequence[Crystal], known: Sequence[Crystal], seed: int) -> list[Sample]:
    """What a sampler of the true distribution would give: a real crystal of the composition, drawn among all of them.

    Perov-5 has two of each composition, ABX3 and BAX3; references of which the other is not in `known` are left out.
    """
    rng = np.random.default_rng(seed)
    alike: dict[Any, list[Crystal]] = defaultdict(list)
    for crystal in known:
        alike[reduced_composition(crystal)].append(crystal)
    groups = [(reference, alike[reduced_composition(reference)]) for reference in references]
    return [Sample(ref, found[rng.integers(len(found))], "crystal") for ref, found in groups if len(found) > 1]


def measure(samples: Sequence[Sample], name: str) -> dict[str, Any]:
    """The rows of one column. Every share is over all samples, failures included."""
    number = len(samples)
    checks = [sample.crystal and check(sample.crystal) for sample in samples]
    pairs = [(sample.crystal, sample.reference) for sample in samples]
    print(f"{name}: matching {number} pairs", file=sys.stderr)
    matches = match_pairs(pairs)
    valid_matches = [
        rms for rms, row in zip(matches.rms_dist, checks, strict=True) if row and row.valid and rms is not None
    ]

    def share(flags) -> float:
        return float(np.sum(list(flags)) / number)

    def volume_ratio(crystal: Crystal, reference: Crystal) -> float:
        return (crystal.volume / crystal.num_atoms) / (reference.volume / reference.num_atoms)

    return {
        "num_samples": number,
        "num_failures": sum(sample.crystal is None for sample in samples),
        "failures": dict(Counter(sample.status for sample in samples if sample.crystal is None)),
        "invalid": dict(Counter(row.status for row in checks if row and not row.valid)),
        "min_distance": share(crystal is not None and crystal.min_distance >= MIN_DISTANCE for crystal, _ in pairs),
        "volume_per_atom": share(
            c is not None and abs(volume_ratio(c, ref) - 1) <= VOLUME_TOLERANCE for c, ref in pairs
        ),
        "match_rate": matches.match_rate,
        "rms_dist": matches.rmse,
        "match_rate_valid": len(valid_matches) / number,
        "struct_valid": share(row is not None and row.struct_valid for row in checks),
        "comp_valid": share(row is not None and row.comp_valid for row in checks),
    }


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """The columns as a Markdown table."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for key, title in ROWS.items():
        cells = []
        for column in columns.values():
            value = column.get(key)
            if value is None:
                cells.append("-")
            elif key in SHARES:
                cells.append(f"{100 * value:.1f} %")
            else:
                cells.append(str(value) if isinstance(value, int) else f"{value:.4f}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    failures = [f"{name}: {column['failures']}" for name, column in columns.items() if column["failures"]]
    return "\n".join([*lines, *(["", "Failures by reason: " + "; ".join(failures)] if failures else [])])


def draw_samples(samples: Sequence[Sample], name: str, path: Path, seed: int, number: int = 6) -> None:
    """Picture of `number` samples drawn by `seed`, not chosen by eye: generated above the reference."""
    drawn = np.random.default_rng(seed).choice(len(samples), min(number, len(samples)), replace=False)
    chosen = [samples[i] for i in np.sort(drawn)]

    def caption(crystal: Crystal | None) -> str:
        if crystal is None:
            return ""
        numbers = describe(crystal)
        group = numbers["space_group_number_loose"] or "-"
        return f"{numbers['formula']}\nspace group {group}, {numbers['min_distance']:.2f} A"

    crystal_picture.draw_grid(
        {name: [s.crystal or s.status for s in chosen], "reference": [s.reference for s in chosen]},
        {name: [caption(s.crystal) for s in chosen], "reference": [caption(s.reference) for s in chosen]},
        path,
        f"{len(chosen)} of {len(samples)} samples drawn by seed {seed}; space group at 0.1 A and shortest distance",
    )


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a number needs beside it: command, commit, seed, versions, machine, and what generate wrote of itself."""

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    made_by = {}
    for name, path in (("generated", arguments.generated), ("untrained", arguments.untrained)):
        if path and (Path(path) / "config.json").is_file():
            config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
            made_by[name] = {key: value for key, value in config.items() if key not in ("checkpoint", "requests")}
    return {
        "seed": arguments.seed,
        "git_commit": run("git", "rev-parse", "HEAD") + ("+changes" if run("git", "status", "--porcelain") else ""),
        "versions": {
            name: metadata.version(name) for name in ("unimat-jax", "numpy", "pymatgen", "spglib", "smact", "ase")
        },
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {cpu}, {os.cpu_count()} cores",
        "matcher": MATCHER_SETTINGS,
        "generate_config": made_by,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perov_unet", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--reference", type=Path, required=True, help="perov_5/val.npz")
    parser.add_argument("--generated", type=Path, help="output directory of `unimat generate` with the trained network")
    parser.add_argument("--untrained", type=Path, help="the same with the untrained network")
    parser.add_argument("--known", type=Path, help="perov_5/train.npz: a column of real crystals drawn by composition")
    parser.add_argument("--trained_loss", type=float, help="validation loss of the trained network")
    parser.add_argument("--untrained_loss", type=float, help="validation loss of the untrained network")
    parser.add_argument("--num_samples", type=int, default=500, help="references drawn where --generated names none")
    parser.add_argument("--seed", type=int, default=0, help="draws references, random coordinates and the picture")
    parser.add_argument("--output_dir", type=Path, required=True, help="for perov_unet.json, .md and .png")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()

    reference = read_reference(arguments.reference)
    generated = read_generated(arguments.generated, reference) if arguments.generated else None
    untrained = read_generated(arguments.untrained, reference) if arguments.untrained else None
    if generated is not None:
        references = [sample.reference for sample in generated]
    else:
        rng = np.random.default_rng(arguments.seed)
        chosen = rng.choice(sorted(reference), min(arguments.num_samples, len(reference)), replace=False)
        references = [reference[uid] for uid in chosen.tolist()]
    if untrained is not None and Counter(s.reference.uid for s in untrained) != Counter(r.uid for r in references):
        raise UserError(
            f"--untrained={arguments.untrained} holds other compositions than --generated: use one seed for both"
        )

    columns = {"random coordinates": random_coordinates(references, arguments.seed)}
    if untrained is not None:
        columns["untrained network"] = untrained
    if generated is not None:
        columns["trained network"] = generated
    if arguments.known:
        known = [*read_reference(arguments.known).values(), *reference.values()]
        columns["perfect sampler"] = perfect_sampler(references, known, arguments.seed)
    columns["real data"] = [Sample(ref, ref, "crystal") for ref in references]
    losses = {"untrained network": arguments.untrained_loss, "trained network": arguments.trained_loss}
    results = {name: {**measure(samples, name), "loss": losses.get(name)} for name, samples in columns.items()}

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    text = table(results)
    report = {**provenance(arguments), "columns": results, "wall_s": round(time.perf_counter() - start, 1)}
    (arguments.output_dir / "perov_unet.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (arguments.output_dir / "perov_unet.md").write_text(text + "\n", encoding="utf-8")
    pictured = "trained network" if generated is not None else "random coordinates"
    draw_samples(columns[pictured], pictured, arguments.output_dir / "perov_unet.png", arguments.seed)
    print(text)
    print(f"\nwritten: {arguments.output_dir}/perov_unet.json, .md, .png")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
