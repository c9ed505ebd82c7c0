"""Specs to test with, and crystals as the tensors that the device sees."""

import jax
import numpy as np

from unimat_jax.crystal import Crystal
from unimat_jax.densify import densify, occupancy
from unimat_jax.periodic_table import Table
from unimat_jax.representation import (
    UniMatSpec,
    batch_records,
    encode,
    model_inputs,
)

CARBON = Table.of_elements(["C"])


def make_spec(form: str, table: Table | None = None, size: int = 24, **changes) -> UniMatSpec:
    """A spec whose standardisation is not the identity, so that forgetting it shows."""
    number = 9 if form == "matrix" else 6
    rng = np.random.default_rng(number)
    values = {
        "max_atoms_per_element": size,
        "max_atoms": size,
        "table": table or Table(),
        "coordinates": "cartesian" if form == "matrix" else "fractional",
        "lattice_form": form,
        "lattice_mean": tuple(rng.normal(size=number).tolist()),
        "lattice_std": tuple(rng.uniform(0.5, 2.0, number).tolist()),
        "coordinate_radius": 17.0 if form == "matrix" else 1.0,
    }
    return UniMatSpec(**{**values, **changes})


FORMS = ["parameters", "log_metric", "matrix"]


def tensors(crystals_: list[Crystal], spec: UniMatSpec, rotations=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [B, L, H, W, 3], lattice [B, D] and occupancy [B, L, H, W], all the way through the device."""
    batch = model_inputs(batch_records([encode(c, spec) for c in crystals_], spec.max_atoms), spec, rotations)
    arrays = {name: jax.numpy.asarray(value) for name, value in batch.items()}
    return np.asarray(densify(arrays, spec)), batch["lattice"], np.asarray(occupancy(arrays, spec))
