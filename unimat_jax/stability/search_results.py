"""Two methods' relaxed candidates of the same compositions against each other: best energies, curves, who wins."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.evaluation.metrics import Metric, bootstrap, mean, share
from unimat_jax.evaluation.outputs import full_rows, table, write_rows
from unimat_jax.stability.comparison import ENERGY, compare_sets

SUMMARY = "search.json"
METHODS = ("model", "random")
TIE = 0.001
"""eV/atom: best energies nearer than this are the same."""
NEAR = 0.01
"""eV/atom: within this of the lowest of both methods a composition counts as solved."""
_FIRST = ("composition", "formula", "method", "candidate", "uid", "status", ENERGY, "force_calls", "cpu_seconds")
_RELAXED = ("status", "message", ENERGY, "seconds", "cpu_seconds", "max_force", "max_stress", "volume_per_atom",
            "volume_change", "relax_rmsd", "space_group_number")  # fmt: skip
_MADE = ("operations", "space_group", "volume_fraction", "attempts", "soft_calls", "soft_cpu_seconds")
Row = Mapping[str, Any]


def candidate_row(
    method: str, place: tuple[int, int, str], made: Row, relaxed: Row | None, generation_seconds: float
) -> dict[str, Any]:
    """A candidate's row, from its row in the manifest and that of its relaxation, None where it was not made.

    place: number of the composition, of the candidate, and the composition's reduced formula. generation_seconds: of
    the processor, soft spheres left out. force_calls: soft spheres included.
    """
    composition, candidate, formula = place
    soft = made.get("soft_calls", 0)
    row = {
        "method": method, "composition": composition, "candidate": candidate, "uid": made["uid"], "formula": formula,
        "reduced_formula": formula, "generation_status": made["status"],
        "generation_cpu_seconds": generation_seconds, **{name: made.get(name) for name in _MADE},
    }  # fmt: skip
    if relaxed is None:
        return {**row, "status": f"failed({made['status']})", "message": made["message"], "force_calls": soft}
    return {**row, **{name: relaxed.get(name) for name in _RELAXED}, "force_calls": relaxed["force_calls"] + soft}


def best_energies(rows: Sequence[Row], number: int | None = None) -> dict[int, float]:
    """eV/atom of the lowest converged of the first `number` candidates by composition, where there is one."""
    result: dict[int, float] = {}
    for row in rows:
        early = number is None or row["candidate"] < number
        if early and row["status"] == "converged" and row.get(ENERGY) is not None:
            energy = float(row[ENERGY])
            result[row["composition"]] = min(energy, result.get(row["composition"], energy))
    return result


def method_metrics(rows: Sequence[Row], num_compositions: int) -> dict[str, Metric]:
    """Of one method's candidates."""
    best = best_energies(rows)
    calls = [row["force_calls"] for row in rows]
    return {
        "composition_converged": share([i in best for i in range(num_compositions)],
                                       "compositions of which at least one candidate converged"),
        "converged": share([row["status"] == "converged" for row in rows], "candidates that converged in the budget"),
        "mean_force_calls": mean(calls, "of a candidate, soft spheres included"),
        **{f"mean_{name}": mean([row.get(name) or 0.0 for row in rows], text, unit="s") for name, text in (
            ("generation_cpu_seconds", "processor seconds to make a candidate"),
            ("soft_cpu_seconds", "processor seconds of the soft spheres"),
            ("cpu_seconds", "processor seconds of the relaxation"))},
        **volume_metrics(rows),
    }  # fmt: skip


def volume_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """How far the cells were from rest."""
    changes = [row["volume_change"] for row in rows if row["status"] == "converged"]
    text = "volume after the relaxation over before, minus 1; mean over the converged"
    return {"mean_volume_change": mean(changes, text, failures=len(rows) - len(changes))}


def best_metrics(model: Sequence[Row], random: Sequence[Row], num_compositions: int) -> dict[str, Metric]:
    """The model's lowest energies minus those of random search, and who is lower."""
    ours, theirs = best_energies(model), best_energies(random)
    both = sorted(ours.keys() & theirs.keys())
    differences = [ours[i] - theirs[i] for i in both]
    text = "lowest of the model minus lowest of random search"
    none = num_compositions - len(both)
    result = {
        "best_difference_mean": mean(differences, f"mean of {text}", unit="eV/atom", failures=none),
        "best_difference_median": median(differences, f"median of {text}", failures=none),
    }
    flags = {
        "model_wins": ([d < -TIE for d in differences], f"the model's lowest is lower by more than {TIE} eV/atom"),
        "tie": ([abs(d) <= TIE for d in differences], f"both lowest within {TIE} eV/atom"),
        "random_wins": ([d > TIE for d in differences], f"random search's lowest is lower by more than {TIE} eV/atom"),
    }
    for name, (values, definition) in flags.items():
        result[name] = share(values, f"{definition}; of compositions where both converged", failures=none)
    for name, there, other in (("only_model", ours, theirs), ("only_random", theirs, ours)):
        definition = f"{name.removeprefix('only_')} alone has a converged candidate; of all compositions"
        result[name] = share([i in there and i not in other for i in range(num_compositions)], definition)
    return result


