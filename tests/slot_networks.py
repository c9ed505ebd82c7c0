"""Small networks of slots with wild weights, and what they are asked: for the tests of slots_test.py and
slot_diffusion_test.py."""

import jax
import jax.numpy as jnp
import numpy as np

from unimat_jax import models
from unimat_jax.assembly import init_arguments
from unimat_jax.periodic_table import Table
from unimat_jax.representation import UniMatSpec

SPEC = UniMatSpec(
    max_atoms_per_element=24,
    max_atoms=24,
    table=Table.of_elements(["Sr", "Ti", "O"]),
    lattice_mean=(0.9,) * 3 + (0.0,) * 3,
    lattice_std=(0.2,) * 6,
)
SETTINGS = {"sigma_min": 0.002, "sigma_max": 0.5, "logsnr_min": -12.0, "logsnr_max": 12.0, "lattice_weight": 1.0}
SMALL = {"width": 16, "depth": 2, "heads": 2, "pair_width": 8}


def network_with(seed=0, **changes):
    """(network, parameters without zeros, so that each of them acts)."""
    network = models.create("slots", **SMALL | changes)
    arguments = init_arguments(SPEC, 0, "slots")
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *arguments)["params"])
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / max(1, s.shape[0]) ** 0.5, s.dtype), shapes)
    return network, params


def slots_of(counts, size):
    """Flat slots [1, size] of so many atoms of Sr, Ti and O."""
    places, grid = SPEC.table.place_of[[38, 22, 8]], SPEC.num_slots // SPEC.max_atoms_per_element
    rows = [level * grid + place for place, n in zip(places, counts, strict=True) for level in range(n)]
    return jnp.asarray([rows + [SPEC.num_slots] * (size - len(rows))], jnp.int32)


def places(counts, seed=0):
    return np.random.default_rng(seed).random((sum(counts), 3)).astype(np.float32)


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)
