"""What `unimat search` found, as numbers to keep and a picture: a model against random structure search.

python -m benchmarks.search --run=DIR --output_dir=benchmarks/search --name=perov_5

Reads the --output_dir of a comparison and writes NAME.json (the run's search.json, with throughput and, of random
search, what each kind of symmetry was worth) and NAME.png (the curves of best energy). Nothing is relaxed here.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from benchmarks.fingerprints import commit, machine
from unimat_jax.cli import Parser, run_program
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.evaluation.outputs import PARQUET
from unimat_jax.stability.comparison import ENERGY
from unimat_jax.stability.outputs import RELAXED
from unimat_jax.stability.search_results import METHODS, NEAR, SUMMARY

ANIONS, BOND = (7, 8, 9, 16), 1.65
"""Atomic numbers; Angstrom."""
LABELS = {"model": "model", "random": "random structure search"}


def throughput(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the relaxations alone, by one processor; the calls of those that did not converge include soft spheres."""
    seconds = sum(row["cpu_seconds"] or 0.0 for row in rows)
    spent = sum(row["force_calls"] - (row["soft_calls"] or 0) for row in rows)
    ended = [row["force_calls"] for row in rows if row["status"] == "not_converged"]
    return {
        "rows": len(rows), "status": dict(Counter(row["status"] for row in rows).most_common()),
        "relaxed_per_cpu_minute": round(60 * len(rows) / seconds, 2), "cpu_seconds": round(seconds, 1),
        "cpu_seconds_per_force_call": round(seconds / spent, 4), "force_calls_mean": round(spent / len(rows), 1),
        "force_calls_of_not_converged_mean": round(float(np.mean(ended)), 1) if ended else None,
    }  # fmt: skip


def by_operations(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of random candidates by their symmetry operations: share converged, and of how many compositions the lowest."""
    best: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        if row["status"] == "converged":
            other = best.get(row["composition"])
            if other is None or row[ENERGY] < other[ENERGY]:
                best[row["composition"]] = row
    result = {}
    for operations in sorted({row["operations"] for row in rows if row["operations"]}):
        mine = [row for row in rows if row["operations"] == operations]
        result[str(operations)] = {
            "candidates": len(mine), "converged": float(np.mean([row["status"] == "converged" for row in mine])),
            "lowest_of_its_composition": sum(row["operations"] == operations for row in best.values()),
        }  # fmt: skip
    return result


def bonded_anions(rows: Sequence[Mapping[str, Any]], run: Path) -> dict[str, float]:
    """Share of converged candidates, and of the lowest of each composition, in which two of N, O, F and S have bonded
    to each other (nearer than BOND): molecules and peroxides, which no perovskite has."""
    from ase.neighborlist import neighbor_list

    relaxed: dict[str, bool] = {}
    for path in sorted(run.glob(f"pieces/*/*/{RELAXED}")):
        for entry in read_entries(path, progress=False):
            if entry.crystal is not None:
                numbers = entry.crystal.atomic_numbers
                i, j = neighbor_list("ij", entry.crystal.to_ase(), BOND)
                relaxed[entry.uid] = bool((np.isin(numbers[i], ANIONS) & np.isin(numbers[j], ANIONS)).any())
    converged = sorted((row for row in rows if row["status"] == "converged"), key=lambda row: -row[ENERGY])
    lowest = {row["composition"]: row["uid"] for row in converged}
    return {
        "of_converged": float(np.mean([relaxed[row["uid"]] for row in converged])),
        "of_lowest": float(np.mean([relaxed[uid] for uid in lowest.values()])),
    }


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Above the lowest of both against candidates and against processor seconds; the share solved; both against one
    another by composition."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for method, points in result["curves"].items():
        above = [1000 * point["above_lowest_mean"] for point in points]
        for ax, name in ((axes[0], "candidates"), (axes[1], "cpu_seconds")):
            ax.plot([point[name] for point in points], above, "o-", markersize=4, label=LABELS[method])
        axes[2].plot([p["candidates"] for p in points], [100 * p["solved"] for p in points], "o-", markersize=4)
    axes[0].set(xlabel="candidates of a composition", ylabel="above the lowest of both (meV/atom)")
    axes[1].set(xlabel="processor seconds a composition, all included")
    axes[2].set(xlabel="candidates of a composition", ylim=(0, 102),
                ylabel=f"within {1000 * NEAR:g} meV/atom of it (%)")  # fmt: skip
    axes[0].legend(frameon=False, fontsize=8)
    pairs = [(c["model"], c["random"]) for c in result["compositions"] if None not in (c["model"], c["random"])]
    differences = np.sort([1000 * (model - random) for model, random in pairs])
    axes[3].bar(range(len(differences)), differences, width=1.0, color=["C0" if d < 0 else "C1" for d in differences])
    axes[3].set(xlabel="compositions, sorted by it", ylabel="model minus random (meV/atom)")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:2]:
        ax.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.search", description=__doc__)
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--output_dir", type=Path, required=True)
    p.add_argument("--name", default="search")
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    result = json.loads((arguments.run / SUMMARY).read_text(encoding="utf-8"))
    rows = pyarrow.parquet.read_table(arguments.run / PARQUET).to_pylist()
    by_method = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    expected = result["num_compositions"] * result["candidates_of_each"]
    assert all(len(mine) == expected for mine in by_method.values()), "a candidate was lost"
    plan = result["plan"]
    for name in ("checkpoint", "compositions_from"):  # of the machine that it was made on
        plan[name] = Path(plan[name]).name
    plan["not_in"] = [Path(path).name for path in plan["not_in"]]
    plan.pop("compositions")
    result = {
        "commit": commit(), "machine": machine(), **result,
        "throughput": {method: throughput(mine) for method, mine in by_method.items()},
        "random_by_operations": by_operations(by_method["random"]),
        "bonded_anions": {method: bonded_anions(mine, arguments.run) for method, mine in by_method.items()},
    }  # fmt: skip
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / f"{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, path.with_suffix(".png"))
    print(
        json.dumps(
            {name: result[name] for name in ("throughput", "random_by_operations", "bonded_anions", "best", "pairs")},
            indent=1,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
