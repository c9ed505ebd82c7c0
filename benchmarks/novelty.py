"""How long uniqueness and novelty of 10,000 Perov-5-like crystals take, against pymatgen alone, and whether both agree.

    python -m benchmarks.novelty --data_dir=$UNIMAT_DATA --output_dir=benchmarks/novelty

The generated crystals are drawn from Perov-5's train and val, with replacement, and rattled a little; known are the
11,356 of train. pymatgen is timed in one process on a part of the same work, twice: as MatterGen's code does it, within
each reduced formula, on some formulas; and each crystal against all others, on some pairs. Processor seconds are what
is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.perov_unet import provenance, read_reference
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.alignment import TOLERANCES, Tolerances, fits, reduced, rms_dist
from unimat_jax.evaluation.clusters import content_order
from unimat_jax.evaluation.matching import reduced_composition
from unimat_jax.evaluation.novelty import KnownStructures, match_known, unique_clusters
from unimat_jax.evaluation.pool import available_cores

SETS = ("perov_5/val", "carbon_24/val", "mp_20/val")


def rattled(crystal: Crystal, uid: str, rng: np.random.Generator, atoms: float = 0.05, cell: float = 0.01) -> Crystal:
    """Atoms moved by `atoms` (Angstrom, standard deviation along each axis), the cell strained by `cell`."""
    moves = atoms * rng.normal(size=(crystal.num_atoms, 3)) @ np.linalg.inv(crystal.lattice)
    lattice = crystal.lattice @ (np.eye(3) + cell * rng.normal(size=(3, 3)))
    return Crystal.create(crystal.atomic_numbers, crystal.frac_coords + moves, lattice, uid)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Result and processor seconds, which other programs on the machine disturb less than they do a clock."""
    start = time.process_time()
    return function(), time.process_time() - start


