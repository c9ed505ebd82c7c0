"""Remakes unimat_jax/starter/starter.npz from the source distribution of matminer 0.4.0 on PyPI.

python -m data_prep.make_starter [--sdist=matminer-0.4.0.tar.gz] [--output=starter.npz]
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unimat_jax.cli import run_program
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import atomic_number

SDIST_SHA256 = "1a6bdfb198b36d836bab4fbcdffb2dc4fda8a740c3dc08cbb21ea43b817fec86"
MEMBER = "matminer-0.4.0/matminer/datasets/flla_2015.csv"
MAX_ATOMS = 20


def download(directory: Path) -> Path:
    """The source distribution, fetched by pip. Raises UserError with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "matminer==0.4.0"]
    done = subprocess.run([*command, "--dest", str(directory)], capture_output=True, text=True, check=False)
    sdist = directory / "matminer-0.4.0.tar.gz"
    if not sdist.exists():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"pip could not fetch matminer 0.4.0 ({last}): fetch it elsewhere and give --sdist=PATH")
    return sdist


def read_sdist(sdist: Path) -> dict[str, np.ndarray]:
    """The arrays of starter.npz. Raises UserError for another file than matminer 0.4.0's source distribution."""
    if not sdist.is_file():
        raise UserError(f"--sdist={sdist} does not exist")
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise UserError(f"--sdist={sdist} has SHA-256 {digest}, matminer-0.4.0.tar.gz has {SDIST_SHA256}")
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(MEMBER)
        assert member is not None
        lines = io.TextIOWrapper(member, encoding="utf-8", newline="").readlines()
    ids, sizes, numbers, frac, lattices, formation, hull = [], [], [], [], [], [], []
    csv.field_size_limit(2**31 - 1)
    for row in csv.DictReader(line for line in lines if not line.startswith("# ref:")):
        structure = ast.literal_eval(row["structure"])  # literals only: nothing is run
        sites = structure["sites"]
        if len(sites) > MAX_ATOMS:
            continue
        assert all(len(site["species"]) == 1 and site["species"][0]["occu"] == 1 for site in sites), row["material_id"]
        ids.append(row["material_id"])
        sizes.append(len(sites))
        numbers += [atomic_number(site["species"][0]["element"]) for site in sites]
        frac += [site["abc"] for site in sites]
        lattices.append(structure["lattice"]["matrix"])
        formation.append(float(row["formation_energy_per_atom"]))
        hull.append(float(row["e_above_hull"]))
    return {
        "material_id": np.array(ids),
        "n_atoms": np.array(sizes, np.uint8),
        "numbers": np.array(numbers, np.uint8),
        "frac_coords": np.array(frac, np.float64),
        "lattice": np.array(lattices, np.float64),
        "formation_energy_per_atom": np.array(formation, np.float64),
        "e_above_hull": np.array(hull, np.float64),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="matminer-0.4.0.tar.gz (default: pip fetches it)")
    default = Path(__file__).parents[1] / "unimat_jax" / "starter" / "starter.npz"
    parser.add_argument("--output", type=Path, default=default)
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        arrays = read_sdist(flags.sdist or download(Path(directory)))
    np.savez_compressed(flags.output, **arrays)  # type: ignore[arg-type]
    print(f"{len(arrays['material_id'])} crystals, {flags.output.stat().st_size} bytes: {flags.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
