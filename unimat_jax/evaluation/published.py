"""Published rows to print beside ours. Validity, coverage and match rates in per cent, as the papers print them.

Sources: UniMat and LM: UniMat paper (arXiv 2311.09235) table 1; CDVAE, DiffCSP and others: DiffCSP (arXiv 2309.04475)
tables 1 and 4. All on the test splits with 10,000 samples (CDVAE protocol; energies from a property network are left
out); ours may be another split: the report names it.
"""

from __future__ import annotations

_COLUMNS = ("struct_valid", "comp_valid", "cov_recall", "cov_precision", "wdist_density", "wdist_num_elems")
_PROXY: dict[str, dict[str, tuple[float | None, ...]]] = {
    "perov_5": {
        "UniMat (paper)": (100.0, 98.8, 99.2, 98.2, 0.076, 0.025),
        "CDVAE": (100.0, 98.59, 99.45, 98.46, 0.1258, 0.0628),
        "DiffCSP": (100.0, 98.85, 99.74, 98.27, 0.1110, 0.0128),
        "LM": (100.0, 98.7, 99.6, 99.4, 0.071, 0.036),
    },
    "carbon_24": {
        "UniMat (paper)": (100.0, None, 100.0, 96.5, 0.013, None),
        "CDVAE": (100.0, None, 99.8, 83.08, 0.1407, None),
        "DiffCSP": (100.0, None, 99.9, 97.27, 0.0805, None),
    },
    "mp_20": {
        "UniMat (paper)": (97.2, 89.4, 99.8, 99.7, 0.088, 0.056),
        "CDVAE": (100.0, 86.7, 99.15, 99.49, 0.6875, 1.432),
        "DiffCSP": (100.0, 83.25, 99.71, 99.76, 0.3502, 0.3398),
        "LM": (95.8, 88.8, 99.6, 98.5, 0.696, 0.092),
    },
}
# match rate and RMSE with one sample and with 20, predictions filtered by validity
_CSP: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "perov_5": {
        "CDVAE": (45.31, 0.1138, 88.51, 0.0464),
        "DiffCSP": (52.02, 0.0760, 98.60, 0.0128),
        "P-cG-SchNet": (48.22, 0.4179, 97.94, 0.3463),
    },
    "carbon_24": {
        "CDVAE": (17.09, 0.2969, 88.37, 0.2286),
        "DiffCSP": (17.54, 0.2759, 88.47, 0.2192),
        "P-cG-SchNet": (17.29, 0.3846, 55.91, 0.3551),
    },
    "mp_20": {
        "CDVAE": (33.90, 0.1045, 66.95, 0.1026),
        "DiffCSP": (51.49, 0.0631, 77.93, 0.0492),
        "P-cG-SchNet": (15.39, 0.3762, 32.64, 0.3018),
    },
    "mpts_52": {
        "CDVAE": (5.34, 0.2106, 20.79, 0.2085),
        "DiffCSP": (12.19, 0.1786, 34.02, 0.1749),
        "P-cG-SchNet": (3.67, 0.4115, 12.96, 0.3942),
    },
}
DATASETS = tuple(_CSP)


def published(dataset: str) -> dict[str, dict[str, float]]:
    """Metric -> {row name: value} for a data set, shares in 0..1 as ours; {} for an unknown one."""
    result: dict[str, dict[str, float]] = {}
    for row, values in _PROXY.get(dataset, {}).items():
        for name, value in zip(_COLUMNS, values, strict=True):
            if value is not None:
                result.setdefault(name, {})[row] = value if name.startswith("wdist") else value / 100
    for row, (rate, rms, rate_20, rms_20) in _CSP.get(dataset, {}).items():
        numbers = {"match_rate_valid": rate / 100, "rms_dist_valid": rms, "match_rate_20_valid": rate_20 / 100}
        for name, value in {**numbers, "rms_dist_20_valid": rms_20}.items():
            result.setdefault(name, {})[row] = value
    return result


def guess_dataset(paths: list[str]) -> str:
    """The known data set that the paths of files name (perov_5, perov5, perov-5, ...), "" where they name none."""
    text = " ".join(paths).lower().replace("-", "_")
    for name in DATASETS:
        if name in text or name.replace("_", "") in text.replace("_", ""):
            return name
    return ""
