"""All that can be said of one structure alone: verdicts, numbers, first shells, fingerprints. One row a structure."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal, found_by_spglib
from unimat_jax.evaluation.entries import Entry
from unimat_jax.evaluation.fingerprint_pool import Fingerprint, fingerprints
from unimat_jax.evaluation.geometry import shells, strict_reason
from unimat_jax.evaluation.pool import Failure, map_isolated
from unimat_jax.evaluation.structure_statistics import SYMPREC_LOOSE, describe, space_group
from unimat_jax.evaluation.validity import Validity, check

TIMEOUT_S = 30.0
"""Seconds that one structure may take in each stage."""
NO_FINGERPRINT = Fingerprint(None, None, "not_computed")


@dataclasses.dataclass(frozen=True)
class Measured:
    """row: what the per-structure table says. bond_lengths (Angstrom) and coordination: of all atoms' first shells."""

    entry: Entry
    row: dict[str, Any]
    bond_lengths: np.ndarray
    coordination: np.ndarray
    fingerprint: Fingerprint = NO_FINGERPRINT

    @property
    def crystal(self) -> Crystal | None:
        return self.entry.crystal

    @property
    def valid(self) -> bool:
        """CDVAE's: both validities, and a fingerprint where one was asked for."""
        return bool(self.row["valid"])


def measure(
    entries: Sequence[Entry],
    *,
    with_fingerprints: bool = True,
    num_workers: int | None = None,
    cache_dir: Path | None = None,
    what: str = "structures",
) -> list[Measured]:
    """One Measured an entry, in order. What fails or takes too long has the reason in its row and stays in the list."""
    there = [entry.crystal for entry in entries if entry.crystal is not None]
    checked = map_isolated(_measure, there, num_workers=num_workers, timeout_s=TIMEOUT_S, progress=f"checking {what}")
    results = list(checked)
    prints: list[Fingerprint] = [NO_FINGERPRINT] * len(there)
    if with_fingerprints:
        prints = fingerprints(there, num_workers=num_workers, cache_dir=cache_dir, timeout_s=TIMEOUT_S)
    found = iter(zip(results, prints, strict=True))
    return [_combine(entry, *next(found)) if entry.crystal is not None else _failed(entry) for entry in entries]


def _measure(crystal: Crystal) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """(row, bond lengths, coordination numbers) of a crystal; runs in a worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spglib's and pymatgen's remarks on odd cells, which the verdicts tell
        validity, numbers, near = check(crystal), describe(crystal), shells(crystal)
        symmetrised = _symmetrised_group(crystal)
    strict = strict_reason(crystal, near.closest_ratio)
    symbols = sorted(set(crystal.symbols))
    row = {
        **validity.to_json(),
        **numbers,
        "struct_valid_strict": not strict,
        "strict_reason": strict,
        "num_elements": len(symbols),
        "chemical_system": "-".join(symbols),
        "space_group_number_symmetrised": symmetrised,
        "mean_coordination": float(near.coordination.mean()),
        "closest_radii_ratio": near.closest_ratio,
    }
    return row, near.bond_lengths.astype(np.float32), near.coordination.astype(np.int16)


def _symmetrised_group(crystal: Crystal) -> int | None:
    """The space group at 0.01 A after the atoms were moved onto the symmetry that is found at 0.1 A."""
    import spglib

    cell: Any = (crystal.lattice, crystal.frac_coords, crystal.atomic_numbers)
    refined = found_by_spglib(spglib.refine_cell, cell, symprec=SYMPREC_LOOSE)
    if refined is None:
        return None
    lattice, frac, numbers = refined
    return space_group(Crystal.create(numbers, frac, lattice), 0.01)[0]


def _combine(entry: Entry, result: Any, fingerprint: Fingerprint) -> Measured:
    if isinstance(result, Failure):
        return _failed(dataclasses.replace(entry, reason=result.reason, message=result.message))
    row, lengths, coordination = result
    unprinted = "" if fingerprint is NO_FINGERPRINT else fingerprint.reason
    if unprinted:
        row = {**row, "valid": False, "status": "+".join(filter(None, [row["status"].replace("valid", ""), unprinted]))}
    return Measured(
        entry, _with_entry(row, entry) | {"fingerprint_reason": unprinted}, lengths, coordination, fingerprint
    )


def _failed(entry: Entry) -> Measured:
    """A structure that never was one, or whose check never ended."""
    row = Validity.failed(entry.uid, entry.reason).to_json()
    row |= {"struct_valid_strict": False, "strict_reason": entry.reason, "fingerprint_reason": entry.reason}
    nothing = Fingerprint(None, None, entry.reason)
    return Measured(
        dataclasses.replace(entry, crystal=None), _with_entry(row, entry), np.zeros(0), np.zeros(0, int), nothing
    )


def _with_entry(row: dict[str, Any], entry: Entry) -> dict[str, Any]:
    return {**row, "uid": entry.uid, "message": entry.message, "reference_uid": entry.reference_uid, **entry.properties}
