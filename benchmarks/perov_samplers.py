"""Quality against the sampler's steps, of any checkpoint that takes compositions: one sample a Perov-5 reference.

    python -m benchmarks.perov_samplers --checkpoint=runs/perov_5_slots --reference=perov_5/val.npz --num_samples=500 \
        --settings mean:100 mean:20 ancestral:100 ddim:50 heun:25 --output=benchmarks/perov_slots/samplers.json

A setting is METHOD:STEPS, or METHOD:STEPS:FIELD=VALUE,... with the fields of config.sample; what is not given is the
checkpoint's. The rows are those of perov_unet.py, failures in every
denominator; crystals a second without the first batch, which compiles. No training structure is looked at.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fingerprints import commit, machine
from benchmarks.perov_unet import Sample, measure, read_reference
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError

FIELDS = ("method", "num_steps", "time_power", "mean_below", "noise_below", "corrector_steps", "corrector_below",
          "closest_ratio")  # fmt: skip


def setting_of(text: str) -> dict[str, Any]:
    """Fields of config.sample of "mean:100", "heun:25:time_power=1.5,corrector_steps=1". Raises UserError."""
    method, steps, *rest = [*text.split(":"), "", ""][:3]
    try:
        pairs = [pair.split("=") for pair in rest[0].split(",") if pair]
        numbers = {name: int(value) if name == "corrector_steps" else float(value) for name, value in pairs}
        if numbers.keys() - {*FIELDS[2:]}:
            raise ValueError
        return {"method": method, "num_steps": int(steps), **numbers}
    except ValueError as error:
        raise UserError(
            f"--settings {text}: write METHOD:STEPS, or METHOD:STEPS:time_power=0.5,mean_below=0.3,corrector_steps=1"
        ) from error


def generate(generator: Any, references: Sequence[Crystal], setting: dict[str, Any], batch_size: int, seed: int) -> Any:
    """(samples in the order of the references, crystals a second)."""
    from unimat_jax.requests import Request

    requests = [Request("formula", r.formula, Counter(r.atomic_numbers.tolist())) for r in references]
    settings = generator.settings(batch_size=batch_size, **setting)
    size = settings.batch_size
    next(generator.sample(requests[:size], settings, {}, seed=seed))  # compiles
    begin = time.perf_counter()
    found = [sample for batch in generator.sample(requests, settings, {}, seed=seed) for sample in batch]
    rate = len(found) / (time.perf_counter() - begin) if len(found) % size == 0 else None  # else it compiles again
    return [Sample(r, s.crystal, s.status) for r, s in zip(references, found, strict=True)], rate


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.perov_samplers", description=__doc__)
    p.add_argument("--checkpoint", required=True, type=Path)
    p.add_argument("--reference", required=True, type=Path, help="perov_5/val.npz")
    p.add_argument("--num_samples", type=int, default=500, help="references, drawn by --seed; 0: all")
    p.add_argument("--settings", nargs="+", required=True, metavar="METHOD:STEPS")
    p.add_argument("--batch_size", type=int, default=250)
    p.add_argument("--step", type=int, help="of the checkpoint; default: the latest")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", required=True, type=Path)
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    from unimat_jax.generator import Generator

    chosen = [setting_of(text) for text in arguments.settings]
    references = list(read_reference(arguments.reference).values())
    if 0 < arguments.num_samples < len(references):
        drawn = np.random.default_rng(arguments.seed).choice(len(references), arguments.num_samples, replace=False)
        references = [references[i] for i in np.sort(drawn)]
    generator = Generator(arguments.checkpoint, step=arguments.step)
    result: dict[str, Any] = {
        "checkpoint_step": generator.step, "parameters_hash": generator.params_hash, "seed": arguments.seed,
        "model": generator.description["model"]["name"], "batch_size": arguments.batch_size,
        "commit": commit(), "machine": machine(), "rows": [],
    }  # fmt: skip
    for text, setting in zip(arguments.settings, chosen, strict=True):
        samples, rate = generate(generator, references, setting, arguments.batch_size, arguments.seed)
        used = {k: v for k, v in dataclasses.asdict(generator.settings(**setting)).items() if k in FIELDS}
        row = {**used, **measure(samples, text), "crystals_per_s": rate}
        result["rows"].append(row)
        rmse = "-" if row["rms_dist"] is None else f"{row['rms_dist']:.4f}"
        speed = "" if rate is None else f"  {rate:.0f} crystals/s"
        shares = f"match {100 * row['match_rate']:.1f} %  RMSE {rmse}  min distance {100 * row['min_distance']:.1f} %"
        print(f"{text:>40}  {shares}  failures {row['num_failures']}{speed}", flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
