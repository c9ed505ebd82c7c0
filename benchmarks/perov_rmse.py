"""Where the RMSE of predicted Perov-5 crystals comes from, and what a perfect sampler's would be.

python -m benchmarks.perov_rmse --generated=DIR --reference=perov_5/val.npz --known=perov_5/train.npz --output=FILE.json

DIR: of `unimat generate --compositions_from=val.npz`. Each crystal is laid upon the ideal perovskite by the best of all
orders of its atoms: which element sits at A, which at B, and how far the atoms are from the ideal places (root mean
square, in shares of the cell). A prediction has the arrangement of the reference or another, and both are displaced or
not.

The perfect sampler draws among the two real crystals of a composition, where both are in the reference or in --known.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fingerprints import commit, machine
from benchmarks.perov_unet import read_generated, read_reference
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.matching import match_pairs, reduced_composition

IDEAL = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
ORDERS = np.array(list(itertools.permutations(range(5))))
DISPLACED = 0.02
"""Share of the cell from which on a crystal counts as displaced: the ideal ones of Perov-5 have less than 0.001."""
FAR = 0.15
"""From here on other ideal places than those it came from may be the nearest."""


def laid_on_ideal(crystal: Crystal) -> tuple[tuple[int, int], bool]:
    """((element at A, at B), displaced or not) of a crystal of five atoms."""
    sites, size = sites_and_displacement(crystal)
    return sites, size > DISPLACED


def sites_and_displacement(crystal: Crystal) -> tuple[tuple[int, int], float]:
    """((element at A, at B), root mean square distance from the ideal places in shares of the cell)."""
    away = np.asarray(crystal.frac_coords)[ORDERS] - IDEAL
    away = away - away[:, :1]
    away -= np.round(away)
    for _ in range(2):  # the shift of the origin, and once more where an atom was wrapped by the first
        away -= away.mean(1, keepdims=True)
        away -= np.round(away)
    sizes = np.sqrt(np.square(away).sum(2).mean(1))
    best = int(sizes.argmin())
    a, b = np.asarray(crystal.atomic_numbers)[ORDERS[best][:2]].tolist()
    return (a, b), float(sizes[best])


def known_arrangements(known: Sequence[Crystal]) -> dict[Any, set[tuple[int, int]]]:
    """Reduced composition -> the arrangements in which it occurs."""
    found: dict[Any, set[tuple[int, int]]] = defaultdict(set)
    for crystal in known:
        found[reduced_composition(crystal)].add(laid_on_ideal(crystal)[0])
    return found


def decomposition(
    pairs: Sequence[tuple[Crystal | None, Crystal]], arrangements: Mapping[Any, set[tuple[int, int]]] | None = None
) -> dict[str, Any]:
    """Match rate and RMSE of (prediction, reference), and what each kind of pair gives to them. arrangements: of
    `known_arrangements`, to tell other arrangements apart: the composition's other crystal, possibly one that is not
    known (only one is), or one of no crystal; "far" where the prediction or the reference is further than FAR."""
    distances = match_pairs(pairs).rms_dist
    rms = np.array([np.nan if d is None else d for d in distances], float)
    matched = ~np.isnan(rms)
    kinds = []
    for prediction, reference in pairs:
        if prediction is None:
            kinds.append("failure")
            continue
        (sites, size), (its_sites, its_size) = sites_and_displacement(prediction), sites_and_displacement(reference)
        word = {True: "displaced", False: "ideal"}
        if sites == its_sites:
            kinds.append(f"{word[size > DISPLACED]} for {word[its_size > DISPLACED]}")
            continue
        kind = "other arrangement"
        if arrangements is not None:
            real = arrangements[reduced_composition(reference)]
            kind += ", real" if sites in real else ", perhaps real" if len(real) < 2 else ", of no crystal"
            if sites not in real and len(real) > 1:
                kind += ", far" if max(size, its_size) > FAR else ", near"
        kinds.append(kind)
    rows = {}
    for kind in sorted(set(kinds)):
        chosen = np.array([k == kind for k in kinds])
        hit = chosen & matched
        rows[kind] = {
            "pairs": int(chosen.sum()),
            "matched": int(hit.sum()),
            "mean_rms": float(rms[hit].mean()) if hit.any() else None,
            "of_the_rmse": float(rms[hit].sum() / matched.sum()),
        }
    return {"pairs": len(pairs), "match_rate": float(matched.mean()), "rmse": float(rms[matched].mean()), "kinds": rows}


def perfect_sampler(references: Sequence[Crystal], known: Sequence[Crystal]) -> dict[str, float]:
    """What a coin between the two real crystals of a composition gives, without the coin's own scatter."""
    alike: dict[Any, list[Crystal]] = defaultdict(list)
    for crystal in known:
        alike[reduced_composition(crystal)].append(crystal)
    both = [(r, other) for r in references for other in alike[reduced_composition(r)] if other.uid != r.uid]
    distances = match_pairs([(other, reference) for reference, other in both]).rms_dist
    found = [d for d in distances if d is not None]
    crossed = len(found) / len(both)
    return {
        "references": len(both),
        "other_matches": crossed,
        "match_rate": (1 + crossed) / 2,
        "rmse": sum(found) / (len(both) + len(found)),  # its own crystal, the other half of the draws, is at zero
    }


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.perov_rmse", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--generated", type=Path, required=True, help="output directory of unimat generate")
    parser.add_argument("--reference", type=Path, required=True, help="perov_5/val.npz, whose compositions they have")
    parser.add_argument("--known", type=Path, help="perov_5/train.npz: the perfect sampler, kinds of arrangements")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    arguments = parser.parse(argv)
    reference = read_reference(arguments.reference)
    pairs = [(s.crystal, s.reference) for s in read_generated(arguments.generated, reference)]
    if arguments.known is None:
        report: dict[str, Any] = {"generated": decomposition(pairs)}
    else:
        known = [*reference.values(), *read_reference(arguments.known).values()]
        report = {"generated": decomposition(pairs, known_arrangements(known))}
        report["perfect sampler"] = perfect_sampler(list(reference.values()), known)
    report |= {"commit": commit(), "machine": machine()}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "machine"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
