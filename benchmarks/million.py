"""A million crystals on one machine: how fast they are built and read, and whether memory grows with their number.

python -m benchmarks.million --source=$UNIMAT_DATA/mp_le20/mp_le20.npz --workdir=/tmp/million

The crystals are real ones with their atoms moved by 0.02 A and their cells strained by 1 % (standard deviations). Each
size is built by `unimat prepare` in a process of its own, then read back shuffled on one core. Reading is given per
second of processor time, building per second of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fingerprints import commit, machine
from unimat_jax import data
from unimat_jax.cli import Parser, run_program
from unimat_jax.errors import UserError
from unimat_jax.representation import batch_records

FILE_SIZE = 10_000
MOVED, STRAINED = 0.02, 0.01
BATCH = 256
PAGE = os.sysconf("SC_PAGE_SIZE")


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(
        prog="python -m benchmarks.million", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--source", type=Path, required=True, help="npz of real crystals")
    p.add_argument("--sizes", default="10000,100000,1000000")
    p.add_argument("--num_workers", type=int, default=2)
    p.add_argument("--no_niggli", action="store_true", help="leave the cells as they are")
    p.add_argument("--batches", type=int, default=200, help="batches of 256 in each of 5 rounds of reading")
    p.add_argument("--workdir", type=Path, required=True, help="some 2 GB for a million; emptied first")
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/million"))
    flags = p.parse(sys.argv[1:] if argv is None else argv)
    result: dict[str, Any] = {"commit": commit(), "machine": machine(), "num_workers": flags.num_workers}
    result |= {"niggli": not flags.no_niggli, "sizes": []}
    path = flags.output_dir / ("million_no_niggli.json" if flags.no_niggli else "million.json")
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    for size in [int(number) for number in flags.sizes.split(",")]:
        shutil.rmtree(flags.workdir, ignore_errors=True)
        row = {"crystals": size, "load_before": os.getloadavg()[0]}
        row["make_source_seconds"] = timed(lambda: perturb(flags.source, flags.workdir / "source", size))[1]  # noqa: B023
        row["source_bytes"] = bytes_of(flags.workdir / "source")
        row |= build(flags.workdir, flags.num_workers, not flags.no_niggli)
        row |= read_back(data.dataset_directory("crystals", flags.workdir), flags.batches)
        result["sizes"].append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")  # what is done so far
        print(json.dumps(row), flush=True)
    print(f"written: {path}")
    return 0


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return function(), round(time.perf_counter() - begin, 2)


def bytes_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def perturb(source: Path, directory: Path, number: int) -> None:
    """`number` perturbed crystals as npz files of FILE_SIZE."""
    if not source.is_file():
        raise UserError(f"--source={source} does not exist: give an npz of crystals (layout: README)")
    directory.mkdir(parents=True)
    with np.load(source) as file:
        real = {name: file[name] for name in ("n_atoms", "numbers", "frac_coords", "lattice")}
    sizes = real["n_atoms"].astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    for index in range(-(-number // FILE_SIZE)):
        rng = np.random.default_rng(index)
        chosen = rng.integers(0, len(sizes), min(FILE_SIZE, number - index * FILE_SIZE))
        of_atom = np.repeat(np.arange(len(chosen)), sizes[chosen])
        within = np.arange(len(of_atom)) - np.repeat(np.cumsum(sizes[chosen]) - sizes[chosen], sizes[chosen])
        atoms = starts[chosen][of_atom] + within
        lattice = real["lattice"][chosen] @ (np.eye(3) + STRAINED * rng.normal(size=(len(chosen), 3, 3)))
        moves = MOVED * rng.normal(size=(len(atoms), 3))
        np.savez(
            directory / f"{index:06}.npz",
            material_id=np.array([f"perturbed-{index * FILE_SIZE + i}" for i in range(len(chosen))]),
            n_atoms=real["n_atoms"][chosen],
            numbers=real["numbers"][atoms],
            frac_coords=real["frac_coords"][atoms] + np.einsum("ni,nij->nj", moves, np.linalg.inv(lattice)[of_atom]),
            lattice=lattice,
            volume_per_atom=np.abs(np.linalg.det(lattice)) / sizes[chosen],
        )


def build(work_dir: Path, num_workers: int, niggli: bool) -> dict[str, Any]:
    """Time, memory and disk of `unimat prepare` on work_dir/source, measured from outside."""
    command = [sys.executable, "-m", "unimat_jax.cli", "prepare", "--dataset=crystals", f"--data_dir={work_dir}"]
    command += [f"--source={work_dir / 'source'}", f"--num_workers={num_workers}"]
    command += [] if niggli else ["--no-niggli"]
    begin, cpu_before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    memory, largest, disk, stages, watched = 0, 0, 0, {}, 0
    while running.poll() is None:
        of_each = [resident(pid) for pid in tree(running.pid)]
        memory, largest = max(memory, sum(of_each)), max(largest, *of_each, 0)
        stage = stage_of(work_dir / "crystals" / "1.0.0.parsing")
        stages.setdefault(stage, [time.perf_counter() - begin, 0])
        stages[stage][1] = max(stages[stage][1], sum(of_each))
        if watched % 50 == 0:
            disk = max(disk, disk_use(work_dir / "crystals"))
        watched += 1
        time.sleep(0.1)
    seconds, cpu = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = cpu.ru_utime + cpu.ru_stime - cpu_before.ru_utime - cpu_before.ru_stime
    assert running.stdout is not None
    said = running.stdout.read()
    if running.returncode:
        raise UserError(f"{' '.join(command)} failed: {said}")
    directory = data.dataset_directory("crystals", work_dir)
    report = json.loads((directory / "data_report.json").read_text())
    shards = list(directory.glob("*.array_record*"))
    ends = [*[start for start, _ in stages.values()][1:], seconds]
    return {
        "kept": report["kept"],
        "dropped": report["dropped"],
        "build_seconds": round(seconds, 2),
        "crystals_per_second": round(report["read"] / seconds, 1),
        "processor_seconds": round(cpu_seconds, 1),
        "crystals_per_processor_second": round(report["read"] / cpu_seconds, 1),
        "stages": {
            name: {"seconds": round(end - start, 2), "peak_bytes": peak}
            for (name, (start, peak)), end in zip(stages.items(), ends, strict=True)
        },
        "peak_bytes_of_all_processes": memory,
        "peak_bytes_of_one_process": largest,
        "peak_disk_bytes": max(disk, disk_use(work_dir / "crystals")),
        "shards": len(shards),
        "bytes_per_crystal": round(sum(p.stat().st_size for p in shards) / report["kept"], 1),
    }


def tree(pid: int) -> list[int]:
    """The process and all that it started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it just ended
            continue
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def resident(pid: int) -> int:
    """Bytes of a process in memory; what processes share counts in each."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def stage_of(directory: Path) -> str:
    chosen = directory / "chosen"
    for stage, sign in (("writing", "1.0.0"), ("sorting", "000000.run.npy"), ("counting", "duplicates.npy")):
        if (chosen / sign).exists():
            return stage
    return "choosing" if chosen.exists() else "parsing"


def disk_use(directory: Path) -> int:
    done = subprocess.run(["du", "-s", "--block-size=1", str(directory)], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0]) if done.stdout else 0


def read_back(directory: Path, batches: int) -> dict[str, Any]:
    """Crystals a second on one core, shuffled, in batches of BATCH: a median of 5 rounds of each kind, in turn."""
    import tensorflow_datasets as tfds

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        source = data.RecordSource(directory, "train")
        spec = data.make_spec(data.read_statistics(directory))
        switches = {"shuffle_atoms": True, "random_shift": True, "random_axes": True}
        maker = data.BatchMaker(source, spec, batch_size=BATCH, seed=0, augmentation=switches)
        builder: Any = tfds.builder_from_directory(str(directory))
        one_by_one = builder.as_data_source("train")
        _, opened = timed(lambda: maker.indices(0))
        kinds: dict[str, tuple[int, Callable[[int], Any]]] = {
            "raw records": (batches, lambda i: source._shards.read(maker.indices(i).astype(np.int64))),
            "decoded to arrays": (batches, lambda i: batch_records(source.read(maker.indices(i)), spec.max_atoms)),
            "batches for the device, augmented": (batches, maker),
            "tfds.data_source, one by one": (
                max(1, batches // 20),
                lambda i: [one_by_one[int(j)] for j in maker.indices(i)],
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        number = 0
        for _ in range(5):
            for name, (count, function) in kinds.items():
                cpu = time.process_time()  # other work on the machine does not count
                for _ in range(count):
                    function(number)
                    number += 1
                rates[name].append(count * BATCH / (time.process_time() - cpu))
        ids = set()
        for start in range(0, len(source), 10_000):
            ids |= {r["material_id"] for r in source.read(range(start, min(start + 10_000, len(source))))}
    finally:
        os.sched_setaffinity(0, cores)
    assert len(ids) == len(source), "a crystal is there twice, or not at all"
    return {
        "train_records": len(source),
        "first_order_seconds": opened,
        "read_crystals_per_second": {name: round(statistics.median(found)) for name, found in rates.items()},
    }


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
