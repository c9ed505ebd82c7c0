"""The outcomes of parsing on disk, in the source's order: parsing is done once, and an interrupted run goes on where it
stopped. They lie in parts of a fixed number of structures, whatever the number of workers: the later stages take one
part at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from data_prep.atomic import write_json
from data_prep.outcome import Outcome, read_outcome
from unimat_jax.errors import UserError

PART_SIZE = 8192
"""Structures of a part: some 2 MB on disk and 30 MB in memory."""


class Spool:
    """A directory of parts."""

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
            while read_outcome(file) is not None:
                number, end = number + 1, file.tell()
            file.truncate(end)
        return number

    def append(self, outcomes: Iterable[bytes], already: int) -> Iterator[bytes]:
        """Writes each outcome (`Outcome.to_bytes`) after the `already` whole ones, then passes it on; where they end,
        the spool gets its size."""
        self.directory.mkdir(parents=True, exist_ok=True)
        outcomes, size = iter(outcomes), already
        for number in itertools.count(already // self.part_size):
            with self.part(number).open("ab") as file:
                for outcome in itertools.islice(outcomes, (number + 1) * self.part_size - size):
                    file.write(outcome)
                    size += 1
                    yield outcome
            if size < (number + 1) * self.part_size:
                break
        self.finish(size)

    def finish(self, size: int) -> None:
        write_json(self._end, {"size": size})

    def read(self, number: int) -> Iterator[tuple[int, Outcome]]:
        """(place in the part's file, outcome) of one part. Raises UserError where it is damaged."""
        found, place = 0, 0
        with self.part(number).open("rb") as file:
            while (entry := read_outcome(file)) is not None:
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
            entry = read_outcome(file)
        assert entry is not None
        return entry.origin

    def _joined(self, entry: Outcome) -> Outcome:
        extra = self.extra_columns.get(entry.uid)
        return dataclasses.replace(entry, properties={**entry.properties, **extra}) if extra else entry
