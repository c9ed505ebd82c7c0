"""The outcomes of parsing on disk, in order: parsing is done once, and an interrupted run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from data_prep.parse_pool import Outcome

_HEAD = struct.Struct("<II")  # bytes of the JSON that follows, number of atoms


class Spool:
    """A file of Outcomes, append only. One entry: sizes, JSON, then slots, frac_coords and lattice as raw bytes."""

    def __init__(self, path: Path, extra_columns: Mapping[str, Mapping[str, float]] | None = None):
        """extra_columns: id -> more properties, joined when the outcomes are read."""
        self.path = path
        self.extra_columns = extra_columns or {}

    def __iter__(self) -> Iterator[Outcome]:
        if self.path.exists():
            with self.path.open("rb") as file:
                while (entry := _read(file)) is not None:
                    extra = self.extra_columns.get(entry.uid)
                    if extra:
                        entry = dataclasses.replace(entry, properties={**entry.properties, **extra})
                    yield entry

    def resume(self) -> int:
        """The number of whole entries; half an entry that a killed run left at the end is cut off."""
        if not self.path.exists():
            return 0
        number = end = 0
        with self.path.open("r+b") as file:
            while _read(file) is not None:
                number, end = number + 1, file.tell()
            file.truncate(end)
        return number

    def append(self, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        """Writes each outcome, then passes it on."""
        with self.path.open("ab") as file:
            for outcome in outcomes:
                file.write(_entry(outcome))
                yield outcome


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
