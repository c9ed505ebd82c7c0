"""Learning curves of a few networks that differ in one thing, trained alike: one study a run, resumable.

python -m benchmarks.learning --study=precision --data_dir=data --workdir=runs/learning

precision: bfloat16 against float32, and seeds of float32 against each other. size: 16, 32 and 64 base channels.
crop: the table cut to the data's rows and columns against the full one. data: 1k, 4k, 16k and all crystals of a set.
Every run is `unimat_jax.main` in workdir/STUDY/VARIANT; what is done is not done again, and --variants trains only
those named (two processes, each pinned to a core, can share a study). The result holds every variant as far as it is.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fingerprints import commit, machine
from benchmarks.perov_unet import Sample, measure, read_reference
from unimat_jax.checkpoint import Checkpoints
from unimat_jax.cli import Parser, run_program
from unimat_jax.errors import UserError
from unimat_jax.generator import Generator
from unimat_jax.main import config_path, load_config
from unimat_jax.train import train

_EVAL = {"train.eval_examples": 512, "train.sample_every": 0}
_NARROW = {"model.channel_multipliers": (1, 2, 4), "train.num_steps": 600, "train.eval_every": 150}
STUDIES: dict[str, dict[str, Any]] = {
    "precision": {
        "config": "perov_5",
        "changes": {"train.num_steps": 500, "train.eval_every": 500, "train.log_every": 5},
        "variants": {
            **{f"float32, seed {seed}": {"train.seed": seed} for seed in range(4)},
            **{f"bfloat16, seed {seed}": {"train.seed": seed, "model.dtype": "bfloat16"} for seed in range(2)},
        },
    },
    "size": {
        "config": "perov_5",
        "changes": _NARROW,
        "variants": {f"{base} channels": {"model.base_channels": base} for base in (16, 32, 64)},
    },
    "crop": {
        "config": "perov_5",
        "changes": _NARROW,
        "variants": {"6 x 17": {"data.table": "data"}, "9 x 18": {"data.table": "full"}},
    },
    "data": {
        "config": "perov_5",
        "changes": {
            "data.dataset": "crystals", "data.random_shift": True, "data.origin_shift": 0.0, "model.base_channels": 8,
            "model.attended_sites": 24, "model.attention_resolutions": (9,), "train.batch_size": 32,
            "train.num_steps": 1500, "train.eval_every": 125, "train.eval_examples": 1024,
        },
        "variants": {
            f"{name} crystals": {"data.max_train_examples": number}
            for name, number in (("1,000", 1000), ("4,000", 4000), ("16,000", 16000), ("all", 0))
        },
    },
}  # fmt: skip
"""Each is a config of configs/ with changes for all of its variants and for each."""

SMOOTH = 10
"""Logged steps whose mean the plotted training loss is."""


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.learning", description=__doc__)
    p.add_argument("--study", required=True, help=", ".join(STUDIES))
    p.add_argument("--variants", help="as in --variants='16 channels;32 channels'; default: all; '' trains none")
    p.add_argument("--data_dir", required=True, help="as unimat prepare made it")
    p.add_argument("--reference", type=Path, help="perov_5/val.npz: also sample each variant, one a composition")
    p.add_argument("--num_samples", type=int, default=200)
    p.add_argument("--num_steps", type=int, help="instead of the study's")
    p.add_argument("--workdir", type=Path, required=True)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/learning"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    if arguments.study not in STUDIES:
        raise UserError(f"--study={arguments.study}: choose from {', '.join(STUDIES)}")
    study = STUDIES[arguments.study]
    named = list(study["variants"]) if arguments.variants is None else arguments.variants.split(";")
    named = [name for name in named if name]
    unknown = sorted(set(named) - set(study["variants"]))
    if unknown:
        raise UserError(f"--variants={unknown[0]}: choose from {'; '.join(study['variants'])}")
    rows: dict[str, Any] = {}
    for name, changes in study["variants"].items():
        workdir = arguments.workdir / arguments.study / name.replace(" ", "_").replace(",", "")
        config = variant_config(study, changes, arguments, workdir)
        if name in named:
            train(config, workdir)
        if not (workdir / "metrics.jsonl").exists():
            continue
        step = Checkpoints(workdir, 1).latest_step or 0
        if name in named and step != config.train.num_steps:
            return 1  # stopped by a signal: what there is is saved
        rows[name] = {"changes": dict(changes), "steps_done": step, **curves(workdir)}
        if arguments.reference and step == config.train.num_steps:
            rows[name]["samples"] = sampled(workdir, arguments.reference, arguments.num_samples)
    result = {
        "study": arguments.study, "config": study["config"], "changes": study["changes"], "commit": commit(),
        "machine": machine(), "variants": rows,
    }  # fmt: skip
    if arguments.study == "precision":
        result["spread"] = spread(rows)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / f"{arguments.study}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, arguments.study, path.with_suffix(".png"))
    print(f"written: {path}, {path.with_suffix('.png').name}")
    return 0


def variant_config(study: Mapping[str, Any], changes: Mapping[str, Any], arguments: Any, workdir: Path) -> Any:
    """The config of one variant: the study's, with the variant's own changes."""
    values = {**_EVAL, **study["changes"], "data.data_dir": arguments.data_dir, **changes}
    if arguments.num_steps:
        values["train.num_steps"] = arguments.num_steps
    values["train.checkpoint_every"] = values["train.num_steps"] // 2
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return load_config([f"--config={config_path(study['config'])}", f"--workdir={workdir}", *flags])[0]


def curves(workdir: Path) -> dict[str, Any]:
    """Training and validation losses by step, of metrics.jsonl: of steps that a resumed run wrote twice the last."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    model = json.loads((workdir / "model.json").read_text())
    found = {
        name: {line["step"]: round(line[key], 5) for line in lines if key in line}
        for name, key in (("train_loss", "train/loss"), ("eval_loss", "eval/loss"), ("eval_x_loss", "eval/x_loss"))
    }
    rate = statistics.median([line["examples_per_sec"] for line in lines if "examples_per_sec" in line])
    return {"num_params": model["num_params"], "median_crystals_per_second": round(rate, 1), **found}


