"""Any collection of crystals -> Crystals, in two stages so that the second can run in parallel.

`scan(path)` finds structures, cheaply and lazily; `parse` (structure_parsing.py) turns one into a Crystal or raises.
One bad structure never ends a run. Nothing is unpickled, and archives are not unpacked to disk.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from unimat_jax import structure_json
from unimat_jax import structure_tables as tables
from unimat_jax import structure_texts as texts
from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.errors import UserError
from unimat_jax.structure_parsing import Changes, RawStructure, parse, problem
from unimat_jax.structure_streams import SourceFile, TooLarge

__all__ = ["Changes", "Failure", "RawStructure", "parse", "read_structures", "scan"]

MAX_MEMBER_BYTES = 4 * 2**30
"""A larger file inside a zip is refused (`too_large`): a few kilobytes can unpack to terabytes. The limits of
structure_streams hold for what then comes out of it."""

GENERATED, MANIFEST = "generated_crystals.extxyz", "manifest.jsonl"
"""In output directories of `unimat generate`, beside the same crystals as CIF; MatterGen writes the first too."""

_READERS: list[tuple[str, Callable[[SourceFile], Iterator[RawStructure]]]] = [
    (r"\.cif(\.gz)?$", texts.scan_cif),
    (r"\.(ext)?xyz(\.gz)?$", texts.scan_extxyz),
    (r"\.csv(\.gz|\.bz2)?$", tables.scan_csv),
    (r"\.jsonl?(\.gz|\.bz2)?$", structure_json.scan_json),
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
    path that does not exist, an unknown kind of file, a file that cannot be read, or a table without structures. What
    breaks later, or in one file of many, is a structure of format "problem".
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give {_KNOWN}")
    if (path / GENERATED).is_file():
        return _scan_generated(path)
    if path.is_dir():
        return _scan_directory(path)
    if not path.is_file():  # a pipe would be waited for without end
        raise UserError(f"{path} is no regular file: give {_KNOWN}")
    if path.suffix.lower() == ".zip":
        return _scan_zip(path)
    reader = _reader(path.name)
    if reader is None:
        raise UserError(f"{path} is of no known kind: give {_KNOWN}")
    return scan_file(path, reader)


def scan_file(path: Path, reader: Callable[[SourceFile], Iterator[RawStructure]]) -> Iterator[RawStructure]:
    """What `reader` finds in one file; UserError at once where it fails before the first structure."""
    source = SourceFile(path.name, _uids([path.name])[0], functools.partial(open, path, "rb"), path)
    return _checked_first(_read(source, reader, alone=True))


def _scan_directory(path: Path) -> Iterator[RawStructure]:
    files: list[Path] = []
    left_out: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        left_out.append((Path(error.filename), f"a directory that cannot be read ({error.strerror})"))

    for root, directories, names in os.walk(path, onerror=unreadable):
        here = Path(root)
        links = [here / name for name in directories if (here / name).is_symlink()]
        left_out += [(link, "a link to a directory, which is not followed") for link in links]
        for file in (here / name for name in names):
            if os.path.isfile(file):  # noqa: PTH113  Path.is_file raises where the target's directory is closed
                files.append(file)
            else:
                left_out.append((file, "no regular file (a pipe, a device or a broken link)"))
    if not files and not left_out:
        raise UserError(f"{path} is an empty directory: put crystal files there ({_KNOWN})")
    files.sort()
    names = [p.relative_to(path).as_posix() for p in files]
    sources = [
        SourceFile(name, uid, functools.partial(open, p, "rb"), p)
        for name, uid, p in zip(names, _uids(names), files, strict=True)
    ]

    def found() -> Iterator[RawStructure]:
        for left, what in sorted(left_out):
            name = left.relative_to(path).as_posix()
            yield problem(name, name, "not_a_file", f"{name} is {what} and was left out")
        for source in sources:
            yield from _scan_one_of_many(source)

    return found()


def _scan_generated(directory: Path) -> Iterator[RawStructure]:
    """The crystals of an output directory of `unimat generate` or MatterGen, each once, all frames; ours also tells of
    the samples that are none."""

    def crystals_and_failures(file: SourceFile) -> Iterator[RawStructure]:
        yield from texts.scan_extxyz(file)
        manifest = directory / MANIFEST
        if manifest.is_file():
            yield from _scan_manifest(SourceFile(MANIFEST, MANIFEST, functools.partial(open, manifest, "rb"), manifest))

    path = directory / GENERATED
    return _read(SourceFile(GENERATED, GENERATED, functools.partial(open, path, "rb"), path), crystals_and_failures)


def _scan_manifest(file: SourceFile) -> Iterator[RawStructure]:
    for number, line in enumerate(file.lines(), 1):
        try:
            row = json.loads(line)
            if "formula" not in row:
                yield problem(row["uid"], MANIFEST, row["status"], row["message"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{MANIFEST}: line {number} is no row of a manifest ({error!r})") from error


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


def _scan_one_of_many(file: SourceFile) -> Iterator[RawStructure]:
    reader = _reader(file.name)
    if reader is None:
        archive = re.search(r"\.(zip|tar|tgz|7z|rar|(tar\.)?(gz|bz2|xz|zst))$", file.name, re.IGNORECASE)
        why = "is an archive inside, which is not opened: unpack it" if archive else "is of no known kind"
        yield problem(
            file.uid,
            file.name,
            "not_a_structure_file",
            f"{file.name or 'a file without a name'} {why}; it was left out",
        )
        return
    yield from _read(file, reader)


def _read(
    file: SourceFile, reader: Callable[[SourceFile], Iterator[RawStructure]], alone: bool = False
) -> Iterator[RawStructure]:
    """What the reader finds, and what ends it early as a last problem. alone: nothing else was asked for, so that a
    file which fails before its first structure is a UserError."""
    found = False
    try:
        for raw in _refuse_pointer(file) or reader(file):
            found = True
            yield raw
        if not found:
            yield problem(file.uid, file.name, "empty_file", f"{file.name} is empty")
    except Exception as error:  # decoders and readers of broken files raise anything at all
        if isinstance(error, UserError | TooLarge):
            message = str(error)
        else:
            kind = (
                error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
            )
            message = f"{file.name} cannot be read ({kind})"
        if alone and not found:
            raise UserError(" ".join(message.split())) from error
        reason = "too_large" if isinstance(error, TooLarge) else "unreadable_file"
        yield problem(file.uid, file.name, reason, message + ("; the rest is not read" if found else ""))


def _scan_zip(path: Path) -> Iterator[RawStructure]:
    members = open_zip(path)

    def found() -> Iterator[RawStructure]:
        for file, refusal in members:
            yield from [refusal] if refusal else _scan_one_of_many(file)

    return found()


def open_zip(path: Path) -> Iterator[tuple[SourceFile, RawStructure | None]]:
    """Each file of a zip by name, and the problem that forbids to open it. UserError at once for what is no zip."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # BadZipFile, and what else broken headers lead to
        raise UserError(f"{path} is no valid zip ({error}): was the download cut off?") from error
    members = sorted((m for m in archive.infolist() if not m.filename.endswith("/")), key=lambda m: m.filename)
    if not members:
        raise UserError(f"{path} holds no files: was the download cut off?")

    def opener(member: zipfile.ZipInfo) -> IO[bytes]:
        return archive.open(member)

    return (
        (SourceFile(member.filename, uid, functools.partial(opener, member)), _refuse_member(member, uid))
        for member, uid in zip(members, _uids([m.filename for m in members]), strict=True)
    )


def _refuse_member(member: zipfile.ZipInfo, uid: str) -> RawStructure | None:
    name = member.filename
    if PurePosixPath(name).is_absolute() or ".." in re.split(r"[\\/]", name) or re.match(r"[A-Za-z]:|\\", name):
        return problem(uid, name, "unsafe_path", f"{name!r} points outside the zip: repack it with plain names")
    if stat.S_ISLNK(member.external_attr >> 16):
        return problem(uid, name, "unsafe_path", f"{name!r} is a link: repack the zip with the file itself")
    if member.file_size > MAX_MEMBER_BYTES:
        size, limit = member.file_size // 2**20, MAX_MEMBER_BYTES // 2**20
        message = f"{name} is {size} MiB unpacked, the limit is {limit}"
        return problem(uid, name, "too_large", f"{message}: unpack the zip and give the directory")
    if member.flag_bits & 1:
        return problem(uid, name, "encrypted", f"{name} is encrypted: unpack the zip and give the directory")
    return None


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
