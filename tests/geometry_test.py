import numpy as np
import pytest
from crystal_cases import diamond, perovskite, quartz, random_crystal
from hypothesis import given, settings
from hypothesis import strategies as st

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.geometry import shells, strict_reason
from unimat_jax.periodic_table import covalent_radii


def test_first_shells_of_textbook_crystals():
    found = {
        "quartz": (quartz(), [4, 4, 4, 2, 2, 2, 2, 2, 2], [1.60, 1.62]),
        "perovskite": (perovskite(), [12, 6, 2, 2, 2], [1.95, 2.77]),
        "diamond": (diamond(), [4, 4], [1.54, 1.55]),
        "fcc": (Crystal.create([29], [[0, 0, 0]], 1.8 * (1 - np.eye(3))), [12], [2.54, 2.55]),
    }
    for name, (crystal, coordination, (low, high)) in found.items():
        near = shells(crystal)
        assert near.coordination.tolist() == coordination, name
        assert low < near.bond_lengths.min() and near.bond_lengths.max() < high, name
        assert len(near.bond_lengths) == sum(coordination)
        assert strict_reason(crystal, near.closest_ratio) == ""


def test_own_images_count_in_the_strict_rule():
    thin = Crystal.create([6], [[0, 0, 0]], np.diag([5.0, 5.0, 1.0]))
    near = shells(thin)
    assert near.nearest[0] == pytest.approx(1.0) and near.coordination[0] == 2
    assert near.closest_ratio == pytest.approx(1.0 / (2 * 0.76))
    assert strict_reason(thin, near.closest_ratio) == "atoms_too_close"
    wider = shells(Crystal.create([6], [[0, 0, 0]], np.diag([5.0, 5.0, 1.07])))
    assert strict_reason(thin, wider.closest_ratio) == ""


@pytest.mark.parametrize(("length", "reason"), [(0.5, "density_out_of_range"), (20.0, "density_out_of_range"), (3, "")])
def test_densities_of_no_solid(length, reason):
    crystal = Crystal.create([6], [[0, 0, 0]], length * np.eye(3))
    assert strict_reason(crystal, 1.0) == reason


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_shells_agree_with_ase_and_with_the_cell_s_choice(seed):
    from ase.neighborlist import primitive_neighbor_list

    rng = np.random.default_rng(seed)
    crystal = random_crystal(rng, 8)
    near = shells(crystal)
    i, distance = primitive_neighbor_list(
        "id", (True,) * 3, crystal.lattice, crystal.frac_coords @ crystal.lattice, float(near.nearest.max()) + 0.01
    )
    by_ase = [distance[i == atom].min() for atom in range(crystal.num_atoms)]
    np.testing.assert_allclose(near.nearest, by_ase, atol=1e-6)
    assert near.closest_ratio <= near.nearest.min() / (2 * covalent_radii(crystal.atomic_numbers).min()) + 1e-9
    shear = np.array([[1, 2, 0], [0, 1, 0], [-1, 0, 1]])
    other = Crystal.create(
        crystal.atomic_numbers, crystal.frac_coords @ np.linalg.inv(shear) + 0.3, shear @ crystal.lattice
    )
    np.testing.assert_allclose(shells(other).nearest, near.nearest, atol=1e-6)


def test_many_atoms_come_in_blocks(monkeypatch):
    from unimat_jax.evaluation import geometry

    crystal = random_crystal(np.random.default_rng(0), 8)
    whole = shells(crystal)
    monkeypatch.setattr(geometry, "_BLOCK", 1)
    part = shells(crystal)
    np.testing.assert_array_equal(whole.nearest, part.nearest)
    np.testing.assert_array_equal(whole.coordination, part.coordination)
    assert whole.closest_ratio == part.closest_ratio


def test_every_element_has_a_radius():
    radii = covalent_radii(np.arange(1, 119))
    assert np.isfinite(radii).all() and radii.min() > 0.2 and radii.max() < 3
    assert radii[0] == 0.31 and radii[117] == 1.5
