"""A source file as a stream: on disk or in a zip, decompressed on the way, and never more of it in memory than a limit.

The limits hold for what comes out of the decompressor, whatever a header says.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

MAX_TEXT_BYTES = 64 * 2**20
"""Of one structure's text, one line, one table cell, one JSON value: 200,000 atoms take less, and a few kilobytes can
unpack to terabytes."""
MAX_ARRAYS_BYTES = 4 * 2**30
"""Of what has to be in memory as a whole: the arrays of an npz file, a Parquet file in a zip."""


class TooLarge(ValueError):
    """A structure or a file is over a limit; the message says which, and what to do."""


def too_large(name: str, limit: int | None = None) -> TooLarge:
    mebibytes = (MAX_TEXT_BYTES if limit is None else limit) / 2**20
    return TooLarge(f"{name} is larger than {mebibytes:g} MiB: is it one structure? Give many as CSV, JSON or extxyz")


@dataclasses.dataclass(frozen=True, slots=True)
class SourceFile:
    """A file on disk or inside a zip. `name`: as shown; `uid`: what a single structure in it is called."""

    name: str
    uid: str
    open: Callable[[], IO[bytes]]
    path: Path | None = None

    @contextlib.contextmanager
    def binary(self) -> Iterator[IO[bytes]]:
        """The decompressed content as a stream."""
        with self.open() as stream:
            if self.name.lower().endswith(".gz"):
                with gzip.GzipFile(fileobj=stream) as unzipped:
                    yield unzipped  # type: ignore[misc]
            elif self.name.lower().endswith(".bz2"):
                with bz2.BZ2File(stream) as unzipped:
                    yield unzipped
            else:
                yield stream

    def read(self, limit: int) -> bytes:
        """The whole content; TooLarge above `limit` bytes."""
        with self.binary() as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise too_large(self.name, limit)
        return content

    def text(self) -> str:
        return self.read(MAX_TEXT_BYTES).decode("utf-8-sig", errors="replace")

    @contextlib.contextmanager
    def characters(self, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
        """The content as a text stream; bytes that are no UTF-8 become U+FFFD."""
        with self.binary() as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=newline)

    def lines(self, newline: str | None = None) -> Iterator[str]:
        """The lines with their ends, one in memory at a time; TooLarge for an endless one."""
        with self.characters(newline) as stream:
            while line := stream.readline(MAX_TEXT_BYTES + 1):
                if len(line) > MAX_TEXT_BYTES:
                    raise too_large(f"a line of {self.name}")
                yield line
