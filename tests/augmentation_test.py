import itertools

import numpy as np
import pytest
from crystal_cases import (
    cluster_radius,
    crystals,
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
from shared_data import load

from unimat_jax.augmentation import augment, half_turns, permute_axes, random_rotations, shift, shuffle_slots
from unimat_jax.crystal import Crystal
from unimat_jax.periodic_table import COLUMN, ROW
from unimat_jax.representation import batch_records, crystal_of_record, encode

EVERYTHING = {"shuffle_atoms": True, "random_shift": True, "random_axes": True}
NOTHING = dict.fromkeys(EVERYTHING, False)


def batch_of(*crystals_: Crystal, max_atoms: int = 24) -> dict[str, np.ndarray]:
    return batch_records([encode(crystal) for crystal in crystals_], max_atoms)


def crystals_of(batch) -> list[Crystal]:
    """The crystals of a batch; what stands beyond num_atoms is padding."""
    result = []
    for slots, frac, cell, number in zip(
        batch["slots"], batch["frac_coords"], batch["lattice"], batch["num_atoms"], strict=True
    ):
        assert (slots[number:] == -1).all(), "padding became an atom"
        assert (slots[:number] >= 0).all(), "an atom became padding"
        assert len({tuple(slot) for slot in slots[:number].tolist()}) == number, "two atoms in one slot"
        assert (frac >= 0).all() and (frac < 1).all()
        result.append(crystal_of_record({"slots": slots[:number], "frac_coords": frac[:number], "lattice": cell}))
    return result


def changed(batch, name: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    number = len(batch["num_atoms"])
    if name == "shuffle_slots":
        return shuffle_slots(batch, rng.random(batch["slots"].shape[:2]))
    if name == "shift":
        return shift(batch, rng.random((number, 3)))
    if name.startswith("permutation"):
        return permute_axes(batch, np.full(number, int(name[-1])))
    if name == "half_turns":
        return half_turns(batch)
    return augment(batch, rng, **EVERYTHING)


PERMUTATIONS = [f"permutation {i}" for i in range(6)]
CHANGES = ["shuffle_slots", "shift", *PERMUTATIONS, "half_turns", "augment"]


@pytest.mark.parametrize("name", CHANGES)
@settings(max_examples=25)
@given(crystals(max_atoms=8), st.integers(0, 2**32 - 1))
def test_the_crystal_stays_the_same_up_to_a_proper_rotation(name, crystal, seed):
    (again,) = crystals_of(changed(batch_of(crystal), name, seed))
    assert same_up_to_proper_rotation(crystal, again)


@pytest.mark.parametrize("name", CHANGES)
def test_neighbour_shells_stay(name):
    (again,) = crystals_of(changed(batch_of(quartz()), name, 5))
    for before, after in zip(shells(quartz(), 6.0), shells(again, 6.0), strict=True):
        np.testing.assert_allclose(after, before, atol=2e-3)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("seed", range(4))
def test_quartz_stays_p3_121(name, seed):
    (again,) = crystals_of(changed(batch_of(quartz()), name, seed))
    assert space_group(again) == 152
    assert space_group(again.niggli()) == 152
    assert space_group(again.primitive()) == 152
    assert same_up_to_proper_rotation(quartz(), again)
    assert not same_up_to_proper_rotation(mirrored(quartz()), again)
    assert cluster_radius(quartz()) > 6.0


@pytest.mark.parametrize("choice", [3, 4, 5])
def test_an_odd_permutation_without_inversion_would_be_found_out(choice):
    batch = permute_axes(batch_of(quartz()), np.array([choice]))
    (wrong,) = crystals_of({**batch, "frac_coords": np.mod(-batch["frac_coords"], 1.0)})
    assert space_group(wrong) == 154
    assert not same_up_to_proper_rotation(quartz(), wrong)


@pytest.mark.parametrize("split", ["perov_5/val", "carbon_24/val", "mp_20/val"])
def test_real_crystals_stay_the_same(split):
    real = load(split, 12)
    for crystal, again in zip(real, crystals_of(changed(batch_of(*real), "augment", 3)), strict=True):
        assert same_up_to_proper_rotation(crystal, again, tolerance=2e-3), crystal.uid


def test_the_six_permutations_are_all_different_and_the_first_does_nothing():
    crystal = random_crystal(np.random.default_rng(1), 8)
    batch = batch_of(crystal)
    lengths = [tuple(permute_axes(batch, np.array([i]))["lattice"][0, :3].tolist()) for i in range(6)]
    assert len(set(lengths)) == 6
    assert {tuple(sorted(x)) for x in lengths} == {tuple(sorted(lengths[0]))}
    (first,) = crystals_of(permute_axes(batch, np.array([0])))
    assert difference(crystal, first) < 1e-5


def in_a_cell(angles: tuple[float, float, float], seed: int = 3) -> dict[str, np.ndarray]:
    batch = batch_of(random_crystal(np.random.default_rng(seed), 8))
    return {**batch, "lattice": np.array([[4.0, 5.0, 6.0, *angles]], np.float32)}


@pytest.mark.parametrize(
    "angles, allowed",
    [
        ((90, 90, 90), [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]),
        ((100, 90, 90), [(1, 1, 1), (1, -1, -1)]),
        ((90, 100, 90), [(1, 1, 1), (-1, 1, -1)]),
        ((90, 90, 100), [(1, 1, 1), (-1, -1, 1)]),
        ((100, 90, 80), [(1, 1, 1)]),
    ],
)
def test_all_images_by_half_turns_that_keep_the_cell_become_one(angles, allowed):
    batch = in_a_cell(angles)
    chosen = half_turns(batch)["frac_coords"]
    for signs in itertools.product((1, -1), repeat=3):
        image = {**batch, "frac_coords": np.mod(np.array(signs, np.float32) * batch["frac_coords"], 1.0)}
        away = half_turns(image)["frac_coords"] - chosen
        together = bool(np.abs(away - np.round(away)).max() < 1e-5)
        assert together == (signs in allowed), signs


def test_after_half_turns_two_displaced_perovskites_point_one_way_wherever_the_origin_is():
    up = perovskite()
    moved = np.array(up.frac_coords)
    moved[np.asarray(up.atomic_numbers) == 22] += [0, 0, 0.04]
    down = np.array(up.frac_coords)
    down[np.asarray(up.atomic_numbers) == 22] -= [0, 0, 0.04]
    found = []
    for frac, origin in itertools.product((moved, down), (0.0, 0.3)):
        batch = batch_of(Crystal(up.atomic_numbers, np.mod(frac + origin, 1.0), up.lattice))
        turned = half_turns(batch)
        elements = turned["slots"][0, :5, 2]
        frac = turned["frac_coords"][0, :5]
        ti, sr = (frac[elements == COLUMN[z]][0] for z in (22, 38))
        found.append(float((ti - sr)[2] % 1.0))
    np.testing.assert_allclose(found, found[0], atol=1e-5)
    assert abs(found[0] - 0.5) > 0.03


def test_each_crystal_of_a_batch_gets_its_own_permutation():
    batch = batch_of(*[random_crystal(np.random.default_rng(1), 8)] * 6)
    together = permute_axes(batch, np.arange(6))
    for i in range(6):
        alone = permute_axes(batch_of(random_crystal(np.random.default_rng(1), 8)), np.array([i]))
        np.testing.assert_array_equal(together["lattice"][i], alone["lattice"][0])
        np.testing.assert_array_equal(together["frac_coords"][i], alone["frac_coords"][0])


def test_shuffling_moves_atoms_only_among_the_slots_of_their_element():
    batch = batch_of(quartz(), perovskite())
    orders = set()
    for seed in range(200):
        shuffled = changed(batch, "shuffle_slots", seed)
        for before, after in zip(crystals_of(batch), crystals_of(shuffled), strict=True):
            assert difference(before, after) < 1e-6
        of_slot = {
            tuple(slot): frac for slot, frac in zip(shuffled["slots"][1], shuffled["frac_coords"][1], strict=True)
        }
        oxygen = [of_slot[level, ROW[8], COLUMN[8]] for level in range(3)]
        orders.add(tuple(np.argmin(frac) for frac in oxygen))  # each of the three O of SrTiO3 has its own zero
    assert len(orders) == 6, "not every order of three atoms appears in 200 draws"


def test_shift_is_modulo_one_and_the_same_for_all_atoms():
    crystal = quartz()
    (again,) = crystals_of(shift(batch_of(crystal), np.array([0.25, 0.5, 0.9])))
    moved = Crystal(crystal.atomic_numbers, crystal.frac_coords + np.array([0.25, 0.5, 0.9]), crystal.lattice)
    assert difference(moved, again) < 1e-5
    assert difference(crystal, again) > 1e-3


def test_switches_are_independent():
    """Turning one augmentation on or off leaves the draws of the others as they are."""
    batch = batch_of(quartz(), perovskite(), random_crystal(np.random.default_rng(2), 8))

    def run(**switches):
        return augment(batch, np.random.default_rng(7), **{**NOTHING, **switches})

    for name, value in run().items():
        np.testing.assert_array_equal(value, batch[name])
    np.testing.assert_array_equal(
        run(random_axes=True)["lattice"], run(random_axes=True, random_shift=True, shuffle_atoms=True)["lattice"]
    )
    np.testing.assert_array_equal(
        run(shuffle_atoms=True)["slots"], run(shuffle_atoms=True, random_shift=True, random_axes=True)["slots"]
    )
    shifted = run(random_shift=True)["frac_coords"] - batch["frac_coords"]
    both = run(random_shift=True, random_axes=True)
    axes_only = run(random_axes=True)
    difference_ = both["frac_coords"] - axes_only["frac_coords"] - shifted
    assert np.abs(difference_ - np.round(difference_)).max() < 1e-5


def test_augmentation_depends_on_the_generator_only():
    batch = batch_of(quartz(), perovskite())
    first, second, other = (augment(batch, np.random.default_rng(seed), **EVERYTHING) for seed in (1, 1, 2))
    for name in batch:
        np.testing.assert_array_equal(first[name], second[name])
    assert (first["frac_coords"] != other["frac_coords"]).any()


def test_parts_of_a_global_batch_are_what_one_process_would_make():
    crystals_ = [random_crystal(np.random.default_rng(seed), 8) for seed in range(6)]
    whole = augment(batch_of(*crystals_), np.random.default_rng(4), **EVERYTHING)
    for part in (slice(0, 2), slice(2, 6)):
        mine = augment(batch_of(*crystals_[part]), np.random.default_rng(4), draw_for=6, part=part, **EVERYTHING)
        for name in whole:
            np.testing.assert_array_equal(mine[name], whole[name][part])


def test_origin_shift_moves_every_crystal_alike():
    batch = batch_of(quartz())
    moved = augment(batch, np.random.default_rng(0), origin_shift=0.3, **NOTHING)
    expected = shift(batch, np.full(3, 0.3))
    np.testing.assert_array_equal(moved["frac_coords"], expected["frac_coords"])


def test_inputs_are_left_alone():
    batch = batch_of(quartz(), perovskite())
    before = {name: value.copy() for name, value in batch.items()}
    augment(batch, np.random.default_rng(0), **EVERYTHING)
    for name, value in before.items():
        np.testing.assert_array_equal(batch[name], value)


def test_random_rotations_turn_quartz_and_keep_its_hand():
    for rotation in random_rotations(np.random.default_rng(0), 5):
        crystal = quartz()
        turned = Crystal.create(crystal.atomic_numbers, crystal.frac_coords, crystal.lattice @ rotation.T)
        assert space_group(turned) == 152
        assert same_up_to_proper_rotation(crystal, turned)
