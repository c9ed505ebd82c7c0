"""Crystal files or a known data set -> sharded UniMat records, statistics and a report.

python -m data_prep.prepare --dataset=crystals --source=my_cifs/ --data_dir=data
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_prep.atomic import write_json
from data_prep.beam import BeamWorkers, build_with_tfds, parse_on_beam, pipeline_options
from data_prep.build import (
    check_place,
    check_something_is_left,
    choose,
    make_builder,
    put_in_place,
    write_dropped,
    write_shards,
)
from data_prep.choosing import Work, ids_not_found
from data_prep.datasets import DATASETS, Column, notes_of, source_files
from data_prep.parse_pool import CellOptions
from data_prep.parse_stage import choose_num_workers, open_directory, parse_into
from data_prep.report import REPORT, STATISTICS, fingerprint, make_report, make_statistics, table
from data_prep.selection import Filters, SplitRule, counts, select
from data_prep.shards import SPLITS, VERSION
from data_prep.splits import read_property_table, read_split_ids
from data_prep.spool import PART_SIZE, Spool
from data_prep.tasks import Workers
from unimat_jax.cli import Parser, run_program
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import atomic_number


def prepare(
    dataset: str,
    source: str | Path | None = None,
    data_dir: str | Path = "data",
    *,
    primitive: bool | None = None,
    niggli: bool | None = None,
    primitive_tolerance: float = 0.01,
    niggli_tolerance: float = 1e-5,
    max_atoms: int | None = None,
    max_atoms_per_element: int | None = None,
    elements: Sequence[str] | None = None,
    split_ids: str | Path | None = None,
    split_by: str | None = None,
    split_fractions: Sequence[float] = (0.9, 0.05, 0.05),
    seed: int = 0,
    properties: Sequence[str] = (),
    ignore_properties: Sequence[str] = (),
    property_table: str | Path | None = None,
    num_shards: int | None = None,
    num_workers: int | None = None,
    time_limit: float = 60.0,
    overwrite: bool = False,
    part_size: int = PART_SIZE,
    beam_pipeline_options: str | None = None,
    quiet: bool = False,
) -> Path:
    """The directory `data_dir/dataset/1.0.0` with records, statistics.json and data_report.json.

    dataset: a name of `datasets.DATASETS`. properties: "NAME:UNIT[:FUNCTIONAL[:CORRECTION]]". property_table: a
    CSV whose numbers are joined by id. num_workers: 0 parses in this process, None takes every core where there is text
    to parse. beam_pipeline_options: "runner=NAME,..." for Apache Beam. A finished data set with the same options and
    source is left as it is, an interrupted one goes on, and ends with the same bytes. Raises UserError with the field,
    the value and the remedy.
    """
    start = time.monotonic()
    files = source_files(dataset, None if source is None else str(source))
    beam_options = None
    if beam_pipeline_options is not None:
        beam_options = pipeline_options(beam_pipeline_options)
        data_dir, files = Path(data_dir).resolve(), {split: path.resolve() for split, path in files.items()}
    cell = CellOptions(bool(primitive), niggli is None or niggli, primitive_tolerance, niggli_tolerance)
    declared = dict(_column(text) for text in properties)
    if time_limit <= 0:
        raise UserError(f"--time_limit={time_limit}: give seconds above 0")
    for flag, value in (("part_size", part_size), ("num_shards", num_shards)):
        if value is not None and value < 1:
            raise UserError(f"--{flag}={value}: give 1 or more")
    rule = _split_rule(dataset, split_ids, split_by, split_fractions, seed)
    filters = Filters(max_atoms, max_atoms_per_element, _elements(elements))
    parsing = {"cell": dataclasses.asdict(cell), "source": fingerprint(files)}
    options: dict[str, Any] = {
        **parsing,
        "filters": {**dataclasses.asdict(filters), "elements": sorted(filters.elements) if filters.elements else None},
        "splits": None if "" not in files else {**dataclasses.asdict(rule), "ids": _sha256(split_ids)},
        "properties": {name: column.to_json() for name, column in declared.items()},
        "ignore_properties": sorted(ignore_properties),
        "property_table": _sha256(property_table),
        "num_shards": num_shards,
    }
    options = json.loads(json.dumps(options))  # as it will be read back

    directory = Path(data_dir) / dataset / VERSION
    unfinished = directory.with_name(f"{VERSION}.parsing")
    if _is_done(directory, options, overwrite):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed at its very end
        if not quiet:
            print(f"{directory} is done already: nothing to do (--overwrite makes it again)")
        return directory

    extra = read_property_table(property_table) if property_table else {}
    workers = choose_num_workers(num_workers, files)
    about = {"dataset": dataset, "notes": notes_of(dataset, files), "options": options}
    check_place(directory)
    with _one_error_for_a_full_disk(unfinished):
        open_directory(unfinished, {**parsing, "part_size": part_size, "beam": beam_pipeline_options is not None})
        spool = Spool(unfinished / "parts", part_size, extra)
        work = Work(spool, unfinished / "chosen", filters, rule)
        with contextlib.ExitStack() as stack:
            if beam_options is None:
                parse_into(spool, files, cell, workers, time_limit, quiet)
                pool = stack.enter_context(Workers(work, workers, quiet))
            else:
                parse_on_beam(beam_options, spool, files, cell, time_limit)
                pool = BeamWorkers(work, beam_options)
            open_directory(work.directory, options)
            summary = choose(work, pool)
            check_something_is_left(work, summary, files, unfinished, about)
            added = {name for row in extra.values() for name in row}
            columns = (declared, ignore_properties, added)
            selection = select(summary, DATASETS[dataset], *columns, ids_not_found(work))
            statistics = make_statistics(selection, cell, files, about, SPLITS)
            builder = make_builder(work, selection, statistics, about)
            if beam_options is None:
                built = write_shards(work, pool, builder, sorted(selection.columns), num_shards)
            else:
                built = build_with_tfds(builder, beam_options, num_shards)
        write_json(built / STATISTICS, statistics)
        write_dropped(work, built)
        seconds = time.monotonic() - start
        kept = counts(summary)["kept"]
        about |= {"seconds": round(seconds, 2), "crystals_per_second": round(kept / seconds, 1)}
        report = make_report(selection, built, about, SPLITS, dataset)
        write_json(built / REPORT, report)
        put_in_place(built, directory)
        shutil.rmtree(unfinished)
    if not quiet:
        print(table(report, directory))
    return directory


def _split_rule(
    dataset: str, ids: str | Path | None, by: str | None, fractions: Sequence[float], seed: int
) -> SplitRule:
    fractions = tuple(float(f) for f in fractions)
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0:
        raise UserError(
            f"--split_fractions={fractions}: give three numbers for train, validation and test, train above 0"
        )
    by = by or ("formula" if dataset == "starter" else "id")
    if by not in ("id", "formula"):
        raise UserError(f"--split_by={by}: choose 'id' or 'formula'")
    return SplitRule(read_split_ids(ids) if ids else None, by, fractions, seed)


@contextlib.contextmanager
def _one_error_for_a_full_disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{directory} cannot be written ({error.strerror}): make room and give the same command again, which goes "
            "on with what is finished"
        ) from error


def _is_done(directory: Path, options: dict[str, Any], overwrite: bool) -> bool:
    report = directory / REPORT
    if overwrite or not report.exists():
        return False
    before = json.loads(report.read_text())["options"]
    if before == options:
        return True
    raise UserError(
        f"{directory} was made from another source or with other options ({'; '.join(_differences(before, options))}): "
        "add --overwrite to make it again, or choose another --data_dir"
    )


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """The leaves in which two JSON trees differ, as "name: before, now ..."."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [text for key in keys for text in _differences(before.get(key), now.get(key), key)]
    if before == now or name in ("files", "num_files"):  # the source's one hash says it
        return []
    shown = [str(value) if len(str(value)) < 40 else str(value)[:12] + "..." for value in (before, now)]
    return [f"{name}: {shown[0]}, now {shown[1]}"]


