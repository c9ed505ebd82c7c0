"""Random structures of many compositions, as files like those of `unimat generate`: failures too have their row."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.errors import UserError
from unimat_jax.evaluation.pool import Failure, map_isolated
from unimat_jax.stability import buildcell
from unimat_jax.stability.random_structures import GENERATORS, Draw, Drawn, draw
from unimat_jax.structure_files import GENERATED, MANIFEST


def random_search(
    wanted: Sequence[tuple[Mapping[int, int], str]],
    candidates: int,
    output_dir: Path,
    *,
    seed: int = 0,
    soft_sphere: str = "fixed",
    max_soft_calls: int = 20,
    generator: str = GENERATORS[0],
    num_workers: int | None = None,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Writes `candidates` structures of each composition (counts by atomic number, uid of a known crystal or "") into
    `output_dir`, crystals and manifest, and returns what it took: attempts, failures by reason, processor seconds.

    Raises UserError where what makes them is not installed. What fails has a status: `no_random_structure`,
    `no_volume`, `timeout` and the pool's others.
    """
    require(generator)
    tasks, references = [], []
    for counts, uid in wanted:
        pairs = tuple(sorted(counts.items()))
        tasks += [Draw(pairs, i, seed, soft_sphere, max_soft_calls, generator) for i in range(candidates)]
        references += [uid] * candidates
    begin = time.monotonic()
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    found = map_isolated(draw, tasks, num_workers=num_workers, timeout_s=timeout_s, progress="random structures")
    frames, rows = [], []
    for index, (task, drawn) in enumerate(zip(tasks, found, strict=True)):
        row = {"uid": f"rss_{index:06d}", "index": index, "seed": seed, "candidate": task.index}
        row |= {"reference_uid": references[index]} if references[index] else {}
        values, frame = _row(row["uid"], drawn)
        rows.append(row | values)
        frames.append(frame)
    (output_dir / GENERATED).write_text("".join(frames), encoding="utf-8")
    (output_dir / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.get("failures", {}))
    return {
        "generator": generator, "candidates": len(rows), "made": sum(map(bool, frames)),
        "made_with_fewer_operations": sum(row.get("operations") != row.get("asked_operations") for row in rows),
        "attempts": sum(row.get("attempts", 0) for row in rows), "failed_attempts": dict(reasons.most_common()),
        "seconds": round(time.monotonic() - begin, 2),
        "cpu_seconds": round(sum(row.get("cpu_seconds", 0.0) for row in rows), 2),
        "soft_cpu_seconds": round(sum(row.get("soft_cpu_seconds", 0.0) for row in rows), 2),
        "soft_calls": sum(row.get("soft_calls", 0) for row in rows),
    }  # fmt: skip


def _row(uid: str, drawn: Drawn | Failure) -> tuple[dict[str, Any], str]:
    """What the manifest says of a candidate, and its frame, "" where there is none."""
    if isinstance(drawn, Failure):
        return {"status": drawn.reason, "message": drawn.message}, ""
    values = {field.name: getattr(drawn, field.name) for field in dataclasses.fields(drawn) if field.name != "crystal"}
    if drawn.crystal is None:
        message = f"no sensible structure in {drawn.attempts} attempts"
        return {"status": "no_random_structure", "message": message, **values}, ""
    crystal = dataclasses.replace(drawn.crystal, uid=uid)
    return {"status": "ok", "message": "", "formula": crystal.formula, **values}, crystal.to_extxyz()


def require(generator: str) -> None:
    """Raises UserError where what makes random structures is not installed."""
    if generator == buildcell.COMMAND:
        buildcell.require()
        return
    missing = [package for package in ("ase_ga", "pyxtal") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"random structures need {' and '.join(missing)}: pip install 'unimat-jax[search]'")
