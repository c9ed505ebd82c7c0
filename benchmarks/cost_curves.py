"""What a train step and a sampling step cost against batch, channels, L, table and options, and a model of it.

python -m benchmarks.cost_curves --output_dir=benchmarks/cost_curves

Runs on whatever jax finds (CPU, GPU, TPU). One network (configs/unimat.py with one block a level, attention on the two
coarser grids) is varied in one thing at a time. Each point's programs are compiled, warmed up and timed; memory is the
compiler's (temporaries, and arguments). Fitted to all train steps at once, times at least 0:

    seconds = overhead + operations / speed + (cells of the finest level x channels) / rate + parameters / rate

--options instead times the config fields that change no result, each in turn with the default, on the same network.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.fingerprints import commit, machine
from benchmarks.peer_jax import matmul_peak, random_batch
from unimat_jax import sharding
from unimat_jax.assembly import assemble, create_network, init_arguments, sampler_program
from unimat_jax.cli import Parser, run_program
from unimat_jax.flops import count_flops, model_cost
from unimat_jax.main import config_path, load_config
from unimat_jax.periodic_table import Table
from unimat_jax.representation import UniMatSpec

BASE = {"batch": 8, "channels": 32, "L": 3, "table": (9, 18)}
SWEEPS: dict[str, tuple[Any, ...]] = {
    "batch": (2, 8, 32),
    "channels": (16, 32, 64),
    "L": (1, 3, 6, 12, 24),
    "table": ((3, 6), (6, 9), (9, 18)),
}
OPTIONS = {
    "default": {},
    "model.dtype=bfloat16": {"model.dtype": "bfloat16"},
    "model.remat": {"model.remat": True},
    "model.scan_blocks": {"model.scan_blocks": True},
    "train.microbatches=2": {"train.microbatches": 2},
}
NETWORK = {"model.num_res_blocks": 1, "model.attention_resolutions": (3, 9), "model.dropout_rate": 0.0}
SAMPLER_STEPS = 8
LEVELS = (1, 2, 5, 10, 20, 50, 100, 200)


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.cost_curves", description=__doc__)
    p.add_argument("--options", action="store_true", help="time config fields against the default")
    p.add_argument("--channels", type=int, default=64, help="with --options")
    p.add_argument("--num_res_blocks", type=int, default=3, help="with --options")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/cost_curves"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    dtype = {"model.dtype": arguments.dtype}
    result: dict[str, Any] = {
        "commit": commit(), "machine": machine(), "device": jax.devices()[0].device_kind, "dtype": arguments.dtype,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "matmul_peak": matmul_peak(arguments.dtype), "base": BASE, "network": NETWORK,
    }  # fmt: skip
    if arguments.options:
        more = {**NETWORK, "model.num_res_blocks": arguments.num_res_blocks, **dtype}
        result["network"], result["base"] = more, {**BASE, "channels": arguments.channels}
        result["options"] = options(result["base"], more, arguments.rounds)
        name = "options"
    else:
        seen: dict[str, dict[str, Any]] = {}
        for sweep, values in SWEEPS.items():
            for value in values:
                point = {**BASE, sweep: value}
                if str(point) not in seen:
                    seen[str(point)] = {**point, **measure(point, {**NETWORK, **dtype}, arguments.rounds)}
                    show(seen[str(point)], result["matmul_peak"])
        rows = list(seen.values())
        result |= {"points": rows, "model": fit(rows), "paper_levels": paper_levels()}
        name = "cost_curves"
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / f"{name}_{jax.default_backend()}_{arguments.dtype}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    if not arguments.options:
        draw(result, path.with_suffix(".png"))
    print(f"written: {path}")
    return 0


class Point:
    """The compiled programs of one setting, with arguments to run them on."""

    def __init__(self, point: Mapping[str, Any], changes: Mapping[str, Any]):
        flags = [f"--config.{name}={value}" for name, value in changes.items()]
        flags += [f"--config.train.batch_size={point['batch']}", f"--config.model.base_channels={point['channels']}"]
        config, _, _ = load_config([f"--config={config_path('unimat')}", "--workdir=unused", *flags])
        rows, columns = point["table"]
        table = Table(tuple(range(rows)), tuple(range(columns)))
        atoms = min(20, point["L"] * rows * columns)
        spec = UniMatSpec(max_atoms_per_element=point["L"], max_atoms=atoms, table=table)
        mesh = sharding.make_mesh(1)
        run = assemble(config, spec, [], mesh)
        self.batch = jax.tree.map(jnp.asarray, random_batch(spec, point["batch"], 0))
        self.key, self.state = jax.random.key(0), run.init()
        self.conditions = {
            k: jnp.zeros(a.shape, a.dtype) for k, a in run.objective.abstract_conditions(0, point["batch"]).items()
        }
        program = sampler_program(run.objective, mesh, **{**config.sample, "num_steps": SAMPLER_STEPS})
        params = self.state.ema_params
        self.train_flops = count_flops(run.train_step, self.state, self.batch, self.key)
        self.sample_flops = count_flops(program, params, self.key, self.conditions) / SAMPLER_STEPS
        self.num_params = run.num_params
        begin = time.perf_counter()
        self.train_step = run.train_step.lower(self.state, self.batch, self.key).compile()
        self.train_compile_s = time.perf_counter() - begin
        begin = time.perf_counter()
        self.sampler = program.lower(params, self.key, self.conditions).compile()
        self.sampler_compile_s = time.perf_counter() - begin

    def train(self) -> float:
        """Seconds of one train step."""
        begin = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.train_step(self.state, self.batch, self.key))
        return time.perf_counter() - begin

    def sample(self) -> float:
        """Seconds of one denoising step."""
        begin = time.perf_counter()
        jax.block_until_ready(self.sampler(self.state.ema_params, self.key, self.conditions))
        return (time.perf_counter() - begin) / SAMPLER_STEPS


def measure(point: Mapping[str, Any], changes: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Median seconds of both programs after two runs each, their operations, compile times and memory."""
    programs = Point(point, changes)
    return {**about(programs), **timed({"": programs}, rounds)[""]}


