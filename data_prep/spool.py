"""The outcomes of parsing on disk, in the source's order: parsing is done once, and an interrupted run goes on where it
stopped. They lie in parts of a fixed number of structures, whatever the number of workers: the later stages take one
part at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from data_prep.atomic import write_json
from data_prep.parse_pool import Outcome
from unimat_jax.errors import UserError

PART_SIZE = 8192
"""Structures of a part: some 2 MB on disk and 30 MB in memory."""
_HEAD = struct.Struct("<II")  # bytes of the JSON that follows, number of atoms


class Spool:
    """A directory of parts. One entry: sizes, JSON, then slots, frac_coords and lattice as raw bytes."""

    def __init__(
        self,
        directory: Path,
        part_size: int = PART_SIZE,
        extra_columns: Mapping[str, Mapping[str, float]] | None = None,
    ):
        """extra_columns: id -> more properties, joined when the outcomes are read."""
        self.directory = directory
        self.part_size = part_size
        self.extra_columns = extra_columns or {}

    def part(self, number: int) -> Path:
        """The file of one part, which is whole where the next one or the end is there."""
        return self.directory / f"{number:06}.outcomes"

    @property
    def _end(self) -> Path:
        return self.directory / "end.json"

    @property
    def size(self) -> int | None:
        """The number of outcomes, None as long as there may come more."""
        return json.loads(self._end.read_text())["size"] if self._end.exists() else None

    @property
    def num_parts(self) -> int:
        return -(-(self.size or 0) // self.part_size)

    def resume(self) -> int:
        """The number of whole outcomes; half of one that a killed run left at the end is cut off."""
        if self.size is not None:
            return self.size
        last = sum(1 for _ in itertools.takewhile(Path.exists, map(self.part, itertools.count()))) - 1
        if last < 0:
            return 0
        number, end = last * self.part_size, 0
        with self.part(last).open("r+b") as file:
            while _read(file) is not None:
                number, end = number + 1, file.tell()
            file.truncate(end)
        return number

    def append(self, outcomes: Iterable[Outcome], already: int) -> Iterator[Outcome]:
        """Writes each outcome after the `already` whole ones, then passes it on; when they end the spool has a size."""
        self.directory.mkdir(parents=True, exist_ok=True)
        outcomes, size = iter(outcomes), already
        for number in itertools.count(already // self.part_size):
            with self.part(number).open("ab") as file:
                for outcome in itertools.islice(outcomes, (number + 1) * self.part_size - size):
                    file.write(_entry(outcome))
                    size += 1
                    yield outcome
            if size < (number + 1) * self.part_size:
                break
        write_json(self._end, {"size": size})

    def read(self, number: int) -> Iterator[tuple[int, Outcome]]:
        """(place in the part's file, outcome) of one part. Raises UserError where it is damaged."""
        found, place = 0, 0
        with self.part(number).open("rb") as file:
            while (entry := _read(file)) is not None:
                yield place, self._joined(entry)
                found, place = found + 1, file.tell()
        expected = min(self.part_size, (self.size or 0) - number * self.part_size)
        if found != expected:
            raise UserError(
                f"{self.part(number)} holds {found} structures, not {expected}: delete {self.directory.parent}"
            )

    def origin(self, number: int, place: int) -> str:
        """Where the source has the structure at a place of a part's file."""
        with self.part(number).open("rb") as file:
            file.seek(place)
            entry = _read(file)
        assert entry is not None
        return entry.origin

    def _joined(self, entry: Outcome) -> Outcome:
        extra = self.extra_columns.get(entry.uid)
        return dataclasses.replace(entry, properties={**entry.properties, **extra}) if extra else entry


def _entry(outcome: Outcome) -> bytes:
    values = [outcome.split, outcome.uid, outcome.origin, outcome.reason, outcome.message]
    text = json.dumps([*values, outcome.properties, outcome.texts, outcome.changes]).encode()
    if outcome.record is None:
        return _HEAD.pack(len(text), 0) + text
    record = outcome.record
    arrays = [record["slots"].tobytes(), record["frac_coords"].tobytes(), record["lattice"].tobytes()]
    return b"".join([_HEAD.pack(len(text), len(record["slots"])), text, *arrays])


def _read(file) -> Outcome | None:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    text_size, num_atoms = _HEAD.unpack(head)
    sizes = (text_size, 3 * num_atoms, 12 * num_atoms, 24 if num_atoms else 0)
    body = file.read(sum(sizes))
    if len(body) < sum(sizes):
        return None
    text, slots, frac, lattice = (body[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(4))
    split, uid, origin, reason, message, properties, texts, changes = json.loads(text)
    record = None
    if num_atoms:
        record = {
            "slots": np.frombuffer(slots, np.uint8).reshape(-1, 3),
            "frac_coords": np.frombuffer(frac, np.float32).reshape(-1, 3),
            "lattice": np.frombuffer(lattice, np.float32),
        }
    return Outcome(split, uid, origin, reason, message, record, properties, texts, tuple(changes))
