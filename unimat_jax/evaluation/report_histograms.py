"""Numbers in few digits and histograms in few bins, so that a page does not carry the values themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUM_BINS = 40
MAX_CATEGORIES = 24
SIGNIFICANT_DIGITS = 5


def plain(value: Any) -> Any:
    """A value for JSON: floats rounded, None for NaN and infinity, numpy's types as Python's, anything else as text."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | np.ndarray | set | frozenset) and not isinstance(value, bytes):
        return [plain(item) for item in value]
    return str(value)


def histogram(title: str, series: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Shares of each series' values by bin, {title, edges or categories, series: [{name, n, left_out, shares}]}.

    Numbers fall in bins between the 0.5th and the 99.5th percentile of all values, those outside in the outermost two.
    Texts, and numbers that are all whole, are counted one by one, the rarest beyond `MAX_CATEGORIES` together as
    "other". `left_out` counts None, NaN and infinity, n the rest.
    """
    kept = {name: [value for value in values if _is_there(value)] for name, values in series.items()}
    together = [value for values in kept.values() for value in values]
    result: dict[str, Any] = {"title": title}
    if any(isinstance(value, str) for value in together):
        result["categories"], counts = _count_each({name: list(map(str, values)) for name, values in kept.items()})
    elif all(float(value).is_integer() for value in together):
        result["categories"], counts = _count_each({name: list(map(int, values)) for name, values in kept.items()})
    else:
        edges = _edges(np.asarray(together, float))
        counts = {name: _count_bins(np.asarray(values, float), edges) for name, values in kept.items()}
        result["edges"] = [plain(edge) for edge in edges]
        result["clipped"] = [bool(min(together) < edges[0]), bool(max(together) > edges[-1])]
    result["series"] = [
        {
            "name": name,
            "n": len(values),
            "left_out": len(series[name]) - len(values),
            "shares": [round(count / max(len(values), 1), 5) for count in counts[name]],
        }
        for name, values in kept.items()
    ]
    return result


def _is_there(value: Any) -> bool:
    return value is not None and (isinstance(value, str) or math.isfinite(value))


def _count_each(series: Mapping[str, list[Any]]) -> tuple[list[str], dict[str, list[int]]]:
    """Categories in ascending order, and each series' counts of them. All values are texts, or all are integers."""
    weight: dict[Any, float] = {}
    for values in series.values():
        for value in values:
            weight[value] = weight.get(value, 0) + 1 / len(values)  # a short series has its say too
    shown = sorted(sorted(weight, key=lambda value: -weight[value])[:MAX_CATEGORIES])
    if shown and isinstance(shown[0], int) and shown[-1] - shown[0] < MAX_CATEGORIES and len(shown) == len(weight):
        shown = list(range(shown[0], shown[-1] + 1))  # gaps are to be seen
    other = len(weight) > len(shown)
    place = {value: i for i, value in enumerate(shown)}
    counts = {}
    for name, values in series.items():
        found = np.bincount([place.get(value, len(shown)) for value in values], minlength=len(shown) + 1)
        counts[name] = found[: len(shown) + other].tolist()
    return [str(value) for value in shown] + ["other"] * other, counts


def _edges(values: np.ndarray) -> np.ndarray:
    low, high = np.quantile(values, [0.005, 0.995])
    if not high > low:
        low, high = values.min(), values.max()
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, NUM_BINS + 1)


def _count_bins(values: np.ndarray, edges: np.ndarray) -> list[int]:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
