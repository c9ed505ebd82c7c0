"""What `allocator.keep_freed_memory` is worth: train steps and sampling with and without it, in turn.

python -m benchmarks.kept_memory --configs perov_5_slots perov_5 --data_dir=data --output=benchmarks/kept_memory.json

Each measurement is a process of its own, since an allocator is chosen once: seconds of a train step of each config (the
median of --steps, after as many to warm up), and of 256 crystals by the released perov_5 (10 steps of the sampler).
Ratios are those of the pairs that ran one after the other.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fingerprints import commit, machine
from unimat_jax.allocator import CHOSEN_BY, keep_freed_memory
from unimat_jax.cli import Parser, run_program

SAMPLING = "sampling"


def measure(what: str, data_dir: str, steps: int, kept: bool) -> dict[str, Any]:
    """In this process, which did nothing before: {"seconds", "page_faults", "peak_rss_bytes"}."""
    if kept and not keep_freed_memory():
        raise RuntimeError("not asked: the environment chose an allocator, or there is no glibc")
    run: Callable[[], object]
    if what == SAMPLING:
        from unimat_jax.generator import Generator

        generator = Generator("perov_5")
        run = functools.partial(generator.generate, 256, formula="SrTiO3", num_steps=10, batch_size=256)
    else:
        from benchmarks.profile_step import OfConfig

        ours = OfConfig(what, data_dir)
        ours.setup(0, 0, 0, {})
        run = ours.train
    seconds, before = [], 0
    for number in range(2 * steps):
        if number == steps:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": statistics.median(seconds[steps:]),
        "page_faults": (usage.ru_minflt - before) / steps,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def main(argv: Sequence[str]) -> int:
    p = Parser(prog="python -m benchmarks.kept_memory", description=__doc__)
    p.add_argument("--configs", nargs="+", default=["perov_5_slots", "perov_5"], help="whose train steps")
    p.add_argument("--data_dir", default="data", help="where their data sets are")
    p.add_argument("--pairs", type=int, default=5)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--output", type=Path, default=Path("benchmarks/kept_memory.json"))
    p.add_argument("--measure", help="one measurement, in this process")
    p.add_argument("--kept", action="store_true")
    a = p.parse(argv)
    if a.measure:
        print(json.dumps(measure(a.measure, a.data_dir, a.steps, a.kept)))
        return 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith(CHOSEN_BY)}

    def child(what: str, kept: bool) -> dict[str, Any]:
        words = [f"--measure={what}", f"--data_dir={a.data_dir}", f"--steps={a.steps}", *(["--kept"] if kept else [])]
        command = [sys.executable, "-m", "benchmarks.kept_memory", *words]
        return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    result: dict[str, Any] = {"commit": commit(), "machine": machine(), "pairs": a.pairs, "steps": a.steps, "rows": {}}
    for what in [*a.configs, SAMPLING]:
        pairs = [(child(what, False), child(what, True)) for _ in range(a.pairs)]
        ratios = sorted(without["seconds"] / kept["seconds"] for without, kept in pairs)
        row: dict[str, Any] = {"speedup": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
        for name in ("seconds", "page_faults", "peak_rss_bytes"):
            row[name] = {
                "returned": statistics.median(without[name] for without, _ in pairs),
                "kept": statistics.median(kept[name] for _, kept in pairs),
            }
        result["rows"][what] = row
        print(f"{what}: {row['speedup']:.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
        a.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
