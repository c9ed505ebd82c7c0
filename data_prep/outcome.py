"""What became of one structure of the source, and its form on disk and between processes."""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import IO

import numpy as np

_HEAD = struct.Struct("<II")  # bytes of the JSON that follows, number of atoms


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one raw structure. reason is "" and record is there, or reason and message say why not."""

    split: str
    uid: str
    origin: str
    reason: str = ""
    message: str = ""
    record: dict[str, np.ndarray] | None = None
    properties: dict[str, float] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    changes: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Sizes, JSON, then slots, frac_coords and lattice as raw bytes."""
        values = [self.split, self.uid, self.origin, self.reason, self.message]
        text = json.dumps([*values, self.properties, self.texts, self.changes]).encode()
        if self.record is None:
            return _HEAD.pack(len(text), 0) + text
        arrays = [self.record[name].tobytes() for name in ("slots", "frac_coords", "lattice")]
        return b"".join([_HEAD.pack(len(text), len(self.record["slots"])), text, *arrays])


def is_failure(outcome: bytes) -> bool:
    return _HEAD.unpack_from(outcome)[1] == 0


def read_outcome(file: IO[bytes]) -> Outcome | None:
    """The next one, None where the file ends, or ends in the middle of it."""
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
