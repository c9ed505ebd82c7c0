"""decode: any tensor gives a crystal or a named failure."""

import warnings

import numpy as np
import pytest
from crystal_cases import (
    perovskite,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_cases import CARBON, FORMS, make_spec, tensors

from unimat_jax.crystal import Crystal
from unimat_jax.periodic_table import COLUMN, ROW, Table
from unimat_jax.representation import (
    NULL_VALUE,
    OCCUPIED_THRESHOLD,
    DecodeFailure,
    UniMatSpec,
    count_slots_at_null,
    decode,
    lattice_matrix,
)

KNOWN_REASONS = {"not_finite", "no_atoms", "no_element_there", "cell_degenerate", "atoms_overlap"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("table", [Table(), CARBON, Table(rows=(7, 8), columns=(0, 2, 17))])
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    x_scale=st.floats(-6, 6).map(lambda p: 10**p),
    lattice_scale=st.floats(-3, 6).map(lambda p: 10**p),
    size=st.integers(1, 6),
)
def test_noise_decodes_to_a_crystal_or_a_known_reason(form, table, seed, x_scale, lattice_scale, size):
    spec = make_spec(form, table, size)
    rng = np.random.default_rng(seed)
    x = x_scale * rng.normal(size=(*spec.grid, 3)) + rng.choice([0.0, NULL_VALUE, OCCUPIED_THRESHOLD])
    lattice = lattice_scale * rng.normal(size=spec.lattice_size)
    counts = np.zeros(spec.table.shape, int)
    counts[tuple(np.argwhere(spec.table.atomic_numbers)[0])] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Set OLD_ERROR_HANDLING", category=DeprecationWarning)  # spglib's own
        for asked in (None, counts):
            result = decode(x, lattice, spec, counts=asked)
            assert isinstance(result, Crystal) or result.reason in KNOWN_REASONS, result
            if isinstance(result, Crystal):
                assert np.isfinite(result.lattice).all() and np.linalg.det(result.lattice) > 0
                assert (result.frac_coords >= 0).all() and (result.frac_coords < 1).all()
                assert set(result.atomic_numbers.tolist()) <= set(spec.table.atomic_numbers.ravel().tolist()) - {0}
                assert asked is None or result.num_atoms == 1
            else:
                assert result.message
                assert asked is None or result.reason not in ("no_atoms", "no_element_there")


def _decode_one(changes: dict, spec: UniMatSpec, counts=None) -> Crystal | DecodeFailure:
    x, lattice, _ = tensors([perovskite()], spec)
    x, lattice = x[0].copy(), lattice[0].copy()
    for index, value in changes.get("x", {}).items():
        x[index] = value
    for index, value in changes.get("lattice", {}).items():
        lattice[index] = value
    return decode(x, lattice, spec, counts=counts)


def test_every_failure_has_its_reason():
    spec = make_spec("parameters", lattice_mean=(0.0,) * 6, lattice_std=(1.0,) * 6)
    titanium, strontium = (0, ROW[22], COLUMN[22]), (0, ROW[38], COLUMN[38])
    assert isinstance(_decode_one({}, spec), Crystal)
    cases = {
        "not_finite": [{"x": {titanium: np.nan}}, {"lattice": {0: np.inf}}, {"x": {(3, 0, 0): np.nan}}],
        "no_atoms": [{"x": {(): NULL_VALUE}}],
        "no_element_there": [{"x": {(0, 0, 5): 0.0}}],
        "cell_degenerate": [
            {"lattice": {3: 1.0}},  # alpha = 0
            {"lattice": {3: 1.5}},  # no angle at all
            {"lattice": {3: -0.9, 4: -0.9, 5: -0.9}},  # three angles of 154 degrees span no cell
            {"lattice": {0: -30.0}},
            {"lattice": {0: 30.0}},
            {"lattice": {0: 1e5}},  # overflows exp
        ],
        "atoms_overlap": [
            {"x": {titanium: -1.0, strontium: -1.0 + 1e-4}},
            {"x": {titanium: -1.0, strontium: 1 - 1e-4}},
        ],
    }
    assert set(cases) == KNOWN_REASONS
    for reason, changes in cases.items():
        for change in changes:
            result = _decode_one(change, spec)
            assert isinstance(result, DecodeFailure), (reason, change)
            assert result.reason == reason, (change, result)


def test_log_metric_is_a_cell_for_every_value_that_is_not_extreme():
    spec = make_spec("log_metric", lattice_mean=(0.0,) * 6, lattice_std=(1.0,) * 6)
    vectors = np.random.default_rng(0).normal(size=(500, 6))
    assert all(lattice_matrix(vector, 4, spec) is not None for vector in vectors)
    parameters = make_spec("parameters", lattice_mean=(0.0,) * 6, lattice_std=(1.0,) * 6)
    assert any(lattice_matrix(vector, 4, parameters) is None for vector in vectors)


def test_left_handed_matrix_decodes_to_cell_degenerate():
    spec = make_spec("matrix", lattice_mean=(0.0,) * 9, lattice_std=(1.0,) * 9)
    cell = np.diag([3.0, 4.0, 5.0])
    assert lattice_matrix(cell.ravel(), 1, spec) is not None
    assert lattice_matrix(-cell.ravel(), 1, spec) is None


def test_exact_counts_decide_and_not_the_threshold():
    spec = make_spec("parameters")
    counts = np.zeros((9, 18), int)
    for z, count in ((38, 1), (22, 1), (8, 3)):
        counts[ROW[z], COLUMN[z]] = count
    titanium = (0, ROW[22], COLUMN[22])
    extra = {"x": {titanium: NULL_VALUE + 0.4, (3, ROW[8], COLUMN[8]): 0.3, (0, ROW[6], COLUMN[6]): 0.1}}
    result = _decode_one(extra, spec, counts)
    assert isinstance(result, Crystal)
    assert sorted(result.atomic_numbers.tolist()) == [8, 8, 8, 22, 38]
    without = _decode_one(extra, spec)
    assert isinstance(without, Crystal)
    assert sorted(without.atomic_numbers.tolist()) == [6, 8, 8, 8, 8, 38]
    x = tensors([perovskite()], spec)[0][0].copy()
    assert count_slots_at_null(x, counts) == 0
    x[titanium] = NULL_VALUE
    assert count_slots_at_null(x, counts) == 1


def test_occupied_is_a_mean_above_the_papers_minus_one_half():
    # The paper's units y = (x + 1) / 2 put null at -1 and the threshold at -0.5.
    spec = make_spec("parameters")
    titanium = (0, ROW[22], COLUMN[22])
    for offset, number in ((0.01, 5), (-0.01, 4)):
        value = 2 * np.array([-0.9, -0.5 + 3 * offset, -0.1]) - 1
        result = _decode_one({"x": {titanium: value}}, spec)
        assert isinstance(result, Crystal)
        assert result.num_atoms == number


def test_a_tensor_of_another_spec_is_an_error():
    spec = make_spec("parameters")
    with pytest.raises(ValueError, match="decode got x"):
        decode(np.zeros((1, 1, 1, 3)), np.zeros(6), spec)
    with pytest.raises(ValueError, match="lattice"):
        decode(np.zeros((*spec.grid, 3)), np.zeros(9), spec)