def known_metrics(rows: Sequence[Row], known: Mapping[int, Row]) -> dict[str, Metric]:
    """Lowest energies against those of the relaxed known crystals (rows by composition)."""
    best = best_energies(rows)
    energies = {i: row[ENERGY] for i, row in known.items() if row["status"] == "converged"}
    differences = [best[i] - energies[i] for i in sorted(best.keys() & energies.keys())]
    none = len(known) - len(differences)
    text = "lowest of the candidates minus the known crystal, both relaxed"
    return {
        "above_known_mean": mean(differences, f"mean of {text}", unit="eV/atom", failures=none),
        "above_known_median": median(differences, f"median of {text}", failures=none),
        "as_low_as_known": share([i in best and best[i] - energy <= TIE for i, energy in energies.items()],
                                 f"lowest at most {TIE} eV/atom above the known crystal; without one: no"),
        "below_known": share([i in best and best[i] - energy < -TIE for i, energy in energies.items()],
                             f"lowest more than {TIE} eV/atom below the known crystal; without one: no"),
    }  # fmt: skip


def median(values: Sequence[float], definition: str, *, failures: int) -> Metric:
    if not len(values):
        return Metric(None, 0, definition, failures, unit="eV/atom", note="nothing to judge")
    array = np.asarray(values, float)
    return Metric(_middle(array), len(array), definition, failures, bootstrap(array, _middle), "eV/atom")


def _middle(values: np.ndarray) -> float:
    return float(np.median(values))


def curves(
    rows: Mapping[str, Sequence[Row]], num_compositions: int, candidates: int
) -> dict[str, list[dict[str, Any]]]:
    """By method, for the first 1, 2, ... candidates of each composition.

    force_calls and cpu_seconds: spent on a composition so far, on making, soft spheres and relaxing; found: share of
    compositions with a converged candidate; solved: with one within NEAR of the lowest of both methods in the end;
    above_lowest: of the best above that lowest, eV/atom, over the compositions that have one.
    """
    bests = [best_energies(part) for part in rows.values()]
    lowest = {i: min(best.get(i, math.inf) for best in bests) for i in range(num_compositions)}
    result: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for method, part in rows.items():
        for number in range(1, candidates + 1):
            spent = [row for row in part if row["candidate"] < number]
            seconds = sum((row.get(name) or 0.0) for row in spent
                          for name in ("generation_cpu_seconds", "soft_cpu_seconds", "cpu_seconds"))  # fmt: skip
            best = best_energies(part, number)
            above = [best[i] - lowest[i] for i in best]
            result[method].append({
                "candidates": number, "force_calls": sum(row["force_calls"] for row in spent) / num_compositions,
                "cpu_seconds": seconds / num_compositions, "found": len(best) / num_compositions,
                "solved": sum(value <= NEAR for value in above) / num_compositions,
                "above_lowest_mean": float(np.mean(above)) if above else None,
                "above_lowest_median": float(np.median(above)) if above else None,
            })  # fmt: skip
    return dict(result)


def write_results(
    rows: Sequence[Row],
    known: Mapping[int, Row],
    formulas: Sequence[str],
    candidates: int,
    about: Mapping[str, Any],
    output_dir: Path,
) -> dict[str, Any]:
    """per_structure.parquet and .csv (a row a candidate) and search.json, which is returned."""
    number = len(formulas)
    by_method = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    ours, theirs = by_method["model"], by_method["random"]
    bests = {method: best_energies(part) for method, part in by_method.items()}
    result = {
        **about, "num_compositions": number, "candidates_of_each": candidates, "tie_ev_per_atom": TIE,
        "solved_ev_per_atom": NEAR,
        "methods": {method: {
            "status": dict(Counter(row["status"] for row in part).most_common()),
            "metrics": _json(method_metrics(part, number)),
            **({"against_known": _json(known_metrics(part, known))} if known else {}),
        } for method, part in by_method.items()},
        "best": _json(best_metrics(ours, theirs, number)),
        "pairs": _json(compare_sets(ours, theirs)),
        **({"known": {"status": dict(Counter(row["status"] for row in known.values()).most_common()),
                      "metrics": _json(volume_metrics(list(known.values())))}} if known else {}),
        "curves": curves(by_method, number, candidates),
        "compositions": [
            {"formula": formula, **{method: bests[method].get(i) for method in METHODS},
             **({"known": known[i][ENERGY] if known[i]["status"] == "converged" else None} if i in known else {})}
            for i, formula in enumerate(formulas)
        ],
    }  # fmt: skip
    write_rows(full_rows(rows, _FIRST), output_dir)
    (output_dir / SUMMARY).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: metric.to_json() for name, metric in metrics.items()}


def shown(rows: Sequence[Row], known: Mapping[int, Row], num_compositions: int) -> str:
    """The tables that the command prints."""
    by_method = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    metrics = {
        method: method_metrics(part, num_compositions) | (known_metrics(part, known) if known else {})
        for method, part in by_method.items()
    }
    others = {"random": {name: metric.value for name, metric in metrics["random"].items()}}
    both = best_metrics(by_method["model"], by_method["random"], num_compositions)
    both |= compare_sets(by_method["model"], by_method["random"])
    first = table(metrics["model"], others, list(metrics["model"]))
    return f"{first}\n\nA: the model, B: random search\n{table(both, {}, list(both))}"
