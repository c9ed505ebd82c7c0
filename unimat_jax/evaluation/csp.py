"""Crystal structure prediction: match rates and RMSE against references, METRe and cRMSE.

`match_rate`, `rms_dist`: CDVAE's reconstruction metrics (Xie et al. 2022, arXiv 2110.06197) as DiffCSP uses them for
one and for k samples a reference (Jiao et al. 2023, arXiv 2309.04475). `metre`, `crmse`: arXiv 2509.12178, which also
counts a polymorph that was predicted for another reference of the same composition. All over all references.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.alignment import Reduced, Tolerances, rms_dist
from unimat_jax.evaluation.matching import (
    TIMEOUT_S,
    compare,
    reduce_all,
    reduced_composition,
    tolerances_of,
    why_unmatched,
    workers_for,
)
from unimat_jax.evaluation.metrics import Metric, mean, share
from unimat_jax.evaluation.pool import Failure, Pool


@dataclasses.dataclass(frozen=True)
class CspResult:
    """metrics by name; rows: one a sample; reference_rows: one a reference. Distances in (V / n)^(1/3)."""

    metrics: dict[str, Metric]
    rows: list[dict[str, Any]]
    reference_rows: list[dict[str, Any]]
    tolerances: Tolerances

    def to_json(self) -> dict[str, Any]:
        """The metrics and the tolerances."""
        metrics = {name: metric.to_json() for name, metric in self.metrics.items()}
        return {"tolerances": dataclasses.asdict(self.tolerances), "metrics": metrics}


@dataclasses.dataclass(frozen=True)
class _Sample:
    """rms_dist: to its own reference; others: to references of its composition, by uid, its own included."""

    crystal: Crystal | None
    reference: str
    valid: bool
    rms_dist: float | Failure | None
    others: dict[str, float]


def csp_metrics(
    references: Mapping[str, Crystal | None],
    samples: Sequence[Crystal | None],
    reference_uids: Sequence[str],
    *,
    sample_valid: Sequence[bool] | None = None,
    reference_valid: Mapping[str, bool] | None = None,
    tolerances: str | Tolerances = "cdvae",
    with_metre: bool = True,
    num_workers: int | None = None,
    progress: bool = True,
) -> CspResult:
    """Match rates and RMSE of samples, each a prediction of the reference that stands beside it in `reference_uids`.

    A reference has any number of samples; the first in order is the one of the one-sample metrics. A sample of None
    (failed) counts like one that does not match. A uid that only `reference_valid` knows is a reference without a
    crystal: it stays in the denominators. With `sample_valid` and `reference_valid` there are metrics for valid ones
    too (`..._valid`): as in DiffCSP, one sample counts if it and its reference are valid, k samples if they are.

    with_metre: also compares all samples and references of one composition, which is slow where one composition has
    thousands (Carbon-24). Raises UserError where a sample's reference is not among `references`.
    """
    uids: list[str] = [*references, *(uid for uid in reference_valid or {} if uid not in references)]
    known = set(uids)
    if not len(samples) == len(reference_uids) == len(sample_valid if sample_valid is not None else samples):
        raise ValueError("samples, reference_uids and sample_valid must be of one length")
    for uid in reference_uids:
        if uid not in known:
            raise UserError(f"a sample predicts {uid!r}, which is none of the {len(uids)} references: name one of them")
    settings = tolerances_of(tolerances)
    rms = _distances(references, samples, reference_uids, settings, with_metre, num_workers, progress)
    valid = list(sample_valid) if sample_valid is not None else [True] * len(samples)
    scored = [
        _Sample(crystal, uid, ok, found.get(uid), {u: d for u, d in found.items() if isinstance(d, float)})
        for crystal, uid, ok, found in zip(samples, reference_uids, valid, rms, strict=True)
    ]
    by_reference: dict[str, list[_Sample]] = defaultdict(list)
    for sample in scored:
        by_reference[sample.reference].append(sample)
    metrics = _metrics(uids, scored, by_reference, reference_valid, settings, sample_valid is not None, with_metre)
    rows = []
    for s in scored:
        value = s.rms_dist if isinstance(s.rms_dist, float) else None
        rows.append(
            {"match": value is not None, "rms_dist": value, "match_reason": why_unmatched(s.crystal, s.rms_dist)}
        )
    return CspResult(metrics, rows, _reference_rows(uids, scored, by_reference, with_metre), settings)


def _distances(
    references: Mapping[str, Crystal | None],
    samples: Sequence[Crystal | None],
    reference_uids: Sequence[str],
    tolerances: Tolerances,
    with_metre: bool,
    num_workers: int | None,
    progress: bool,
) -> list[dict[str, float | Failure | None]]:
    """For each sample, what comparing it with references of its composition gave, by their uid."""
    compositions: dict[Any, list[str]] = defaultdict(list)
    for uid, crystal in references.items():
        if crystal is not None:
            compositions[reduced_composition(crystal)].append(uid)
    candidates: list[list[str]] = []  # of each sample
    for sample, own in zip(samples, reference_uids, strict=True):
        alike = [] if sample is None else compositions.get(reduced_composition(sample), [])
        candidates.append(alike if with_metre else [uid for uid in alike if uid == own])
    needed = sorted({uid for uids in candidates for uid in uids})
    asked = [i for i, uids in enumerate(candidates) if uids]
    with Pool(workers_for(len(needed) + len(asked), num_workers), timeout_s=TIMEOUT_S) as pool:
        crystals = [*(references[uid] for uid in needed), *(samples[i] for i in asked)]
        cells = iter(reduce_all(pool, [crystal for crystal in crystals if crystal is not None], progress))
        reference_cells = {uid: next(cells) for uid in needed}
        sample_cells = {i: next(cells) for i in asked}
        pairs = [
            (i, uid)
            for i in asked
            for uid in candidates[i]
            if uid == reference_uids[i] or _may_match(sample_cells[i], reference_cells[uid])
        ]
        cell_pairs = [(sample_cells[i], reference_cells[uid]) for i, uid in pairs]
        found = compare(pool, rms_dist, cell_pairs, tolerances, "matching" if progress else "")
    result: list[dict[str, float | Failure | None]] = [{} for _ in samples]
    for (i, uid), value in zip(pairs, found, strict=True):
        result[i][uid] = value
    return result


def _may_match(a: Reduced | Failure, b: Reduced | Failure) -> bool:
    return isinstance(a, Reduced) and isinstance(b, Reduced) and a.counts == b.counts


def _metrics(
    uids: Sequence[str],
    scored: Sequence[_Sample],
    by_reference: Mapping[str, Sequence[_Sample]],
    reference_valid: Mapping[str, bool] | None,
    tolerances: Tolerances,
    with_valid: bool,
    with_metre: bool,
) -> dict[str, Metric]:
    settings = f"StructureMatcher(ltol={tolerances.ltol}, stol={tolerances.stol}, angle_tol={tolerances.angle_tol})"
    most = max((len(samples) for samples in by_reference.values()), default=0)
    result: dict[str, Metric] = {}
    for suffix in ("", "_valid") if with_valid else ("",):
        only = ", only valid samples" if suffix else ""
        first: list[float | None] = []
        best: list[float | None] = []
        for uid in uids:
            samples = by_reference.get(uid, [])
            head = samples[:1] if not suffix or (reference_valid or {}).get(uid, True) else []
            first.append(_least(head, bool(suffix)))
            best.append(_least(samples, bool(suffix)))
        failures = sum(not by_reference.get(uid) or by_reference[uid][0].crystal is None for uid in uids)
        where = f"{only} of valid references" if suffix else ""
        result |= _rate_and_rms(suffix, first, f"the first sample{where}", settings, failures)
        if most > 1:
            missing = sum(all(s.crystal is None for s in by_reference.get(uid, [])) for uid in uids)
            result |= _rate_and_rms(f"_{most}{suffix}", best, f"the best of up to {most}{only}", settings, missing)
        if with_metre:
            nearest = _nearest(uids, [sample for sample in scored if sample.valid or not suffix])
            text = f"references matched by any sample of their composition{only}; {settings}"
            result[f"metre{suffix}"] = share([uid in nearest for uid in uids], text)
            text = f"mean best RMS distance of all references, {tolerances.stol} where unmatched{only}"
            distances = [nearest.get(uid, tolerances.stol) for uid in uids]
            result[f"crmse{suffix}"] = mean(distances, text, unit="(V/n)^(1/3)")
    return result


def _rate_and_rms(
    suffix: str, distances: Sequence[float | None], which: str, settings: str, failures: int
) -> dict[str, Metric]:
    matched = [distance for distance in distances if distance is not None]
    flags = [distance is not None for distance in distances]
    return {
        f"match_rate{suffix}": share(flags, f"references matched by {which}; {settings}", failures=failures),
        f"rms_dist{suffix}": mean(matched, f"mean RMS distance of the matched references, {which}", unit="(V/n)^(1/3)"),
    }


def _least(samples: Sequence[_Sample], only_valid: bool) -> float | None:
    found = [s.rms_dist for s in samples if isinstance(s.rms_dist, float) and (s.valid or not only_valid)]
    return min(found, default=None)


def _nearest(uids: Sequence[str], samples: Sequence[_Sample]) -> dict[str, float]:
    """The smallest distance of any sample to each reference that one matches."""
    result: dict[str, float] = {}
    for sample in samples:
        for uid, distance in sample.others.items():
            result[uid] = min(distance, result.get(uid, math.inf))
    return {uid: result[uid] for uid in uids if uid in result}


def _reference_rows(
    uids: Sequence[str], scored: Sequence[_Sample], by_reference: Mapping[str, Sequence[_Sample]], with_metre: bool
) -> list[dict[str, Any]]:
    nearest = _nearest(uids, scored)
    rows = []
    for uid in uids:
        samples = by_reference.get(uid, [])
        row = {"uid": uid, "num_samples": len(samples), "num_valid_samples": sum(s.valid for s in samples)}
        row |= {"first_rms_dist": _least(samples[:1], False), "best_rms_dist": _least(samples, False)}
        rows.append(row | ({"any_rms_dist": nearest.get(uid)} if with_metre else {}))
    return rows
