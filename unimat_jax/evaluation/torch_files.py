"""Samples that CDVAE and DiffCSP saved with torch (`eval_gen.pt`, `eval_diff.pt`), read without running any code.

Needs the extra `torch`. Only tensors, plain containers and argparse's Namespace are loaded (`weights_only=True`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.crystal import lattice_from_parameters
from unimat_jax.errors import UserError
from unimat_jax.structure_files import RawStructure

FIELDS = ("frac_coords", "atom_types", "lengths", "angles", "num_atoms")


def scan_torch(path: Path) -> Iterator[RawStructure]:
    """One raw structure a sample, uid "eval/number" where there are several evaluations of the same inputs, which are
    then predictions of the structure "number". Raises UserError where torch is missing or the file holds code."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a file that CDVAE's or DiffCSP's scripts saved")
    data = _load(path)
    missing = [name for name in FIELDS if name not in data]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: is it a file of CDVAE's or DiffCSP's evaluate.py?")
    arrays = {name: np.asarray(data[name]) for name in FIELDS}
    if arrays["frac_coords"].ndim == 2:
        arrays = {name: value[None] for name, value in arrays.items()}
    number = len(arrays["frac_coords"])
    for evaluation in range(number):
        part = {name: value[evaluation] for name, value in arrays.items()}
        ends = np.cumsum(part["num_atoms"])
        for i, (end, size) in enumerate(zip(ends, part["num_atoms"], strict=True)):
            atoms = slice(end - size, end)
            payload = {
                "numbers": part["atom_types"][atoms],
                "frac_coords": part["frac_coords"][atoms],
                "lattice": lattice_from_parameters(part["lengths"][i], part["angles"][i]),
            }
            several = number > 1
            uid = f"{evaluation}/{i}" if several else str(i)
            texts = {"reference_uid": str(i)} if several else {}
            yield RawStructure(uid, f"{path.name}:{uid}", "arrays", payload, texts=texts)


def _load(path: Path) -> dict[str, Any]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{path} needs torch to be read: pip install 'unimat-jax[torch]'") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0][:200]
        print(f"{path}: {type(error).__name__}: {first_line}", file=sys.stderr)
        raise UserError(
            f"{path} holds more than tensors, which would have to be run to be read: load it where it was made and "
            f"save a dict of {', '.join(FIELDS)} alone"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not the dict of CDVAE's or DiffCSP's evaluate.py")
    return data