def _sha256(path: str | Path | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _elements(symbols: Sequence[str] | None) -> frozenset[str] | None:
    if not symbols:
        return None
    symbols = _list(symbols) if isinstance(symbols, str) else symbols
    try:
        for symbol in symbols:
            atomic_number(symbol)
    except ValueError as error:
        raise UserError(f"--elements: {error}") from error
    return frozenset(symbols)


def _column(text: str) -> tuple[str, Column]:
    name, *parts = text.split(":")
    if not name or not parts or len(parts) > 3:
        raise UserError(f"--property={text}: write NAME:UNIT[:FUNCTIONAL[:CORRECTION]], as in gap:eV:PBE")
    return name, Column(*parts)


def _parser() -> Parser:
    parser = Parser(
        prog="unimat prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, help=f"one of {', '.join(DATASETS)}; 'crystals' reads your own files")
    add("--source", help="directory, zip or file with the crystals (starter needs none)")
    add("--data_dir", default="data", help="where data sets are kept (default: data)")
    for name, what in (
        ("primitive", "primitive cells (spglib; default: no)"),
        ("niggli", "Niggli cells (spglib; default: yes)"),
    ):
        add(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=what)
    add("--primitive_tolerance", type=float, default=0.01, help="Angstrom (default 0.01)")
    add("--niggli_tolerance", type=float, default=1e-5, help="spglib's eps (default 1e-5)")
    add("--max_atoms", type=int, help="drop crystals with more atoms in the cell")
    add("--max_atoms_per_element", type=int, help="drop crystals with more atoms of one element")
    add("--elements", type=_list, help="drop crystals with other elements, as in Sr,Ti,O")
    add("--split_ids", help="file with an id and a split on each line (CSV, JSON or text)")
    add("--split_by", choices=("id", "formula"), help="what is hashed (starter: formula, crystals: id)")
    add("--split_fractions", type=_list, default=["0.9", "0.05", "0.05"], help="train,validation,test")
    add("--seed", type=int, default=0, help="of the splits (default 0)")
    add(
        "--property",
        action="append",
        default=[],
        dest="properties",
        help="NAME:UNIT[:FUNCTIONAL[:CORRECTION]], repeatable",
    )
    add(
        "--ignore_property",
        action="append",
        default=[],
        dest="ignore_properties",
        help="a column to leave out, repeatable",
    )
    add("--property_table", help="CSV with an id column: its numbers become properties of the crystals of that id")
    add("--num_shards", type=int, help="files a split (default: by size)")
    add("--num_workers", type=int, help="processes that parse (default: every core)")
    add("--time_limit", type=float, default=60.0, help="seconds a structure may take to parse (default 60)")
    add("--part_size", type=int, default=PART_SIZE, help="structures a stage takes at a time (default: %(default)s)")
    add("--beam_pipeline_options", help="build on Apache Beam: runner=FlinkRunner,flink_master=HOST:PORT,...")
    add("--overwrite", action="store_true", help="make a finished data set again")
    return parser


def _list(text: str) -> list[str]:
    return [part for part in text.replace("-", ",").split(",") if part]


def main(argv: Sequence[str] | None = None) -> int:
    """The program, with UserErrors for its caller."""
    flags = vars(_parser().parse(sys.argv[1:] if argv is None else argv))
    try:
        flags["split_fractions"] = [float(f) for f in flags["split_fractions"]]
    except ValueError as error:
        raise UserError(f"--split_fractions: {error}: write three numbers as in 0.9,0.05,0.05") from error
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        prepare(**flags)
    except KeyboardInterrupt as stop:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 143 if stop.args else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt("SIGTERM")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
