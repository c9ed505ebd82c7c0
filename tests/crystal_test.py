import dataclasses
import io
import itertools
import pickle
import warnings

import ase.io
import numpy as np
import pytest
from crystal_cases import (
    crystals,
    diamond,
    difference,
    mirrored,
    perovskite,
    quartz,
    random_crystal,
    same_up_to_proper_rotation,
    shells,
    space_group,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import DummySpecies, Lattice, Structure
from pymatgen.io.vasp import Poscar
from shared_data import load

from unimat_jax.crystal import (
    Crystal,
    CrystalError,
    angles_of,
    lattice_from_parameters,
    min_distance,
    reduced_cell,
)


def left_handed_poscar() -> str:
    """Alpha-quartz in P3_121 with a and b exchanged: the same atoms in space, a left-handed cell."""
    quartz_ = quartz()
    rows = [" ".join(f"{x:.12f}" for x in row) for row in quartz_.lattice[[1, 0, 2]]]
    sites = [" ".join(f"{x:.12f}" for x in row) for row in quartz_.frac_coords[:, [1, 0, 2]]]
    return "\n".join(["left-handed quartz", "1.0", *rows, "Si O", "3 6", "Direct", *sites]) + "\n"


# --- The proof that two crystals are the same must itself be able to fail. ---


def test_mirror_image_is_not_the_same_crystal():
    assert space_group(quartz()) == 152
    assert space_group(mirrored(quartz())) == 154
    assert not same_up_to_proper_rotation(quartz(), mirrored(quartz()))
    assert same_up_to_proper_rotation(quartz(), mirrored(quartz()), allow_mirror=True)


def test_same_crystal_in_another_orientation_is_the_same():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    rotation *= np.linalg.det(rotation)
    original = quartz()
    turned = Crystal(original.atomic_numbers, original.frac_coords + 0.3, original.lattice @ rotation)
    assert same_up_to_proper_rotation(original, turned)
    moved = original.frac_coords.copy()
    moved[0, 0] += 0.01
    assert not same_up_to_proper_rotation(original, Crystal(original.atomic_numbers, moved, original.lattice))


# --- Handedness. ---


def test_left_handed_poscar_of_quartz_stays_p3_121():
    structure = Poscar.from_str(left_handed_poscar()).structure
    assert np.linalg.det(structure.lattice.matrix) < 0
    # What goes wrong without care: lengths and angles of the left-handed cell give a right-handed one.
    cell = lattice_from_parameters(np.array(structure.lattice.abc), np.array(structure.lattice.angles))
    assert space_group(Crystal.create(structure.atomic_numbers, structure.frac_coords, cell)) == 154

    crystal = Crystal.from_pymatgen(structure)
    assert np.linalg.det(crystal.lattice) > 0
    parameters = lattice_from_parameters(crystal.lengths, crystal.angles)
    rebuilt = Crystal.create(crystal.atomic_numbers, crystal.frac_coords, parameters)
    for version in (crystal, rebuilt, crystal.niggli(), crystal.primitive(), rebuilt.niggli().primitive()):
        assert space_group(version) == 152
        assert same_up_to_proper_rotation(quartz(), version)


@settings(max_examples=40)
@given(crystals(), st.permutations(range(3)))
def test_create_keeps_atoms_in_place_and_cell_right_handed(crystal, order):
    order = list(order)
    again = Crystal.create(crystal.atomic_numbers, crystal.frac_coords[:, order], crystal.lattice[order])
    assert np.linalg.det(again.lattice) > 0
    np.testing.assert_allclose(
        again.frac_coords @ again.lattice, crystal.frac_coords @ crystal.lattice, atol=1e-9 * crystal.lengths.max()
    )
    assert same_up_to_proper_rotation(crystal, again)


@settings(max_examples=30)
@given(crystals())
def test_niggli_keeps_the_crystal(crystal):
    reduced = crystal.niggli()
    assert reduced.volume == pytest.approx(crystal.volume, rel=1e-6)
    assert reduced.lengths[0] <= reduced.lengths[1] + 1e-3 and reduced.lengths[1] <= reduced.lengths[2] + 1e-3
    assert reduced.min_distance == pytest.approx(crystal.min_distance, rel=1e-6)
    assert same_up_to_proper_rotation(reduced, crystal)


def test_niggli_and_distance_stand_the_noise_of_float32():
    # A cell as such noise makes them: spglib finds no Niggli cell for a few in a thousand at its own tolerance.
    rng = np.random.default_rng(0)
    hexagonal = np.array([3.2, 3.2, 38.6]), np.array([90.0, 90.0, 120.0])
    for _ in range(300):
        lengths, angles = (values * (1 + 1e-7 * rng.normal(size=3)) for values in hexagonal)
        crystal = Crystal.create([6, 6], [[0, 0, 0], [1 / 3, 2 / 3, 0]], lattice_from_parameters(lengths, angles))
        assert crystal.min_distance == pytest.approx(3.2 / np.sqrt(3), abs=1e-4)
        np.testing.assert_allclose(crystal.niggli().lengths, [3.2, 3.2, 38.6], atol=1e-3)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 1, 1), (1, 2, 1), (1, 1, 3), (2, 1, 2)]))