def about(programs: Point) -> dict[str, Any]:
    memory = programs.train_step.memory_analysis()
    return {
        "num_params": programs.num_params,
        "train_flops": programs.train_flops,
        "sample_flops": programs.sample_flops,
        "train_compile_s": round(programs.train_compile_s, 2),
        "sampler_compile_s": round(programs.sampler_compile_s, 2),
        "temporaries_bytes": memory.temp_size_in_bytes,
        "arguments_bytes": memory.argument_size_in_bytes,
        "sampler_temporaries_bytes": programs.sampler.memory_analysis().temp_size_in_bytes,
    }


def timed(all_programs: Mapping[str, Point], rounds: int) -> dict[str, dict[str, Any]]:
    """Medians of `rounds` turns, each turn going through all programs, after two that do not count."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"train": [], "sample": []} for name in all_programs}
    for turn in range(rounds + 2):
        for name, programs in all_programs.items():
            for kind, run in (("train", programs.train), ("sample", programs.sample)):
                value = run()
                if turn > 1:
                    seconds[name][kind].append(value)
    return {
        name: {f"{kind}_s": statistics.median(values) for kind, values in kinds.items()}
        | {f"{kind}_all_s": values for kind, values in kinds.items()}
        for name, kinds in seconds.items()
    }


def options(point: Mapping[str, Any], network: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Each option's programs beside the default's, in turn; times relative to the default's of the same turn."""
    programs = {name: Point(point, {**network, **changes}) for name, changes in OPTIONS.items()}
    times = timed(programs, rounds)
    rows = {}
    for name, found in programs.items():
        row = {**about(found), **times[name]}
        for kind in ("train", "sample"):
            pairs = zip(row[f"{kind}_all_s"], times["default"][f"{kind}_all_s"], strict=True)
            row[f"{kind}_relative"] = statistics.median(a / b for a, b in pairs)
        rows[name] = row
        print(
            f"{name:<24}train {row['train_s']:.3f} s ({row['train_relative']:.2f} of the default's)  "
            f"sampling step {row['sample_s'] * 1e3:.1f} ms ({row['sample_relative']:.2f})  "
            f"temporaries {row['temporaries_bytes'] / 1e6:.0f} MB  compiled in {row['train_compile_s']:.0f} s"
        )
    return rows


