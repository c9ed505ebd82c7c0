"""data_report.json and the table that a person reads: read, kept, dropped by reason, changed, per split, bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.parse_pool import CellOptions
from data_prep.selection import Selection, counts

REPORT = "data_report.json"
STATISTICS = "statistics.json"
DROPPED = "dropped.jsonl"
"""Every dropped structure, in the source's order: reason, id, origin, message."""
DENSE_BYTES = 20 * 9 * 18 * 3 * 4
"""Bytes of MP-20's dense float32 tensor [20, 9, 18, 3], what the size of a record is measured against."""


def fingerprint(files: Mapping[str, Path]) -> dict[str, Any]:
    """Names, number and SHA-256 of the source files: one hash over (name, hash) of each, in order."""
    total = hashlib.sha256()
    listed = []
    for split, root in files.items():
        members = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        for member in members:
            try:
                with member.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:  # the reader names it among the failures
                digest = f"unreadable: {error.strerror}"
            name = member.relative_to(root).as_posix() if root.is_dir() else member.name
            name = os.fsencode(name).decode(errors="replace")  # a name may be any bytes
            total.update(f"{split}\0{name}\0{digest}\n".encode())
            listed.append({"split": split, "name": name, "sha256": digest})
    shown = listed if len(listed) <= 20 else []
    return {"sha256": total.hexdigest(), "num_files": len(listed), "files": shown}


def make_report(
    selection: Selection, directory: Path, about: Mapping[str, Any], splits: tuple[str, ...], name: str
) -> dict[str, Any]:
    per_split = {}
    for index, split in enumerate(splits):
        number = selection.summary.kept_of_split[index]
        if number:
            size = sum(p.stat().st_size for p in directory.glob(f"{name}-{split}.array_record*"))
            per_crystal = size / number
            per_split[split] = {
                "crystals": number,
                "bytes": size,
                "bytes_per_crystal": round(per_crystal, 1),
                "percent_of_dense_mp_20_tensor": round(100 * per_crystal / DENSE_BYTES, 3),
            }
    return {
        **about,
        **counts(selection.summary),
        "splits": per_split,
        "changed": dict(sorted(selection.changed.items())),
        "properties": {column: meaning.to_json() for column, meaning in selection.columns.items()},
        "columns_not_used": selection.unused_columns,
        "split_ids_not_found": selection.ids_not_found,
        "dropped_structures": dict(selection.summary.first_dropped),
    }


def make_statistics(
    selection: Selection, cell: CellOptions, files: dict[str, Path], about: dict[str, Any], splits: tuple[str, ...]
) -> dict[str, Any]:
    """statistics.json: of the train split, what a model needs to know before it sees the data."""
    notes, kept = list(about["notes"]), selection.summary.kept_of_split
    if not kept[0]:
        notes.append("statistics of all crystals, as there is no train split")
    described = {name: column.to_json() for name, column in selection.columns.items()}
    return {
        "dataset": about["dataset"],
        "num_examples": {split: kept[i] for i, split in enumerate(splits) if kept[i]},
        **selection.statistics.to_json(described),
        "niggli": cell.niggli,
        "primitive": cell.primitive,
        "tolerance": {"niggli": cell.niggli_tolerance, "primitive": cell.primitive_tolerance},
        "source": {"name": ", ".join(p.name for p in files.values()), **about["options"]["source"]},
        "notes": notes,
    }


def table(report: Mapping[str, Any], directory: Path) -> str:
    """The report for a terminal."""
    lines = [
        f"{report['dataset']}: {report['read']} read, {report['kept']} kept, {report['read'] - report['kept']} dropped"
    ]
    for split, values in report["splits"].items():
        share = f"{values['percent_of_dense_mp_20_tensor']} % of MP-20's dense tensor"
        lines.append(
            f"  {split:<12}{values['crystals']:>8} crystals, {values['bytes_per_crystal']} bytes each ({share})"
        )
    for reason, number in report["dropped"].items():
        first = report["dropped_structures"][reason][0]
        lines.append(f"  dropped     {number:>8} {reason}, first {first['id']}: {first['message'][:160]}")
    for change, number in report["changed"].items():
        lines.append(f"  changed     {number:>8} {change}")
    for name, meaning in report["properties"].items():
        about = ", ".join(value for value in meaning.values() if value)
        lines.append(f"  property    {name}: {about}")
    if report["columns_not_used"]:
        lines.append(f"  not used    columns {', '.join(report['columns_not_used'])}")
    if report["split_ids_not_found"]:
        missing = report["split_ids_not_found"]
        lines.append(f"  not found   {len(missing):>8} ids of --split_ids, first {missing[0]}")
    lines += [f"  note        {note}" for note in report["notes"]]
    lines.append(
        f"  {report['seconds']} s, {report['crystals_per_second']} crystals/s; every drop is in {directory / DROPPED}"
    )
    return "\n".join(lines)