def sampled(workdir: Path, reference: Path, number: int) -> dict[str, Any]:
    """What benchmarks.perov_unet measures on one sample for each of `number` compositions, drawn by seed 0."""
    path = workdir / f"samples_{number}.json"
    if path.exists():
        return json.loads(path.read_text())
    crystals = read_reference(reference)
    chosen = np.random.default_rng(0).choice(sorted(crystals), number, replace=False)
    references = [crystals[uid] for uid in chosen.tolist()]
    formulas = [reference.formula for reference in references]
    samples = list(Generator(workdir).generate(number, formula=formulas, seed=0, num_steps=100, batch_size=50))
    pairs = [Sample(ref, s.crystal, s.status) for ref, s in zip(references, samples, strict=True)]
    result = measure(pairs, str(workdir))
    path.write_text(json.dumps(result))
    return result


def spread(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Mean absolute differences of smoothed training losses, after the first fifth: seeds of float32 against each
    other (the run-to-run spread), and bfloat16 against float32 of the same seed."""
    curve = {name: smoothed(row["train_loss"])[1] for name, row in rows.items()}
    curve = {name: losses[len(losses) // 5 :] for name, losses in curve.items()}

    def difference(a: str, b: str) -> dict[str, float]:
        gap = curve[a] - curve[b]
        return {"mean_absolute": round(float(abs(gap).mean()), 5), "mean": round(float(gap.mean()), 5)}

    full = [name for name in curve if name.startswith("float32")]
    pairs = [(a, b) for i, a in enumerate(full) for b in full[i + 1 :]]
    halves = [(name, name.replace("bfloat16", "float32")) for name in curve if name.startswith("bfloat16")]
    return {f"{a} - {b}": difference(a, b) for a, b in [*pairs, *halves] if b in curve}


def smoothed(losses: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, running means of SMOOTH logged losses)."""
    steps, values = np.array(list(losses)), np.array(list(losses.values()))
    width = min(SMOOTH, len(values))
    means = np.convolve(values, np.ones(width) / width, "valid")
    return steps[len(steps) - len(means) :], means


def draw(rows: Mapping[str, Any], study: str, path: Path) -> None:
    """Training losses (precision) or validation losses by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, row in rows.items():
        if study == "precision":
            steps, losses = smoothed(row["train_loss"])
            style = {"color": "black", "linestyle": ":", "zorder": 3} if name.startswith("bfloat16") else {}
            axes.plot(steps, losses, linewidth=1.4, label=name, **style)
        else:
            found = {step: loss for step, loss in row["eval_loss"].items() if step}
            axes.plot(list(found), list(found.values()), marker="o", markersize=3, linewidth=1.2, label=name)
    what = f"training loss, mean of {SMOOTH} logged steps" if study == "precision" else "validation loss"
    axes.set(xlabel="step", ylabel=what)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
