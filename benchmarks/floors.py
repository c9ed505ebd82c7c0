"""What can be had without a model: draws of a data set's own training split, and for Perov-5 a template.

python -m benchmarks.floors --known=perov_5/train.npz --reference=perov_5/val.npz --template --output=FILE.json

Training split: Wasserstein distances of density (g/cm3) and number of elements between the reference and many draws of
--sizes training crystals, with replacement as a model draws. A generated set of that size is as good as real crystals
where its distance is below the 95th percentile.

Template: a = 4.1 Angstrom, ideal places, the anions as X, and of the two others a coin says which is at A. One sample:
the mean over both sides of the coin; twenty: the better of both, which they all but always contain.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fingerprints import commit, machine
from benchmarks.perov_rmse import IDEAL
from benchmarks.perov_unet import read_reference
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.matching import match_pairs
from unimat_jax.evaluation.metrics import wasserstein

QUANTITIES = {"density": lambda c: c.density, "number of elements": lambda c: len(set(c.atomic_numbers.tolist()))}
LENGTH = 4.1
"""Angstrom, of the template's cubic cell."""
ANIONS = (7, 8, 9, 16)
"""N, O, F and S are the X of Perov-5, alone or mixed."""


def split_distances(
    known: Sequence[Crystal], reference: Sequence[Crystal], sizes: Sequence[int], draws: int, seed: int
) -> dict[str, Any]:
    """Mean and 95th percentile over draws of each size, by quantity; and the distance of the whole training split."""
    rng = np.random.default_rng(seed)
    rows: dict[str, Any] = {}
    for name, quantity in QUANTITIES.items():
        ours, theirs = (np.array([quantity(c) for c in crystals], float) for crystals in (known, reference))
        rows[name] = {"all": wasserstein(ours, theirs)}
        for size in sizes:
            found = [wasserstein(rng.choice(ours, size), theirs) for _ in range(draws)]
            rows[name][str(size)] = {"mean": float(np.mean(found)), "95 %": float(np.quantile(found, 0.95))}
    return rows


def template(crystal: Crystal) -> list[Crystal]:
    """The ideal perovskites of a crystal's composition, A and B both ways. Raises ValueError where it has no X3."""
    numbers = crystal.atomic_numbers.tolist()
    x, others = ([n for n in numbers if (n in ANIONS) == inside] for inside in (True, False))
    if (len(x), len(others)) != (3, 2):
        raise ValueError(f"{crystal.formula} is no ABX3: give Perov-5")
    cell = LENGTH * np.eye(3)
    return [Crystal.create([*sites, *x], IDEAL, cell, crystal.uid) for sites in (others, others[::-1])]


def template_scores(reference: Sequence[Crystal]) -> dict[str, Any]:
    """Match rate and RMSE of the template with one sample and with twenty, for all references."""
    pairs = [(guess, crystal) for crystal in reference for guess in template(crystal)]
    distances = match_pairs(pairs).rms_dist
    rms = np.array([np.nan if d is None else d for d in distances], float).reshape(-1, 2)
    best = np.where(np.isnan(rms), np.inf, rms).min(1)
    return {
        "one sample": {"match_rate": float((~np.isnan(rms)).mean()), "rmse": float(np.nanmean(rms))},
        "20 samples": {
            "match_rate": float(np.isfinite(best).mean()),
            "rmse": float(best[np.isfinite(best)].mean()),
        },
    }


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.floors", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--known", type=Path, required=True, help="train.npz")
    parser.add_argument("--reference", type=Path, required=True, help="val.npz")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000], help="crystals a draw")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--template", action="store_true", help="Perov-5's template too")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    arguments = parser.parse(argv)
    known, reference = (list(read_reference(path).values()) for path in (arguments.known, arguments.reference))
    report: dict[str, Any] = {"known": len(known), "reference": len(reference)}
    report["training split"] = split_distances(known, reference, arguments.sizes, arguments.draws, arguments.seed)
    if arguments.template:
        report["template"] = template_scores(reference)
    report |= {"draws": arguments.draws, "seed": arguments.seed, "commit": commit(), "machine": machine()}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
