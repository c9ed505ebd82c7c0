"""Any collection of crystals -> Crystals, in two stages so that the second can run in parallel.

`scan(path)` finds structures, cheaply and lazily; `parse` (structure_parsing.py) turns one into a Crystal or raises.
One bad structure never ends a run. Nothing is unpickled, and archives are not unpacked to disk.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from unimat_jax import structure_tables as tables
from unimat_jax import structure_texts as texts
from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.errors import UserError
from unimat_jax.structure_parsing import Changes, RawStructure, parse, problem
from unimat_jax.structure_tables import SourceFile

__all__ = ["Changes", "Failure", "RawStructure", "parse", "read_structures", "scan"]

MAX_MEMBER_BYTES = 2**30
"""A larger file inside a zip is refused (`too_large`): a few kilobytes can unpack to terabytes."""

GENERATED, MANIFEST = "generated_crystals.extxyz", "manifest.jsonl"
"""In output directories of `unimat generate`, beside the same crystals as CIF; MatterGen writes the first too."""

_READERS: list[tuple[str, Callable[[SourceFile], Iterator[RawStructure]]]] = [
    (r"\.cif(\.gz)?$", texts.scan_cif),
    (r"\.(ext)?xyz(\.gz)?$", texts.scan_extxyz),
    (r"\.csv(\.gz|\.bz2)?$", tables.scan_csv),
    (r"\.jsonl?(\.gz|\.bz2)?$", tables.scan_json),
    (r"\.npz$", tables.scan_npz),
    (r"\.parquet$", tables.scan_parquet),
    (r"\.db$", tables.scan_ase_db),
    (r"(^|/)(poscar|contcar)[^/]*$|\.(poscar|vasp)$", texts.scan_poscar),
]
_KNOWN = (
    "a .cif, POSCAR / CONTCAR / .poscar / .vasp, .extxyz / .xyz, .csv, .json(.gz), .npz, .parquet or .db file, "
    "or a directory or .zip of them"
)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A structure that is no crystal: `reason` is a code to count by."""

    uid: str
    origin: str
    reason: str
    message: str


