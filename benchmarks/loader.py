"""How many crystals a second the loader alone gives, against the train step that it feeds, in one run.

python -m benchmarks.loader --config=quickstart --data_dir=runs/quickstart/data --output_dir=benchmarks/loader
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from unimat_jax import data, models
from unimat_jax.assembly import compiler_options, create_objective, init_arguments
from unimat_jax.cli import Parser, run_program
from unimat_jax.main import config_path, load_config
from unimat_jax.train_state import create_state, make_optimizer, make_schedule
from unimat_jax.train_step import train_step


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.loader", description=__doc__)
    p.add_argument("--config", default="quickstart")
    p.add_argument("--data_dir", required=True)
    p.add_argument("--rounds", type=int, default=5, help="pairs of measurements, taken in turn")
    p.add_argument("--batches", type=int, default=100, help="loader batches a round")
    p.add_argument("--steps", type=int, default=10, help="train steps a round")
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/loader"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    config, _, _ = load_config([f"--config={config_path(arguments.config)}", "--workdir=unused"])

    directory = data.dataset_directory(config.data.dataset, arguments.data_dir)
    keys = ("coordinates", "lattice_form", "table")
    spec = data.make_spec(data.read_statistics(directory), **{k: config.data[k] for k in keys})
    switches = ("shuffle_atoms", "random_shift", "origin_shift", "random_axes", "half_turned")
    maker = data.BatchMaker(
        data.RecordSource(directory, "train"), spec, batch_size=config.train.batch_size, seed=0,
        augmentation={name: config.data[name] for name in switches},
    )  # fmt: skip

    network = models.create(config.model.name, **{k: v for k, v in config.model.items() if k != "name"})
    schedule = make_schedule(learning_rate=1e-4, schedule="constant", warmup_steps=1, num_steps=1000, final_factor=1.0)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.99, weight_decay=0.0, grad_clip=1.0)
    variables = init_arguments(spec, 0, config.model.name)
    init = jax.jit(lambda: create_state(lambda: network.init(jax.random.key(0), *variables)["params"], optimizer))
    objective = create_objective(config.model, config.diffusion, spec)
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, ema_decay=0.999)
    jitted = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(jax.default_backend()))
    batch = {name: jnp.asarray(value) for name, value in maker(0).items()}
    state, metrics = jitted(init(), batch, jax.random.key(1))
    jax.block_until_ready(metrics)

    rows = []
    for _ in range(arguments.rounds):
        iterator = data.training_iterator(maker, num_threads=config.data.num_threads, prefetch=config.data.prefetch)
        next(iterator)
        begin = time.perf_counter()
        for _ in range(arguments.batches):
            next(iterator)
        loader = arguments.batches * config.train.batch_size / (time.perf_counter() - begin)
        del iterator
        begin = time.perf_counter()
        for _ in range(arguments.steps):
            state, metrics = jitted(state, batch, jax.random.key(1))
        jax.block_until_ready(metrics)
        training = arguments.steps * config.train.batch_size / (time.perf_counter() - begin)
        rows.append({"loader": loader, "train_step": training, "ratio": loader / training})
        print(f"loader {loader:8.0f} crystals/s   train step {training:6.0f}   ratio {loader / training:5.1f}")
    result = {
        "config": arguments.config, "rounds": rows, "median_ratio": statistics.median(r["ratio"] for r in rows),
        "device": str(jax.devices()[0].device_kind), "jax": jax.__version__,
    }  # fmt: skip
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / f"loader_{arguments.config}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"median ratio {result['median_ratio']:.1f}; written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
