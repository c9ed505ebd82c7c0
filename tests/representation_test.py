import json

import numpy as np
import pytest
from crystal_cases import (
    crystals,
    diamond,
    difference,
    perovskite,
    quartz,
    random_crystal,
    same_up_to_proper_rotation,
    space_group,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import load
from tensor_cases import CARBON, FORMS, make_spec, tensors

from unimat_jax.augmentation import random_rotations
from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.densify import is_element
from unimat_jax.periodic_table import ATOMIC_NUMBERS, COLUMN, ROW, Table
from unimat_jax.representation import (
    NULL_VALUE,
    UniMatSpec,
    batch_records,
    crystal_of_record,
    decode,
    encode,
    lattice_vector,
    model_inputs,
    wrap,
)


def through_the_tensor(crystal: Crystal, spec: UniMatSpec, rotations=None) -> Crystal:
    x, lattice, _ = tensors([crystal], spec, rotations)
    again = decode(x[0], lattice[0], spec, uid=crystal.uid)
    assert isinstance(again, Crystal), again
    assert again.uid == crystal.uid
    return again


def spread_out(crystal: Crystal) -> Crystal:
    """The crystal, its random atoms moved to places of a grid so that none overlap."""
    side = int(np.ceil(np.cbrt(crystal.num_atoms)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[: crystal.num_atoms]
    inside = np.mod(crystal.frac_coords, 1.0) * 0.8
    return Crystal.create(crystal.atomic_numbers, (grid + inside) / side, crystal.lattice, crystal.uid)


# --- Nothing is lost. ---


@settings(max_examples=60)
@given(crystals(max_atoms=24).map(spread_out), st.sampled_from(FORMS))
def test_encode_densify_decode_loses_nothing(crystal, form):
    assert difference(crystal, through_the_tensor(crystal, make_spec(form))) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", ["perov_5/val", "carbon_24/val", "mp_20/val", "starter_source/flla_le20"])
def test_real_crystals_lose_nothing(split, form):
    real = load(split, 150)
    table = CARBON if split == "carbon_24/val" else Table()
    cells = np.concatenate([[crystal.lengths, crystal.angles] for crystal in real]).reshape(-1, 6)
    numbers = lattice_vector(cells, np.array([crystal.num_atoms for crystal in real]), form)
    mean, std = numbers.mean(0).tolist(), np.maximum(numbers.std(0), 0.05).tolist()
    spec = make_spec(form, table, lattice_mean=tuple(mean), lattice_std=tuple(std))
    x, lattice, _ = tensors(real, spec)
    for crystal, x_, lattice_ in zip(real, x, lattice, strict=True):
        again = decode(x_, lattice_, spec)
        assert isinstance(again, Crystal), (crystal.uid, again)
        assert difference(crystal, again) < 1e-5, crystal.uid


@pytest.mark.parametrize("form", FORMS)
def test_quartz_keeps_its_hand(form):
    again = through_the_tensor(quartz(), make_spec(form))
    assert space_group(again) == 152
    assert same_up_to_proper_rotation(quartz(), again)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_cartesian_crystals_may_be_turned(seed):
    rng = np.random.default_rng(seed)
    crystal = spread_out(random_crystal(rng, 12))
    spec = make_spec("matrix")
    turned_x, turned_lattice, _ = tensors([crystal], spec, random_rotations(rng, 1))
    x, lattice, _ = tensors([crystal], spec)
    assert np.abs(turned_lattice - lattice).max() > 1e-3, "the rotation did nothing to the cell"
    assert crystal.num_atoms == 1 or np.abs(turned_x - x).max() > 1e-3, "the rotation did nothing to the atoms"
    again = decode(turned_x[0], turned_lattice[0], spec)
    assert isinstance(again, Crystal)
    assert difference(crystal, again) < 1e-5
    assert same_up_to_proper_rotation(crystal, again)


def test_random_rotations_are_proper_and_uniform():
    rotations = random_rotations(np.random.default_rng(0), 4000)
    np.testing.assert_allclose(
        rotations @ np.swapaxes(rotations, 1, 2), np.broadcast_to(np.eye(3), (4000, 3, 3)), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1.0)
    # Uniform: every entry has mean 0 and variance 1/3, the trace has mean 0 and variance 1.
    assert np.abs(rotations.mean(0)).max() < 0.04
    assert np.abs(rotations.var(0) - 1 / 3).max() < 0.03
    assert np.trace(rotations, axis1=1, axis2=2).var() == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize(
    ("table", "elements"),
    [
        (CARBON, (6,)),
        (Table(columns=(0, 16)), (1, 3, 9, 11, 17, 35, 37, 53, 55, 85, 87, 117, 71, 103)),
        (Table.of_elements(["Sr", "Ti", "O", "La"]), (8, 22, 38, 57)),
        (Table(rows=(0, 1, 2, 3, 4, 5)), (1, 2, 6, 26, 54, 86)),
    ],
)
@settings(max_examples=20)
@given(data=st.data(), form=st.sampled_from(FORMS))
def test_sub_tables_lose_nothing(table, elements, data, form):
    crystal = spread_out(data.draw(crystals(20, elements)))
    spec = make_spec(form, table)
    again = through_the_tensor(crystal, spec)
    assert difference(crystal, again) < 1e-5
    assert tensors([crystal], spec)[0].shape == (1, 24, *table.shape, 3)


def test_carbon_table_is_one_cell():
    assert make_spec("parameters", CARBON).grid == (24, 1, 1)


# --- What stands where in the tensor. ---


def test_atoms_stand_in_their_elements_cell_and_null_everywhere_else():
    spec = make_spec("parameters")
    x, _, occupied = tensors([perovskite()], spec)
    assert occupied.sum() == 5
    for z, count in ((38, 1), (22, 1), (8, 3)):
        assert occupied[0, :, ROW[z], COLUMN[z]].sum() == count
        assert occupied[0, :count, ROW[z], COLUMN[z]].all(), "slots are filled from the first"
    assert (x[~occupied] == NULL_VALUE).all()
    assert (x[occupied] >= -1).all() and (x[occupied] < 1).all()
    np.testing.assert_allclose(x[0, 0, ROW[22], COLUMN[22]], [0, 0, 0], atol=1e-7)  # fractional 0.5
    np.testing.assert_allclose(x[0, 0, ROW[38], COLUMN[38]], [-1, -1, -1])  # fractional 0


def test_padding_of_a_batch_reaches_no_tensor():
    spec = make_spec("parameters")
    alone, _, _ = tensors([perovskite()], spec)
    together, _, occupied = tensors([quartz(), perovskite(), diamond()], spec)
    np.testing.assert_array_equal(alone[0], together[1])
    assert occupied.sum((1, 2, 3)).tolist() == [9, 5, 2]


@settings(max_examples=50)
@given(crystals(max_atoms=24))
def test_record_is_sparse_and_holds_the_crystal(crystal):
    record = encode(crystal)
    assert record["slots"].dtype == np.uint8 and record["slots"].shape == (crystal.num_atoms, 3)
    assert len({tuple(slot) for slot in record["slots"].tolist()}) == crystal.num_atoms, "two atoms in one slot"
    assert sum(value.nbytes for value in record.values()) == 15 * crystal.num_atoms + 24
    assert difference(crystal, crystal_of_record(record)) < 1e-5


def test_is_element_marks_the_118():
    assert int(is_element(make_spec("parameters")).sum()) == 118
    np.testing.assert_array_equal(is_element(make_spec("parameters")), ATOMIC_NUMBERS > 0)


def test_coordinates_that_round_to_one_become_zero():
    frac = np.array([1.0, -1e-12, 1 - 1e-12, -3.25, 0.25])
    np.testing.assert_array_equal(wrap(frac), [0, 0, 0, 0.75, 0.25])
    assert wrap(np.float32([-1e-9]))[0] == 0


# --- Limits. ---


def test_what_the_spec_cannot_hold_is_refused():
    small = make_spec("parameters", Table.of_elements(["Sr", "Ti", "O"]), 2)
    for crystal, spec, reason in [
        (perovskite(), small, "too_many_of_element"),
        (quartz(), make_spec("parameters", size=6, max_atoms=8), "too_many_atoms"),
        (diamond(), small, "element_outside_table"),
    ]:
        with pytest.raises(CrystalError) as caught:
            encode(crystal, spec)
        assert caught.value.reason == reason
        assert crystal.uid in str(caught.value)


def test_records_that_the_spec_cannot_hold_are_refused_on_the_way_to_the_device():
    batch = batch_records([encode(perovskite())], 8)
    with pytest.raises(CrystalError, match="Ti"):
        model_inputs(batch, make_spec("parameters", Table.of_elements(["Sr", "O"])))
    with pytest.raises(CrystalError, match="3 atoms of one element"):
        model_inputs(batch, make_spec("parameters", size=2))
    with pytest.raises(CrystalError, match="5 atoms, max_atoms = 4"):
        batch_records([encode(perovskite())], 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"coordinates": "polar"},
        {"lattice_form": "matrix"},
        {"coordinates": "cartesian"},
        {"lattice_form": "voigt"},
        {"lattice_mean": (0.0,) * 5},
        {"lattice_std": (1.0,) * 9},
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError, match=str(next(iter(changes)))):
        UniMatSpec(4, 8, **changes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("table", [Table(), CARBON, Table(columns=(0, 16))])
def test_spec_goes_through_json(form, table):
    spec = make_spec(form, table)
    again = UniMatSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)
