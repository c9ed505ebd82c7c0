"""Conditions: their shares, what dropping leaves, and the sites that stay free; densify and occupancy below them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crystal_cases import perovskite, quartz

from unimat_jax.conditioning import drop_properties, free_sites, make_condition, training_condition
from unimat_jax.densify import densify, is_element, occupancy
from unimat_jax.periodic_table import Table
from unimat_jax.representation import NULL_VALUE, UniMatSpec, batch_records, encode, model_inputs

SPEC = UniMatSpec(max_atoms_per_element=6, max_atoms=10)
SMALL = UniMatSpec(max_atoms_per_element=6, max_atoms=10, table=Table.of_elements(["Sr", "Ti", "O", "Si"]))


def batch_of(spec, crystals, properties):
    records = [encode(crystal, spec) for crystal in crystals]
    records = [records[i % len(records)] for i in range(len(properties))]
    batch = model_inputs(batch_records(records, spec.max_atoms), spec)
    return {**batch, "properties": np.asarray(properties, np.float32)}


def conditions(number, seed=0, **shares):
    """A batch of perovskites and quartzes with two properties, the second often missing, and its training condition."""
    properties = np.stack([np.arange(number), np.where(np.arange(number) % 4 == 0, np.nan, 1.5)], 1)
    batch = batch_of(SMALL, [perovskite(), quartz()], properties)
    settings = {"counts_share": 0.5, "elements_share": 0.25, "property_drop_rate": 0.2} | shares
    return batch, jax.device_get(training_condition(jax.random.key(seed), batch, SMALL, **settings))


@pytest.mark.parametrize("spec", [SPEC, SMALL], ids=["full", "small"])
def test_densify_puts_each_atom_in_its_slot_and_null_elsewhere(spec):
    crystals = [perovskite(), quartz()]
    batch = batch_of(spec, crystals, np.zeros((2, 0)))
    x, occupied = np.asarray(densify(batch, spec)), np.asarray(occupancy(batch, spec))
    assert x.shape == (2, *spec.grid, 3) and occupied.shape == (2, *spec.grid)
    numbers = np.broadcast_to(spec.table.atomic_numbers, spec.grid)
    for i, crystal in enumerate(crystals):
        assert sorted(numbers[occupied[i]]) == sorted(crystal.atomic_numbers)
        for z in set(crystal.atomic_numbers.tolist()):
            found = x[i][(numbers == z) & occupied[i]]
            np.testing.assert_allclose(found, 2 * crystal.frac_coords[crystal.atomic_numbers == z] - 1, atol=1e-6)
    assert (x[~occupied] == NULL_VALUE).all()


def test_places_without_an_element():
    assert np.asarray(is_element(SPEC)).sum() == 118
    assert (
        np.asarray(is_element(SMALL)).sum() == (SMALL.table.atomic_numbers > 0).sum() < SMALL.table.atomic_numbers.size
    )


def test_the_shares_of_the_three_modes():
    _, cond = conditions(2000)
    assert set(np.unique(cond["counts_given"])) == set(np.unique(cond["elements_given"])) == {0.0, 1.0}
    assert not (cond["counts_given"] * cond["elements_given"]).any()
    assert cond["counts_given"].mean() == pytest.approx(0.5, abs=0.05)
    assert cond["elements_given"].mean() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(("shares", "given"), [((1.0, 0.0), (1, 0)), ((0.0, 1.0), (0, 1)), ((0.0, 0.0), (0, 0))])
def test_a_share_of_one_is_always_and_of_zero_never(shares, given):
    _, cond = conditions(200, counts_share=shares[0], elements_share=shares[1])
    assert (cond["counts_given"] == given[0]).all() and (cond["elements_given"] == given[1]).all()


def test_what_is_given_is_the_composition_and_what_is_dropped_is_zero():
    batch, cond = conditions(40)
    occupied = np.asarray(occupancy(batch, SMALL))
    for i in range(40):
        np.testing.assert_array_equal(cond["counts"][i], occupied[i] * cond["counts_given"][i])
        np.testing.assert_array_equal(cond["elements"][i], occupied[i].any(0) * cond["elements_given"][i])


def test_properties_are_dropped_one_by_one_and_missing_ones_always():
    batch, cond = conditions(2000)
    given = cond["properties_given"]
    missing = np.isnan(batch["properties"])
    assert missing.sum() == 500 and not given[missing].any()
    assert np.isfinite(cond["properties"]).all()
    np.testing.assert_array_equal(cond["properties"], np.where(given > 0, np.nan_to_num(batch["properties"]), 0))
    assert given[:, 0].mean() == pytest.approx(0.8, abs=0.04)
    both = ~missing[:, 1]
    assert given[both, 1].mean() == pytest.approx(0.8, abs=0.04)
    assert given[both].prod(1).mean() == pytest.approx(0.64, abs=0.05)  # each by its own draw
    assert conditions(50, property_drop_rate=0.0)[1]["properties_given"][:, 0].all()
    assert not conditions(50, property_drop_rate=1.0)[1]["properties_given"].any()


def test_each_key_draws_anew_and_the_same_key_the_same():
    (_, a), (_, b), (_, c) = conditions(200, 1), conditions(200, 1), conditions(200, 2)
    np.testing.assert_array_equal(a["counts_given"], b["counts_given"])
    assert (a["counts_given"] != c["counts_given"]).any()
    assert (a["properties_given"] != c["properties_given"]).any()


def test_free_sites_of_each_mode():
    batch, cond = conditions(60)
    free = np.asarray(free_sites(cond, SMALL))
    occupied, real = np.asarray(occupancy(batch, SMALL)), SMALL.table.atomic_numbers > 0
    assert not free[:, :, ~real].any()
    for i in range(60):
        if cond["counts_given"][i]:
            np.testing.assert_array_equal(free[i], occupied[i])  # exact counts fix every other site
        elif cond["elements_given"][i]:
            np.testing.assert_array_equal(free[i], np.broadcast_to(occupied[i].any(0), SMALL.grid))
        else:
            np.testing.assert_array_equal(free[i], np.broadcast_to(real, SMALL.grid))


def test_a_condition_on_a_place_without_element_frees_nothing_there():
    ones, grid = jnp.ones(1), SPEC.grid
    everywhere = make_condition(jnp.ones((1, *grid)), ones, jnp.ones((1, *grid[1:])), ones, *[jnp.zeros((1, 0))] * 2)
    assert int(free_sites(everywhere, SPEC).sum()) == grid[0] * 118


def test_the_second_branch_keeps_the_composition():
    _, cond = conditions(30)
    without = jax.device_get(drop_properties(cond))
    assert cond["properties"].any() and cond["properties_given"].any()
    assert not without["properties"].any() and not without["properties_given"].any()
    for name in ("counts", "counts_given", "elements", "elements_given"):
        np.testing.assert_array_equal(without[name], cond[name])
