"""Soft spheres: energies and forces that can be worked out by hand, their derivatives, and a budget that is kept."""

import numpy as np
import pytest
from ase import Atoms

from unimat_jax.stability.soft_sphere import FMAX, STIFFNESS, SoftSphere, spread

DIAMETERS = {(1, 1): 1.0, (1, 2): 1.5, (2, 1): 1.5, (2, 2): 2.0}


def cell(positions, numbers, size=10.0):
    return Atoms(numbers=numbers, positions=positions, cell=size * np.eye(3), pbc=True)


def test_one_pair_that_overlaps_by_half_an_angstrom():
    atoms = cell([[0, 0, 0], [1.0, 0, 0]], [1, 2])
    atoms.calc = SoftSphere(DIAMETERS)
    assert atoms.get_potential_energy() == pytest.approx(0.5 * STIFFNESS * 0.5**2)
    np.testing.assert_allclose(atoms.get_forces(), STIFFNESS * np.array([[-0.5, 0, 0], [0.5, 0, 0]]), atol=1e-12)


def test_an_atom_meets_its_own_images():
    """A cubic cell of 1.8 A, diameter 2 A: six neighbours, three pairs for each cell."""
    atoms = cell([[0, 0, 0]], [2], size=1.8)
    atoms.calc = SoftSphere(DIAMETERS)
    assert atoms.get_potential_energy() == pytest.approx(3 * 0.5 * STIFFNESS * 0.2**2)
    np.testing.assert_allclose(atoms.get_forces(), 0, atol=1e-12)
    assert atoms.get_stress()[:3] == pytest.approx(-STIFFNESS * 0.2 / 1.8**2), "pressure outwards"


def test_atoms_that_do_not_touch_feel_nothing():
    atoms = cell([[0, 0, 0], [1.6, 0, 0]], [1, 2])
    atoms.calc = SoftSphere(DIAMETERS)
    assert atoms.get_potential_energy() == 0 and not atoms.get_forces().any() and not atoms.get_stress().any()


def test_forces_and_stress_are_the_derivatives_of_the_energy():
    rng = np.random.default_rng(0)
    atoms = Atoms(numbers=[1, 2, 2, 1, 2], scaled_positions=rng.random((5, 3)), pbc=True,
                  cell=2.2 * np.eye(3) + rng.normal(scale=0.2, size=(3, 3)))  # fmt: skip
    atoms.calc = SoftSphere(DIAMETERS)
    forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
    assert np.abs(forces).max() > 0.1 and np.abs(stress).max() > 0.1

    def energy(strain=None, atom=0, axis=0, shift=0.0):
        moved = atoms.copy()
        moved.calc = SoftSphere(DIAMETERS)
        if strain is not None:
            moved.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        positions = moved.positions.copy()
        positions[atom, axis] += shift
        moved.positions = positions
        return moved.get_potential_energy()

    h = 1e-5
    for atom, axis in ((0, 0), (2, 1), (4, 2)):
        slope = (energy(atom=atom, axis=axis, shift=h) - energy(atom=atom, axis=axis, shift=-h)) / (2 * h)
        assert forces[atom, axis] == pytest.approx(-slope, abs=1e-6)
    for i, j in ((0, 0), (0, 1), (2, 2), (1, 2)):
        strain = np.zeros((3, 3))
        strain[i, j] = strain[j, i] = h if i == j else h / 2
        slope = (energy(strain) - energy(-strain)) / (2 * h) / atoms.get_volume()
        assert stress[i, j] == pytest.approx(slope, abs=1e-6)


def overlapping():
    return cell(np.random.default_rng(1).random((6, 3)) * 4.0, [1, 1, 2, 2, 1, 2], size=4.0)


def least_gap(atoms):
    """Angstrom by which the nearest pair is nearer than its diameter (negative) or farther."""
    distances = atoms.get_all_distances(mic=True)
    pairs = [(i, j) for i in range(len(atoms)) for j in range(i)]
    return min(distances[i, j] - DIAMETERS[atoms.numbers[i], atoms.numbers[j]] for i, j in pairs)


def test_atoms_are_spread_in_their_cell_and_the_start_is_left_alone():
    start = overlapping()
    found = spread(start, DIAMETERS, max_force_calls=200)
    assert found.converged and 1 < found.force_calls <= 200
    assert least_gap(start) < -0.5 and least_gap(found.atoms) > -FMAX / STIFFNESS - 0.01
    assert found.atoms.get_volume() == start.get_volume() and (start.positions == overlapping().positions).all()


def test_the_cell_grows_where_it_may():
    start = overlapping()
    start.set_cell(2.2 * np.eye(3), scale_atoms=True)
    found = spread(start, DIAMETERS, max_force_calls=60, variable_cell=True)
    assert found.atoms.get_volume() > 1.2 * start.get_volume()
    assert least_gap(found.atoms) > least_gap(start)


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_the_budget_of_force_calls_is_kept(budget, monkeypatch):
    calls = []
    original = SoftSphere.calculate
    monkeypatch.setattr(SoftSphere, "calculate", lambda self, *a, **k: (calls.append(1), original(self, *a, **k))[1])
    found = spread(overlapping(), DIAMETERS, max_force_calls=budget)
    assert found.force_calls == len(calls) == budget and not found.converged