def scan(path: str | Path) -> Iterator[RawStructure]:
    """The structures in a file, a directory (recursive) or a zip, in a fixed order.

    Names: a material_id / uid / id column, else the file's name, else that with the row. Raises UserError at once for a
    path that does not exist, an unknown kind of file, or a table without structures.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give {_KNOWN}")
    if (path / GENERATED).is_file():
        return _scan_generated(path)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file()]
        if not files:
            raise UserError(f"{path} is an empty directory: put crystal files there ({_KNOWN})")
        names = [p.relative_to(path).as_posix() for p in files]
        opened = [functools.partial(open, p, "rb") for p in files]
        uids = _uids(names)
        return _scan_many(
            SourceFile(name, uid, opener, p) for name, uid, opener, p in zip(names, uids, opened, files, strict=True)
        )
    if path.suffix.lower() == ".zip":
        return _scan_zip(path)
    reader = _reader(path.name)
    if reader is None:
        raise UserError(f"{path} is of no known kind: give {_KNOWN}")
    source = SourceFile(path.name, _uids([path.name])[0], functools.partial(open, path, "rb"), path)
    return _checked_first(_refuse_pointer(source) or reader(source))


def _scan_generated(directory: Path) -> Iterator[RawStructure]:
    """The crystals of an output directory of `unimat generate` or MatterGen, each once, all frames; ours also tells of
    the samples that are none."""
    path = directory / GENERATED
    source = SourceFile(GENERATED, GENERATED, functools.partial(open, path, "rb"), path)
    yield from texts.scan_extxyz(source)
    if not (directory / MANIFEST).is_file():
        return
    for line in (directory / MANIFEST).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "formula" not in row:
            yield problem(row["uid"], MANIFEST, row["status"], row["message"])


def read_structures(path: str | Path) -> Iterator[Crystal | Failure]:
    """Every structure of `path` as a Crystal, or a Failure with its reason, in order; nothing is skipped."""
    for raw in scan(path):
        try:
            yield parse(raw)[0]
        except CrystalError as error:
            yield Failure(raw.uid, raw.origin, error.reason, str(error))


def _reader(name: str) -> Callable[[SourceFile], Iterator[RawStructure]] | None:
    if PurePosixPath(name).name.startswith("."):  # what systems leave behind, as in __MACOSX/._a.cif
        return None
    return next((reader for pattern, reader in _READERS if re.search(pattern, name, re.IGNORECASE)), None)


def _uids(names: list[str]) -> list[str]:
    """The shortest telling name of each file: its stem, or its path where several share the stem."""
    stems = []
    for name in names:
        file = PurePosixPath(re.sub(r"\.(gz|bz2)$", "", name))
        generic = re.match(r"(poscar|contcar)$", file.name, re.IGNORECASE) and len(file.parts) > 1
        if re.match(r"(poscar|contcar)", file.name, re.IGNORECASE):
            stems.append(file.parent.as_posix() if generic else file.name)
        else:
            stems.append(
                re.sub(r"\.(cif|extxyz|xyz|csv|jsonl?|npz|parquet|db|poscar|vasp)$", "", file.name, flags=re.IGNORECASE)
            )
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else name for stem, name in zip(stems, names, strict=True)]


def _scan_many(files: Iterator[SourceFile]) -> Iterator[RawStructure]:
    for file in files:
        reader = _reader(file.name)
        if reader is None:
            yield problem(
                file.uid, file.name, "not_a_structure_file", f"{file.name} is of no known kind and was left out"
            )
            continue
        try:
            yield from _refuse_pointer(file) or reader(file)
        except UserError as error:
            yield problem(file.uid, file.name, "unreadable_file", str(error))
        except Exception as error:  # zlib, Arrow and SQLite have errors of their own for a file that is damaged
            yield problem(file.uid, file.name, "unreadable_file", f"{file.name}: {type(error).__name__}: {error}")


def _scan_zip(path: Path) -> Iterator[RawStructure]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no valid zip ({error}): was the download cut off?") from error

    def opener(member: zipfile.ZipInfo) -> IO[bytes]:
        return archive.open(member)

    def found() -> Iterator[RawStructure]:
        members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
        for member, uid in zip(members, _uids([m.filename for m in members]), strict=True):
            name = member.filename
            if PurePosixPath(name).is_absolute() or ".." in re.split(r"[\\/]", name) or re.match(r"[A-Za-z]:|\\", name):
                yield problem(uid, name, "unsafe_path", f"{name!r} points outside the zip: repack it with plain names")
            elif member.file_size > MAX_MEMBER_BYTES:
                size, limit = member.file_size // 2**20, MAX_MEMBER_BYTES // 2**20
                message = f"{name} is {size} MiB unpacked, the limit is {limit}"
                yield problem(uid, name, "too_large", f"{message}: unpack the zip and give the directory")
            elif member.flag_bits & 1:
                yield problem(uid, name, "encrypted", f"{name} is encrypted: unpack the zip and give the directory")
            else:
                yield from _scan_many(iter([SourceFile(name, uid, functools.partial(opener, member))]))

    return found()


def _refuse_pointer(file: SourceFile) -> Iterator[RawStructure] | None:
    """A git-lfs pointer in place of the file: common, and its own message would mislead."""
    with file.open() as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            message = f"{file.name} is a git-lfs pointer, not the file: fetch it with 'git lfs pull'"
            return iter([problem(file.uid, file.name, "lfs_pointer", message)])
    return None


def _checked_first(structures: Iterator[RawStructure]) -> Iterator[RawStructure]:
    """The same iterator, advanced once, so that a wrong file is an error here and not in the middle of a run."""
    first = next(structures, None)
    if first is None:
        return iter(())

    def chained() -> Iterator[RawStructure]:
        yield first
        yield from structures

    return chained()
