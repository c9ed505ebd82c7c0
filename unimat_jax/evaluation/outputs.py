"""An evaluation as files: metrics.json, per_structure.parquet and .csv, report.html, and the printed table."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.evaluation.measure import Measured
from unimat_jax.evaluation.metrics import PER_CENT, Metric
from unimat_jax.evaluation.scoring import Scored

METRICS, PARQUET, CSV, REPORT = "metrics.json", "per_structure.parquet", "per_structure.csv", "report.html"
FIRST_COLUMNS = ("uid", "formula", "status", "valid", "struct_valid", "comp_valid", "struct_valid_strict")


def rows_of(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The per-structure table: every row with every column, the telling ones first, None where there is no value."""
    names = dict.fromkeys([*FIRST_COLUMNS, *(name for m in measured for name in m.row)])
    return [{name: _plain(m.row.get(name)) for name in names} for m in measured]


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
