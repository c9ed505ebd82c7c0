"""Changes of a batch that leave each crystal the same up to a proper rotation (DESIGN.md, "augmentation"), random ones
and the choice of one image among many (`half_turns`).

The paper (section 2.1) gets its invariances by augmentation only. With lengths and angles a rigid rotation changes
nothing; what is left is the order of the atoms, the origin and the order of the axes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unimat_jax.representation import wrap

_AXIS_ORDERS = np.array([[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [2, 1, 0], [1, 0, 2]])
_IS_ODD = np.array([False, False, False, True, True, True])
_HALF_TURNS = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
"""None, and about each axis: the signs of the fractional coordinates."""
_RIGHT_ANGLE = 0.1
"""Degrees by which an angle may differ from 90 for a half-turn to leave the cell as it is."""


def shuffle_slots(batch: Mapping[str, np.ndarray], keys: np.ndarray) -> dict[str, np.ndarray]:
    """Deals the atoms of each element to that element's occupied slots in the order of random `keys` [B, A]."""
    level, row, column = np.moveaxis(batch["slots"], -1, 0)
    place = np.where(level < 0, 10_000, row * 100 + column)
    order = np.lexsort((keys, place), axis=-1)
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


def half_turns(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turns each crystal to one of its images by half-turns about cell axes that leave the cell as it is: to the one
    with the greatest polarity, summed over axes. So what is polar points one way in all crystals of a data set.

    Without it a crystal that is displaced lies in one of two places by chance, and one that is not in a single place:
    a sampler that looks for the likeliest structure then finds the second too often. The polarity along an axis is
    the sum over pairs of (group_i - group_j) sin 2 pi (x_j - x_i): periodic, and the same wherever the origin is.
    """
    real = (batch["slots"][..., :1] >= 0).astype(np.float64)
    group = batch["slots"][..., 2:] * real
    turn = 2 * np.pi * batch["frac_coords"].astype(np.float64)
    sin, cos = np.sin(turn) * real, np.cos(turn) * real
    # sin(x_j - x_i) apart: the sum over pairs becomes products of sums over atoms.
    polarity = (group * cos).sum(1) * sin.sum(1) - (group * sin).sum(1) * cos.sum(1)
    is_right = np.abs(batch["lattice"][:, 3:] - 90.0) < _RIGHT_ANGLE
    allowed = np.stack([np.ones(len(polarity), bool)] + [np.delete(is_right, axis, 1).all(1) for axis in range(3)], 1)
    score = np.where(allowed, polarity @ _HALF_TURNS.T, -np.inf)
    signs = _HALF_TURNS[score.argmax(1)].astype(np.float32)
    return {**batch, "frac_coords": wrap(signs[:, None, :] * batch["frac_coords"])}


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
    half_turned: bool = False,
    draw_for: int | None = None,
    part: slice = slice(None),
) -> dict[str, np.ndarray]:
    """Applies the chosen augmentations. `origin_shift` moves every origin by the same fraction of each axis;
    `half_turned`: see `half_turns`.

    Each augmentation draws from its own stream and for a global batch of `draw_for`, of which this batch is `part`: the
    draws depend neither on which others are used nor on the number of processes.
    """
    axes_rng, shift_rng, slot_rng = rng.spawn(3)
    number = draw_for or len(batch["num_atoms"])
    result = half_turns(batch) if half_turned else dict(batch)
    if random_axes:
        result = permute_axes(result, axes_rng.integers(0, 6, number)[part])
    if random_shift or origin_shift:
        vectors = shift_rng.random((number, 3))[part] if random_shift else np.zeros((1, 3))
        result = shift(result, vectors + origin_shift)
    if shuffle_atoms:
        result = shuffle_slots(result, slot_rng.random((number, batch["slots"].shape[1]))[part])
    return result
