"""Kills `unimat prepare` at random moments, lets the same command go on, and compares every byte with a build in peace.

python -m benchmarks.build_kills --kills=40 --crystals=2000 --workdir=/tmp/kills

The source is the package's crystals, some of them twice and some broken, in parts of 200. Half of the kills are
SIGKILL, half SIGTERM, of the main process only: its workers have to end by themselves. Each build is killed one to
three times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fingerprints import commit, machine
from benchmarks.million import stage_of, tree
from unimat_jax.cli import Parser, run_program

TIMES = ("seconds", "crystals_per_second")
ENDED_BY = {signal.SIGKILL: -9, signal.SIGTERM: 143}
"""Exit code; a SIGTERM while Python starts is the system's own end, -15."""


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(
        prog="python -m benchmarks.build_kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--crystals", type=int, default=3000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workdir", type=Path, required=True, help="emptied first")
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/build_kills"))
    flags = p.parse(sys.argv[1:] if argv is None else argv)
    shutil.rmtree(flags.workdir, ignore_errors=True)
    source = write_source(flags.workdir / "source", flags.crystals)
    begin = time.monotonic()
    expected = contents(finish(command(source, flags.workdir / "peace")))
    seconds = time.monotonic() - begin
    random_ = random.Random(flags.seed)
    kills: list[dict[str, str]] = []
    builds = 0
    while len(kills) < flags.kills:
        one = command(source, flags.workdir / "killed")
        shutil.rmtree(flags.workdir / "killed", ignore_errors=True)
        for _ in range(random_.randint(1, 3)):
            sent = random_.choice((signal.SIGKILL, signal.SIGTERM))
            if killed := kill(one, sent, random_.uniform(0, seconds)):
                kills.append(killed)
        found = contents(finish(one))
        builds += 1
        differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if differ:
            raise AssertionError(f"after {kills[-3:]}: {differ} differ, seed {flags.seed}, build {builds}")
        print(f"{len(kills)} kills, {builds} builds, all equal", flush=True)
    told = Counter((kill["signal"], kill["stage"]) for kill in kills)
    result: dict[str, Any] = {"commit": commit(), "machine": machine(), "seed": flags.seed, "crystals": flags.crystals}
    result |= {"kills": len(kills), "builds": builds, "different": 0, "seconds_in_peace": round(seconds, 2)}
    result["kills_by_signal_and_stage"] = {f"{name}, {stage}": n for (name, stage), n in sorted(told.items())}
    result["files_compared"] = sorted(expected)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    (flags.output_dir / "build_kills.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {flags.output_dir / 'build_kills.json'}")
    return 0


def write_source(directory: Path, number: int) -> Path:
    """Real crystals as npz files, with ids that stand there twice and lattices that are none."""
    import unimat_jax.starter

    directory.mkdir(parents=True)
    with np.load(Path(str(unimat_jax.starter.__file__)).parent / "starter.npz") as file:
        arrays = {name: file[name] for name in file.files}
    ids = arrays["material_id"][:number].copy()
    ids[25::50] = ids[: len(ids[25::50])]
    lattice = arrays["lattice"][:number].copy()
    lattice[7::100] = np.nan
    ends = np.cumsum(arrays["n_atoms"].astype(int))
    for index, start in enumerate(range(0, number, 500)):
        rows = slice(start, min(start + 500, number))
        atoms = slice(ends[start] - int(arrays["n_atoms"][start]), ends[rows.stop - 1])
        content = {name: arrays[name][atoms] for name in ("numbers", "frac_coords")}
        content |= {name: arrays[name][rows] for name in ("n_atoms", "e_above_hull")}
        np.savez(directory / f"{index}.npz", material_id=ids[rows], lattice=lattice[rows], **content)
    return directory


def command(source: Path, data_dir: Path, part_size: int = 200) -> list[str]:
    program = [sys.executable, "-m", "unimat_jax.cli", "prepare", "--dataset=crystals", f"--source={source}"]
    return [*program, f"--data_dir={data_dir}", f"--part_size={part_size}", "--num_shards=3", "--num_workers=2"]


def data_dir_of(command: Sequence[str]) -> Path:
    return Path(next(word for word in command if word.startswith("--data_dir=")).partition("=")[2])


def kill(command: Sequence[str], sent: signal.Signals, after: float) -> dict[str, str] | None:
    """Starts the command and kills it after so many seconds; None where it was done before."""
    unfinished = data_dir_of(command) / "crystals" / "1.0.0.parsing"
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(after)
    stage, processes = stage_of(unfinished) if unfinished.exists() else "starting", tree(running.pid)
    running.send_signal(sent)
    said = running.communicate()[1]
    if running.returncode == 0:
        return None
    if running.returncode not in (-sent, ENDED_BY[sent]) or (sent == signal.SIGTERM and "Traceback" in said):
        raise AssertionError(f"{sent.name} in {stage}: exit code {running.returncode}: {said}")
    until = time.monotonic() + 10
    while left := [pid for pid in processes[1:] if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > until:
            raise AssertionError(f"{sent.name} in {stage}: {left} run on")
        time.sleep(0.02)
    return {"signal": sent.name, "stage": stage}


def finish(command: Sequence[str]) -> Path:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr)
    return data_dir_of(command) / "crystals" / "1.0.0"


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes; the report without its times."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    report = json.loads(found["data_report.json"])
    for name in TIMES:
        report.pop(name)
    found["data_report.json"] = json.dumps(report).encode()
    return found


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
