"""Atoms are kept apart: by how much, which, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimat_jax.evaluation.geometry import RADII_FRACTION
from unimat_jax.exclusion import NOISE_SHARE, distances_to_keep, push_apart
from unimat_jax.flops import count_flops

CELL = np.array([[4.0, 0, 0], [1.0, 5.0, 0], [0, 1.0, 6.0]])
METRIC = jnp.asarray(CELL @ CELL.T, jnp.float32)[None]
KEEP = distances_to_keep(jnp.ones((1, 3)), jnp.array([[True, True, False]]), 0.7)
push = jax.jit(push_apart)


def distance(frac):
    difference = np.asarray(frac[0, 0] - frac[0, 1], float)
    return np.linalg.norm((difference - np.round(difference)) @ CELL)


def test_pairs_of_real_atoms_are_kept_the_share_of_their_radii_apart():
    keep = distances_to_keep(jnp.array([[1.0, 2.0, 1.5]]), jnp.array([[True, True, False]]), RADII_FRACTION)
    np.testing.assert_allclose(keep[0], [[0, 2.1, 0], [2.1, 0, 0], [0, 0, 0]], rtol=1e-6)


@settings(max_examples=60)
@given(st.lists(st.floats(-0.12, 0.12), min_size=3, max_size=3), st.floats(0, 1), st.floats(0.3, 1.8))
def test_two_atoms_part_along_their_line_and_no_further(offset, origin, keep):
    """Wherever the cell's border is; the padded atom stays."""
    frac = jnp.array([[[origin] * 3, [origin + x for x in offset], [0.5] * 3]], jnp.float32)
    before = distance(frac)
    moved = push(frac, METRIC, KEEP / 1.4 * keep, jnp.float32(0.0))
    np.testing.assert_allclose(moved.sum(1), 0, atol=1e-5)
    assert not np.any(moved[0, 2])
    if before > keep:
        assert not np.any(moved)
    elif before > 1e-3:
        assert distance(frac + moved) == pytest.approx(keep, abs=1e-3)
        step, line = np.asarray(moved[0, 1]) @ CELL, np.asarray(offset) @ CELL
        assert step @ line == pytest.approx(np.linalg.norm(step) * before, rel=0.02)


def test_a_crowd_is_parted_and_no_further_than_needed():
    rng = np.random.default_rng(0)
    frac = jnp.asarray(0.5 + 0.02 * rng.normal(size=(1, 4, 3)), jnp.float32)
    metric = 100.0 * jnp.eye(3)[None]
    keep = distances_to_keep(jnp.ones((1, 4)), jnp.ones((1, 4), bool), 0.7)
    for _ in range(4):  # as in as many steps of a sampler
        frac = frac + push(frac, metric, keep, jnp.float32(0.0))
    apart = 10 * np.linalg.norm(np.asarray(frac[0][:, None] - frac[0][None]), axis=-1)[np.triu_indices(4, 1)]
    assert apart.min() > 1.35 and apart.max() < 2.0


def test_none_is_moved_where_the_noise_is_large():
    frac = jnp.array([[[0.1] * 3, [0.15] * 3, [0.5] * 3]], jnp.float32)
    size = np.linalg.det(CELL) ** (1 / 3)
    for noise, moves in ((0.99, True), (1.01, False)):  # of the largest at which 1.4 Angstrom are kept
        sigma = jnp.float32(noise * NOISE_SHARE * 1.4 / size)
        assert np.any(push(frac, METRIC, KEEP, sigma)) == moves


def test_a_sampler_with_it_can_be_counted():
    """Its rounds are a loop of unknown length, in which nothing may be a matrix product."""
    frac = jax.ShapeDtypeStruct((1, 3, 3), jnp.float32)
    assert count_flops(push_apart, frac, METRIC, KEEP, jnp.float32(0.0)) == 0


def test_atoms_at_one_place_stay_finite():
    frac = jnp.full((1, 3, 3), 0.25, jnp.float32)
    assert not np.any(push(frac, METRIC, KEEP, jnp.float32(0.0)))
