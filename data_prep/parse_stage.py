"""The first stage of `prepare`: every structure of the source is parsed once, with progress, into a spool on disk."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.datasets import scan_all
from data_prep.outcome import is_failure
from data_prep.parse_pool import CellOptions, WorkersDoNotStart, parse_all
from data_prep.spool import Spool
from data_prep.tasks import progress_bar
from unimat_jax.errors import UserError

_QUICK_SUFFIXES = (".npz", ".parquet", ".db")
"""Sources without text to parse; up to _QUICK_BYTES, starting workers would take longer than the work."""
_QUICK_BYTES = 2**22


def open_directory(directory: Path, options: dict[str, Any]) -> Path:
    """The directory that an interrupted run made with the same options, or an empty one."""
    wanted = json.dumps(options, sort_keys=True)
    about = directory / "options.json"
    if not about.exists() or about.read_text() != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        about.write_text(wanted)
    return directory


def parse_into(
    spool: Spool, files: dict[str, Path], cell: CellOptions, num_workers: int, time_limit: float, quiet: bool
) -> None:
    """Appends the outcome of every structure that the spool does not hold yet."""
    already = spool.resume()
    if spool.size is not None:
        return
    if already and not quiet:
        print(f"continuing after {already} structures that an interrupted run had read")
    failures = 0
    with progress_bar("reading", "crystal", None, already, quiet) as bar:
        for outcome in spool.append(_outcomes(files, cell, num_workers, time_limit, already), already):
            bar.update()
            if is_failure(outcome):
                failures += 1
                bar.set_postfix(failed=failures, refresh=False)


def _outcomes(
    files: dict[str, Path], cell: CellOptions, num_workers: int, time_limit: float, skip: int
) -> Iterator[bytes]:
    number = 0
    try:
        for outcome in parse_all(
            itertools.islice(scan_all(files), skip, None), cell, num_workers=num_workers, time_limit=time_limit
        ):
            number += 1
            yield outcome
    except WorkersDoNotStart:
        print('parsing in one process (a script needs `if __name__ == "__main__":` for more)', file=sys.stderr)
        yield from parse_all(itertools.islice(scan_all(files), skip + number, None), cell, num_workers=0)


def choose_num_workers(asked: int | None, files: dict[str, Path]) -> int:
    """As asked, else every core that this process may use, or none where the work is shorter than starting workers."""
    if asked is not None:
        if asked < 0:
            raise UserError(f"--num_workers={asked}: give 0 (this process only) or more")
        return asked
    if all(p.suffix in _QUICK_SUFFIXES and p.stat().st_size < _QUICK_BYTES for p in files.values()):
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
