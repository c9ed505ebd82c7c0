"""Readers of text files with one structure or several: CIF, extended XYZ and POSCAR. Texts are cut, not yet parsed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from unimat_jax.structure_parsing import MAX_ATOMS, RawStructure, problem
from unimat_jax.structure_streams import MAX_TEXT_BYTES, SourceFile, too_large
from unimat_jax.structure_tables import split_columns, uid_of

MAX_COMMENT = 20_000
"""Characters of an extended XYZ comment line: what looks for its fields can take quadratic time."""

_INFO = re.compile(r'(?<![\w.\-/])([A-Za-z_][\w.\-/]*)=("[^"]*"|\'[^\']*\'|\{[^}]*\}|\[[^\]]*\]|\S+)')
_DATA_LINE = re.compile(r"[ \t]*data_(\S*)", re.IGNORECASE)


def scan_extxyz(file: SourceFile) -> Iterator[RawStructure]:
    """Extended XYZ with any number of frames; numbers of the comment line become columns."""
    for raw, alone in _alone(_frames(file)):
        yield dataclasses.replace(raw, uid=file.uid) if alone and raw.uid == f"{file.uid}-0" else raw


def _alone(structures: Iterator[RawStructure]) -> Iterator[tuple[RawStructure, bool]]:
    """Each structure, and whether it is the only one of its file; the first waits for the second, or for the end."""
    first, number = None, 0
    try:
        for number, raw in enumerate(structures):
            if number == 0:
                first = raw
                continue
            if first:
                yield first, False
                first = None
            yield raw, False
    except Exception:
        if first:
            yield first, False
        raise
    if first:
        yield first, True


def _frames(file: SourceFile) -> Iterator[RawStructure]:
    lines = file.lines()
    for frame, first in enumerate(line for line in lines if line.strip()):
        uid, origin = f"{file.uid}-{frame}", f"{file.name}:frame {frame}"
        if not re.fullmatch(r"\d{1,18}", first.strip(), re.ASCII):
            message = f"{origin}: {first.strip()[:40]!r} stands where the number of atoms should: the rest is not read"
            yield problem(uid, origin, "unparsable", message)
            return
        size, characters = int(first), 0
        body: list[str] = []
        for number, line in enumerate(lines):  # not `range(size)`: the number may be any
            characters += len(line)
            if size <= MAX_ATOMS and characters <= MAX_TEXT_BYTES:
                body.append(line)
            if number == size:
                break
        if size > MAX_ATOMS:
            yield problem(uid, origin, "too_large", f"{origin} announces {size} atoms, the limit is {MAX_ATOMS}")
        elif characters > MAX_TEXT_BYTES:
            yield problem(uid, origin, "too_large", str(too_large(origin)))
        elif body and len(body[0]) > MAX_COMMENT:
            message = f"{origin}: the comment line has {len(body[0])} characters, the limit is {MAX_COMMENT}"
            yield problem(uid, origin, "too_large", message)
        else:
            yield _frame(file, frame, first, body, size)


def _frame(file: SourceFile, frame: int, first: str, body: list[str], size: int) -> RawStructure:
    origin = f"{file.name}:frame {frame}"
    info = {k: v.strip("\"'") for k, v in _INFO.findall(body[0] if body else "")}
    uid = uid_of(info, f"{file.uid}-{frame}")
    if len(body) < size + 1:
        return problem(uid, origin, "unparsable", f"{origin} is cut off: {max(len(body) - 1, 0)} of {size} atoms")
    known = ("lattice", "properties", "pbc", "stress", "virial")
    numbers, texts = split_columns({k: v for k, v in info.items() if k.lower() not in known})
    return RawStructure(uid, origin, "extxyz", first + "".join(body), numbers, texts)


def scan_cif(file: SourceFile) -> Iterator[RawStructure]:
    """A CIF with one block (named by its file) or several (named by their `data_` lines), a block at a time."""
    without_cell = ""

    def with_cell() -> Iterator[RawStructure]:
        nonlocal without_cell
        for block in _blocks(file):
            if "_cell_length_a" in block.lower():  # blocks such as data_global of journals hold no cell
                start = _DATA_LINE.match(block)
                name = start.group(1) if start else ""
                yield RawStructure(name or file.uid, f"{file.name}:data_{name}", "cif", block)
            elif not without_cell.strip():
                without_cell = block

    empty = True
    for raw, alone in _alone(with_cell()):
        empty = False
        yield dataclasses.replace(raw, uid=file.uid, origin=file.name) if alone else raw
    if empty and without_cell.strip():
        yield RawStructure(file.uid, file.name, "cif", without_cell)


def _blocks(file: SourceFile) -> Iterator[str]:
    """What stands before the first `data_` line, if anything; then each block from its `data_` line on."""
    block: list[str] = []
    characters = 0
    for line in file.lines():
        if _DATA_LINE.match(line):
            if block:
                yield "".join(block)
            block, characters = [], 0
        block.append(line)
        characters += len(line)
        if characters > MAX_TEXT_BYTES:
            raise too_large(f"a block of {file.name}")
    if block:
        yield "".join(block)


def scan_poscar(file: SourceFile) -> Iterator[RawStructure]:
    if (text := file.text()).strip():
        yield RawStructure(file.uid, file.name, "poscar", text)
