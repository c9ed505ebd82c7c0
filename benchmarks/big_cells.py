"""What cells of up to 500 atoms cost: slots with and without `model.neighbours`, and the U-Net; and data to train on.

python -m benchmarks.big_cells --source=$UNIMAT_DATA/starter_source/flla_le20.npz
python -m benchmarks.big_cells --source=... --write=cells.extxyz        supercells for `unimat prepare`
python -m benchmarks.big_cells --source=cells.extxyz --sampled=out      distances and order of what was generated

Supercells are those of real elements and binary compounds, as near to cubes as whole multiples make them. Of each size
the one with the most atoms of one element is measured (255 is the most that a record holds), one crystal a step, on the
first device that jax finds. The U-Net is not run: its operations are counted, and with --compile_unet its memory is the
compiler's. Exponents are slopes of log cost against log atoms, over the three largest sizes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase.neighborlist import neighbor_list

from benchmarks.fingerprints import commit, machine
from unimat_jax import sharding
from unimat_jax.assembly import abstract_batch, assemble, sampler_program
from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.geometry import shells
from unimat_jax.flops import step_cost
from unimat_jax.main import config_path, load_config
from unimat_jax.representation import UniMatSpec, batch_records, encode, model_inputs
from unimat_jax.structure_files import read_structures

SIZES = (20, 50, 100, 200, 350, 500)
MOST_OF_ONE = 255
SAMPLER_STEPS = 4
LONGEST_WAVE = 5.0
"""Largest wave vector of `reflection`, 1/Angstrom."""
SLOTS = {"model.width": 64, "model.depth": 3, "model.heads": 4, "model.pair_width": 32, "composition.width": 0}
UNET = {"model.base_channels": 32, "model.num_res_blocks": 1, "model.attention_resolutions": (3, 9)}
VARIANTS = {
    "neighbours": ("perov_5_slots", {**SLOTS, "model.neighbours": 32}),
    "all_pairs": ("perov_5_slots", {**SLOTS, "model.remat": True}),
    "unet": ("unimat", UNET),
}
COSTS = (
    "train_s",
    "train_processor_s",
    "sample_step_s",
    "sample_step_processor_s",
    "flops",
    "xla_flops",
    "temporaries_bytes",
)


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.big_cells", description=__doc__)
    p.add_argument("--source", required=True, help="crystal files")
    p.add_argument("--write", type=Path, help="an extxyz file of supercells of 100 to 500 atoms; nothing is measured")
    p.add_argument("--number", type=int, default=400, help="with --write")
    p.add_argument("--sampled", type=Path, help="an output directory of unimat generate; nothing else is measured")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    p.add_argument("--compile_unet", type=int, nargs="*", default=(), help="sizes at which it is compiled")
    p.add_argument("--output", type=Path, default=Path("benchmarks/big_cells/costs.json"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    crystals = [c for c in read_structures(arguments.source) if isinstance(c, Crystal)]
    if arguments.write:
        arguments.write.write_text("".join(c.to_extxyz() for c in training_cells(crystals, arguments.number)))
        return 0
    result: dict[str, Any] = {"commit": commit(), "machine": machine()}
    if arguments.sampled:
        sampled = [c for c in read_structures(arguments.sampled) if isinstance(c, Crystal)]
        result |= {"sampled": distances(sampled), "source": distances(crystals[: len(sampled) * 10])}
    else:
        result |= {"device": jax.devices()[0].device_kind, "versions": {n: version(n) for n in ("jax", "flax")}}
        result |= {"settings": VARIANTS, "sampler_steps": SAMPLER_STEPS, "rows": []}
        for size in arguments.sizes:
            crystal = big_cell(crystals, size)
            for name in VARIANTS:
                result["rows"].append(measure(name, crystal, arguments.rounds, size in arguments.compile_unet))
                print(json.dumps(result["rows"][-1]), flush=True)
                result["exponents"] = exponents(result["rows"])
                write(arguments.output, result)
    write(arguments.output, result)
    print(json.dumps(result.get("exponents", result), indent=1))
    return 0


def write(path: Path, result: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def supercell(crystal: Crystal, size: int) -> Crystal:
    """Its largest supercell of at most `size` atoms among those grown along the shortest axis, one by one."""
    times = np.ones(3, int)
    while True:
        more = times + (np.arange(3) == np.argmin(times * crystal.lengths))
        if more.prod() * crystal.num_atoms > size:
            break
        times = more
    shifts = np.stack(np.meshgrid(*map(np.arange, times), indexing="ij"), -1).reshape(-1, 1, 3)
    frac = ((crystal.frac_coords + shifts) / times).reshape(-1, 3)
    numbers = np.tile(crystal.atomic_numbers, len(shifts))
    uid = f"{crystal.uid}_{'x'.join(map(str, times))}"
    return Crystal.create(numbers, frac, crystal.lattice * times[:, None], uid)


def most_of_one(crystal: Crystal) -> int:
    """Atoms of its most frequent element: L."""
    return max(Counter(crystal.atomic_numbers.tolist()).values())


def simple(crystals: Sequence[Crystal]) -> Iterator[Crystal]:
    """Elements and binary compounds of at most 8 atoms."""
    return (c for c in crystals if c.num_atoms <= 8 and len(set(c.atomic_numbers.tolist())) <= 2)


def big_cell(crystals: Sequence[Crystal], size: int) -> Crystal:
    """The supercell nearest to `size` atoms, of those as near the one with the largest L that a record holds."""
    cells = [c for c in (supercell(c, size) for c in simple(crystals)) if most_of_one(c) <= MOST_OF_ONE]
    if not cells:
        raise UserError("--source has no element or binary compound of at most 8 atoms")
    return max(cells, key=lambda c: (c.num_atoms, most_of_one(c)))


def training_cells(crystals: Sequence[Crystal], number: int) -> Iterator[Crystal]:
    """So many supercells of 100 to 500 atoms, their sizes even in that range, of crystals in a fixed random order."""
    rng = np.random.default_rng(0)
    chosen = list(simple(crystals))
    while number:
        for i in rng.permutation(len(chosen)):
            cell = supercell(chosen[i], int(rng.integers(120, 501)))
            if number and cell.num_atoms >= 100 and most_of_one(cell) <= MOST_OF_ONE:
                number -= 1
                yield cell


def measure(name: str, crystal: Crystal, rounds: int, compile_unet: bool) -> dict[str, Any]:
    """One row: of a variant on one crystal."""
    file, changes = VARIANTS[name]
    flags = [f"--config.{field}={value}" for field, value in changes.items()]
    flags += ["--config.train.batch_size=1", "--config.sample.method=ddim"]
    config, _, _ = load_config([f"--config={config_path(file)}", "--workdir=unused", *flags])
    spec = UniMatSpec(max_atoms_per_element=most_of_one(crystal), max_atoms=crystal.num_atoms)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    run = assemble(config, spec, [], mesh)
    key = jax.random.key(0)
    cost = step_cost(run.train_step, run.abstract_state, abstract_batch(spec, 0, 1), key)
    row = {
        "variant": name, "crystal": crystal.uid, "formula": crystal.formula, "atoms": crystal.num_atoms,
        "max_atoms_per_element": spec.max_atoms_per_element, "parameters": cost.num_params,
        "flops": cost.train_flops_per_crystal,
    }  # fmt: skip
    if name == "unet" and not compile_unet:
        return row
    begin = time.perf_counter()
    step = run.train_step.lower(run.abstract_state, abstract_batch(spec, 0, 1), key).compile()
    row["compile_s"] = round(time.perf_counter() - begin, 1)
    row["xla_flops"] = step.cost_analysis()["flops"]
    row["temporaries_bytes"] = step.memory_analysis().temp_size_in_bytes
    if name == "unet":
        return row
    batch = model_inputs(batch_records([encode(crystal, spec)], spec.max_atoms), spec)
    batch |= {"properties": np.zeros((1, 0), np.float32), "index": np.zeros(1, np.int32)}
    batch = jax.tree.map(jnp.asarray, batch)
    state = run.init()

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, batch, key)
        return metrics

    row["train_s"], row["train_processor_s"] = seconds_of(train, rounds)
    if not np.isfinite(train()["train/loss"]):
        raise FloatingPointError(f"{crystal.uid}: the loss of {name} is no number")
    program = sampler_program(run.objective, mesh, **{**config.sample, "num_steps": SAMPLER_STEPS})
    arrays = {"slot": batch["slot"], "properties": batch["properties"], "indices": batch["index"]}
    pair = seconds_of(lambda: program(state.ema_params, key, arrays), rounds)
    row["sample_step_s"], row["sample_step_processor_s"] = (seconds / SAMPLER_STEPS for seconds in pair)
    return row


def seconds_of(run: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds by the clock and of the processor (which other work disturbs less), after a run that is not
    counted."""
    jax.block_until_ready(run())
    clock, processor = [], []
    for _ in range(rounds):
        begin = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        clock.append(time.perf_counter() - begin[0])
        processor.append(time.process_time() - begin[1])
    return statistics.median(clock), statistics.median(processor)


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each variant and cost the slope over its three largest sizes."""
    result: dict[str, dict[str, float]] = {}
    for name in VARIANTS:
        for cost in COSTS:
            points = sorted((row["atoms"], row[cost]) for row in rows if row["variant"] == name and cost in row)
            if len(points) > 2:
                atoms, costs = np.log(np.array(points[-3:], float)).T
                slope = np.polyfit(atoms, costs, 1)[0]
                result.setdefault(name, {})[cost] = round(float(slope), 2)
    return result


def meets_another_element(crystal: Crystal) -> np.ndarray:
    """Whether the nearest atom of each is of another element; of atoms that have one within 6 Angstrom."""
    atom, other, distance = neighbor_list("ijd", crystal.to_ase(), 6.0)
    order = np.lexsort((distance, atom))
    first = order[np.unique(atom[order], return_index=True)[1]]
    return crystal.atomic_numbers[atom[first]] != crystal.atomic_numbers[other[first]]


def reflection(crystal: Crystal) -> float:
    """Its strongest reflection beyond 1.26 Angstrom, every atom scattering alike: |S(k)|^2 / N^2, at most 1. Of atoms
    without order the largest of some thousand exponential numbers of mean 1 / N."""
    reciprocal = 2 * np.pi * np.linalg.inv(crystal.lattice).T
    most = np.ceil(LONGEST_WAVE * crystal.lengths / (2 * np.pi)).astype(int)
    axes = [np.arange(-n, n + 1) for n in most]
    x, y, z = (np.exp(2j * np.pi * np.outer(h, at)) for h, at in zip(axes, crystal.frac_coords.T, strict=True))
    strength = np.abs((x[:, None] * y).reshape(-1, crystal.num_atoms) @ z.T / crystal.num_atoms) ** 2
    wave = np.linalg.norm(np.stack(np.meshgrid(*axes, indexing="ij"), -1) @ reciprocal, axis=-1)
    return float(strength.ravel()[(wave.ravel() > 0) & (wave.ravel() <= LONGEST_WAVE)].max())


def distances(crystals: Sequence[Crystal]) -> dict[str, Any]:
    """Percentiles of the distance from an atom to its nearest one (Angstrom), how often that one is of another element
    (compounds alone), volumes, and how ordered each is as a whole: its strongest reflection; over all crystals."""
    nearest = [shells(c).nearest for c in crystals]
    met = [meets_another_element(c) for c in crystals if len(set(c.atomic_numbers.tolist())) > 1]
    levels = (0, 5, 50, 95)
    return {
        "crystals": len(crystals), "atoms": [min(map(len, nearest)), max(map(len, nearest))],
        "nearest_percentiles": dict(zip(map(str, levels), np.percentile(np.concatenate(nearest), levels), strict=True)),
        "share_below_1A": float((np.concatenate(nearest) < 1).mean()),
        "nearest_is_of_another_element": float(np.concatenate(met).mean()) if met else None,
        "reflection_quartiles": np.percentile(list(map(reflection, crystals)), (0, 25, 50, 75, 100)).round(3).tolist(),
        "volume_per_atom": statistics.median(c.volume / c.num_atoms for c in crystals),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
