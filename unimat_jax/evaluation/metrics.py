"""A metric with all that a reader needs to trust it, and the statistics that metrics share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BOOTSTRAP_DRAWS = 400
CONFIDENCE = 0.95
MOST_RESAMPLED = 30_000
"""Values above which a distance of distributions gets no bootstrap interval: it would take minutes."""
PER_CENT = "%"
"""The unit of a share: its value is in 0..1, and is shown in per cent."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """value: None where it is not defined (`note` says why). n: the denominator or the number of values. failures: how
    many of n could not be judged, and count against the value. interval: 95 % bootstrap interval, None for counts."""

    value: float | None
    n: int
    definition: str
    failures: int = 0
    interval: tuple[float, float] | None = None
    unit: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value not in ("", None) or name == "value"
        }


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of a statistic over resampled rows of `values` [n, ...]; None for fewer than two rows."""
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def share(flags: Sequence[bool] | np.ndarray, definition: str, *, failures: int = 0) -> Metric:
    """The share of true flags over all of them, in 0..1."""
    flags = np.asarray(flags, bool)
    if not len(flags):
        return Metric(None, 0, definition, note="nothing to judge")
    # The mean of n resampled flags is a binomial draw: no need to resample.
    draws = np.random.default_rng(0).binomial(len(flags), flags.mean(), 10 * BOOTSTRAP_DRAWS) / len(flags)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Metric(float(flags.mean()), len(flags), definition, failures, (float(low), float(high)), PER_CENT)


def mean(values: Sequence[float] | np.ndarray, definition: str, *, unit: str = "", failures: int = 0) -> Metric:
    """The mean of the values that there are."""
    array = np.asarray(values, float)
    array = array[np.isfinite(array)]
    if not len(array):
        return Metric(None, 0, definition, failures, unit=unit, note="no values")
    return Metric(float(array.mean()), len(array), definition, failures, bootstrap(array, np.mean), unit)


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """First Wasserstein distance of two samples on a line, in their unit; as scipy.stats.wasserstein_distance."""
    a, b = np.sort(a), np.sort(b)
    points = np.sort(np.concatenate([a, b]))
    gaps = np.diff(points)
    cdf_a = np.searchsorted(a, points[:-1], "right") / len(a)
    cdf_b = np.searchsorted(b, points[:-1], "right") / len(b)
    return float(np.sum(np.abs(cdf_a - cdf_b) * gaps))


def distribution_distance(
    generated: Sequence[float] | np.ndarray,
    reference: Sequence[float] | np.ndarray,
    definition: str,
    *,
    unit: str = "",
    subset: int | None = None,
    failures: int = 0,
    seed: int = 0,
) -> Metric:
    """Wasserstein distance of two sets of numbers, missing ones left out.

    subset: CDVAE draws one unseeded subset of 1,000; here the mean over 100 seeded draws without replacement, and the
    interval is that of the draws. Without it, all values, and the interval is the bootstrap's over the generated ones.
    """
    a, b = (np.asarray(values, float) for values in (generated, reference))
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if not len(a) or not len(b):
        return Metric(None, len(a), definition, failures, unit=unit, note="no values")
    if subset is not None and len(a) > subset:
        rng = np.random.default_rng(seed)
        draws = [wasserstein(rng.choice(a, subset, replace=False), b) for _ in range(100)]
        low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Metric(float(np.mean(draws)), subset, definition, failures, (float(low), float(high)), unit)
    note = f"fewer than the protocol's {subset:,} values: all of them" if subset is not None else ""
    interval = bootstrap(a, lambda values: wasserstein(values, b), seed) if len(a) + len(b) < MOST_RESAMPLED else None
    return Metric(wasserstein(a, b), len(a), definition, failures, interval, unit, note)
