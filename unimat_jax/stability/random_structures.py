"""One random "sensible" structure, as of AIRSS (Pickard and Needs 2011, doi:10.1088/0953-8984/23/5/053201).

The volume is drawn from 0.4 to 1.2 times what the composition is estimated to take, no two atoms are nearer than a part
of the sum of their covalent radii, and cells with 2, 3 and 4 symmetry operations take turns with those of none: ase-ga
makes the latter, pyxtal the others. Soft spheres then push the atoms apart, in force calls that are counted.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.periodic_table import SYMBOLS
from unimat_jax.stability import buildcell
from unimat_jax.stability.atomic_volumes import estimated_volume

if TYPE_CHECKING:
    from unimat_jax.stability.soft_sphere import Distances

VOLUME_RANGE = (0.4, 1.2)
"""Of the estimated volume; the paper's."""
OPERATIONS = (1, 2, 3, 4)
"""Symmetry operations of a cell; candidate i of a composition has number i modulo their number."""
GROUPS = {2: range(2, 10), 3: range(143, 147), 4: [*range(10, 47), *range(75, 83)]}
"""Space groups with so many operations beside translations."""
MIN_RATIO, SOFT_RATIO = 0.7, 0.9
"""Of the sum of the covalent radii: the nearest that atoms are placed, and the diameter of the soft spheres."""
LENGTHS, ANGLES = (0.5, 2.0), (45.0, 135.0)
"""Of V^(1/3), and degrees: other cells are no sensible ones."""
ATTEMPTS = 100
"""For a candidate with its symmetry; then as many without."""
PLACEMENTS = 200
"""Random positions that ase-ga tries in one attempt."""
GENERATORS = ("ase_pyxtal", buildcell.COMMAND)


@dataclasses.dataclass(frozen=True)
class Draw:
    """One candidate to make. counts: (atomic number, atoms in the cell) of each element; index: of the candidate among
    those of its composition, which with `seed` and the composition decides everything (but what buildcell does).

    soft_sphere: "fixed" or "variable" cell, or "none"; max_soft_calls: its budget; generator: one of GENERATORS.
    """

    counts: tuple[tuple[int, int], ...]
    index: int
    seed: int
    soft_sphere: str = "fixed"
    max_soft_calls: int = 20
    generator: str = GENERATORS[0]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """crystal: None where no attempt succeeded. operations: symmetry operations that it has, 1 where the asked ones
    fit in no attempt; space_group: that was drawn (0: by buildcell); volume_fraction: of the estimate, before
    soft spheres moved the cell; failures: attempts by reason. cpu_seconds: of all attempts, soft_cpu_seconds: after
    them."""

    crystal: Crystal | None
    asked_operations: int
    operations: int
    space_group: int
    volume_fraction: float
    attempts: int
    failures: dict[str, int]
    cpu_seconds: float
    soft_calls: int = 0
    soft_converged: bool = False
    soft_cpu_seconds: float = 0.0


def draw(task: Draw) -> Drawn:
    """The candidate, the same each time. Raises CrystalError (`no_volume`)."""
    from unimat_jax.stability.soft_sphere import spread  # with ASE, which `--help` need not wait for

    begin = time.process_time()
    rng = np.random.default_rng([task.seed, task.index, *(number for pair in task.counts for number in pair)])
    counts = dict(task.counts)
    fraction = float(rng.uniform(*VOLUME_RANGE))
    volume = fraction * estimated_volume(counts)
    asked = OPERATIONS[task.index % len(OPERATIONS)]
    # In a cell of less than the estimated volume all distances shrink alike.
    closest = pair_distances(counts, MIN_RATIO * min(1.0, fraction ** (1 / 3)))
    failures: Counter[str] = Counter()
    found, group, operations, attempt = None, 1, asked, 0
    for attempt in range(1, 2 * ATTEMPTS + 1):
        operations = asked if attempt <= ATTEMPTS else 1
        try:
            if task.generator == buildcell.COMMAND:
                group, found = 0, buildcell.build(counts, operations, volume, closest)
            elif operations == 1:
                group, found = 1, _without(counts, volume, closest, rng)
            else:
                group = int(rng.choice(GROUPS[operations]))
                found = _symmetric(counts, group, volume, rng)
            check_sensible(found, counts, closest)
            break
        except CrystalError as error:
            found = None
            failures[error.reason] += 1
    done = time.process_time()
    drawn = Drawn(found, asked, operations, group, fraction, attempt, dict(failures), round(done - begin, 4))
    if found is None or task.soft_sphere == "none":
        return drawn
    spheres = pair_distances(counts, SOFT_RATIO)
    variable = task.soft_sphere == "variable"
    after = spread(found.to_ase(), spheres, max_force_calls=task.max_soft_calls, variable_cell=variable)
    return dataclasses.replace(
        drawn, crystal=Crystal.from_ase(after.atoms), soft_calls=after.force_calls, soft_converged=after.converged,
        soft_cpu_seconds=round(time.process_time() - done, 4),
    )  # fmt: skip


