"""Scores crystals, anybody's: unimat evaluate --structures=out --reference=perov_5/val.csv --output_dir=scores

--spec=cdvae   validity, coverage and property distributions against --reference (the UniMat paper's table 1)
--spec=csp     match rates against --reference: each structure against the one that it predicts
--spec=dng     uniqueness and novelty against --train or --known, S.U.N. where energies are given
--spec=lemat   the same with LeMat-GenBench's tolerances and thresholds

Writes metrics.json, per_structure.parquet and .csv (a row a structure, failures too) and report.html.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation import outputs
from unimat_jax.evaluation.coverage import CUTOFFS
from unimat_jax.evaluation.entries import Entry, read_entries
from unimat_jax.evaluation.measure import measure
from unimat_jax.evaluation.novelty import KnownStructures
from unimat_jax.evaluation.published import DATASETS, guess_dataset, published
from unimat_jax.evaluation.scoring import SPECS, Scored, Task, pair_up, score

CACHE = "cache"
PACKAGES = ("unimat-jax", "pymatgen", "spglib", "smact", "numpy", "scipy", "ase")
BASELINE_SEED = 0
RANDOM = "random coordinates"


def parser() -> Parser:
    p = Parser(prog="unimat evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--structures",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="crystal files, directories, zips",
    )
    p.add_argument(
        "--reference",
        nargs="+",
        action="extend",
        metavar="PATH",
        default=[],
        help="real crystals, as a validation split",
    )
    p.add_argument(
        "--train", nargs="+", metavar="PATH", default=[], help="the training set: novelty, and a row to compare"
    )
    p.add_argument(
        "--known", nargs="+", action="extend", metavar="PATH", default=[], help="more structures that are not novel"
    )
    p.add_argument("--spec", choices=SPECS, default="cdvae")
    p.add_argument("--output_dir", required=True, type=Path)
    p.add_argument("--dataset", choices=DATASETS, help="published rows and cut-offs; default: by the reference's path")
    p.add_argument("--cutoffs", metavar="STRUCT,COMP", help="of coverage; default: those of --dataset, else 0.4,10")
    p.add_argument("--e_above_hull", metavar="COLUMN", default="", help="eV/atom, in the structures' files: S.U.N.")
    p.add_argument("--relaxed", action="store_true", help="the structures are relaxed; only recorded")
    p.add_argument("--only_predicted", action="store_true", help="csp: leave out references that nothing predicts; "
                   "without it they count as unmatched")  # fmt: skip
    p.add_argument("--no_metre", dest="with_metre", action="store_false", help="csp: leave out METRe and cRMSE, which "
                   "compare all structures of one composition: hours where it has thousands (Carbon-24)")  # fmt: skip
    p.add_argument("--baseline_samples", type=int, default=1000, help="size of the two rows to compare with; 0: none")
    p.add_argument("--num_workers", type=int, help="processes; default: all cores")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on in --output_dir with what is cached there")
    existing.add_argument("--overwrite", action="store_true", help="delete the evaluation in --output_dir first")
    return p


def evaluate(
    structures: Sequence[str | Path],
    *,
    output_dir: str | Path,
    reference: Sequence[str | Path] = (),
    train: Sequence[str | Path] = (),
    known: Sequence[str | Path] = (),
    spec: str = "cdvae",
    dataset: str = "",
    cutoffs: tuple[float, float] | None = None,
    e_above_hull: str = "",
    relaxed: bool = False,
    only_predicted: bool = False,
    with_metre: bool = True,
    baseline_samples: int = 1000,
    num_workers: int | None = None,
) -> Scored:
    """Scores the structures in files, writes everything into `output_dir`, prints the table and returns the scores.

    Raises UserError for inputs that are missing or cannot be read. Structures that are none count as failures.
    """
    begin = time.monotonic()
    os.environ.setdefault("SPGLIB_WARNING", "OFF")  # a status in the table says it, and the workers inherit this
    output_dir, protocol = Path(output_dir), SPECS[spec]
    _check_needs(spec, reference, train, known)
    dataset = dataset or guess_dataset([str(path) for path in [*reference, *train]])
    if cutoffs is None:
        known_cutoffs = CUTOFFS.get(dataset, CUTOFFS["mp_20"])
        cutoffs = known_cutoffs["struct_cutoff"], known_cutoffs["comp_cutoff"]
    output_dir.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {"num_workers": num_workers, "cache_dir": output_dir / CACHE}

    entries = read_entries(structures)
    reference_entries = read_entries(reference) if reference else []
    if spec == "csp":
        predicted = set(pair_up(entries, {entry.uid for entry in reference_entries}))
        left = len(reference_entries) - len(predicted)
        if only_predicted:
            reference_entries = [entry for entry in reference_entries if entry.uid in predicted]
        elif left:
            print(f"{left} of {len(reference_entries)} references have no prediction and count as unmatched "
                  "(--only_predicted leaves them out)", file=sys.stderr)  # fmt: skip
    training = read_entries(train) if train else []
    others = read_entries(known) if known else []
    known_crystals = [e.crystal for e in [*training, *others] if e.crystal is not None]
    task = Task(
        spec=protocol,
        reference=measure(reference_entries, what="the reference", **shared) if reference_entries else [],
        training=training,
        known=KnownStructures(known_crystals) if known_crystals else None,
        cutoffs=cutoffs,
        energies=_shared_energies(entries, reference_entries),
        e_above_hull=e_above_hull,
        with_metre=with_metre,
        **shared,
    )
    if e_above_hull and not any(e_above_hull in entry.properties for entry in entries):
        raise UserError(f"--e_above_hull={e_above_hull}: no structure has that column; they have {_columns(entries)}")
    scored = score(entries, task)
    # Whether random coordinates are new is no question, and one that costs an hour where all have one composition.
    groups = tuple(group for group in protocol.groups if group != "novelty")
    without_novelty = dataclasses.replace(task, spec=dataclasses.replace(protocol, groups=groups))
    baselines = {
        title: score(made, without_novelty if title == RANDOM else task, title)
        for title, made in baseline_sets(entries, reference_entries, training, spec, baseline_samples).items()
    }

    about = {
        "spec": spec, "protocol": protocol.text, "tolerances": protocol.tolerances, "cutoffs": list(cutoffs),
        "dataset": dataset, "structures": [str(p) for p in structures], "reference": [str(p) for p in reference],
        "train": [str(p) for p in train], "known": [str(p) for p in known],
        "raw_or_relaxed": "relaxed" if relaxed else "raw",
        "only_predicted": only_predicted,
        "num_structures": len(entries), "num_failures": sum(e.crystal is None for e in entries),
        "reference_hash": content_hash(reference_entries), "structures_hash": content_hash(entries),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip
    _write(scored, baselines, about, task, output_dir)
    return scored


def _check_needs(spec: str, reference: Sequence[Any], train: Sequence[Any], known: Sequence[Any]) -> None:
    given = {"reference": bool(reference), "known": bool(train) or bool(known)}
    flags = {"reference": "--reference=PATH (real crystals to compare with)", "known": "--train=PATH or --known=PATH"}
    for need in SPECS[spec].needs:
        if not given[need]:
            raise UserError(f"--spec={spec} needs {flags[need]}")


def _columns(entries: Sequence[Entry]) -> list[str]:
    return sorted({name for entry in entries for name in entry.properties})


def _shared_energies(entries: Sequence[Entry], reference: Sequence[Entry]) -> tuple[str, ...]:
    """Columns of energies that both sets have."""
    return tuple(name for name in _columns(entries) if "energy" in name and name in _columns(reference))


def content_hash(entries: Sequence[Entry]) -> str:
    """Of what the structures are, whatever file holds them and in whatever order: 16 hexadecimal digits."""
    digests = []
    for entry in entries:
        digest = hashlib.sha256(entry.reason.encode())
        if entry.crystal is not None:
            order = np.lexsort([*entry.crystal.frac_coords.T.round(5), entry.crystal.atomic_numbers])
            for array in (entry.crystal.atomic_numbers[order], entry.crystal.frac_coords[order].round(5),
                          entry.crystal.lattice.round(5)):  # fmt: skip
                digest.update((array + 0.0).tobytes())
        digests.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]


def baseline_sets(
    entries: Sequence[Entry], reference: Sequence[Entry], training: Sequence[Entry], spec: str, number: int
) -> dict[str, list[Entry]]:
    """What to compare with: the training set as if it had been generated (the ceiling), and random coordinates in real
    cells (the floor). At most `number` each, and no more than there are structures; drawn with a fixed seed."""
    number = min(number, len(entries))
    rng = np.random.default_rng(BASELINE_SEED)
    result: dict[str, list[Entry]] = {}

    def drawn(pool: Sequence[Entry]) -> list[Entry]:
        there = [entry for entry in pool if entry.crystal is not None]
        return [there[i] for i in sorted(rng.permutation(len(there))[:number])]

    if number and training and spec != "csp":
        result["training set"] = drawn(training)
    cells = drawn(reference or training)
    if number and cells:
        result[RANDOM] = [
            Entry(f"random-{entry.uid}", _scattered(entry.crystal, rng), reference_uid=entry.uid)
            for entry in cells
            if entry.crystal is not None
        ]
    return result


def _scattered(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    return Crystal.create(crystal.atomic_numbers, rng.random((crystal.num_atoms, 3)), crystal.lattice, crystal.uid)


def _write(
    scored: Scored, baselines: Mapping[str, Scored], about: dict[str, Any], task: Task, output_dir: Path
) -> None:
    from unimat_jax.evaluation.report import write_report
    from unimat_jax.evaluation.report_data import MetricRow, ReportData

    rows = outputs.rows_of(scored.measured)
    outputs.write_rows(rows, output_dir)
    outputs.write_metrics(scored, baselines, about, output_dir)
    beside: dict[str, dict[str, float | None]] = {
        title: {name: metric.value for name, metric in other.metrics.items()} for title, other in baselines.items()
    }
    for name, values in published(about["dataset"]).items():
        for title, value in values.items():
            beside.setdefault(title, {})[name] = value
    names = [name for name in scored.metrics if "/" not in name and not name.endswith("_all")]  # the rest: metrics.json
    beside = {title: values for title, values in beside.items() if not values.keys().isdisjoint(names)}
    headline = [
        MetricRow(name, m.value, m.interval, m.unit, m.definition + (f" ({m.note})" if m.note else ""), m.n, m.failures,
                  {title: values.get(name) for title, values in beside.items()})
        for name, m in ((name, scored.metrics[name]) for name in names)
    ]  # fmt: skip
    files = {outputs.METRICS: "every metric with its definition", outputs.PARQUET: "a row a structure",
             outputs.CSV: "the same as text"}  # fmt: skip
    write_report(
        output_dir / outputs.REPORT,
        ReportData(
            title=f"{len(rows):,} structures: {', '.join(Path(p).name for p in about['structures'])}",
            protocol=about["protocol"],
            created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            headline=headline,
            rows=rows,
            generated=[m.crystal for m in scored.measured],
            nearest={
                scored.measured[i].entry.uid: crystal
                for i, j in scored.nearest.items()
                if (crystal := task.reference[j].crystal) is not None
            },
            reference=[m.crystal for m in task.reference if m.crystal is not None],
            histograms=_histograms(scored, task),
            failures=Counter(row["status"] for row in rows if row["status"] != "valid"),
            files=files,
        ),
    )
    print(outputs.table(scored.metrics, beside, names))
    print(f"protocol: {about['protocol']}; published rows: other splits and 10,000 samples, see report.html")
    print(f"{len(rows)} structures, {about['num_failures']} of them none; {about['seconds']} s")
    for name in (outputs.METRICS, outputs.PARQUET, outputs.CSV, outputs.REPORT):
        print(f"  {output_dir / name}")


def _histograms(scored: Scored, task: Task) -> dict[str, dict[str, list[Any]]]:
    columns = {
        "density (g/cm3)": "density", "volume per atom (A3)": "volume_per_atom", "atoms": "num_atoms",
        "elements": "num_elements", "shortest distance (A)": "min_distance",
        "space group at 0.1 A": "space_group_number_loose",
    }  # fmt: skip
    sets = {"generated": scored.measured, "reference": task.reference}
    result = {
        title: {name: [v for m in part if (v := m.row.get(column)) is not None] for name, part in sets.items() if part}
        for title, column in columns.items()
    }
    for title, field in (("bond length (A)", "bond_lengths"), ("coordination number", "coordination")):
        result[title] = {
            name: np.concatenate([getattr(m, field) for m in part]).tolist() for name, part in sets.items() if part
        }
    return result


def _cutoffs(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        struct, comp = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--cutoffs={text}: write two numbers, structure and composition, as 0.4,10") from error
    return struct, comp


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parser().parse(sys.argv[1:] if argv is None else argv))
    _check_needs(arguments["spec"], arguments["reference"], arguments["train"], arguments["known"])
    cutoffs = _cutoffs(arguments.pop("cutoffs"))
    outputs.prepare_directory(
        arguments["output_dir"], resume=arguments.pop("resume"), overwrite=arguments.pop("overwrite"), kept=CACHE,
        made=(outputs.METRICS, outputs.PARQUET, outputs.CSV, outputs.REPORT), what="an evaluation",
    )  # fmt: skip
    dataset = arguments.pop("dataset") or ""
    evaluate(cutoffs=cutoffs, dataset=dataset, **arguments)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
