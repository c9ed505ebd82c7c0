"""The model of compositions alone: minutes of training on a data set, and what 10,000 compositions drawn of it are.

python -m benchmarks.compositions --config=perov_5_slots --data_dir=data --num_steps=3000 --output=compositions.json
python -m benchmarks.compositions --config=perov_5_slots --data_dir=data --checkpoint=perov_5 --min_p 0 0.01
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import wasserstein_distance

from benchmarks.fingerprints import commit, machine
from unimat_jax import assembly, data, sharding
from unimat_jax.cli import Parser, run_program
from unimat_jax.composition_model import CompositionModel
from unimat_jax.errors import UserError
from unimat_jax.evaluation.composition import composition_reason
from unimat_jax.generator import Generator
from unimat_jax.main import config_path, load_config
from unimat_jax.representation import UniMatSpec
from unimat_jax.requests import Request, count_table, counts_of_table
from unimat_jax.train_state import apply_gradients, create_state, make_optimizer, make_schedule
from unimat_jax.train_step import COMPOSITION

DRAWN_AT_A_TIME = 1000
"""Compositions."""
NONMETALS = frozenset((1, 6, 7, 8, 9, 15, 16, 17, 34, 35, 53))


def train(model: CompositionModel, config: Any, batches: data.BatchMaker, num_steps: int) -> tuple[Any, float]:
    """(averaged parameters, seconds)."""
    o = config.optimizer
    schedule = make_schedule(
        num_steps=num_steps, learning_rate=o.learning_rate, schedule=o.schedule, warmup_steps=o.warmup_steps,
        final_factor=o.final_factor,
    )  # fmt: skip
    optimizer = make_optimizer(schedule, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, grad_clip=o.grad_clip)
    key = jax.random.key(config.train.seed)
    state = create_state(lambda: model.network.init(key, *model.init_arguments())["params"], optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, slot):
        def loss(params):
            return model.losses(params, {"slot": slot}, jax.random.fold_in(key, state.step + 1), train=True).mean()

        return apply_gradients(state, jax.grad(loss)(state.params), optimizer, o.ema_decay)

    begin = time.monotonic()
    for i in range(num_steps):
        state = step(state, batches(i)["slot"])
    jax.block_until_ready(state)
    return state.ema_params, time.monotonic() - begin


def log_likelihoods(model: CompositionModel, params: Any, tables: np.ndarray) -> np.ndarray:
    """Exact, of counts [B, P] (nats): the sum over all orders of the elements, through all of their subsets."""
    next_of, count_of, result = jax.jit(model.element_logits), jax.jit(model.count_logits), np.zeros(len(tables))
    sizes = np.asarray(model.size_logits(params))[0]
    for k in np.unique((tables > 0).sum(1)):
        rows = np.flatnonzero((tables > 0).sum(1) == k)
        counts = tables[rows]
        elements = np.argsort(counts == 0, 1, kind="stable")[:, :k]
        number, each = counts.sum(1), np.arange(len(rows))
        reached = np.full((len(rows), 2**k), -np.inf)
        reached[:, 0] = 0.0
        for subset in range(2**k):
            chosen = np.zeros(counts.shape, bool)
            inside = [i for i in range(k) if subset >> i & 1]
            chosen[each[:, None], elements[:, inside]] = True
            logits = np.asarray(next_of(params, chosen, number), np.float64)
            for i in set(range(k)) - set(inside):
                after = subset | 1 << i
                step = reached[:, subset] + logits[each, elements[:, i]]
                reached[:, after] = np.logaddexp(reached[:, after], step)
        total = sizes[number - 1] + reached[:, -1] + logits[:, -1]
        known = np.zeros_like(counts)
        for i in range(k):
            asked = count_of(params, counts > 0, known, number, elements[:, i])
            answer = counts[each, elements[:, i]]
            total = total + np.asarray(asked, np.float64)[each, answer - 1]
            known[each, elements[:, i]] = answer
        result[rows] = total
    return result


def draw(
    model: CompositionModel, params: Any, number: int, seed: int, min_p: float
) -> tuple[list[dict[int, int]], float]:
    """(compositions by atomic number, seconds without compilation)."""
    program = assembly.composition_program(model, sharding.make_mesh(), proposals=1, min_p=min_p)
    conditions = model.conditions([Request("none")] * DRAWN_AT_A_TIME)

    def part(first: int) -> np.ndarray:
        indices = np.arange(first, first + DRAWN_AT_A_TIME, dtype=np.int32)
        return np.asarray(program(params, jax.random.key(seed), {**conditions, "indices": indices}))

    part(0)
    begin = time.monotonic()
    tables = np.concatenate([part(first) for first in range(0, number, DRAWN_AT_A_TIME)])[:number]
    return [counts_of_table(table, model.spec) for table in tables], time.monotonic() - begin


def compositions_of(source: data.RecordSource, spec: UniMatSpec) -> list[dict[int, int]]:
    """Of the crystals that the spec can hold."""
    records = (r for r in source.read(range(len(source))) if data.fits(r, spec))
    return [dict(Counter(data.ATOMIC_NUMBERS[r["slots"][:, 1], r["slots"][:, 2]].tolist())) for r in records]


def tables_of(compositions: list[dict[int, int]], spec: UniMatSpec) -> np.ndarray:
    """Counts [B, P]."""
    return np.stack([count_table(Request("formula", counts=c), spec).ravel() for c in compositions])


def measure(drawn: list, train_set: list, validation: list) -> dict[str, Any]:
    """Shares of the drawn compositions, each draw counted. Unseen nonmetals: no training crystal has the same nonmetal
    atoms, as many of each."""

    def keys(compositions: list[dict[int, int]]) -> list[tuple]:
        return [tuple(sorted(c.items())) for c in compositions]

    def nonmetals(key: tuple) -> tuple:
        return tuple(item for item in key if item[0] in NONMETALS)

    def distance(of: Callable[[dict[int, int]], int]) -> float:
        return float(wasserstein_distance([of(c) for c in drawn], [of(c) for c in validation]))

    ours, seen, held_out = keys(drawn), set(keys(train_set)), set(keys(validation))
    together, anions = seen | held_out, {nonmetals(key) for key in seen}
    return {
        "comp_valid": float(np.mean([not composition_reason(c.items()) for c in drawn])),
        "unique": len(set(ours)) / len(ours),
        "novel_to_train": float(np.mean([key not in seen for key in ours])),
        "novel_to_train_and_validation": float(np.mean([key not in together for key in ours])),
        "in_validation": float(np.mean([key in held_out for key in ours])),
        "unseen_nonmetals": float(np.mean([nonmetals(key) not in anions for key in ours])),
        "num_elements": len({element for c in drawn for element in c}),
        "wasserstein_to_validation": {"num_elements": distance(len), "num_atoms": distance(lambda c: sum(c.values()))},
    }


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.compositions", description=__doc__)
    p.add_argument("--config", default="perov_5_slots")
    p.add_argument("--data_dir", default="data")
    p.add_argument("--checkpoint", help="whose model is measured; none is trained then")
    p.add_argument("--num_steps", type=int, default=3000)
    p.add_argument("--num_samples", type=int, default=10_000)
    p.add_argument("--min_p", type=float, nargs="+", default=[0.0], help="drawn with each (config.sample)")
    p.add_argument("--seed", type=int, default=0, help="of the draws; that of training is the config's")
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--depth", type=int, default=2)
    p.add_argument("--dropout_rate", type=float, default=0.1)
    p.add_argument("--output", help="JSON of what was measured")
    a = p.parse(sys.argv[1:] if argv is None else argv)
    config, _, _ = load_config([f"--config={config_path(a.config)}", "--workdir=unused"])
    directory = data.dataset_directory(config.data.dataset, a.data_dir)
    source, held_out = (data.RecordSource(directory, split) for split in ("train", "validation"))
    if a.checkpoint:
        generator = Generator(a.checkpoint)
        spec, model, settings = generator.spec, generator.composition, {"checkpoint": a.checkpoint}
        if model is None:
            raise UserError(f"--checkpoint={a.checkpoint}: it has no model of compositions")
        params, trained = generator.params[COMPOSITION], {"step": generator.step}
    else:
        settings = {"width": a.width, "depth": a.depth, "dropout_rate": a.dropout_rate}
        spec = data.make_spec(
            data.read_statistics(directory), max_atoms_per_element=config.data.max_atoms_per_element or None,
            table=config.data.table, lattice_form=config.data.lattice_form,
        )  # fmt: skip
        model = assembly.create_composition(settings, spec)
        if model is None:
            raise UserError(f"--width={a.width}: give a whole number above 0")
        size = config.train.batch_size
        none: dict[str, Any] = dict.fromkeys(("shuffle_atoms", "random_shift", "random_axes"), False)
        maker = data.BatchMaker(source, spec, batch_size=size, seed=config.train.seed, augmentation=none)
        params, seconds = train(model, config, maker, a.num_steps)
        trained = {"num_steps": a.num_steps, "batch_size": size, "train_seconds": seconds}
    splits = [compositions_of(split, spec) for split in (source, held_out)]
    losses = [-log_likelihoods(model, params, tables_of(split, spec)).mean() for split in splits]
    draws = []
    for min_p in a.min_p:
        drawn, draw_seconds = draw(model, params, a.num_samples, a.seed, min_p)
        draws.append({"min_p": min_p, "seconds": draw_seconds, **measure(drawn, *splits)})
    result = {
        "config": a.config, "composition": settings, **trained,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "nats": dict(zip(("train", "validation"), losses, strict=True)),
        "num_samples": a.num_samples, "seed": a.seed, "draws": draws,
        "training_split": measure(splits[0], *splits), "validation_split": measure(splits[1], *splits),
        "machine": machine(), "commit": commit(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if a.output:
        Path(a.output).parent.mkdir(parents=True, exist_ok=True)
        Path(a.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
