"""Attention among the likeliest sites: which are picked, what they know of each other, and that they alone meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unet3d_test import inputs, network, random_params, shapes_of

from unimat_jax import models
from unimat_jax.errors import UserError
from unimat_jax.models.site_attention import SiteAttention, gather, pair_features, pick_sites, scatter_add

GRID = (2, 3, 4)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("noise_level", [0.0, 1.0, 30.0])
def test_an_exact_composition_is_picked_whole_at_every_noise_level(noise_level):
    possible = np.zeros((2, *GRID), bool)
    possible[0, 0, 1, 2] = possible[0, 1, 1, 2] = possible[1, 0, 0, 3] = True
    x = jnp.where(possible[..., None], 0.5, -3.0) + noise_level * noise(2, *GRID, 3)
    sites, mask = pick_sites(x, jnp.asarray(possible), 4)
    assert sites.shape == mask.shape == (2, 4) and mask.sum(1).tolist() == [2, 1]
    for example in range(2):
        found = set(np.asarray(sites[example])[np.asarray(mask[example])].tolist())
        assert found == set(np.flatnonzero(possible[example]).tolist())


def test_without_a_condition_the_sites_farthest_from_null_are_picked():
    x = jnp.full((1, *GRID, 3), -3.0).at[0, 1, 2, 3].set(0.9).at[0, 0, 0, 1].set(jnp.array([-0.9, 0.0, 0.1]))
    sites, mask = pick_sites(x, jnp.ones((1, *GRID), bool), 2)
    assert mask.all() and np.asarray(sites[0]).tolist() == [23, 1]
    everything, _ = pick_sites(x, jnp.ones((1, *GRID), bool), 1000)
    assert sorted(np.asarray(everything[0]).tolist()) == list(range(24))


def test_gather_and_scatter_are_each_other_s_transpose():
    grid, sites = noise(2, *GRID, 5), jnp.array([[3, 7, 23], [0, 5, 1]])
    rows = gather(grid, sites)
    np.testing.assert_array_equal(rows[1, 1], grid[1, 0, 1, 1])
    np.testing.assert_array_equal(rows[0, 2], grid[0, 1, 2, 3])
    weight = noise(2, 3, 5, seed=1)
    added = scatter_add(jnp.zeros_like(grid), sites, weight)
    np.testing.assert_allclose(jnp.vdot(added, grid), jnp.vdot(weight, rows), rtol=1e-5)
    assert int((added != 0).any(-1).sum()) == 6


def test_pairs_know_differences_alone_and_waves_have_the_cell_s_period():
    coords = noise(2, 4, 3)
    pairs = pair_features(coords)
    moved = pair_features(coords + jnp.array([0.3, -0.2, 0.7]))
    np.testing.assert_allclose(moved, pairs, atol=1e-5)
    wrapped = pair_features(coords.at[0, 1, 2].add(2.0))
    np.testing.assert_allclose(wrapped[..., 3:], pairs[..., 3:], atol=1e-4)
    assert np.abs(wrapped[0, 1, 2] - pairs[0, 1, 2])[2] == pytest.approx(2, abs=1e-5)
    assert np.abs(pair_features(coords.at[0, 1, 2].add(0.5))[0, 1, 2, 3:] - pairs[0, 1, 2, 3:]).max() > 0.1


def block():
    """One block on 4 sites of which the last may hold no atom: a function of (grid, coordinates) and its arguments."""
    module, sites = SiteAttention(head_dim=4), jnp.array([[3, 7, 23, 9], [0, 5, 1, 2]])
    mask = jnp.array([[True, True, True, False]] * 2)
    grid, tokens, embedding = noise(2, *GRID, 5), noise(2, 4, 8, seed=1), noise(2, 6, seed=2)
    coords = noise(2, 4, 3, seed=3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), grid, tokens, sites, mask, pair_features(coords), embedding)
    params = random_params(shapes)

    @jax.jit
    def run(grid, coords):
        return gather(module.apply(params, grid, tokens, sites, mask, pair_features(coords), embedding)[0], sites)

    return run, grid, coords


def test_each_atom_hears_of_the_others_and_of_where_they_are():
    run, grid, coords = block()
    before = run(grid, coords)
    told = {
        "features": run(grid.at[0, 1, 2, 3].add(1.0), coords),  # flat index 23
        "coordinates": run(grid, coords.at[0, 2, 1].add(0.4)),
    }
    for what, after in told.items():
        assert np.abs(after - before)[0, :2].min() > 1e-4, what
        np.testing.assert_allclose(after[1], before[1], atol=1e-6, err_msg=what)
    for after in (run(grid.at[0, 0, 2, 1].add(1.0), coords), run(grid, coords.at[0, 3].add(0.4))):  # the masked site
        np.testing.assert_allclose(after[0, :3], before[0, :3], atol=1e-6)
    np.testing.assert_array_equal(before[:, 3], gather(grid, jnp.array([[9], [2]]))[:, 0])  # nothing is written there


def two_elements(**settings):
    """A network that attends among sites alone, and a condition of two elements: two atoms and one."""
    net = network(channel_multipliers=(1,), attention_resolutions=(), num_res_blocks=1, site_width=8, **settings)
    x, lattice, logsnr, cond = inputs((2, 1, 24))
    counts = jnp.zeros_like(cond["counts"]).at[:, :, 0, 3].set(1.0).at[:, 0, 0, 20].set(1.0)
    cond = {**cond, "counts": counts, "counts_given": jnp.ones(2), "elements_given": jnp.zeros(2)}
    arguments = (x, lattice, logsnr, cond)
    params = random_params(shapes_of(net, arguments))
    return jax.jit(lambda *arguments: net.apply({"params": params}, *arguments)), arguments


def test_what_is_not_asked_for_is_not_attended_to():
    """More places than atoms: the rest of the picked sites say nothing, whatever stands there."""
    run, (x, *rest) = two_elements(attended_sites=6)
    before = run(x, *rest)
    after = run(x.at[:, 1, 0, 9].add(5.0), *rest)
    asked = (slice(None), slice(None), 0, jnp.array([3, 20]))
    np.testing.assert_allclose(after[0][asked], before[0][asked], atol=1e-5)
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)


def test_exchanging_two_atoms_of_an_element_exchanges_what_comes_out():
    run, (x, *rest) = two_elements(attended_sites=4, convolution="plane")
    x_pred, lattice = run(x, *rest)
    swapped, same_lattice = run(x.at[:, :, 0, 3].set(x[:, ::-1, 0, 3]), *rest)
    np.testing.assert_allclose(swapped[:, :, 0, 3], x_pred[:, ::-1, 0, 3], atol=1e-4)
    np.testing.assert_allclose(same_lattice, lattice, atol=1e-4)


def test_a_number_below_zero_is_named():
    with pytest.raises(UserError, match=r"config.model: attended_sites = -1: give 0"):
        models.create("unet3d", attended_sites=-1)
