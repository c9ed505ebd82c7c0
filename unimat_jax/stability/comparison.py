"""Two sets of relaxed crystals against each other: equations 3 and 4 of the UniMat paper.

Equation 3 is the mean of E_f(a) - E_f(b) over all pairs of a in A and b in B of one composition, equation 4 the share
of those pairs with E_f(a) < E_f(b). Within one composition the elements cancel, so that the difference is that of the
energies an atom, and needs no reference. Compositions are reduced: Sr2Ti2O6 meets SrTiO3.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.errors import UserError
from unimat_jax.evaluation.metrics import Metric, mean, share

ENERGY = "scaled_energy_per_atom"
SAME = ("energy_model", "weights", "energy_model_kwargs", "correction", "functional", "protocol", "package")
"""What two sets must agree in, by the names in stability.json."""

Rows = Sequence[Mapping[str, Any]]


def compare_sets(a: Rows, b: Rows) -> dict[str, Metric]:
    """Both equations over all pairs of one composition (`_all`) and over the lowest of each composition (`_lowest`).

    A pair counts where both are converged and have an energy; `failures` of the `_all` metrics are the pairs that were
    dropped, of the `_lowest` ones the compositions of both sets in which one set has no converged member.
    """
    ours, theirs = _by_composition(a), _by_composition(b)
    common = sorted(ours.keys() & theirs.keys())
    differences, lowest, dropped, empty = [], [], 0, 0
    for formula in common:
        good_a = [energy for energy in ours[formula] if energy is not None]
        good_b = [energy for energy in theirs[formula] if energy is not None]
        differences += [x - y for x in good_a for y in good_b]
        dropped += len(ours[formula]) * len(theirs[formula]) - len(good_a) * len(good_b)
        if good_a and good_b:
            lowest.append(min(good_a) - min(good_b))
        else:
            empty += 1
    result = {}
    for name, values, failures, text in (
        ("all", differences, dropped, "all pairs of one composition, both converged"),
        ("lowest", lowest, empty, "the lowest converged of each composition that both sets have"),
    ):
        definition = f"mean of E_f(A) - E_f(B) over {text} (the paper's equation 3)"
        result[f"delta_formation_energy_{name}"] = mean(values, definition, unit="eV/atom", failures=failures)
        definition = f"share with E_f(A) < E_f(B) of {text} (the paper's equation 4)"
        result[f"reduction_rate_{name}"] = share([value < 0 for value in values], definition, failures=failures)
    return result


def _by_composition(rows: Rows) -> dict[str, list[float | None]]:
    result: dict[str, list[float | None]] = defaultdict(list)
    for row in rows:
        if row.get("reduced_formula"):
            result[row["reduced_formula"]].append(row.get(ENERGY) if row["status"] == "converged" else None)
    return result


def read_other(directory: Path, about: Mapping[str, Any], mixed_schemes: bool) -> list[dict[str, Any]]:
    """The rows of another run. Raises UserError where it is none, or was made by another model or protocol unasked."""
    import pyarrow.parquet

    from unimat_jax.evaluation.outputs import PARQUET
    from unimat_jax.stability.outputs import SUMMARY

    if not (directory / SUMMARY).is_file() or not (directory / PARQUET).is_file():
        raise UserError(f"--against={directory} has no {SUMMARY} and {PARQUET}: give the --output_dir of another run")
    theirs = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    different = [name for name in SAME if theirs.get(name) != about[name]]
    if different and not mixed_schemes:
        shown = "; ".join(f"{name}: {about[name]!r} here, {theirs.get(name)!r} there" for name in different)
        raise UserError(
            f"--against={directory} was made otherwise ({shown}): make both alike, or ask for the mixture with "
            "--mixed_schemes"
        )
    return pyarrow.parquet.read_table(directory / PARQUET).to_pylist()
