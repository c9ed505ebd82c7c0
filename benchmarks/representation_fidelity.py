"""What a UniMat record, a voxel grid and a graph each lose of the same real crystals.

python -m benchmarks.representation_fidelity --structures=perov_5/val.npz --num_samples=200

Each representation is written and read back, without any network. UniMat: encode, spread out in float32, decode.
Voxels: Gaussians on a 32^3 grid in the cell's own axes, one channel for all elements weighted by their atomic numbers
(as in density-image models), atoms read as local maxima. Graph: the distances of each atom's 12 nearest neighbours,
which is what CGCNN-like models see of the geometry; elements and cell are given for free, and coordinates with the same
distances are sought.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage, optimize

from unimat_jax.cli import Parser, run_program
from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.evaluation.matching import match_rms
from unimat_jax.evaluation.structure_statistics import SYMPREC, space_group
from unimat_jax.representation import NULL_VALUE, UniMatSpec, batch_records, decode, encode, model_inputs

GRID, WIDTH = 32, 0.5
"""Voxels along each axis; Gaussian width in Angstrom."""
NEIGHBOURS, STARTS = 12, 4
_IMAGES = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), -1).reshape(-1, 3)


def through_unimat(crystal: Crystal) -> Crystal | None:
    """Encoded, spread over the full 9 x 18 table as float32, decoded without being told the composition."""
    most = int(np.bincount(crystal.atomic_numbers).max())
    spec = UniMatSpec(max_atoms_per_element=most, max_atoms=crystal.num_atoms)
    record = encode(crystal, spec)
    inputs = model_inputs(batch_records([record], spec.max_atoms), spec)
    x = np.full((spec.num_slots, 3), NULL_VALUE, np.float32)
    x[inputs["slot"][0]] = inputs["coords"][0]
    found = decode(x.reshape(*spec.grid, 3), inputs["lattice"][0], spec)
    return found if isinstance(found, Crystal) else None


def through_voxels(crystal: Crystal) -> Crystal | None:
    """Painted on a periodic grid and read back: maxima to a parabola's precision, elements by the nearest height."""
    axes = [np.arange(GRID) / GRID] * 3
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    difference = points[:, None] - crystal.frac_coords
    difference -= np.round(difference)
    squared = ((difference @ crystal.lattice) ** 2).sum(-1)
    density = (np.exp(-squared / (2 * WIDTH**2)) * crystal.atomic_numbers).sum(1).reshape(GRID, GRID, GRID)
    peaks = (density == ndimage.maximum_filter(density, size=3, mode="wrap")) & (density > 0.5)
    places = np.argwhere(peaks)
    if not len(places):
        return None
    frac, heights = [], []
    for place in places:
        offset = np.zeros(3)
        for axis in range(3):
            step = np.eye(3, dtype=int)[axis]
            below, here, above = (density[tuple((place + k * step) % GRID)] for k in (-1, 0, 1))
            curvature = below - 2 * here + above
            offset[axis] = 0.5 * (below - above) / curvature if curvature < 0 else 0.0
        frac.append((place + offset) / GRID)
        heights.append(density[tuple(place)])
    numbers = np.clip(np.round(heights), 1, 118).astype(int)
    try:
        return Crystal.create(numbers, frac, crystal.lattice)
    except CrystalError:
        return None


def neighbour_distances(frac: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """Sorted distances [n, NEIGHBOURS] of each atom's nearest neighbours, periodic images included (Angstrom)."""
    number = len(frac)
    vectors = (frac[None, :, None] + _IMAGES - frac[:, None, None]) @ lattice
    distances = np.linalg.norm(vectors, axis=-1).reshape(number, -1)
    distances[distances < 1e-6] = np.inf
    return np.sort(distances, axis=1)[:, :NEIGHBOURS]


def through_graph(crystal: Crystal) -> Crystal | None:
    """Coordinates that give each atom the same sorted edge lengths: the best of a few random starts of a least-squares
    search. The first atom stays at the origin."""
    rng = np.random.default_rng(0)
    target = neighbour_distances(crystal.frac_coords, crystal.lattice)

    def residual(flat: np.ndarray) -> np.ndarray:
        frac = np.concatenate([np.zeros((1, 3)), flat.reshape(-1, 3)])
        return (neighbour_distances(frac, crystal.lattice) - target).ravel()

    if crystal.num_atoms == 1:
        return crystal
    starts = [rng.random(3 * (crystal.num_atoms - 1)) for _ in range(STARTS)]
    best = min((optimize.least_squares(residual, start, max_nfev=60) for start in starts), key=lambda found: found.cost)
    frac = np.concatenate([np.zeros((1, 3)), best.x.reshape(-1, 3)])
    return Crystal.create(crystal.atomic_numbers, frac, crystal.lattice)


def measure(name: str, through: Callable[[Crystal], Crystal | None], crystals: Sequence[Crystal]) -> dict[str, Any]:
    """Shares of crystals that come back: at all, with their composition, matching, and with their space group."""
    begin = time.perf_counter()
    decoded, composition, matched, group, distances = 0, 0, 0, 0, []
    for crystal in crystals:
        found = through(crystal)
        if found is None:
            continue
        decoded += 1
        if sorted(found.atomic_numbers.tolist()) != sorted(crystal.atomic_numbers.tolist()):
            continue
        composition += 1
        rms = match_rms(found, crystal)
        if rms is not None:
            matched += 1
            distances.append(rms * np.cbrt(crystal.volume / crystal.num_atoms))
        group += space_group(found, SYMPREC)[0] == space_group(crystal, SYMPREC)[0]
    number = len(crystals)
    return {
        "representation": name,
        "num_crystals": number,
        "decoded": decoded / number,
        "composition": composition / number,
        "matched": matched / number,
        "space_group": group / number,
        "median_rmsd_A": float(np.median(distances)) if distances else None,
        "largest_rmsd_A": float(np.max(distances)) if distances else None,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.representation_fidelity", description=__doc__)
    p.add_argument("--structures", nargs="+", required=True, metavar="PATH")
    p.add_argument("--num_samples", type=int, default=200, help="crystals of each file, drawn by the seed")
    p.add_argument("--max_atoms", type=int, default=12, help="larger ones are left out: the graph search is slow")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/representation_fidelity"))
    arguments = p.parse(sys.argv[1:] if argv is None else argv)
    rows = []
    for path in arguments.structures:
        crystals = [e.crystal for e in read_entries(path) if e.crystal and e.crystal.num_atoms <= arguments.max_atoms]
        chosen = np.random.default_rng(arguments.seed).permutation(len(crystals))[: arguments.num_samples]
        crystals = [crystals[i] for i in sorted(chosen)]
        name = "/".join(Path(path).with_suffix("").parts[-2:])
        for title, through in (("UniMat", through_unimat), ("voxels", through_voxels), ("graph", through_graph)):
            rows.append({"structures": name, **measure(title, through, crystals)})
            print(json.dumps(rows[-1]), flush=True)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    result = {
        "max_atoms": arguments.max_atoms, "seed": arguments.seed, "grid": GRID, "width_A": WIDTH,
        "neighbours": NEIGHBOURS, "starts": STARTS, "rows": rows, "machine": platform.processor() or platform.machine(),
        "packages": {name: metadata.version(name) for name in ("numpy", "scipy", "pymatgen", "spglib")},
    }  # fmt: skip
    path = arguments.output_dir / "representation_fidelity.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
