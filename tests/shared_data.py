"""The real crystals that are not in the repository: found by the environment variable UNIMAT_DATA, else tests skip."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from unimat_jax.crystal import Crystal

SPLITS = ("perov_5/val", "perov_5/train", "carbon_24/val", "mp_20/val", "starter_source/flla_le20")


def data_dir() -> Path:
    """The directory that UNIMAT_DATA names; skips the calling test where there is none."""
    if not os.environ.get("UNIMAT_DATA"):
        pytest.skip("set UNIMAT_DATA to the directory of the benchmark crystals (perov_5/val.npz, ...) to run this")
    path = Path(os.environ["UNIMAT_DATA"])
    if not path.is_dir():
        pytest.skip(f"UNIMAT_DATA = {path} is no directory")
    return path


def golden_dir() -> Path:
    """Reference values by the original CDVAE code, beside the data."""
    path = data_dir().parent / "golden"
    if not path.is_dir():
        pytest.skip(f"no reference values at {path}")
    return path


def load(split: str, number: int | None = None, seed: int = 0) -> list[Crystal]:
    """All crystals of a split ("perov_5/val"), or `number` of them drawn by `seed`."""
    with np.load(data_dir() / f"{split}.npz") as file:
        arrays = {name: file[name] for name in ("material_id", "n_atoms", "numbers", "frac_coords", "lattice")}
    offsets = np.concatenate([[0], np.cumsum(arrays["n_atoms"].astype(int))])
    rows = np.arange(len(arrays["n_atoms"]))
    if number is not None:
        rows = np.sort(np.random.default_rng(seed).choice(rows, min(number, len(rows)), replace=False))
    return [
        Crystal.create(
            arrays["numbers"][offsets[i] : offsets[i + 1]],
            arrays["frac_coords"][offsets[i] : offsets[i + 1]],
            arrays["lattice"][i],
            str(arrays["material_id"][i]),
        )
        for i in rows
    ]
