"""Which of the parsed structures become records, part by part: filters, splits, and each id once in the whole source.

An id that stands there twice is found through files of hashes, not in memory: its first structure is kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.atomic import write_array, written_whole
from data_prep.outcome import Outcome
from data_prep.selection import Filters, SplitRule, Summary
from data_prep.spool import Spool

_HASHES_AT_ONCE = 2**20


@dataclasses.dataclass(frozen=True)
class Work:
    """What every process of the later stages holds. directory: of their files, whose names are numbers of parts."""

    spool: Spool
    directory: Path
    filters: Filters
    rule: SplitRule

    def file(self, part: int, kind: str) -> Path:
        return self.directory / f"{part:06}.{kind}"

    @property
    def duplicates(self) -> Path:
        return self.directory / "duplicates.npy"

    def verdict(self, outcome: Outcome) -> tuple[int | None, str, str]:
        """The split, or None with a reason and a message; duplicates are not looked for."""
        if outcome.record is None:
            return None, outcome.reason, outcome.message
        reason, message = self.filters.reason(outcome.record["slots"])
        if reason:
            return None, reason, message
        split = self.rule.split(outcome)
        if split is None:
            return None, "not_in_split_ids", "the file of split ids does not name it"
        return split, "", ""

    def judged(self, part: int) -> Iterator[tuple[Outcome, int | None, str, str]]:
        """Each outcome of a part with its verdict, duplicates told."""
        first_of = self._first_of(part)
        for number, (_, outcome) in enumerate(self.spool.read(part)):
            split, reason, message = self.verdict(outcome)
            if number in first_of:
                origin = self.spool.origin(*first_of[number])
                split, reason = None, "duplicate_id"
                message = f"the id stands at {origin} already: the first is kept"
            yield outcome, split, reason, message

    def _first_of(self, part: int) -> dict[int, tuple[int, int]]:
        """number in the part -> part and place of the structure that had its id first."""
        index, first_part, place = np.load(self.duplicates, mmap_mode="r")
        size = self.spool.part_size
        rows = slice(*np.searchsorted(index, np.array([part * size, (part + 1) * size], np.uint64)).tolist())
        numbers = (index[rows] - part * size).tolist()
        return dict(zip(numbers, zip(first_part[rows].tolist(), place[rows].tolist(), strict=True), strict=True))


def halves_of_hash(key: str, salt: str = "") -> tuple[int, int]:
    """The MD5 by which TFDS orders records, in two halves of 64 bits."""
    digest = hashlib.md5((salt + key.replace("\\", "/")).encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def write_hashes(work: Work, part: int) -> None:
    """PART.ids.npy: [4, n] sorted by the hash of the id: its two halves, number in the source, place in the part."""
    rows = [
        (*halves_of_hash(outcome.uid), part * work.spool.part_size + number, place)
        for number, (place, outcome) in enumerate(work.spool.read(part))
        if work.verdict(outcome)[0] is not None
    ]
    array = np.array(rows, np.uint64).reshape(-1, 4).T
    write_array(work.file(part, "ids.npy"), array[:, np.lexsort(array[1::-1])])


def find_duplicates(work: Work) -> None:
    """duplicates.npy: [3, n] sorted by the first row: number of a structure whose id an earlier one has, and that one's
    part and place."""
    files = [work.file(part, "ids.npy") for part in range(work.spool.num_parts)]
    number_of_ranges = 1 + work.spool.num_parts * work.spool.part_size // _HASHES_AT_ONCE
    bounds = [round(2**64 * i / number_of_ranges) for i in range(number_of_ranges + 1)]
    found = [np.empty((3, 0), np.uint64)]
    for low, high in itertools.pairwise(bounds):
        rows = np.concatenate([_between(file, low, high) for file in files], axis=1)
        rows = rows[:, np.lexsort(rows[2::-1])]
        repeats = np.zeros(rows.shape[1], bool)
        repeats[1:] = (rows[:2, 1:] == rows[:2, :-1]).all(0)
        first = np.maximum.accumulate(np.where(repeats, 0, np.arange(rows.shape[1])))[repeats]
        found.append(np.stack([rows[2, repeats], rows[2, first] // np.uint64(work.spool.part_size), rows[3, first]]))
    duplicates = np.concatenate(found, axis=1)
    write_array(work.duplicates, duplicates[:, np.argsort(duplicates[0])])


def _between(file: Path, low: int, high: int) -> np.ndarray:
    """Columns of a sorted array on disk whose first row is in [low, high)."""
    array = np.load(file, mmap_mode="r")
    start = np.searchsorted(array[0], np.uint64(low))
    stop = np.searchsorted(array[0], np.uint64(high - 1), "right")
    return np.array(array[:, start:stop])


def write_summary(work: Work, part: int) -> None:
    """PART.dropped.jsonl, every dropped structure with its reason, and PART.summary.json."""
    summary = Summary()
    with written_whole(work.file(part, "dropped.jsonl")) as beside, beside.open("w", encoding="utf-8") as file:
        for outcome, split, reason, message in work.judged(part):
            if split is None:
                described = {"id": outcome.uid, "origin": outcome.origin, "message": message}
                summary.drop(reason, described)
                file.write(json.dumps({"reason": reason, **described}) + "\n")
            else:
                summary.keep(outcome, split)
    with written_whole(work.file(part, "summary.json")) as beside:
        beside.write_text(json.dumps(summary.state()))


def merged_summary(work: Work) -> Summary:
    """In the order of the parts: the same to the last digit whatever ran when."""
    whole = Summary()
    for part in range(work.spool.num_parts):
        whole.merge(Summary.of_state(json.loads(work.file(part, "summary.json").read_text())))
    return whole


def ids_not_found(work: Work) -> list[str]:
    """The ids of --split_ids that no structure has, sorted."""
    names = sorted(work.rule.ids or ())
    wanted = np.array([halves_of_hash(name)[0] for name in names], np.uint64)
    order = np.argsort(wanted)
    found = np.zeros(len(names), bool)
    for part in range(work.spool.num_parts if names else 0):
        hashes = np.load(work.file(part, "ids.npy"), mmap_mode="r")[0]
        place = np.minimum(np.searchsorted(wanted, hashes, sorter=order), len(names) - 1)
        hit = order[place]
        found[hit[wanted[hit] == hashes]] = True
    return [name for name, is_found in zip(names, found, strict=True) if not is_found]
