"""Fingerprints of many crystals: over all cores, each within a time limit, kept on disk by the crystals' content."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.crystalnn import FEATURE_NAMES, Surroundings, features_of, surroundings
from unimat_jax.evaluation.magpie import composition_fingerprint
from unimat_jax.evaluation.pool import Failure, Pool, available_cores
from unimat_jax.evaluation.voronoi import FingerprintError

CACHE_VERSION = "unimat-fingerprint-1"
"""Part of every key: a change of what a fingerprint is needs another."""
_CHUNK_ATOMS = 400  # sent to a process at once: small crystals cost less together
_WORKER_ATOMS = 2000  # some 2 s of work, for which another process is worth its start
_PART_SIZE, _PART_SECONDS = 5000, 60.0  # of new results, before they go to disk
_PASSING = ("timeout", "worker_died", "error")  # may be the machine's fault: not kept on disk


@dataclasses.dataclass(frozen=True, eq=False)
class Fingerprint:
    """struct [61] or None, comp [132] or None. reason: "" or why struct is None: one of FingerprintError's, `timeout`,
    `worker_died` or `error`; these three are printed too."""

    struct: np.ndarray | None
    comp: np.ndarray | None
    reason: str = ""


Outcome = tuple[np.ndarray | None, str]
"""(structure fingerprint, "") or (None, reason)."""


def fingerprints(
    crystals: Sequence[Crystal],
    *,
    num_workers: int | None = None,
    cache_dir: str | Path | None = None,
    timeout_s: float = 30.0,
    progress: bool = True,
) -> list[Fingerprint]:
    """One Fingerprint a crystal, in order, by `structure_fingerprint` and `composition_fingerprint`.

    A crystal that fails has a reason and costs nobody else. num_workers: processes at most, by default as many as
    cores; 0: this one. cache_dir: where fingerprints are kept as the work goes on, and found again by content (made if
    absent). timeout_s: for one structure. progress: a bar with the failures so far. Raises UserError if no process
    starts.
    """
    from tqdm import tqdm

    keys = [content_key(crystal) for crystal in crystals]
    cache = _Cache(Path(cache_dir) if cache_dir is not None else None)
    rows = Counter(keys)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    todo = [row for row in sorted(first.values()) if keys[row] not in cache.outcomes]
    done = sum(rows[key] for key in rows if key in cache.outcomes)
    failed = sum(rows[key] for key in rows if key in cache.outcomes and cache.outcomes[key][1])
    bar = tqdm(
        total=len(keys), initial=done, desc="fingerprints", unit="crystal", disable=not progress, file=sys.stderr
    )
    try:
        for row, outcome in _outcomes([crystals[row] for row in todo], num_workers, timeout_s):
            key = keys[todo[row]]
            cache.add(key, outcome)
            if outcome[1]:
                failed += rows[key]
                bar.set_postfix(failed=failed)
            bar.update(rows[key])
    finally:
        bar.close()
        cache.flush()
    return [_fingerprint(crystal, *cache.outcomes[key]) for crystal, key in zip(crystals, keys, strict=True)]


def _fingerprint(crystal: Crystal, struct: np.ndarray | None, reason: str) -> Fingerprint:
    numbers, counts = np.unique(crystal.atomic_numbers, return_counts=True)
    return Fingerprint(struct, composition_fingerprint(zip(numbers.tolist(), counts.tolist(), strict=True)), reason)


def content_key(crystal: Crystal) -> bytes:
    """32 bytes that name a crystal's content: elements, coordinates and lattice to 8 decimals; not uid, properties."""
    digest = hashlib.sha256(CACHE_VERSION.encode())
    digest.update(np.asarray(crystal.atomic_numbers, "<i4").tobytes())
    for values in (crystal.frac_coords, crystal.lattice):
        digest.update((np.round(values, 8) + 0.0).astype("<f8").tobytes())  # + 0.0: not -0.0
    return digest.digest()