def timed_pool(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Result, seconds by the clock, and processor seconds of this process and those that it started and ended."""

    def cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start, start_cpu = time.perf_counter(), cpu()
    result = function()
    return result, {"clock_s": time.perf_counter() - start, "cpu_s": cpu() - start_cpu}


def pymatgen_matcher(tolerances: Tolerances) -> Any:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(ltol=tolerances.ltol, stol=tolerances.stol, angle_tol=tolerances.angle_tol)


def by_formula(
    generated: Sequence[Crystal],
    known: Sequence[Crystal],
    number: int,
    tolerances: Tolerances,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """pymatgen on all crystals of `number` formulas: processor seconds, leaders and novel ones that it finds."""
    matcher = pymatgen_matcher(tolerances)
    groups: dict[Any, list[Crystal]] = defaultdict(list)
    for crystal in sorted(generated, key=content_order):
        groups[reduced_composition(crystal)].append(crystal)
    others: dict[Any, list[Crystal]] = defaultdict(list)
    for crystal in known:
        others[reduced_composition(crystal)].append(crystal)
    keys = sorted(groups)
    chosen = [keys[i] for i in rng.choice(len(keys), min(number, len(keys)), replace=False)]
    unique_s = novel_s = 0.0
    crystals: list[str] = []
    leaders: set[str] = set()
    novel: set[str] = set()
    for key in tqdm(chosen, desc="pymatgen by formula", file=sys.stderr):
        structures = [crystal.to_pymatgen() for crystal in groups[key]]
        references = [crystal.to_pymatgen() for crystal in others[key]]
        crystals += [crystal.uid for crystal in groups[key]]
        start = time.process_time()
        first: list[Any] = []
        for structure in structures:
            if not any(matcher.fit(leader, structure) for leader in first):
                first.append(structure)
        unique_s += time.process_time() - start
        start = time.process_time()
        novel |= {s.properties["uid"] for s in structures if not any(matcher.fit(s, r) for r in references)}
        novel_s += time.process_time() - start
        leaders |= {structure.properties["uid"] for structure in first}
    return {"crystals": crystals, "leaders": leaders, "novel": novel, "unique_s": unique_s, "novel_s": novel_s}


def pair_seconds(generated: Sequence[Crystal], number: int, tolerances: Tolerances, rng: np.random.Generator) -> float:
    """Processor seconds that pymatgen's fit takes for a pair drawn at random, nearly always of unlike formulas."""
    matcher = pymatgen_matcher(tolerances)
    structures = [generated[i].to_pymatgen() for i in rng.integers(0, len(generated), 2 * number)]
    start = time.process_time()
    for a, b in zip(structures[::2], structures[1::2], strict=True):
        matcher.fit(a, b)
    return (time.process_time() - start) / number


def agreement(crystals: Sequence[Crystal], number: int, preset: str, rng: np.random.Generator) -> dict[str, Any]:
    """RMS distances and `fit` of both, for `number` rattled crystals against their originals and, where a composition
    has several crystals, for as many pairs of those."""
    tolerances = TOLERANCES[preset]
    matcher = pymatgen_matcher(tolerances)
    groups: dict[Any, list[Crystal]] = defaultdict(list)
    for crystal in crystals:
        groups[reduced_composition(crystal), crystal.num_atoms].append(crystal)
    pairs = []
    for i in rng.choice(len(crystals), min(number, len(crystals)), replace=False):
        scale = rng.choice([0.0, 0.05, 0.2, 0.5, 1.0])
        pairs.append((rattled(crystals[i], "", rng, scale, scale / 5), crystals[i]))
        group = groups[reduced_composition(crystals[i]), crystals[i].num_atoms]
        if len(group) > 1:
            pairs.append((crystals[i], group[rng.integers(len(group))]))
    result: dict[str, Any] = {"preset": preset, "pairs": len(pairs)}
    result |= dict.fromkeys(("unmatched", "fit", "other_match", "other_fit"), 0)
    seconds = {"pymatgen_rms": 0.0, "reduce_two": 0.0, "rms": 0.0}
    worst = 0.0
    for a, b in tqdm(pairs, desc=f"agreement, {preset}", file=sys.stderr):
        structures = a.to_pymatgen(), b.to_pymatgen()
        expected, spent = timed(lambda structures=structures: matcher.get_rms_dist(*structures))
        seconds["pymatgen_rms"] += spent
        (cell_a, cell_b), spent = timed(lambda a=a, b=b: (reduced(a), reduced(b)))
        seconds["reduce_two"] += spent
        rms, spent = timed(lambda a=cell_a, b=cell_b: rms_dist(a, b, tolerances))
        seconds["rms"] += spent
        expected_fit = bool(matcher.fit(*structures))
        result["unmatched"] += expected is None
        result["fit"] += expected_fit
        result["other_match"] += (expected is None) != (rms is None)
        result["other_fit"] += fits(cell_a, cell_b, tolerances) != expected_fit
        if expected is not None and rms is not None:
            worst = max(worst, abs(rms - float(expected[0])))
    milliseconds = {f"{name}_ms": 1e3 * value / len(pairs) for name, value in seconds.items()}
    return result | {"largest_rms_difference": worst} | milliseconds


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.novelty", description=__doc__)
    p.add_argument("--data_dir", type=Path, required=True, help="the directory of perov_5/train.npz and the others")
    p.add_argument("--num_samples", type=int, default=10_000)
    p.add_argument("--tolerances", default="cdvae", choices=list(TOLERANCES))
    p.add_argument("--num_formulas", type=int, default=1000, help="of which pymatgen matches all crystals")
    p.add_argument("--num_pairs", type=int, default=1000, help="at random, for pymatgen without formulas")
    p.add_argument("--agreement_pairs", type=int, default=1000, help="of each data set and preset; 0: leave out")
    p.add_argument("--num_workers", type=int, default=available_cores())
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/novelty"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    rng = np.random.default_rng(arguments.seed)
    tolerances = TOLERANCES[arguments.tolerances]
    known = list(read_reference(arguments.data_dir / "perov_5" / "train.npz").values())
    source = known + list(read_reference(arguments.data_dir / "perov_5" / "val.npz").values())
    drawn = rng.integers(0, len(source), arguments.num_samples)
    generated = [rattled(source[i], f"{n}", rng) for n, i in enumerate(drawn)]

    load = os.getloadavg()[0]
    clusters, unique_time = timed_pool(
        lambda: unique_clusters(generated, tolerances, num_workers=arguments.num_workers)
    )
    found, novel_time = timed_pool(
        lambda: match_known(generated, KnownStructures(known), tolerances, num_workers=arguments.num_workers)
    )
    part = by_formula(generated, known, arguments.num_formulas, tolerances, rng)
    chosen = [int(uid) for uid in part["crystals"]]
    factor = len(generated) / len(chosen)
    pair_s = pair_seconds(generated, arguments.num_pairs, tolerances, rng)
    n = len(generated)
    all_pairs_s = pair_s * n * (n - 1) / 2, pair_s * n * len(known)
    result = {
        **{key: value for key, value in provenance(_provenance_arguments(arguments)).items() if key in _KEPT},
        "num_samples": n,
        "num_known": len(known),
        "tolerances": arguments.tolerances,
        "num_workers": arguments.num_workers,
        "unique": sum(clusters.unique) / n,
        "novel": sum(found.novel) / n,
        "load_average_before": load,
        "ours": {"unique": unique_time, "novel": novel_time},
        "pymatgen_by_formula": {
            "crystals": len(chosen),
            "other_leaders": sum(clusters.unique[i] != (str(i) in part["leaders"]) for i in chosen),
            "other_novel": sum(found.novel[i] != (str(i) in part["novel"]) for i in chosen),
            "estimated_unique_cpu_s": factor * part["unique_s"],
            "estimated_novel_cpu_s": factor * part["novel_s"],
        },
        "pymatgen_all_pairs": {
            "pairs": arguments.num_pairs,
            "pair_ms": 1e3 * pair_s,
            "estimated_unique_cpu_s": all_pairs_s[0],
            "estimated_novel_cpu_s": all_pairs_s[1],
        },
    }
    ours_s = unique_time["cpu_s"] + novel_time["cpu_s"]
    result["cpu_ratio"] = {
        "by_formula": factor * (part["unique_s"] + part["novel_s"]) / ours_s,
        "all_pairs": sum(all_pairs_s) / ours_s,
    }
    result["agreement"] = [
        {"data": name}
        | agreement(
            list(read_reference(arguments.data_dir / f"{name}.npz").values()), arguments.agreement_pairs, preset, rng
        )
        for name in SETS
        for preset in TOLERANCES
        if arguments.agreement_pairs
    ]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "novelty.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key not in _KEPT}, indent=1))
    print(f"written: {path}")
    return 0


_KEPT = ("seed", "git_commit", "versions", "python", "machine")


def _provenance_arguments(arguments: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(seed=arguments.seed, generated=None, untrained=None)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
