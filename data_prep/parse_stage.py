"""The first stage of `prepare`: every structure of the source is parsed once, with progress, into a spool on disk."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.datasets import scan_all
from data_prep.parse_pool import CellOptions, Item, Outcome, WorkersDoNotStart, parse_all
from data_prep.spool import Spool
from unimat_jax.errors import UserError

_QUICK_SUFFIXES = (".npz", ".parquet", ".db")
"""Sources without text to parse; up to _QUICK_BYTES, starting workers would take longer than the work."""
_QUICK_BYTES = 2**22


def open_spool(directory: Path, parsing: dict[str, Any], extra: dict[str, dict[str, float]]) -> Spool:
    """The spool of an interrupted run on the same source and cell options, or a new one."""
    wanted = json.dumps(parsing, sort_keys=True)
    about = directory / "parsing.json"
    if not about.exists() or about.read_text() != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        about.write_text(wanted)
    return Spool(directory / "outcomes.bin", extra)


def parse_into(
    spool: Spool, files: dict[str, Path], cell: CellOptions, num_workers: int, time_limit: float, quiet: bool
) -> None:
    """Appends the outcome of every structure that the spool does not hold yet."""
    already = spool.resume()
    total = sum(1 for _ in scan_all(files))
    if already and not quiet:
        print(f"continuing after {already} of {total} structures that an interrupted run had read")
    failures = 0
    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    with tqdm(
        total=total,
        initial=already,
        unit="crystal",
        desc="reading",
        disable=quiet,
        file=sys.stderr,
        mininterval=interval,
    ) as bar:
        for outcome in spool.append(_outcomes(files, cell, num_workers, time_limit, already)):
            failures += bool(outcome.reason)
            bar.update()
            if outcome.reason:
                bar.set_postfix(failed=failures, refresh=False)


def _outcomes(
    files: dict[str, Path], cell: CellOptions, num_workers: int, time_limit: float, skip: int
) -> Iterator[Outcome]:
    number = 0
    try:
        for outcome in parse_all(_skipped(files, skip), cell, num_workers=num_workers, time_limit=time_limit):
            number += 1
            yield outcome
    except WorkersDoNotStart:
        print('parsing in one process (a script needs `if __name__ == "__main__":` for more)', file=sys.stderr)
        yield from parse_all(_skipped(files, skip + number), cell, num_workers=0)


def _skipped(files: dict[str, Path], skip: int) -> Iterator[Item]:
    for index, item in enumerate(scan_all(files)):
        if index >= skip:
            yield item


def choose_num_workers(asked: int | None, files: dict[str, Path]) -> int:
    """As asked, else every core that this process may use, or none where the work is shorter than starting workers."""
    if asked is not None:
        if asked < 0:
            raise UserError(f"--num_workers={asked}: give 0 (this process only) or more")
        return asked
    if all(p.suffix in _QUICK_SUFFIXES and p.stat().st_size < _QUICK_BYTES for p in files.values()):
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
