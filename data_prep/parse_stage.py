"""The first stage of `prepare`: every structure of the source is parsed once, with progress, into a spool on disk."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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
    with progress_bar("reading", "crystal", expected_number(files), already, quiet) as bar:
        for outcome in spool.append(_outcomes(files, cell, num_workers, time_limit, already), already):
            bar.update()
            if is_failure(outcome):
                failures += 1
                bar.set_postfix(failed=failures, refresh=False)


def expected_number(files: dict[str, Path]) -> int | None:
    """Structures in the source, where its files tell without being read; None where they do not."""
    total = 0
    for root in files.values():
        for path in root.rglob("*") if root.is_dir() else [root]:
            number = _number_in(path)
            if number is None:
                return None
            total += number
    return total


def _number_in(path: Path) -> int | None:
    if path.is_dir():
        return 0
    try:
        if path.suffix in (".cif", ".vasp", ".poscar"):
            return 1  # nearly always
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive, archive.open("n_atoms.npy") as file:
                np.lib.format.read_magic(file)
                return np.lib.format.read_array_header_1_0(file)[0][0]
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_metadata(path).num_rows
    except Exception:  # a damaged file: reading it tells what is wrong
        return 1
    return None


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