class _Cache:
    """Outcomes by content key, in memory and, with a directory, in files fingerprints-*.npz, only ever added to."""

    def __init__(self, directory: Path | None):
        self.directory = directory
        self.outcomes: dict[bytes, Outcome] = {}
        self.new: list[bytes] = []
        self.flushed = time.monotonic()
        if directory is None:
            return
        if directory.exists() and not directory.is_dir():
            raise UserError(f"cache_dir = {directory} is a file: name a directory")
        for path in sorted(directory.glob("fingerprints-*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    keys, structs, reasons = file["key"], file["struct"], file["reason"]
                assert structs.shape == (len(keys), len(FEATURE_NAMES)) and len(reasons) == len(keys)
            except (OSError, ValueError, KeyError, AssertionError, zipfile.BadZipFile) as error:
                print(f"{path} is no cache of fingerprints and left alone: {error}", file=sys.stderr)
                continue
            for key, struct, reason in zip(keys, structs, reasons.tolist(), strict=True):
                self.outcomes[key.tobytes()] = (None if reason else struct, reason)

    def add(self, key: bytes, outcome: Outcome) -> None:
        self.outcomes[key] = outcome
        if outcome[1] not in _PASSING:
            self.new.append(key)
        if len(self.new) >= _PART_SIZE or time.monotonic() > self.flushed + _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is new into a file of its own, which appears only when it is complete."""
        self.flushed = time.monotonic()
        if self.directory is None or not self.new:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        empty = np.full(len(FEATURE_NAMES), np.nan)
        found = [self.outcomes[key] for key in self.new]
        path = self.directory / f"fingerprints-{uuid.uuid4().hex}.npz"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(
                file,
                key=np.frombuffer(b"".join(self.new), np.uint8).reshape(-1, 32),
                struct=np.array([empty if struct is None else struct for struct, _ in found]),
                reason=np.array([reason for _, reason in found]),
            )
        temporary.replace(path)
        self.new = []


def _outcomes(crystals: Sequence[Crystal], num_workers: int | None, timeout_s: float) -> Iterator[tuple[int, Outcome]]:
    """(place, outcome) of each crystal, in any order."""
    workers = available_cores() if num_workers is None else num_workers
    workers = min(workers, 1 + sum(crystal.num_atoms for crystal in crystals) // _WORKER_ATOMS)
    chunks: list[list[int]] = []
    atoms = _CHUNK_ATOMS
    for row, crystal in enumerate(crystals):
        if atoms + crystal.num_atoms > _CHUNK_ATOMS:
            chunks.append([])
            atoms = 0
        chunks[-1].append(row)
        atoms += crystal.num_atoms
    with Pool(workers, timeout_s=timeout_s) as pool:
        for only_one in (False, True):  # a chunk that fails is done again one by one, which shows the culprit
            results = pool.map(_outcomes_of, [[crystals[row] for row in chunk] for chunk in chunks])
            failed: list[list[int]] = []
            for chunk, result in zip(chunks, results, strict=True):
                if not isinstance(result, Failure):
                    yield from zip(chunk, result, strict=True)
                elif only_one or len(chunk) == 1:
                    name = crystals[chunk[0]].uid or "a crystal"
                    print(f"no fingerprint of {name}: {result.reason} {result.message}", file=sys.stderr)
                    yield chunk[0], (None, result.reason)
                else:
                    failed += [[row] for row in chunk]
            chunks = failed


def _outcomes_of(crystals: Sequence[Crystal]) -> list[Outcome]:
    """Runs in a worker. Small crystals cost less together."""
    found: list[Surroundings | str] = []
    for crystal in crystals:
        try:
            found.append(surroundings(crystal))
        except FingerprintError as error:
            found.append(error.reason)
    there = [one for one in found if isinstance(one, Surroundings)]
    structs = iter(features_of(there) if there else [])
    return [(None, one) if isinstance(one, str) else (next(structs).mean(0), "") for one in found]
