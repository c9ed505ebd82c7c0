"""The proxy metrics of CDVAE (Xie et al. 2022, arXiv 2110.06197), which the UniMat paper reports (its Table 1).

Validity, coverage (COV), Wasserstein distances of properties, diversity; each failure counts against the generated set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from unimat_jax.evaluation.coverage import Coverage, coverage
from unimat_jax.evaluation.magpie import standardise
from unimat_jax.evaluation.measure import Measured
from unimat_jax.evaluation.metrics import Metric, distribution_distance, mean, share

SUBSET = 1000
"""Valid crystals that CDVAE draws for its property statistics."""
DISTRIBUTIONS = {
    "density": ("density", "g/cm3"),
    "num_elems": ("num_elements", ""),
    "volume_per_atom": ("volume_per_atom", "A3"),
}
_VERDICTS = {
    "struct_valid": "no two atoms nearer than 0.5 A (own images left out), cell of at least 0.1 A3 (CDVAE)",
    "comp_valid": "SMACT: neutral and anions more electronegative, oxidation states smact14 (CDVAE)",
    "valid": "struct_valid, comp_valid, and a CrystalNN fingerprint that can be computed (CDVAE)",
    "struct_valid_strict": "0.01-25 g/cm3, distances >= 0.7 of the sum of covalent radii, own images included",
    "comp_valid_icsd24": "SMACT with the oxidation states of ICSD 2024",
}


@dataclasses.dataclass(frozen=True)
class ProxyResult:
    """metrics by name; coverage: with nearest references by generated and by reference structure, None without them."""

    metrics: dict[str, Metric]
    coverage: Coverage | None


def validity_metrics(generated: Sequence[Measured]) -> dict[str, Metric]:
    """Shares of all that was asked for."""
    failures = sum(m.crystal is None for m in generated)
    flags = {name: [bool(m.row.get(name)) for m in generated] for name in _VERDICTS if name != "comp_valid_icsd24"}
    flags["comp_valid_icsd24"] = [not m.row["comp_reason_icsd24"] for m in generated]
    return {name: share(flags[name], text, failures=failures) for name, text in _VERDICTS.items()}


def proxy_metrics(
    generated: Sequence[Measured],
    reference: Sequence[Measured],
    *,
    cutoffs: tuple[float, float],
    energies: Sequence[str] = (),
) -> ProxyResult:
    """All proxy metrics of a generated set against a reference set; `cutoffs`: COV's for structure and composition.

    energies: property columns that both sets have, of which the Wasserstein distance is taken too.
    """
    metrics = validity_metrics(generated)
    covered = _coverage(generated, reference, cutoffs)
    if covered is not None:
        metrics |= _coverage_metrics(covered, generated, reference, cutoffs)
    valid = [m for m in generated if m.valid]
    whole = [m for m in reference if m.crystal is not None]
    for name, (column, unit) in DISTRIBUTIONS.items():
        ours, theirs = ([m.row[column] for m in part] for part in (valid, whole))
        text = f"Wasserstein distance of {column} between valid generated and reference crystals"
        left_out = len(generated) - len(valid)
        metrics[f"wdist_{name}"] = distribution_distance(
            ours, theirs, f"{text}; mean of 100 seeded draws of {SUBSET}", unit=unit, subset=SUBSET, failures=left_out
        )
        metrics[f"wdist_{name}_all"] = distribution_distance(
            ours, theirs, f"{text}; all of them", unit=unit, failures=left_out
        )
    for name, field, unit in (("bond_length", "bond_lengths", "A"), ("coordination", "coordination", "")):
        ours, theirs = (np.concatenate([[], *(getattr(m, field) for m in part)]) for part in (valid, whole))
        text = f"Wasserstein distance of {field} in all first shells of valid generated and of reference crystals"
        left_out = len(generated) - len(valid)
        metrics[f"wdist_{name}"] = distribution_distance(ours, theirs, text, unit=unit, failures=left_out)
    for column in energies:
        ours, theirs = ([m.row.get(column, np.nan) for m in part] for part in (valid, whole))
        missing = len(generated) - int(np.isfinite(ours).sum())
        metric = distribution_distance(
            ours, theirs, f"Wasserstein distance of the column {column}", subset=SUBSET, failures=missing
        )
        note = "not comparable with published values, which a property network predicts"
        metrics[f"wdist_{column}"] = dataclasses.replace(metric, note=note)
    return ProxyResult(metrics | _diversity(valid), covered)


def _coverage(
    generated: Sequence[Measured], reference: Sequence[Measured], cutoffs: tuple[float, float]
) -> Coverage | None:
    ours, theirs = ([m.fingerprint for m in part] for part in (generated, reference))
    if not any(p.struct is not None for p in ours) or not any(p.struct is not None for p in theirs):
        return None
    return coverage(
        [p.struct for p in ours],
        [p.comp for p in ours],
        [p.struct for p in theirs],
        [p.comp for p in theirs],
        struct_cutoff=cutoffs[0],
        comp_cutoff=cutoffs[1],
        num_generated=len(generated),
    )


def _coverage_metrics(
    found: Coverage, generated: Sequence[Measured], reference: Sequence[Measured], cutoffs: tuple[float, float]
) -> dict[str, Metric]:
    where = f"within {cutoffs[0]:g} in structure (CrystalNN) and {cutoffs[1]:g} in composition (Magpie)"
    missing = sum(m.fingerprint.struct is None for m in generated)
    missing_reference = sum(m.fingerprint.struct is None for m in reference)
    precision = share(
        found.generated.within(*cutoffs), f"generated structures {where} of a reference", failures=missing
    )
    recall = share(
        found.reference.within(*cutoffs), f"references {where} of a generated one", failures=missing_reference
    )
    average = "mean distance to the nearest"
    return {
        "cov_recall": dataclasses.replace(recall, value=found.cov_recall),
        "cov_precision": dataclasses.replace(precision, value=found.cov_precision),
        "amsd_recall": mean(found.reference.struct_distance, f"{average} generated structure fingerprint"),
        "amcd_recall": mean(found.reference.comp_distance, f"{average} generated composition fingerprint"),
        "amsd_precision": mean(found.generated.struct_distance, f"{average} reference structure fingerprint"),
        "amcd_precision": mean(found.generated.comp_distance, f"{average} reference composition fingerprint"),
    }


def _diversity(valid: Sequence[Measured]) -> dict[str, Metric]:
    """Mean pairwise distances of at most SUBSET valid crystals, drawn with seed 0."""
    from scipy.spatial.distance import pdist

    there = [m.fingerprint for m in valid if m.fingerprint.struct is not None]
    chosen = np.random.default_rng(0).permutation(len(there))[:SUBSET]
    if len(chosen) < 2:
        return {}
    result = {}
    for name, rows in (
        ("struct_div", np.stack([there[i].struct for i in chosen])),
        ("comp_div", standardise(np.stack([there[i].comp for i in chosen]))),
    ):
        text = f"mean pairwise distance of {name[:6].rstrip('_')} fingerprints of at most {SUBSET} valid crystals"
        result[name] = Metric(float(pdist(rows).mean()), len(rows), text)
    return result
