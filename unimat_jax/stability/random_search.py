"""Random "sensible" structures (AIRSS: Pickard and Needs 2011, doi:10.1088/0953-8984/23/5/053201), for a baseline.

The volume is drawn from 0.4 to 1.2 times what the composition is estimated to take, no two atoms are nearer than a part
of the sum of their covalent radii, and cells with 2, 3 and 4 symmetry operations take turns with those of none: ase-ga
makes the latter, pyxtal the others. Soft spheres then push the atoms apart, in calls that count in the budget.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.errors import UserError
from unimat_jax.evaluation.pool import Failure, map_isolated
from unimat_jax.stability.atomic_volumes import estimated_volume
from unimat_jax.stability.soft_sphere import Distances, spread
from unimat_jax.structure_files import GENERATED, MANIFEST

VOLUME_RANGE = (0.4, 1.2)
"""Of the estimated volume; the paper's."""
OPERATIONS = (1, 2, 3, 4)
"""Symmetry operations of a cell; candidate i has number i modulo their number."""
GROUPS = {2: range(2, 10), 3: range(143, 147), 4: [*range(10, 47), *range(75, 83)]}
"""Space groups with so many operations beside translations."""
MIN_RATIO, SOFT_RATIO = 0.7, 0.9
"""Of the sum of the covalent radii: the nearest that atoms are placed, and the diameter of the soft spheres."""
LENGTHS, ANGLES = (0.5, 2.0), (45.0, 135.0)
"""Of V^(1/3), and degrees: cells outside are no sensible ones."""
ATTEMPTS = 100
"""For a candidate with its symmetry; then as many without."""
PLACEMENTS = 200
"""Random positions that ase-ga tries in one attempt."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """One candidate to make. counts: atoms of each element in the cell; index: of the candidate of its composition,
    which with `seed` and the composition decides everything. soft_sphere: "fixed", "variable" (cell) or "none"."""

    counts: tuple[tuple[int, int], ...]
    index: int
    seed: int
    soft_sphere: str = "fixed"
    max_soft_calls: int = 20


@dataclasses.dataclass(frozen=True)
class Drawn:
    """crystal: None where no attempt succeeded. failures: attempts by reason. raw_volume_fraction: of the estimate."""

    crystal: Crystal | None
    operations: int
    space_group: int
    volume_fraction: float
    attempts: int
    failures: dict[str, int]
    soft_calls: int
    soft_converged: bool
    cpu_seconds: float
    soft_cpu_seconds: float


def draw(task: Draw) -> Drawn:
    """The candidate, the same each time."""
    begin = time.process_time()
    key = [task.seed, task.index, *(number for pair in task.counts for number in pair)]
    rng = np.random.default_rng(key)
    counts = dict(task.counts)
    fraction = float(rng.uniform(*VOLUME_RANGE))
    volume = fraction * estimated_volume(counts)
    wanted = OPERATIONS[task.index % len(OPERATIONS)]
    # In a cell of less than the estimated volume all distances shrink alike.
    closest = pair_distances(counts, MIN_RATIO * min(1.0, fraction ** (1 / 3)))
    failures: Counter[str] = Counter()
    found, group, attempt = None, 1, 0
    for attempt in range(1, 2 * ATTEMPTS + 1):
        operations = wanted if attempt <= ATTEMPTS else 1
        group = int(rng.choice(GROUPS[operations])) if operations > 1 else 1
        try:
            found = _symmetric(counts, group, volume, rng) if operations > 1 else _without(counts, volume, closest, rng)
            check_sensible(found, counts, closest)
            break
        except CrystalError as error:
            found = None
            failures[error.reason] += 1
    done = time.process_time()
    if found is None:
        return Drawn(None, wanted, group, fraction, attempt, dict(failures), 0, False, round(done - begin, 4), 0.0)
    budget = 0 if task.soft_sphere == "none" else task.max_soft_calls
    spheres = pair_distances(counts, SOFT_RATIO)
    after = spread(found.to_ase(), spheres, max_force_calls=budget, variable_cell=task.soft_sphere == "variable")
    crystal = Crystal.from_ase(after.atoms)
    return Drawn(
        crystal, 1 if group == 1 else wanted, group, fraction, attempt, dict(failures), after.force_calls,
        after.converged, round(done - begin, 4), round(time.process_time() - done, 4),
    )  # fmt: skip


def pair_distances(counts: Mapping[int, int], ratio: float) -> Distances:
    """`ratio` times the sum of the covalent radii of each pair of elements (Cordero et al. 2008, as ASE has them)."""
    from ase.data import covalent_radii

    return {(a, b): ratio * float(covalent_radii[a] + covalent_radii[b]) for a in counts for b in counts}


def check_sensible(crystal: Crystal, counts: Mapping[int, int], closest: Distances) -> None:
    """Raises CrystalError (`wrong_composition`, `too_close`, `cell_shape`) for what is no sensible structure."""
    from ase.neighborlist import neighbor_list

    if Counter(crystal.atomic_numbers.tolist()) != Counter(counts):
        raise CrystalError("wrong_composition", f"{crystal.formula} is not what was asked for")
    lengths = crystal.lengths / crystal.volume ** (1 / 3)
    angles = crystal.angles
    if lengths.min() < LENGTHS[0] or lengths.max() > LENGTHS[1] or angles.min() < ANGLES[0] or angles.max() > ANGLES[1]:
        raise CrystalError("cell_shape", f"a cell of {crystal.lengths.round(2)} A and {crystal.angles.round(1)} degrees")
    if len(neighbor_list("i", crystal.to_ase(), dict(closest))):
        raise CrystalError("too_close", "two atoms are too close")


def _without(counts: Mapping[int, int], volume: float, closest: Distances, rng: np.random.Generator) -> Crystal:
    """By ase-ga, without symmetry."""
    from ase import Atoms
    from ase_ga.startgenerator import StartGenerator
    from ase_ga.utilities import CellBounds

    edge = volume ** (1 / 3)
    length = [LENGTHS[0] * edge, LENGTHS[1] * edge]
    bounds = {**dict.fromkeys(("a", "b", "c"), length), **dict.fromkeys(("alpha", "beta", "gamma"), list(ANGLES))}
    make = StartGenerator(
        Atoms(pbc=True), list(counts.items()), dict(closest), number_of_variable_cell_vectors=3, box_volume=volume,
        box_to_place_in=[np.zeros(3), np.zeros((3, 3))], cellbounds=CellBounds(bounds), test_too_far=False, rng=rng,
    )  # fmt: skip
    atoms: Any = make.get_new_candidate(maxiter=PLACEMENTS)
    if atoms is None:
        raise CrystalError("no_room", f"no random positions in {volume:.1f} A^3 keep their distances")
    return Crystal.from_ase(atoms)


def _symmetric(counts: Mapping[int, int], group: int, volume: float, rng: np.random.Generator) -> Crystal:
    """By pyxtal, in a primitive cell of a space group, scaled to the volume."""
    from pyxtal import pyxtal
    from pyxtal.msg import Comp_CompatibilityError, VolumeError

    from unimat_jax.periodic_table import SYMBOLS

    crystal = pyxtal()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it tries other volumes
            crystal.from_random(
                3, group, [SYMBOLS[z] for z in counts], list(counts.values()), conventional=False, max_count=1,
                random_state=rng,
            )  # fmt: skip
    except Comp_CompatibilityError as error:
        raise CrystalError("composition_does_not_fit_group", str(error)) from error
    except (VolumeError, RuntimeError) as error:
        raise CrystalError("pyxtal_found_none", str(error)) from error
    if not crystal.valid:
        raise CrystalError("pyxtal_found_none", "no positions found")
    found = Crystal.from_ase(crystal.to_ase()).primitive()
    scale = (volume / found.volume) ** (1 / 3)
    return Crystal.create(found.atomic_numbers, found.frac_coords, found.lattice * scale)


def generate(
    wanted: Sequence[tuple[Mapping[int, int], str]],
    candidates: int,
    output_dir: Path,
    *,
    seed: int,
    soft_sphere: str,
    max_soft_calls: int,
    num_workers: int | None,
    timeout_s: float,
) -> dict[str, Any]:
    """Writes the candidates of each (counts, uid of a known crystal) into `output_dir` as `unimat generate` does, with
    failures in the manifest, and returns what it took.

    Raises UserError where the extra is not installed or an element has no volume.
    """
    for package in ("ase_ga", "pyxtal"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"random structures need {package}: pip install 'unimat-jax[search]'")
    tasks, references = [], []
    for counts, uid in wanted:
        estimated_volume(counts)
        pairs = tuple(sorted(counts.items()))
        tasks += [Draw(pairs, i, seed, soft_sphere, max_soft_calls) for i in range(candidates)]
        references += [uid] * candidates
    begin = time.monotonic()
    frames, rows = [], []
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    found = map_isolated(draw, tasks, num_workers=num_workers, timeout_s=timeout_s, progress="random structures")
    for index, (task, drawn) in enumerate(zip(tasks, found, strict=True)):
        row: dict[str, Any] = {"uid": f"rss_{index:06d}", "index": index, "seed": seed, "candidate": task.index,
                               "reference_uid": references[index]}  # fmt: skip
        if isinstance(drawn, Failure):
            rows.append({**row, "status": drawn.reason, "message": drawn.message})
            continue
        values = dataclasses.asdict(dataclasses.replace(drawn, crystal=None))
        values.pop("crystal")
        if drawn.crystal is None:
            message = f"no sensible structure in {drawn.attempts} attempts: {drawn.failures}"
            rows.append({**row, "status": "no_random_structure", "message": message, **values})
            continue
        crystal = dataclasses.replace(drawn.crystal, uid=row["uid"])
        rows.append({**row, "status": "ok", "message": "", "formula": crystal.formula, **values})
        frames.append(crystal.to_extxyz())
    (output_dir / GENERATED).write_text("".join(frames), encoding="utf-8")
    (output_dir / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.get("failures", {}))
    return {
        "candidates": len(rows), "made": len(frames), "attempts": sum(row.get("attempts", 0) for row in rows),
        "failed_attempts": dict(reasons.most_common()), "seconds": round(time.monotonic() - begin, 2),
        "cpu_seconds": round(sum(row.get("cpu_seconds", 0.0) for row in rows), 2),
        "soft_cpu_seconds": round(sum(row.get("soft_cpu_seconds", 0.0) for row in rows), 2),
        "soft_calls": sum(row.get("soft_calls", 0) for row in rows),
    }  # fmt: skip