def test_primitive_undoes_a_supercell(seed, repeats):
    crystal = random_crystal(np.random.default_rng(seed), max_atoms=5)
    big = Crystal.from_pymatgen(crystal.to_pymatgen().make_supercell(repeats))
    small = big.primitive()
    assert big.num_atoms == crystal.num_atoms * np.prod(repeats)
    assert small.num_atoms == crystal.primitive().num_atoms <= crystal.num_atoms
    assert same_up_to_proper_rotation(small.primitive(), crystal.primitive(), tolerance=1e-2)


def test_primitive_neither_turns_nor_symmetrises():
    frac = perovskite().frac_coords + 1e-3 * np.random.default_rng(0).normal(size=(5, 3))
    turned = perovskite().lattice @ np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    crystal = Crystal.create(perovskite().atomic_numbers, frac, turned)
    small = crystal.primitive(tolerance=0.05)
    offset = (small.frac_coords @ small.lattice) @ np.linalg.inv(crystal.lattice) - crystal.frac_coords
    np.testing.assert_allclose(offset, np.round(offset), atol=1e-9)
    assert space_group(crystal, 0.05) == 221 and space_group(small, 1e-4) == 1


@pytest.mark.parametrize("repeats", [(2, 1, 1), (1, 1, 2), ((1, 1, 0), (-1, 2, 0), (0, 0, 1))])
def test_supercell_of_quartz_comes_back_as_p3_121(repeats):
    big = Crystal.from_pymatgen(quartz().to_pymatgen().make_supercell(repeats))
    assert big.num_atoms > 9
    for small in (big.primitive(), big.niggli().primitive(), big.primitive().niggli()):
        assert small.num_atoms == 9
        assert space_group(small) == 152


def test_other_crystals_are_not_the_same():
    assert not same_up_to_proper_rotation(perovskite(), diamond())
    assert len(shells(perovskite(), 5.0)) == 5


# --- Lengths, angles, distances. ---


@settings(max_examples=100)
@given(crystals())
def test_lattice_from_parameters_inverts_lengths_and_angles(crystal):
    cell = lattice_from_parameters(crystal.lengths, crystal.angles)
    np.testing.assert_allclose(np.linalg.norm(cell, axis=1), crystal.lengths, rtol=1e-9)
    np.testing.assert_allclose(angles_of(cell), crystal.angles, atol=1e-6)
    np.testing.assert_allclose(cell @ cell.T, crystal.lattice @ crystal.lattice.T, atol=1e-6)
    reference = Lattice(crystal.lattice)
    np.testing.assert_allclose(crystal.angles, reference.angles, atol=1e-6)
    assert crystal.volume == pytest.approx(reference.volume, rel=1e-9)


def test_density_is_the_textbooks():
    assert quartz().density == pytest.approx(2.65, abs=0.01)
    assert perovskite().density == pytest.approx(5.12, abs=0.01)
    assert diamond().density == pytest.approx(3.51, abs=0.01)


def test_angles_that_span_no_cell_give_nan():
    assert np.isnan(lattice_from_parameters(np.ones(3), np.array([30.0, 30.0, 90.0]))).any()
    assert np.isfinite(lattice_from_parameters(np.ones(3), np.array([60.0, 60.0, 90.0]))).all()