def pair_distances(counts: Mapping[int, int], ratio: float) -> Distances:
    """`ratio` times the sum of the covalent radii of each pair of elements (Cordero et al. 2008, as ASE has them)."""
    from ase.data import covalent_radii

    return {(a, b): ratio * float(covalent_radii[a] + covalent_radii[b]) for a in counts for b in counts}


def check_sensible(crystal: Crystal, counts: Mapping[int, int], closest: Distances) -> None:
    """Raises CrystalError (`wrong_composition`, `cell_shape`, `too_close`) for what is no sensible structure."""
    from ase.neighborlist import neighbor_list

    if Counter(crystal.atomic_numbers.tolist()) != Counter(counts):
        raise CrystalError("wrong_composition", f"{crystal.formula} is not what was asked for")
    lengths, angles = crystal.lengths / crystal.volume ** (1 / 3), crystal.angles
    if lengths.min() < LENGTHS[0] or lengths.max() > LENGTHS[1] or angles.min() < ANGLES[0] or angles.max() > ANGLES[1]:
        raise CrystalError(
            "cell_shape", f"lengths of {crystal.lengths.round(2)} A, angles of {angles.round(1)} degrees"
        )
    if len(neighbor_list("i", crystal.to_ase(), dict(closest))):
        raise CrystalError("too_close", "two atoms are nearer than asked for")


def _without(counts: Mapping[int, int], volume: float, closest: Distances, rng: np.random.Generator) -> Crystal:
    """By ase-ga, without symmetry."""
    from ase import Atoms
    from ase_ga.startgenerator import StartGenerator
    from ase_ga.utilities import CellBounds

    edge = volume ** (1 / 3)
    bounds = {name: [LENGTHS[0] * edge, LENGTHS[1] * edge] for name in ("a", "b", "c")}
    bounds |= {name: list(ANGLES) for name in ("alpha", "beta", "gamma")}
    make = StartGenerator(
        Atoms(pbc=True), list(counts.items()), dict(closest), number_of_variable_cell_vectors=3, box_volume=volume,
        box_to_place_in=[np.zeros(3), np.zeros((3, 3))], cellbounds=CellBounds(bounds), test_too_far=False,
        rng=cast(Any, rng),  # annotated as numpy.random itself; draws by methods that a Generator has too
    )  # fmt: skip
    atoms: Any = make.get_new_candidate(maxiter=PLACEMENTS)
    if atoms is None:
        raise CrystalError("no_room", f"no random positions in {volume:.1f} A^3 keep their distances")
    return Crystal.from_ase(atoms)


@functools.cache
def _tolerances() -> Any:
    """pyxtal's own, of which it would make another each time: milliseconds."""
    from pyxtal.tolerance import Tol_matrix

    return Tol_matrix(prototype="atomic")


def _symmetric(counts: Mapping[int, int], group: int, volume: float, rng: np.random.Generator) -> Crystal:
    """By pyxtal, in a primitive cell of a space group, scaled to the volume."""
    from pyxtal import pyxtal
    from pyxtal.msg import Comp_CompatibilityError, VolumeError

    crystal = pyxtal()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it tries other volumes
            crystal.from_random(
                3, group, [SYMBOLS[z] for z in counts], list(counts.values()), conventional=False, max_count=1,
                tm=_tolerances(), random_state=rng,
            )  # fmt: skip
    except Comp_CompatibilityError as error:
        raise CrystalError("composition_does_not_fit_group", str(error)) from error
    except (VolumeError, RuntimeError) as error:
        raise CrystalError("no_positions_in_group", str(error)) from error
    if not crystal.valid:
        raise CrystalError("no_positions_in_group", f"pyxtal found no positions in group {group}")
    found = Crystal.from_ase(crystal.to_ase()).primitive()
    scale = (volume / found.volume) ** (1 / 3)
    return Crystal.create(found.atomic_numbers, found.frac_coords, found.lattice * scale)
