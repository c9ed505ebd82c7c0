"""Where the time of the train step of peer_unet3d.py goes on a CPU, by kind of operation, and what its floor is.

python -m benchmarks.profile_step --output=benchmarks/profile_step.json
python -m benchmarks.profile_step --config=perov_5_slots --data_dir=data --output=benchmarks/perov_slots/profile.json

With --config, that of any config, on a batch of its data set: of the first `data.size_window` ones, which differ in how
many atoms they are padded to, the one in the middle (without a model of compositions).

Thread time of XLA's own trace over a few steps, each operation put into one kind by its name. Floors, in seconds a
step: products at the speed of the best matrix product measured in this run; the same plus the least traffic of
gradients, Adam and the moving average at the measured speed of memory; and with the products at the speed that XLA's
kernels have in the step (their thread time over the threads), everything else free.
"""

from __future__ import annotations

import collections
import gzip
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.fingerprints import commit, machine
from benchmarks.peer_jax import Ours, matmul_peak, versions
from benchmarks.peer_torch import timed
from benchmarks.peer_unet3d import BATCH, LEVELS
from unimat_jax import data, sharding
from unimat_jax.assembly import assemble
from unimat_jax.cli import Parser, run_program
from unimat_jax.evaluation.pool import available_cores
from unimat_jax.flops import count_flops
from unimat_jax.main import load_config

KINDS = {
    "products and convolutions": r"dot|convolution|matmul|ynn|onednn",  # XLA hands most of them to such libraries
    "transposes and copies": r"transpose|copy",
    "slices, pads, concatenations": r"slice|pad|concatenate|gather|scatter",
    "sums": r"reduce",
}
"""By the name of an operation (a fusion's tells what it is made of), the first that fits; else "element-wise"."""
NETWORKS = ("UNet3D", "SlotTransformer")
OUTSIDE = "outside the network: Adam, moving average, norms of gradients and parameters, loss"
OPTIMIZER_BYTES = 10 * 4
"""A parameter: the gradient written and read; parameter, two moments and average each read and written, in float32."""


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.profile_step", description=__doc__)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, default=Path("benchmarks/profile_step.json"))
    p.add_argument("--config", help="name or file; default: the network of peer_unet3d.py")
    p.add_argument("--data_dir", default="data", help="with --config: where its data set is")
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    ours = OfConfig(arguments.config, arguments.data_dir) if arguments.config else Ours()
    about = ours.setup(BATCH, LEVELS, arguments.seed, {})
    for _ in range(3):
        ours.train()
    seconds = statistics.median(ours.train() for _ in range(arguments.rounds))
    text = ours.train_step.lower(ours.state, ours.batch, ours.key).compile().as_text() or ""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(arguments.steps):
                ours.train()
        trace = max(Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    kinds, number = by_kind(events, scopes(text))
    flops = count_flops(ours.train_step, ours.shapes, ours.batch, ours.key)
    peak, bandwidth = matmul_peak("float32"), memory_bandwidth()
    threads = available_cores()
    optimizer = about["num_params"] * OPTIMIZER_BYTES / bandwidth
    products = kinds["products and convolutions"] / arguments.steps / threads
    total = sum(kinds.values())
    result = {
        "commit": commit(), "machine": machine(), "threads": threads, "seed": arguments.seed,
        "versions": about["versions"], "num_params": about["num_params"], "padded_atoms": about.get("padded_atoms"),
        "step_s": seconds, "thread_time_s": total / arguments.steps, "operations_a_step": number // arguments.steps,
        "share_of_thread_time": {name: round(value / total, 3) for name, value in kinds.most_common()},
        "flops": flops, "matmul_peak": peak, "memory_bytes_per_second": bandwidth,
        "floor_s": {
            "products at the matmul peak": flops / peak,
            "and the optimizer's traffic": flops / peak + optimizer,
            "products at XLA's speed, and the optimizer's traffic": products + optimizer,
        },
    }  # fmt: skip
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


class OfConfig:
    """The train step of a config and its first batch."""

    def __init__(self, name: str, data_dir: str):
        self.config = load_config([f"--config={name}", "--workdir=", f"--config.data.data_dir={data_dir}"])[0]
        self.config.composition.width = 0

    def setup(self, batch_size: int, max_atoms_per_element: int, seed: int, settings: Mapping[str, Any]) -> Any:
        """As `Ours.setup`; the config says how large the batch and what the network is."""
        del batch_size, max_atoms_per_element, settings
        chosen = self.config.data
        directory = data.dataset_directory(chosen.dataset, chosen.data_dir)
        spec = data.make_spec(data.read_statistics(directory), table=chosen.table)
        augmentation = {
            name: chosen[name]
            for name in ("shuffle_atoms", "random_shift", "origin_shift", "random_axes", "half_turned")
        }
        batches = data.BatchMaker(
            data.RecordSource(directory, "train"),
            spec,
            batch_size=self.config.train.batch_size,
            seed=seed,
            augmentation=augmentation,
            size_window=chosen.size_window,
        )
        programs = assemble(self.config, spec, [], sharding.make_mesh())
        drawn = sorted((batches(i) for i in range(max(1, chosen.size_window))), key=lambda b: b["slot"].shape[1])
        self.batch, self.key = jax.tree.map(jnp.asarray, drawn[len(drawn) // 2]), jax.random.key(seed)
        self.state, self.train_step, self.shapes = programs.init(), programs.train_step, programs.shapes
        padded = self.batch["slot"].shape[1]
        return {"num_params": programs.num_params, "versions": versions(), "padded_atoms": padded}

    def train(self) -> float:
        """Seconds of one step, of which the loss is read."""

        def step():
            self.state, metrics = self.train_step(self.state, self.batch, self.key)
            jax.block_until_ready(self.state)
            float(metrics["train/loss"])

        return timed(step)


def scopes(hlo: str) -> dict[str, str]:
    """Instruction -> the place in the Python program it comes from, of a compiled program's text."""
    found = {}
    for line in hlo.splitlines():
        if match := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line):
            name = re.search(r'op_name="([^"]*)"', line)
            found[match[1]] = name[1] if name else ""
    return found


def by_kind(events: Sequence[Mapping[str, Any]], scope_of: Mapping[str, str]) -> tuple[collections.Counter[str], int]:
    """Seconds of thread time by kind, and the number of operations."""
    seconds: collections.Counter[str] = collections.Counter()
    number = 0
    for event in events:
        name = event.get("name", "")
        if event.get("ph") != "X" or name not in scope_of:
            continue
        scope = scope_of[name]
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "element-wise")
        if scope and not any(network in scope for network in NETWORKS):
            kind = OUTSIDE
        seconds[kind] += event["dur"] / 1e6
        number += 1
    return seconds, number


def memory_bandwidth(size: int = 2**26, repeats: int = 5) -> float:
    """Bytes a second of a += b over arrays that no cache holds: two read and one written for each."""
    b = jnp.ones(size)
    add = jax.jit(lambda a, b: a + b, donate_argnums=0)
    a, best = add(jnp.zeros(size), b), 0.0
    for _ in range(repeats):

        def run():
            nonlocal a
            a = add(a, b).block_until_ready()

        best = max(best, 3 * 4 * size / timed(run))
    return best


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
