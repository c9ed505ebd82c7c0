"""Which loss weight of null sites serves unconditional generation best? Equal steps, one network, several weights.

python -m benchmarks.null_weight --data_dir=data --workdir=runs/null_weight --output_dir=benchmarks/null_weight

Trains `configs/perov_5.py` without conditions, once for each weight, then samples unconditionally. Every real crystal
of Perov-5 has 5 atoms, so the share of samples with 5 atoms tells how well occupied and null sites are told apart. The
validation losses are not comparable between weights: each weighs its own.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax

from unimat_jax.cli import Parser, run_program
from unimat_jax.evaluation.validity import check
from unimat_jax.generator import Generator
from unimat_jax.main import config_path, load_config
from unimat_jax.train import train


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.null_weight", description=__doc__)
    p.add_argument("--data_dir", required=True)
    p.add_argument("--workdir", type=Path, required=True)
    p.add_argument("--weights", default="1,0.1,0.01")
    p.add_argument("--num_steps", type=int, default=1000)
    p.add_argument("--num_samples", type=int, default=256)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/null_weight"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    rows = []
    for weight in (float(w) for w in arguments.weights.split(",")):
        workdir = arguments.workdir / f"weight_{weight:g}"
        changes = {
            "data.data_dir": arguments.data_dir, "diffusion.null_weight": weight, "diffusion.counts_share": 0.0,
            "diffusion.elements_share": 0.0, "train.num_steps": arguments.num_steps, "train.sample_every": 0,
            "train.eval_every": arguments.num_steps, "train.eval_examples": 64,
        }  # fmt: skip
        flags = [f"--config.{name}={value}" for name, value in changes.items()]
        config, _, _ = load_config([f"--config={config_path('perov_5')}", f"--workdir={workdir}", *flags])
        train(config, workdir)
        samples = Generator(workdir).generate(arguments.num_samples, seed=0, num_steps=50, batch_size=64)
        crystals = [s.crystal for s in samples if s.crystal]
        share = 1 / len(samples)
        rows.append(
            {
                "null_weight": weight,
                "decoded": len(crystals) * share,
                "five_atoms": sum(c.num_atoms == 5 for c in crystals) * share,
                "struct_valid": sum(check(c).struct_valid for c in crystals) * share,
                "comp_valid": sum(check(c).comp_valid for c in crystals) * share,
                "num_atoms": dict(sorted(Counter(c.num_atoms for c in crystals).items())),
                "failures": dict(Counter(s.status for s in samples if not s.crystal)),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    result = {
        "num_steps": arguments.num_steps, "num_samples": arguments.num_samples, "seed": 0, "rows": rows,
        "device": str(jax.devices()[0].device_kind), "jax": jax.__version__,
    }  # fmt: skip
    path = arguments.output_dir / "null_weight.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