@pytest.mark.parametrize("skewed", [False, True])
@settings(max_examples=60)
@given(crystals(max_atoms=6), st.lists(st.integers(-3, 3), min_size=3, max_size=3))
def test_min_distance_is_that_of_a_wide_search(skewed, crystal, multiples):
    if skewed:  # the same lattice by a basis of long vectors, as no reduced cell has
        i, j, k = multiples
        basis = np.array([[1, 0, 0], [i, 1, 0], [j, k, 1]])
        frac = crystal.frac_coords @ np.linalg.inv(basis)
        distance = Crystal.create(crystal.atomic_numbers, frac, basis @ crystal.lattice).min_distance
    else:
        distance = crystal.min_distance
    reach = np.ceil(crystal.lengths.min() * np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0) + 1).astype(int)
    shifts = np.array(list(itertools.product(*[range(-n, n + 1) for n in reach])))
    frac = crystal.frac_coords - np.floor(crystal.frac_coords)
    vectors = (frac[:, None, None, :] - frac[None, :, None, :] + shifts) @ crystal.lattice
    distances = np.linalg.norm(vectors, axis=-1)
    assert distance == pytest.approx(distances[distances > 1e-9].min(), abs=1e-6)


def test_min_distance_counts_an_atoms_own_images():
    assert min_distance(np.zeros((1, 3)), 3.0 * np.eye(3)) == pytest.approx(3.0)
    flat = lattice_from_parameters(np.array([10.0, 10.0, 10.0]), np.array([90.0, 90.0, 170.0]))
    assert min_distance(np.zeros((1, 3)), flat) == pytest.approx(np.linalg.norm(flat[0] + flat[1]))


# --- Files and other packages. ---


def through_cif(crystal: Crystal) -> Crystal:
    return Crystal.from_pymatgen(Structure.from_str(crystal.to_cif(), fmt="cif"))


def through_extxyz(crystal: Crystal) -> Crystal:
    atoms = ase.io.read(io.StringIO(crystal.to_extxyz()), format="extxyz")
    assert isinstance(atoms, ase.Atoms)
    assert atoms.info.get("uid", "") == crystal.uid
    assert atoms.pbc.all()
    return Crystal.from_ase(atoms)


def through_poscar(crystal: Crystal) -> Crystal:
    return Crystal.from_pymatgen(Poscar.from_str(crystal.to_poscar()).structure)


def through_pymatgen(crystal: Crystal) -> Crystal:
    return Crystal.from_pymatgen(crystal.to_pymatgen())


def through_ase(crystal: Crystal) -> Crystal:
    return Crystal.from_ase(crystal.to_ase())


ROADS = [through_cif, through_extxyz, through_poscar, through_pymatgen, through_ase]


@pytest.mark.parametrize("road", ROADS)
@settings(max_examples=25)
@given(crystals(elements=tuple(range(1, 104))))
def test_round_trip_of_any_crystal(road, crystal):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen's about elements without electronegativity
        again = road(crystal)
    assert difference(crystal, again) < 1e-5


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["quartz", "left-handed quartz", "perovskite", "diamond"])
def test_round_trip_of_known_crystals(road, name):
    known = {"quartz": quartz, "perovskite": perovskite, "diamond": diamond}
    crystal = known[name]() if name in known else Crystal.from_pymatgen(Poscar.from_str(left_handed_poscar()).structure)
    again = road(crystal)
    assert difference(crystal, again) < 1e-5
    assert space_group(again) == {"perovskite": 221, "diamond": 227}.get(name, 152)


@pytest.mark.parametrize("split", ["perov_5/val", "carbon_24/val", "mp_20/val"])
def test_round_trip_of_real_crystals(split):
    for crystal, road in zip(load(split, 40), itertools.cycle(ROADS), strict=False):
        again = road(crystal)
        assert difference(crystal, again) < 1e-5, (crystal.uid, road.__name__)


def test_heavy_elements_pass_through_every_file():
    crystal = Crystal.create([118, 104, 112], [[0, 0, 0], [0.5, 0.5, 0.5], [0.25, 0, 0]], 6.0 * np.eye(3), "heavy")
    for road in ROADS:
        assert difference(crystal, road(crystal)) < 1e-5


