"""Readers of text files with one structure or several: CIF, extended XYZ and POSCAR. Texts are cut, not yet parsed."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from collections.abc import Iterator

from unimat_jax.structure_parsing import RawStructure, problem
from unimat_jax.structure_tables import SourceFile, split_columns, uid_of

_INFO = re.compile(r'([A-Za-z_][\w.\-/]*)=("[^"]*"|\'[^\']*\'|\{[^}]*\}|\[[^\]]*\]|\S+)')


def scan_extxyz(file: SourceFile) -> Iterator[RawStructure]:
    """Extended XYZ with any number of frames; numbers of the comment line become columns."""
    with file.binary() as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8", errors="replace")
        frame, first, any_frame = 0, next(lines, ""), False
        pending: list[RawStructure] = []
        while first:
            if not first.strip():
                first = next(lines, "")
                continue
            any_frame = True
            origin = f"{file.name}:frame {frame}"
            if not first.strip().isdigit():
                message = (
                    f"{origin}: {first.strip()[:40]!r} stands where the number of atoms should: the rest is not read"
                )
                pending.append(problem(f"{file.uid}-{frame}", origin, "unparsable", message))
                first = ""
            else:
                size = int(first)
                body = [line for line in (next(lines, "") for _ in range(size + 1)) if line]
                pending.append(_extxyz_frame(file, frame, first, body, size))
                first = next(lines, "")
            frame += 1
            if len(pending) > 1:
                yield pending.pop(0)
        if not any_frame:
            yield problem(file.uid, file.name, "empty_file", f"{file.name} is empty")
        for last in pending:  # the only frame of a file takes the file's name
            lone = frame == 1 and last.uid == f"{file.uid}-0"
            yield dataclasses.replace(last, uid=file.uid) if lone else last


def _extxyz_frame(file: SourceFile, frame: int, first: str, body: list[str], size: int) -> RawStructure:
    origin = f"{file.name}:frame {frame}"
    info = {k: v.strip("\"'") for k, v in _INFO.findall(body[0] if body else "")}
    uid = uid_of(info, f"{file.uid}-{frame}")
    if len(body) < size + 1:
        return problem(uid, origin, "unparsable", f"{origin} is cut off: {max(len(body) - 1, 0)} of {size} atoms")
    known = ("lattice", "properties", "pbc", "stress", "virial")
    numbers, texts = split_columns({k: v for k, v in info.items() if k.lower() not in known})
    return RawStructure(uid, origin, "extxyz", first + "".join(body), numbers, texts)


_DATA_BLOCK = re.compile(r"^[ \t]*data_(\S*)", re.IGNORECASE | re.MULTILINE)


def scan_cif(file: SourceFile) -> Iterator[RawStructure]:
    """A CIF with one block (named by its file) or several (named by their `data_` lines)."""
    text = file.text()
    if not text.strip():
        yield problem(file.uid, file.name, "empty_file", f"{file.name} is empty")
        return
    starts = [m.start() for m in _DATA_BLOCK.finditer(text)]
    blocks = [text[start:stop] for start, stop in itertools.pairwise([*starts, len(text)])]
    # Blocks such as data_global of journals hold no cell.
    blocks = [block for block in blocks if "_cell_length_a" in block.lower()]
    if len(blocks) <= 1:
        yield RawStructure(file.uid, file.name, "cif", text if not blocks else blocks[0])
        return
    for block in blocks:
        name = _DATA_BLOCK.match(block).group(1)  # type: ignore[union-attr]
        yield RawStructure(name or file.uid, f"{file.name}:data_{name}", "cif", block)


def scan_poscar(file: SourceFile) -> Iterator[RawStructure]:
    text = file.text()
    if not text.strip():
        yield problem(file.uid, file.name, "empty_file", f"{file.name} is empty")
        return
    yield RawStructure(file.uid, file.name, "poscar", text)
