"""Reader of pymatgen JSON, one entry in memory at a time.

The standard library decodes one value after another out of a window on the stream. The streaming parser ijson refuses
the NaN that Python and pymatgen write, and takes longer.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from unimat_jax.errors import UserError
from unimat_jax.structure_parsing import RawStructure, problem
from unimat_jax.structure_streams import MAX_TEXT_BYTES, SourceFile, TooLarge, too_large
from unimat_jax.structure_tables import split_columns, uid_of

WINDOW = 2**16
"""Characters that are read at once; the window grows for a longer value, up to MAX_TEXT_BYTES."""
MAX_UNDECIDED = 1000
"""Entries without a structure that are held back before a file counts as a collection with failures."""

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_NUMBER_MAY_GO_ON = re.compile(r"([.eE][+-]?)?")  # behind the window
_LONGEST_TOKEN = 16  # "-Infinity", an escaped surrogate pair


def scan_json(file: SourceFile) -> Iterator[RawStructure]:
    """A Structure or an entry with one, a list or an object (id -> entry) of them, {"entries": [...]}, a table with
    columns, pandas' orient="split"; JSON lines in .jsonl.

    Entries stream, as do the rows of orient="split"; a table with columns is decoded as a whole, up to MAX_TEXT_BYTES.
    """
    entries = _lines if re.search(r"\.jsonl(\.|$)", file.name.lower()) else _document
    held: list[RawStructure] | None = []
    try:
        for raw in entries(file):
            if held is None:
                yield raw
            elif raw.format == "problem" and len(held) < MAX_UNDECIDED:
                held.append(raw)
            else:
                yield from held
                held = None
                yield raw
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError | TooLarge):
            raise
        kind = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{file.name} is no valid JSON ({kind}): is the file cut off?") from error
    if held is not None:
        reason = held[0].payload[1] if held else f"{file.name} is empty"
        raise UserError(f"{file.name} holds no pymatgen Structure: {reason}")


class _Window:
    """Values of a JSON text, decoded one after another. ValueError where it is none."""

    def __init__(self, stream: io.TextIOWrapper, name: str):
        self.stream, self.name = stream, name
        self.text, self.at, self.before, self.ended = "", 0, 0, False

    def _read_on(self) -> None:
        more = self.stream.read(max(WINDOW, len(self.text) - self.at))
        self.text, self.before, self.at = self.text[self.at :] + more, self.before + self.at, 0
        self.ended = not more

    def next_character(self) -> str:
        """What the next value begins with, "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self._read_on()

    def value(self) -> Any:
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end - self.at > MAX_TEXT_BYTES:
                    raise too_large(f"an entry of {self.name}")
                if self.ended or not _NUMBER_MAY_GO_ON.fullmatch(self.text, end):
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - _LONGEST_TOKEN or error.msg.startswith("Unterminated string")
                if self.ended or not cut:
                    raise ValueError(f"{error.msg} at character {self.before + error.pos}") from error
            if len(self.text) - self.at > MAX_TEXT_BYTES:
                raise too_large(f"an entry of {self.name}")
            self._read_on()

    def list_values(self) -> Iterator[Any]:
        """The values of the list that begins here."""
        self.at += 1
        if self.next_character() == "]":
            self.at += 1
            return
        yield self.value()
        while self._goes_on("]"):
            yield self.value()

    def object_keys(self) -> Iterator[str]:
        """The keys of the object that begins here; the caller takes each value before the next key."""
        self.at += 1
        if self.next_character() == "}":
            self.at += 1
            return
        yield self._key()
        while self._goes_on("}"):
            yield self._key()

    def _key(self) -> str:
        key = self.value() if self.next_character() == '"' else None
        if key is None or self.next_character() != ":":
            raise ValueError(f"expecting a key and ':' at character {self.before + self.at}")
        self.at += 1
        return key

    def _goes_on(self, closing: str) -> bool:
        character = self.next_character()
        if not character or character not in "," + closing:
            raise ValueError(f"expecting ',' or {closing!r} at character {self.before + self.at}")
        self.at += 1
        return character == ","


def _lines(file: SourceFile) -> Iterator[RawStructure]:
    for number, line in enumerate(line for line in file.lines() if line.strip()):
        uid, origin = f"{file.uid}-{number}", f"{file.name}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield problem(uid, origin, "unparsable", f"{origin} is no JSON: {error}")
        else:
            yield from _entry(uid, origin, value, keyed=False)


def _document(file: SourceFile) -> Iterator[RawStructure]:
    with file.characters() as stream:
        window = _Window(stream, file.name)
        first = window.next_character()
        if first == "[":
            yield from _list(file, window)
        elif first == "{":
            yield from _object(file, window)
        elif first:
            kind = type(window.value()).__name__
            raise UserError(f"{file.name} holds a {kind}: give a list or an object of pymatgen Structures")
        if rest := window.next_character():
            raise ValueError(f"{rest!r} follows after its end; several values on lines are .jsonl")