def show(row: Mapping[str, Any], peak: float) -> None:
    print(
        f"batch {row['batch']:>3}  channels {row['channels']:>3}  L {row['L']:>2}  table {row['table']}: train "
        f"{row['train_s'] * 1e3:.0f} ms, {row['batch'] / row['train_s']:.0f} crystals/s, "
        f"{row['train_flops'] / row['train_s'] / peak:.0%} of peak; sampling step {row['sample_s'] * 1e3:.1f} ms, "
        f"{row['sample_flops'] / row['sample_s'] / peak:.0%}; {row['temporaries_bytes'] / 1e6:.0f} MB; compiled in "
        f"{row['train_compile_s']:.0f} s",
        flush=True,
    )


def features(row: Mapping[str, Any]) -> list[float]:
    """What the model's terms multiply: 1, operations, values of the finest level, parameters."""
    rows, columns = row["table"]
    return [1.0, row["train_flops"], row["batch"] * row["L"] * rows * columns * row["channels"], row["num_params"]]


def fit(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The model's coefficients, none negative, by least squares of relative errors, and how far off it is."""
    from scipy.optimize import nnls

    seconds = np.array([row["train_s"] for row in rows])
    matrix = np.array([features(row) for row in rows])
    scale = matrix.max(0)
    found, _ = nnls(matrix / scale / seconds[:, None], np.ones(len(rows)))
    coefficients = found / scale
    errors = matrix @ coefficients / seconds - 1
    names = ("overhead", "per_flop", "per_value", "per_parameter")
    return {
        "seconds": dict(zip(names, coefficients.tolist(), strict=True)),
        "median_relative_error": float(np.median(abs(errors))),
        "largest_relative_error": float(abs(errors).max()),
    }


def paper_levels(levels: Sequence[int] = LEVELS) -> dict[str, Any]:
    """Training operations a crystal of configs/unimat.py against L, and the exact polynomial a + b L + c L^2 of L > 2
    through the last three of them (below, kernels along L have fewer taps)."""
    config, _, _ = load_config([f"--config={config_path('unimat')}", "--workdir=unused"])
    network = create_network(config.model)
    flops = {}
    for level in levels:
        spec = UniMatSpec(max_atoms_per_element=level, max_atoms=level, table=Table())
        flops[level] = model_cost(network, init_arguments(spec, 0)).train_flops_per_crystal
    c, b, a = np.polyfit(levels[-3:], [flops[level] for level in levels[-3:]], 2)
    return {"train_flops_per_crystal": flops, "polynomial": {"constant": a, "linear": b, "quadratic": c}}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Measured train steps of each sweep, and the model's line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    coefficients = list(result["model"]["seconds"].values())
    figure, all_axes = plt.subplots(1, len(SWEEPS), figsize=(12, 3.2), layout="constrained", sharey=True)
    for axes, (sweep, values) in zip(all_axes, SWEEPS.items(), strict=True):
        points = [{**BASE, sweep: value} for value in values]
        keys = ("batch", "channels", "L", "table")
        rows = [next(r for r in result["points"] if all(r[k] == p[k] for k in keys)) for p in points]
        x = [value[0] * value[1] if sweep == "table" else value for value in values]
        axes.loglog(x, [row["train_s"] for row in rows], "o", label="measured")
        model = [sum(c * f for c, f in zip(coefficients, features(row), strict=True)) for row in rows]
        axes.loglog(x, model, "-", linewidth=1.2, label="model")
        axes.set(xlabel="places of the table" if sweep == "table" else sweep)
        axes.set_xticks(x, [str(v) for v in x])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set(ylabel="seconds a train step")
    low, high = all_axes[0].get_ylim()
    ticks = [t for t in (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10) if low < t < high]
    all_axes[0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    all_axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
