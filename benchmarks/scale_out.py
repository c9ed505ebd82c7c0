"""The same run on 1 and 8 devices, with sharded parameters and in two real processes; and from 8 devices to others.

python -m benchmarks.scale_out --data_dir=runs/quickstart/data --workdir=runs/scale_out

Devices are CPU devices of JAX, the two processes talk over loopback (gloo). All runs are `python -m unimat_jax.main` on
the same batches; what differs is the order of additions.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unimat_jax import sharding
from unimat_jax.assembly import abstract_batch, assemble
from unimat_jax.cli import Parser, run_program
from unimat_jax.errors import UserError
from unimat_jax.main import config_path, load_config
from unimat_jax.representation import UniMatSpec

NETWORK = {
    "data.dataset": "starter",
    "model.base_channels": 64,
    "model.channel_multipliers": (1, 2, 4),
    "model.num_res_blocks": 1,
    "train.batch_size": 8,
    "train.eval_examples": 32,
    "train.log_every": 1,
    "train.sample_every": 0,
    "optimizer.schedule": "constant",
}
"""Large enough that fsdp shards most of its parameters."""
RUNS = {"8 devices": (8, 1, 1), "8 devices, fsdp 4": (8, 1, 4), "2 processes x 4 devices, fsdp 2": (4, 2, 2)}
"""name -> devices a process, processes, config.train.fsdp."""
GO_ON = {"1 device": (1, 1, 1), "2 devices": (2, 1, 2), "4 devices, fsdp 2": (4, 1, 2), "2 processes x 2": (2, 2, 1)}
"""On these the run of 8 devices goes on from its middle."""


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in settings.items()]


def free_port() -> int:
    """A port whose next is free too, as a job needs them."""
    while True:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            try:
                socket.create_server(("", port + 1)).close()
            except OSError:
                continue
            return port


def train(workdir: Path, arguments: Sequence[str], devices: int, processes: int) -> None:
    """Runs the training program to its end, in so many processes."""
    command = [sys.executable, "-m", "unimat_jax.main", f"--workdir={workdir}", *arguments]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    job = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={processes}"] if processes > 1 else []
    workdir.parent.mkdir(parents=True, exist_ok=True)
    children = []
    for process in range(processes):
        log = workdir.parent / f"{workdir.name}_{process}.log"
        own = [*job, f"--process_id={process}"] if job else []
        with log.open("wb") as file:
            children.append(subprocess.Popen([*command, *own], stdout=file, stderr=subprocess.STDOUT, env=env))
    codes = [child.wait() for child in children]
    if any(codes):
        raise UserError(f"{workdir}: exit codes {codes}; what they said is in {workdir.parent}")


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    """Loss and gradient norm of each step; of a step that stands twice the last line counts."""
    found: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train/loss" in row:
            found[row["step"]] = {name: row[name] for name in ("train/loss", "train/grad_norm")}
    return found


def difference(ours: dict[int, dict[str, float]], straight: dict[int, dict[str, float]], after: int) -> dict[str, Any]:
    steps = sorted(step for step in straight if step > after)
    result: dict[str, Any] = {"steps": len(steps), "first_step": steps[0]}
    for name in ("train/loss", "train/grad_norm"):
        a, b = (np.array([run[step][name] for step in steps]) for run in (ours, straight))
        result[f"max_relative_difference {name}"] = float(f"{np.max(np.abs(a - b) / np.abs(b)):.3g}")
    return result


def memory(config: Any, description: dict[str, Any], fsdp: int) -> dict[str, Any]:
    """The train step's bytes a device by the compiler's memory analysis, on 8 devices."""
    mesh = sharding.make_mesh(fsdp)
    spec, schema = UniMatSpec.from_json(description["spec"]), description["condition_schema"]
    run = assemble(config, spec, schema, mesh)
    by_batch = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=by_batch)
        for name, a in abstract_batch(spec, len(schema), config.train.batch_size).items()
    }
    found = run.train_step.lower(run.abstract_state, batch, jax.random.key(0)).compile().memory_analysis()
    state = sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(run.shapes))
    sharded = sum(
        int(np.prod(s.shape)) * s.dtype.itemsize
        for s, d in zip(jax.tree.leaves(run.shapes), jax.tree.leaves(run.shardings), strict=True)
        if not d.is_fully_replicated
    )
    return {
        "fsdp": fsdp,
        "state_bytes": state,
        "share_of_the_state_that_is_sharded": round(sharded / state, 4),
        "arguments_bytes_per_device": found.argument_size_in_bytes,
        "temporaries_bytes_per_device": found.temp_size_in_bytes,
        "arguments_expected": state - sharded + sharded // fsdp,
    }


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.scale_out", description=__doc__)
    p.add_argument("--config", default="perov_5")
    p.add_argument("--data_dir", required=True, help="with the data set starter, as the quickstart makes it")
    p.add_argument("--num_steps", type=int, default=50)
    p.add_argument("--workdir", type=Path, required=True)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/scale_out"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    half = arguments.num_steps // 2
    settings = NETWORK | {
        "train.num_steps": arguments.num_steps, "train.checkpoint_every": half,
        "train.eval_every": arguments.num_steps,
    }  # fmt: skip
    given = [f"--config={config_path(arguments.config)}", f"--config.data.data_dir={arguments.data_dir}"]
    common = [*given, *flags(settings)]
    root: Path = arguments.workdir
    shutil.rmtree(root, ignore_errors=True)

    print("1 device", file=sys.stderr)
    train(root / "1 device", common, 1, 1)
    straight = losses(root / "1 device")
    result: dict[str, Any] = {"settings": {k: str(v) for k, v in settings.items()}, "against 1 device": {}}
    for name, (devices, processes, fsdp) in RUNS.items():
        print(name, file=sys.stderr)
        train(root / name, [*common, f"--config.train.fsdp={fsdp}"], devices, processes)
        result["against 1 device"][name] = difference(losses(root / name), straight, 0)
    middle = result[f"from step {half} of 8 devices"] = {}
    for name, (devices, processes, fsdp) in GO_ON.items():
        print(f"from 8 devices to {name}", file=sys.stderr)
        workdir = shutil.copytree(root / "8 devices", root / f"8 to {name}")
        shutil.rmtree(workdir / "checkpoints" / str(arguments.num_steps))
        train(workdir, [*common, f"--config.train.fsdp={fsdp}"], devices, processes)
        compared = difference(losses(workdir), losses(root / "8 devices"), half)
        middle[name] = compared

    jax.config.update("jax_num_cpu_devices", 8)
    config, _, _ = load_config([*common, "--workdir=unused"])
    description = json.loads((root / "8 devices" / "model.json").read_text())
    result["num_params"] = description["num_params"]
    result["memory of the train step"] = [memory(config, description, fsdp) for fsdp in (1, 2, 4, 8)]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "scale_out.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
