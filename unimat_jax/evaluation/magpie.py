"""Composition fingerprints: statistics of elemental properties, as matminer's ElementProperty with the preset "magpie".

CDVAE's coverage (Xie et al. 2022, arXiv 2110.06197) compares compositions by them. The properties are L. Ward et al.'s,
npj Comput. Mater. 2, 16028 (2016), doi:10.1038/npjcompumats.2016.28; values and rules are those of matminer 0.10.1.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

PROPERTIES = (
    *("Number", "MendeleevNumber", "AtomicWeight", "MeltingT", "Column", "Row", "CovalentRadius", "Electronegativity"),
    *("NsValence", "NpValence", "NdValence", "NfValence", "NValence"),
    *("NsUnfilled", "NpUnfilled", "NdUnfilled", "NfUnfilled", "NUnfilled"),
    *("GSvolume_pa", "GSbandgap", "GSmagmom", "SpaceGroupNumber"),
)
STATISTICS = ("minimum", "maximum", "range", "mean", "avg_dev", "mode")
FEATURE_NAMES = tuple(f"MagpieData {statistic} {name}" for name in PROPERTIES for statistic in STATISTICS)
"""The 132 features by matminer's names."""


@functools.cache
def element_data() -> dict[str, list[float | None]]:
    """magpie_data/elements.json (see its README): by name, one value for each Z from 1 to 118 or for each feature."""
    return json.loads((Path(__file__).parent / "magpie_data" / "elements.json").read_text(encoding="utf-8"))


def composition_fingerprint(composition: Iterable[tuple[int, float]], *, impute: bool = True) -> np.ndarray:
    """float64 [132]: FEATURE_NAMES of a composition, (atomic number, count) pairs; only the counts' ratios matter.

    impute: a property that an element lacks (He has no electronegativity) is the mean over those that have it, matminer
    0.10.1's default. False: its statistics are NaN, which `standardise` takes for the mean of CDVAE's data.
    """
    return _fingerprint(tuple(sorted((number, count) for number, count in composition)), impute).copy()


@functools.lru_cache(maxsize=100_000)
def _fingerprint(composition: tuple[tuple[int, float], ...], impute: bool) -> np.ndarray:
    numbers, counts = (np.array(column) for column in zip(*composition, strict=True))
    values = _table(impute)[numbers]
    weights = counts[:, None] / counts.sum()
    low, high, mean = values.min(0), values.max(0), (weights * values).sum(0)
    deviation = (weights * np.abs(values - mean)).sum(0)
    mode = values[np.isclose(counts, counts.max())].min(0)  # the lowest value of the most frequent elements
    return np.stack([low, high, high - low, mean, deviation, mode], axis=1).ravel()


@functools.cache
def _table(impute: bool) -> np.ndarray:
    """[119, 22] by atomic number and property."""
    columns = [element_data()[name] for name in PROPERTIES]
    table = np.array(columns, float).T
    if impute:
        table = np.where(np.isnan(table), np.nanmean(table, axis=0), table)
    return np.concatenate([np.full((1, len(PROPERTIES)), np.nan), table])


def standardise(fingerprints: np.ndarray) -> np.ndarray:
    """[..., 132] in the units of CDVAE's coverage: its training set's mean 0 and deviation 1; NaN becomes 0."""
    data = element_data()
    scaled = (fingerprints - np.array(data["cdvae_scaler_means"])) / np.array(data["cdvae_scaler_stds"])
    return np.where(np.isnan(scaled), 0.0, scaled)
