"""The largest batch that fits a slice, and the best mesh for it: few compilations, as each takes minutes.

Memory is close to affine in the batch: two compilations of the first mesh give the line, the state's share of another
mesh is known without one, and what the line predicts is then compiled. Every try is kept as it comes, and a search that
was stopped goes on.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.aot.program import compile_for, tensor_of
from unimat_jax.aot.topology import GIB, Topology, make_devices
from unimat_jax.errors import UserError

RATE = "crystals_per_second_per_chip_nothing_hidden"
"""What the best try has most of: with every collective's time added to the kernels'."""


def find_best(
    config: Any,
    topology: Topology,
    *,
    saved: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
    say: Callable[[str], None] = lambda line: None,
    attempt: Callable[[Any, Topology], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """{"search": what it is of, "tries": [...], "best": the try with the highest rate of crystals that fits, or None}.

    Batches are config.train.microbatches times the chips, doubled; meshes are all divisors of the chips as fsdp. saved:
    an earlier result of the same search, whose tries are not compiled again. save: called after each try. attempt:
    compiles (config, topology) and gives a try; for tests. Raises UserError if `saved` is of another search.
    """
    attempt = attempt or _compile_try
    report = {"search": _identity(config, topology), "tries": [], "best": None}
    if saved:
        if saved.get("search") != json.loads(json.dumps(report["search"])):
            raise UserError("--output holds the report of another search or program: name another file")
        report["tries"] = list(saved["tries"])
    tries = report["tries"]
    unit = topology.num_chips * config.train.microbatches

    def attempt_once(fsdp: int, batch: int) -> dict[str, Any]:
        for known in tries:
            if (known["fsdp"], known["batch_size"]) == (fsdp, batch):
                return known
        say(f"try {len(tries) + 1}: batch {batch}, fsdp {fsdp}: compiling ...")
        changed = copy.deepcopy(config)
        changed.train.fsdp, changed.train.batch_size = fsdp, batch
        found = {"fsdp": fsdp, "batch_size": batch, **attempt(changed, topology)}
        tries.append(found)
        report["best"] = max((t for t in tries if t["fits"]), key=lambda t: t[RATE], default=None)
        save(report)
        say(_row(found))
        return found

    states = {}
    for fsdp in (n for n in range(1, topology.num_chips + 1) if topology.num_chips % n == 0):
        states[fsdp] = state_bytes(config, topology, fsdp)
        if len({t["batch_size"] for t in tries if t["peak"] and not t["partial"]}) < 2:
            for batch in (unit, 2 * unit):
                if not attempt_once(fsdp, batch)["fits"]:
                    break
        batch = predicted_batch(tries, states, fsdp, unit, topology.chip.usable_hbm)
        while batch >= unit and not attempt_once(fsdp, batch)["fits"]:
            batch //= 2
        failed = {t["batch_size"] for t in tries if t["fsdp"] == fsdp and not t["fits"]}
        while batch >= unit and 2 * batch not in failed:
            if predicted_batch(tries, states, fsdp, unit, topology.chip.usable_hbm) <= batch:
                break
            batch *= 2
            if not attempt_once(fsdp, batch)["fits"]:
                break
    report["best"] = max((t for t in tries if t["fits"]), key=lambda t: t[RATE], default=None)
    save(report)
    return report


def predicted_batch(
    tries: Sequence[dict[str, Any]], states: dict[int, int], fsdp: int, unit: int, capacity: int
) -> int:
    """The largest unit * 2^k that the line through the two largest tries (of this mesh, else of any one mesh, moved by
    the difference in state) keeps within `capacity`; `unit` without a line."""
    for mesh in (fsdp, *sorted(states, reverse=True)):
        points = sorted({t["batch_size"]: t["peak"] for t in tries if t["fsdp"] == mesh and not t["partial"]}.items())
        if len(points) > 1:
            (low, low_peak), (high, high_peak) = points[-2:]
            slope = max((high_peak - low_peak) / (high - low), 1e-9)
            spare = capacity - high_peak + states[mesh] - states[fsdp]
            largest = high + spare / slope
            return unit * 2 ** math.floor(math.log2(largest / unit)) if largest >= unit else 0
    return unit


def state_bytes(config: Any, topology: Topology, fsdp: int) -> int:
    """Bytes of the training state on one chip of a mesh. Nothing is compiled."""
    import jax

    from unimat_jax import sharding
    from unimat_jax.assembly import assemble

    mesh = sharding.make_mesh(fsdp, make_devices(topology))
    changed = copy.deepcopy(config)
    changed.train.batch_size = topology.num_chips * changed.train.microbatches
    spec, schema, _ = tensor_of(config)
    run = assemble(changed, spec, schema, mesh)
    leaves = zip(jax.tree.leaves(run.shapes), jax.tree.leaves(run.shardings), strict=True)
    return sum(math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, placed in leaves)


def read_saved(path: Path | None) -> dict[str, Any] | None:
    """The report of an earlier search. Raises UserError if the file holds something else."""
    if path is None or not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        return {"search": saved["search"], "tries": saved["tries"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output = {path}: the file there is no search's report: name another file") from error


def as_text(report: dict[str, Any]) -> str:
    """A table of the tries, the best last."""
    lines = [_row(None), *map(_row, sorted(report["tries"], key=lambda t: (t["fsdp"], t["batch_size"])))]
    best = report["best"]
    if best is None:
        return "\n".join([*lines, "nothing fits: raise train.microbatches, set model.remat, or take a larger slice"])
    return "\n".join(
        [*lines, f"best: --config.train.batch_size={best['batch_size']} --config.train.fsdp={best['fsdp']}"]
    )


def _row(found: dict[str, Any] | None) -> str:
    if found is None:
        head = f"{'batch':>8} {'fsdp':>5} {'peak GiB':>9} {'of':>6}  fits"
        return f"{head}  {'optimal s':>10} {'links s':>8} crystals/s/chip"
    memory = f"{found['peak'] / GIB:>9.2f} {found['capacity'] / GIB:>6.2f}  {'yes' if found['fits'] else 'no':<4}"
    start = f"{found['batch_size']:>8} {found['fsdp']:>5} {memory}"
    if "optimal_seconds" not in found:
        return start
    return f"{start}  {found['optimal_seconds']:>10.4g} {found['collective_seconds']:>8.2g} {found[RATE]:>15.4g}"


def _compile_try(config: Any, topology: Topology) -> dict[str, Any]:
    program = compile_for(config, topology, programs=("train_step",), count=False)["programs"]["train_step"]
    memory = program["memory"]
    found = {name: memory[name] for name in ("fits", "peak", "capacity", "partial")}
    names = ("optimal_seconds", "collective_seconds", RATE, "compile_seconds")
    return found | {name: program[name] for name in names if name in program}


def _identity(config: Any, topology: Topology) -> dict[str, Any]:
    """What a search depends on."""
    settings = config.to_dict()
    for name in ("batch_size", "fsdp"):
        del settings["train"][name]
    settings.pop("sample")
    return {"topology": topology.name, "config": settings}