def _list(file: SourceFile, window: _Window) -> Iterator[RawStructure]:
    for number, value in enumerate(window.list_values()):
        yield from _entry(f"{file.uid}-{number}", f"{file.name}:{number}", value, keyed=False)


def _object(file: SourceFile, window: _Window) -> Iterator[RawStructure]:
    undecided: dict[str, Any] = {}
    start, kind = window.at, ""
    for key in window.object_keys():
        begins = window.next_character()
        if not kind and begins == "[" and key == "entries":
            kind = "list"
            yield from _list(file, window)
            continue
        if not kind and begins == "[" and key == "data" and isinstance(undecided.get("columns"), list):
            kind = "list"
            yield from _rows(file, undecided["columns"], undecided.get("index"), window.list_values())
            continue
        value = window.value()
        if not kind:
            undecided[key] = value
            if _is_entry(key, value) or len(undecided) > MAX_UNDECIDED:
                kind = "ids"
                yield from _by_id(file, undecided)
            elif window.before + window.at - start > MAX_TEXT_BYTES:
                raise too_large(file.name)
        elif kind == "ids":
            yield from _by_id(file, {key: value})
    if not kind and {"columns", "data"} <= undecided.keys() and isinstance(undecided["data"], list):
        yield from _rows(file, undecided["columns"], undecided.get("index"), iter(undecided["data"]))
    elif not kind and ("sites" in undecided or "structure" in undecided):
        yield from _entry(file.uid, f"{file.name}:{file.uid}", undecided, keyed=True)
    elif not kind:
        yield from _by_id(file, undecided)


def _is_entry(key: str, value: Any) -> bool:
    """Whether `key` can be an id and `value` its entry; one entry has keys such as `initial_structure` itself."""
    has_structure = isinstance(value, dict) and ("sites" in value or "structure" in value)
    return has_structure and not key.endswith("structure") and key not in ("data", "parameters")


def _by_id(file: SourceFile, entries: dict[str, Any]) -> Iterator[RawStructure]:
    for key, value in entries.items():
        if not key.startswith("@"):
            yield from _entry(key, f"{file.name}:{key}", value, keyed=True)


def _rows(file: SourceFile, columns: Any, ids: Any, rows: Iterator[Any]) -> Iterator[RawStructure]:
    """pandas' orient="split", as matbench has it."""
    ids = ids if isinstance(ids, list) else []
    for number, row in enumerate(rows):
        uid = str(ids[number]) if number < len(ids) else str(number)
        origin = f"{file.name}:{uid}"
        if not isinstance(row, list) or not isinstance(columns, list) or len(row) != len(columns):
            yield problem(uid, origin, "unparsable", f"{origin} has other cells than the columns {columns}")
        else:
            yield from _entry(uid, origin, dict(zip(map(str, columns), row, strict=True)), keyed=True)


def _entry(uid: str, origin: str, value: Any, keyed: bool) -> Iterator[RawStructure]:
    structures = value.get("structure") if isinstance(value, dict) else None
    if not isinstance(structures, list):
        yield _one(uid, origin, value, keyed)
        return
    for i in range(len(structures)):  # columns of equal length under one key
        row = {k: v[i] if isinstance(v, list) and len(v) == len(structures) else v for k, v in value.items()}
        yield _one(f"{uid}-{i}", f"{origin}:{i}", row, keyed=True)


def _one(uid: str, origin: str, value: Any, keyed: bool) -> RawStructure:
    if not isinstance(value, dict):
        return problem(uid, origin, "no_structure", f"{origin} is a {type(value).__name__}, not a structure")
    structure = value if "sites" in value else value.get("structure")
    if isinstance(structure, str):
        try:
            structure = json.loads(structure)
        except (ValueError, RecursionError):
            structure = None
    if not isinstance(structure, dict):
        keys = ", ".join(list(value)[:8])
        return problem(uid, origin, "no_structure", f"{origin} has no pymatgen Structure (keys: {keys})")
    if structure is value:
        return RawStructure(uid, origin, "pymatgen", value)
    row = {k: v for k, v in value.items() if k != "structure"}
    for nested in ("data", "parameters"):  # a ComputedStructureEntry's own columns
        if isinstance(value.get(nested), dict):
            row = {**value[nested], **row}
    uid = uid if keyed else uid_of(row, uid)
    row = {
        k: v
        for k, v in row.items()
        if not k.startswith("@") and not (k == "correction" and "energy_adjustments" in row)
    }
    return RawStructure(uid, origin, "pymatgen", structure, *split_columns(row))
