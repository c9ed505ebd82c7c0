"""What is evaluated: every structure of crystal files, those that are none included, with what the files say of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.errors import UserError
from unimat_jax.structure_files import MANIFEST, RawStructure, parse, scan

NOT_STRUCTURES = {"not_a_structure_file"}
"""Files beside the structures, as a README: reported, but no part of what was asked for."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One structure that was asked for. crystal: None where there is none, and `reason` and `message` then say why.

    reference_uid: the structure that it is a prediction of, "" where the files name none.
    """

    uid: str
    crystal: Crystal | None
    reason: str = ""
    message: str = ""
    reference_uid: str = ""

    @property
    def properties(self) -> dict[str, float]:
        return self.crystal.properties if self.crystal else {}


def read_entries(paths: str | Path | Sequence[str | Path], *, progress: bool = True) -> list[Entry]:
    """All structures of crystal files, directories and zips, in order, with unique uids (a repeated one gets "#2").

    Raises UserError where a path does not exist, is of an unknown kind or holds no structure at all.
    """
    from tqdm import tqdm

    paths = [paths] if isinstance(paths, str | Path) else paths
    entries: list[Entry] = []
    left_out = 0
    for path in paths:
        path = Path(path)
        references = _manifest_references(path)
        bar = {"desc": f"reading {path.name}", "unit": "structure", "file": sys.stderr, "leave": False}
        for found in tqdm(_entries(path, references), disable=not progress, **bar):
            if found.reason in NOT_STRUCTURES:
                left_out += 1
                print(f"left out: {found.message}", file=sys.stderr)
            else:
                entries.append(found)
    if not entries:
        shown = ", ".join(str(path) for path in paths)
        raise UserError(f"no structures in {shown}: give crystal files, or a directory or zip of them")
    return _unique(entries)


def _entries(path: Path, references: dict[str, str]) -> Iterator[Entry]:
    for raw in _scan(path):
        reference = references.get(raw.uid) or raw.texts.get("reference_uid", "")
        if not reference and "reference_uid" in raw.properties:  # a name of digits alone was read as a number
            reference = f"{raw.properties['reference_uid']:.0f}"
        try:
            yield Entry(raw.uid, parse(raw)[0], reference_uid=reference)
        except CrystalError as error:
            yield Entry(raw.uid, None, error.reason, str(error), reference)


def _scan(path: Path) -> Iterator[RawStructure]:
    if path.suffix == ".pt":
        from unimat_jax.evaluation.torch_files import scan_torch

        return scan_torch(path)
    return scan(path)


def _manifest_references(path: Path) -> dict[str, str]:
    """reference_uid by uid, of an output directory of `unimat generate`."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return {}
    rows = (json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines())
    return {row["uid"]: row["reference_uid"] for row in rows if "uid" in row and "reference_uid" in row}


def _unique(entries: list[Entry]) -> list[Entry]:
    seen: dict[str, int] = {}
    result = []
    for entry in entries:
        seen[entry.uid] = number = seen.get(entry.uid, 0) + 1
        result.append(entry if number == 1 else dataclasses.replace(entry, uid=f"{entry.uid}#{number}"))
    return result
