"""A training run that is killed again and again, against the same run left alone: are they the same, bit for bit?

python -m benchmarks.kills --data_dir=runs/quickstart/data --workdir=runs/kills --kills=30

Each kill is SIGKILL or SIGTERM, in turn at a random moment of a step, at one while a checkpoint is being written, and
anywhere from the program's start on. Which examples a step used is logged by the program; a step's last line counts.
Building of data sets under kills: benchmarks/build_kills.py.
"""

from __future__ import annotations

import json
import os
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

import jax
import numpy as np
import orbax.checkpoint as ocp

from unimat_jax.checkpoint import FOLDER
from unimat_jax.cli import Parser, run_program
from unimat_jax.errors import UserError
from unimat_jax.main import config_path

SETTINGS = {
    "data.dataset": "starter",
    "model.base_channels": 8,
    "model.channel_multipliers": (1, 2),
    "train.batch_size": 16,
    "train.eval_examples": 32,
    "train.log_every": 1,
    "train.checkpoint_every": 5,
    "train.eval_every": 10_000,
    "train.log_batches": True,
}
MOMENTS = ("a step", "a save", "anywhere")


class Run:
    """The training program on one workdir, started as often as it must be."""

    def __init__(self, workdir: Path, arguments: Sequence[str], devices: int):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        self._command = [sys.executable, "-m", "unimat_jax.main", f"--workdir={workdir}", *arguments]
        self._env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as file:
            return subprocess.Popen(self._command, stdout=file, stderr=subprocess.STDOUT, env=self._env)

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.workdir / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def is_saving(self) -> bool:
        return any((self.workdir / FOLDER).glob("*.orbax-checkpoint-tmp*"))


def kill_once(run: Run, how: signal.Signals, moment: str, draw: random.Random, longest: float) -> dict[str, Any] | None:
    """Starts the run and kills it; None where it ended before."""
    before = len(run.rows("batches_0.jsonl"))
    child, begin = run.start(), time.monotonic()
    delay = draw.uniform(0.0, longest)
    while child.poll() is None:
        started = len(run.rows("batches_0.jsonl")) > before
        if moment == "anywhere" and time.monotonic() - begin > delay:
            break
        if moment == "a step" and started:
            time.sleep(draw.uniform(0.0, 2.0))
            break
        if moment == "a save" and started and run.is_saving:
            break
        time.sleep(0.002)
    saving, seconds = run.is_saving, time.monotonic() - begin
    if child.poll() is None:
        child.send_signal(how)
    code = child.wait()
    if code not in (0, -signal.SIGKILL, -signal.SIGTERM):
        raise UserError(f"the run ended with exit code {code}: see {run.log}")
    if code == 0 and how == signal.SIGKILL:
        return None
    steps = [row["step"] for row in run.rows("batches_0.jsonl")]
    return {
        "signal": how.name, "moment": moment, "was_saving": saving, "seconds_after_start": round(seconds, 2),
        "exit_code": code, "steps_begun": max(steps, default=0), "half_written_left": run.is_saving,
    }  # fmt: skip


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint as it lies on disk, by its path; devices that are not here may have written it."""
    items = {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for item in ("params", "ema_params", "optimizer"):
            path = (workdir / FOLDER / str(step) / item).absolute()
            tree = checkpointer.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            items[item] = checkpointer.restore(path, restore_args=as_numpy)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(items)}


def compared(killed: Run, straight: Run, num_steps: int) -> dict[str, Any]:
    """Raises UserError where anything differs."""
    ours, theirs = (arrays(run.workdir, num_steps) for run in (killed, straight))
    differing = [name for name in theirs if name not in ours or ours[name].tobytes() != theirs[name].tobytes()]
    sequences = [{row["step"]: row["index"] for row in run.rows("batches_0.jsonl")} for run in (killed, straight)]
    losses = [
        {row["step"]: row["train/loss"] for row in run.rows("metrics.jsonl") if "train/loss" in row}
        for run in (killed, straight)
    ]
    result = {
        "arrays": len(theirs),
        "arrays_that_differ": len(differing),
        "numbers": sum(array.size for array in theirs.values()),
        "steps": num_steps,
        "steps_with_other_examples": sum(sequences[0].get(s) != sequences[1][s] for s in range(1, num_steps + 1)),
        "steps_with_another_loss": sum(losses[0].get(s) != losses[1][s] for s in range(1, num_steps + 1)),
        "steps_begun_in_all": len(killed.rows("batches_0.jsonl")),
        "num_examples": sum(map(len, sequences[1].values())),
    }
    if differing or result["steps_with_other_examples"] or result["steps_with_another_loss"]:
        raise UserError(f"the runs differ: {json.dumps(result)}; first array {differing[:1]}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.kills", description=__doc__)
    p.add_argument("--config", default="perov_5")
    p.add_argument("--data_dir", required=True, help="with the data set starter, as the quickstart makes it")
    p.add_argument("--kills", type=int, default=30)
    p.add_argument("--num_steps", type=int, default=300)
    p.add_argument("--devices", type=int, default=2)
    p.add_argument("--longest", type=float, default=20.0, help="seconds after the start for a kill 'anywhere'")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workdir", type=Path, required=True)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/kills"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    settings = SETTINGS | {"train.num_steps": arguments.num_steps}
    flags = [
        f"--config={config_path(arguments.config)}",
        f"--config.data.data_dir={arguments.data_dir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]
    shutil.rmtree(arguments.workdir, ignore_errors=True)
    arguments.workdir.mkdir(parents=True)
    straight, killed = (Run(arguments.workdir / n, flags, arguments.devices) for n in ("straight", "killed"))
    if straight.start().wait():
        raise UserError(f"the undisturbed run failed: see {straight.log}")

    draw, kills = random.Random(arguments.seed), []
    while len(kills) < arguments.kills:
        how = draw.choice((signal.SIGKILL, signal.SIGTERM))
        kill = kill_once(killed, how, MOMENTS[len(kills) % 3], draw, arguments.longest)
        if kill is None:
            break
        kills.append(kill)
        print(json.dumps(kill), file=sys.stderr, flush=True)
        if (killed.workdir / FOLDER / str(arguments.num_steps)).exists():
            break
    if killed.start().wait():
        raise UserError(f"the killed run failed in the end: see {killed.log}")
    result = {
        "kills": len(kills),
        "by_signal": dict(Counter(k["signal"] for k in kills)),
        "while_a_checkpoint_was_written": sum(k["was_saving"] for k in kills),
        "before_the_first_step": sum(k["steps_begun"] == 0 for k in kills),
        **compared(killed, straight, arguments.num_steps),
        "settings": {k: str(v) for k, v in settings.items()},
        "devices": arguments.devices,
        "seed": arguments.seed,
        "each": kills,
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "each"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
