"""An evaluation as files: metrics.json, per_structure.parquet and .csv, report.html, and the printed table."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.errors import UserError
from unimat_jax.evaluation.measure import Measured
from unimat_jax.evaluation.metrics import PER_CENT, Metric
from unimat_jax.evaluation.scoring import Scored

METRICS, PARQUET, CSV, REPORT = "metrics.json", "per_structure.parquet", "per_structure.csv", "report.html"
FIRST_COLUMNS = ("uid", "formula", "status", "valid", "struct_valid", "comp_valid", "struct_valid_strict")


def prepare_directory(
    directory: Path, *, resume: bool, overwrite: bool, kept: str, made: Sequence[str], what: str
) -> None:
    """Makes `directory` ready for another run: a directory that is not empty is only touched when it is ours and the
    user said so.

    kept: the file or directory with what is finished, which `resume` keeps and `overwrite` deletes; made: the files
    that every run writes anew. Ours has `kept` or the first of `made`. Raises UserError.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output_dir={directory} is a file: name a directory")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not (resume or overwrite):
        raise UserError(f"--output_dir={directory} is not empty: add --resume or --overwrite, or name another")
    if not (directory / kept).exists() and not (directory / made[0]).is_file():
        raise UserError(f"--output_dir={directory} holds something else than {what}: name another")
    for name in made:
        (directory / name).unlink(missing_ok=True)
    if overwrite and (directory / kept).is_dir():
        for path in (directory / kept).iterdir():
            path.unlink()
    elif overwrite:
        (directory / kept).unlink(missing_ok=True)


def rows_of(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The per-structure table: every row with every column, the telling ones first, None where there is no value."""
    return full_rows([m.row for m in measured], FIRST_COLUMNS)


def full_rows(rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> list[dict[str, Any]]:
    """The rows with all columns of all of them, `first` first; None where there is no value or no finite one."""
    names = dict.fromkeys([*first, *(name for row in rows for name in row)])
    return [{name: _plain(row.get(name)) for name in names} for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_rows(rows: Sequence[Mapping[str, Any]], output_dir: Path) -> None:
    """per_structure.parquet and .csv."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        kinds = {type(value) for value in values} - {type(None)}
        if len(kinds - {int, float}) > 0 and len(kinds) > 1:  # a column of texts and numbers is one of texts
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(values, from_pandas=True) if kinds else pa.array(values, pa.string())
    table = pa.table(columns)
    pyarrow.parquet.write_table(table, output_dir / PARQUET)
    pyarrow.csv.write_csv(table, output_dir / CSV)


def write_metrics(scored: Scored, others: Mapping[str, Scored], about: Mapping[str, Any], output_dir: Path) -> None:
    """metrics.json: what was done (`about`), every metric, and the same metrics of the sets to compare with."""
    values = {
        **about,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "status": dict(Counter(m.row["status"] for m in scored.measured).most_common()),
        "metrics": {name: metric.to_json() for name, metric in scored.metrics.items()},
        "comparison": {
            title: {name: metric.to_json() for name, metric in other.metrics.items()} for title, other in others.items()
        },
    }
    (output_dir / METRICS).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def shown(value: float | None, unit: str) -> str:
    """A value as the table prints it."""
    if value is None:
        return "-"
    if unit == PER_CENT:
        return f"{100 * value:.1f}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def table(metrics: Mapping[str, Metric], others: Mapping[str, Mapping[str, float | None]], names: Sequence[str]) -> str:
    """The named metrics with their 95 % intervals, and beside them the values of `others` (title -> name -> value)."""
    titles = list(others)
    lines = [["metric", "value", "95 % interval", *titles]]
    for name in names:
        metric = metrics[name]
        interval = "-".join(shown(v, metric.unit) for v in metric.interval) if metric.interval else ""
        unit = f" ({metric.unit})" if metric.unit else ""
        cells = [shown(others[title].get(name), metric.unit) for title in titles]
        lines.append([name + unit, shown(metric.value, metric.unit), interval, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
