"""What settings of glibc's allocator are worth on a CPU: train steps and sampling with each of them, in turn.

python -m benchmarks.malloc --configs perov_5_slots perov_5 --data_dir=data --output=benchmarks/malloc/two_cores.json
taskset -c 0 python -m benchmarks.malloc --output=benchmarks/malloc/one_core.json

Each measurement is a process of its own, since an allocator is set before it starts: seconds of a train step of each
config (the median of --steps, after as many to warm up), and of 256 crystals by the released perov_5 (10 steps of the
sampler). A ratio is that of two that ran in the same round.
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
from unimat_jax.allocator import CHOSEN_BY, TUNABLES
from unimat_jax.cli import Parser, run_program
from unimat_jax.evaluation.pool import available_cores

SAMPLING = "sampling"
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
KEPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
SETTINGS = {"none": {}, "huge pages": HUGE, "kept": KEPT, "kept huge pages, as train": {"GLIBC_TUNABLES": TUNABLES}}


def measure(what: str, data_dir: str, steps: int) -> dict[str, float]:
    """In this process, which did nothing before: {"seconds", "page_faults", "peak_rss_bytes"}."""
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
    p = Parser(prog="python -m benchmarks.malloc", description=__doc__)
    p.add_argument("--configs", nargs="+", default=["perov_5_slots", "perov_5"], help="whose train steps")
    p.add_argument("--data_dir", default="data", help="where their data sets are")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--output", type=Path, default=Path("benchmarks/malloc/two_cores.json"))
    p.add_argument("--measure", help="one measurement, in this process")
    a = p.parse(argv)
    if a.measure:
        print(json.dumps(measure(a.measure, a.data_dir, a.steps)))
        return 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith(CHOSEN_BY)}

    def child(what: str, setting: dict[str, str]) -> dict[str, float]:
        words = [f"--measure={what}", f"--data_dir={a.data_dir}", f"--steps={a.steps}"]
        command = [sys.executable, "-m", "benchmarks.malloc", *words]
        env = environment | setting
        return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)

    about = {"commit": commit(), "machine": machine(), "cores": available_cores(), "rounds": a.rounds, "steps": a.steps}
    result: dict[str, Any] = about | {"rows": {}}
    for what in [*a.configs, SAMPLING]:
        rounds = [{name: child(what, setting) for name, setting in SETTINGS.items()} for _ in range(a.rounds)]
        rows = result["rows"][what] = {}
        for name in SETTINGS:
            ratios = sorted(each["none"]["seconds"] / each[name]["seconds"] for each in rounds)
            medians = {key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name]}
            rows[name] = medians | {"speedup": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
            print(f"{what}, {name}: {rows[name]['speedup']:.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        a.output.parent.mkdir(exist_ok=True)
        a.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