def test_uid_and_properties_go_into_files():
    crystal = Crystal.create([11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], 3.5 * np.eye(3), "abc-1", {"band_gap": 5.0})
    assert "data_abc-1" in crystal.to_cif()
    assert crystal.to_ase().info == {"uid": "abc-1", "band_gap": 5.0}
    assert "band_gap=5.0" in crystal.to_extxyz()
    assert crystal.to_poscar().splitlines()[0] == "abc-1"
    for uid in ("", "two words", 'a "quoted" one', "Sr=Ti", "0017", "1e5", "T"):
        renamed = dataclasses.replace(crystal, uid=uid)
        atoms = ase.io.read(io.StringIO(renamed.to_extxyz()), format="extxyz")
        assert str(atoms.info.get("uid", "")) == uid
        assert atoms.info["band_gap"] == 5.0
        assert difference(renamed, through_cif(renamed)) < 1e-5


def test_formula_counts_atoms_of_the_cell_and_hides_ones():
    assert perovskite().formula == "SrTiO3"
    assert quartz().formula == "Si3O6"
    assert Crystal.create([1] * 11, np.random.default_rng(0).random((11, 3)), 9 * np.eye(3)).formula == "H11"


# --- What is refused. ---


@pytest.mark.parametrize(
    ("numbers", "frac", "lattice", "reason"),
    [
        ([], np.zeros((0, 3)), np.eye(3), "no_atoms"),
        ([1], np.zeros((2, 3)), np.eye(3), "bad_shape"),
        ([1], np.zeros((1, 3)), np.eye(2), "bad_shape"),
        ([0], np.zeros((1, 3)), np.eye(3), "bad_element"),
        ([119], np.zeros((1, 3)), np.eye(3), "bad_element"),
        ([1], [[0, np.nan, 0]], np.eye(3), "not_finite"),
        ([1], np.zeros((1, 3)), np.diag([1, 1, np.inf]), "not_finite"),
        ([1], np.zeros((1, 3)), np.zeros((3, 3)), "cell_degenerate"),
        ([1], np.zeros((1, 3)), [[1, 0, 0], [0, 1, 0], [1, 1, 0]], "cell_degenerate"),
    ],
)
def test_create_names_what_is_wrong(numbers, frac, lattice, reason):
    with pytest.raises(CrystalError) as caught:
        Crystal.create(numbers, frac, lattice, "case-7")
    assert caught.value.reason == reason
    assert "case-7" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).reason == reason  # process pools


def test_disordered_vacancy_and_molecule_are_refused():
    cell = Lattice.cubic(4.0)
    mixed = Structure(cell, [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    partial = Structure(cell, [{"Fe": 0.9}], [[0, 0, 0]])
    vacancy = Structure(cell, ["Fe", DummySpecies("X", 0)], [[0, 0, 0], [0.5, 0.5, 0.5]])
    for structure, reason in [(mixed, "disordered"), (partial, "disordered"), (vacancy, "bad_element")]:
        with pytest.raises(CrystalError) as caught:
            Crystal.from_pymatgen(structure)
        assert caught.value.reason == reason
    with pytest.raises(CrystalError) as caught:
        Crystal.from_ase(ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.7]]))
    assert caught.value.reason == "not_periodic"


def test_deuterium_and_oxidation_states_are_read_as_their_elements():
    structure = Structure(Lattice.cubic(4.0), ["D+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert Crystal.from_pymatgen(structure).atomic_numbers.tolist() == [1, 17]


@pytest.mark.parametrize("old", [True, False])
def test_what_spglib_cannot_reduce_stays_as_it_is(old, monkeypatch):
    """Whether spglib says it by None or raises, which ASE switches by the environment."""
    monkeypatch.setenv("SPGLIB_OLD_ERROR_HANDLING", str(old))
    lattice = np.array([[-997.6278392, 1237.66966209, -1470.14767856], [-8197.79195888, -5621.89121389, 1965.24907915],
                        [1371.2114942, 5130.07544823, 9778.7832786]])  # fmt: skip
    flat = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert (reduced_cell(flat) == flat).all()
    assert Crystal.create([3], [[0, 0, 0]], lattice).min_distance > 1000
