"""Random changes of a batch that leave each crystal the same up to a proper rotation (DESIGN.md, "augmentation").

The paper (section 2.1) gets its invariances by augmentation only. With lengths and angles a rigid rotation changes
nothing; what is left is the order of the atoms, the origin and the order of the axes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unimat_jax.representation import wrap

_AXIS_ORDERS = np.array([[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [2, 1, 0], [1, 0, 2]])
_IS_ODD = np.array([False, False, False, True, True, True])


def shuffle_slots(batch: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Deals the atoms of each element to that element's occupied slots at random."""
    level, row, column = np.moveaxis(batch["slots"], -1, 0)
    place = np.where(level < 0, 10_000, row * 100 + column)
    order = np.lexsort((rng.random(place.shape), place), axis=-1)
    place = np.take_along_axis(place, order, -1)
    index = np.broadcast_to(np.arange(place.shape[1]), place.shape)
    starts = np.where(np.diff(place, axis=-1, prepend=-1) != 0, index, 0)
    rank = index - np.maximum.accumulate(starts, axis=-1)
    slots = np.take_along_axis(batch["slots"], order[..., None], 1)
    slots[..., 0] = np.where(slots[..., 0] < 0, -1, rank)
    return {**batch, "slots": slots, "frac_coords": np.take_along_axis(batch["frac_coords"], order[..., None], 1)}


def shift(batch: Mapping[str, np.ndarray], vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Moves the origin of each crystal: adds `vectors` [B, 3] or [3] to its fractional coordinates, modulo 1."""
    vectors = np.broadcast_to(vectors, (len(batch["num_atoms"]), 3))
    return {**batch, "frac_coords": wrap(batch["frac_coords"] + vectors[:, None, :].astype(np.float32))}


def permute_axes(batch: Mapping[str, np.ndarray], choice: np.ndarray) -> dict[str, np.ndarray]:
    """Renames the cell axes by permutation number `choice` [B] in 0..5, with their angles.

    Permutations 3-5 are odd: they turn a right-handed basis left-handed, so basis and coordinates are also inverted.
    """
    axes = _AXIS_ORDERS[choice]
    frac = np.take_along_axis(batch["frac_coords"], axes[:, None, :], -1)
    frac = np.where(_IS_ODD[choice][:, None, None], -frac, frac)
    lengths = np.take_along_axis(batch["lattice"][:, :3], axes, -1)
    angles = np.take_along_axis(batch["lattice"][:, 3:], axes, -1)
    return {**batch, "frac_coords": wrap(frac), "lattice": np.concatenate([lengths, angles], -1)}


def random_rotations(rng: np.random.Generator, number: int) -> np.ndarray:
    """Uniform proper rotations [number, 3, 3] (determinant +1), from normalised random quaternions."""
    w, x, y, z = np.moveaxis((q := rng.normal(size=(number, 4))) / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def augment(
    batch: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    *,
    shuffle_atoms: bool,
    random_shift: bool,
    origin_shift: float = 0.0,
    random_axes: bool,
) -> dict[str, np.ndarray]:
    """Applies the chosen augmentations; each draws for the whole batch, so the draws do not depend on one another's use."""
    keys = rng.spawn(3)
    number = len(batch["num_atoms"])
    result = dict(batch)
    if random_axes:
        result = permute_axes(result, keys[0].integers(0, 6, number))
    if random_shift:
        result = shift(result, keys[1].random((number, 3)))
    elif origin_shift:
        result = shift(result, np.full(3, origin_shift))
    if shuffle_atoms:
        result = shuffle_slots(result, keys[2])
    return result
