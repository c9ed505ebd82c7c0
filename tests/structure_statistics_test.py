import numpy as np
import pytest
from crystal_cases import quartz

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.structure_statistics import describe


def test_describe_gives_textbook_numbers():
    numbers = describe(quartz())
    assert numbers["space_group_number"] == numbers["space_group_number_loose"] == 152
    assert numbers["formula"] == "Si3O6"
    assert numbers["volume_per_atom"] == pytest.approx(113.0 / 9, abs=0.05)
    assert numbers["density"] == pytest.approx(2.65, abs=0.01)
    assert numbers["min_distance"] == pytest.approx(1.60, abs=0.02)
    rattled = quartz().frac_coords + 0.003 * np.random.default_rng(0).normal(size=(9, 3))
    loose = describe(Crystal.create(quartz().atomic_numbers, rattled, quartz().lattice))
    assert (loose["space_group_number"], loose["space_group_number_loose"]) == (1, 152)


def test_describe_says_why_there_is_no_space_group():
    numbers = describe(Crystal.create([1, 1], [[0, 0, 0], [0, 0, 1e-6]], 3.0 * np.eye(3)))
    assert numbers["space_group_number"] is None
    assert "0.01 A" in numbers["space_group_failure"]
