import csv
import json

import numpy as np
import pytest
from crystal_cases import diamond, perovskite, quartz, random_crystal
from hypothesis import given, settings
from hypothesis import strategies as st

from unimat_jax.cli import run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation import validity
from unimat_jax.evaluation.structure_statistics import describe
from unimat_jax.evaluation.validity import Validity, check, format_summary, summary


def test_known_crystals_are_valid():
    for crystal in (quartz(), perovskite(), diamond()):
        row = check(crystal)
        assert row.status == "valid" and row.valid
    assert check(perovskite()).min_distance == pytest.approx(3.905 / 2)


@pytest.mark.parametrize(("distance", "reason"), [(0.501, ""), (0.499, "atoms_too_close"), (0.0, "atoms_too_close")])
def test_half_an_angstrom_is_the_limit(distance, reason):
    for z in (distance, 6.0 - distance):  # the second only across the border of the cell
        row = check(Crystal.create([1, 1], [[0, 0, 0], [0, 0, z / 6.0]], np.diag([5.0, 5.0, 6.0])))
        assert row.struct_reason == reason
        assert row.min_distance == pytest.approx(distance, abs=1e-9)


def test_own_images_do_not_count_as_in_cdvae():
    thin = Crystal.create([6], [[0, 0, 0]], np.diag([5.0, 5.0, 0.4]))
    assert check(thin).struct_valid
    assert check(thin).min_distance is None
    assert thin.min_distance == pytest.approx(0.4)


def test_a_tiny_cell_is_no_crystal():
    row = check(Crystal.create([6], [[0, 0, 0]], 0.4 * np.eye(3)))
    assert row.struct_reason == row.status == "volume_too_small"


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(-2.5, 3).map(lambda p: 10**p))
def test_any_crystal_gets_a_verdict_and_numbers(seed, scale):
    crystal = random_crystal(np.random.default_rng(seed), 10)
    crystal = Crystal.create(crystal.atomic_numbers, crystal.frac_coords, scale * crystal.lattice, f"c{seed}")
    row = check(crystal)
    assert "check_failed" not in row.status
    assert row.uid == crystal.uid
    if row.min_distance is not None:
        assert row.min_distance >= crystal.min_distance - 1e-6 * scale
        assert row.struct_valid == (row.min_distance >= 0.5 and crystal.volume >= 0.1)
    numbers = describe(crystal)
    json.dumps(numbers)
    assert numbers["num_atoms"] == crystal.num_atoms
    assert (numbers["space_group_number"] is None) <= ("space_group_failure" in numbers)


def test_a_check_that_breaks_is_a_status(monkeypatch, capsys):
    def broken(crystal):
        raise RuntimeError("pymatgen has a bad day")

    monkeypatch.setattr(validity, "min_pair_distance", broken)
    row = check(quartz())
    assert row.status == "check_failed" and not row.valid
    assert "quartz" in capsys.readouterr().err


def mixed_rows() -> list[Validity]:
    close = Crystal.create([11, 17], [[0, 0, 0], [0, 0, 0.01]], 4 * np.eye(3), "close")
    odd = Crystal.create([11, 11, 11, 9], np.eye(4, 3) / 2, 6 * np.eye(3), "odd")
    both = Crystal.create([11, 11, 11, 9], np.eye(4, 3) / 200, 6 * np.eye(3), "both")
    return [check(c) for c in (quartz(), perovskite(), close, odd, both)] + [Validity.failed("gone", "cell_degenerate")]


def test_counts_add_up_and_failures_stay_in_the_denominator():
    totals = summary(mixed_rows())
    assert totals["num_structures"] == 6 == sum(totals["status"].values())
    assert totals["status"] == {
        "valid": 2,
        "atoms_too_close": 1,
        "no_neutral_combination": 1,
        "atoms_too_close+no_neutral_combination": 1,
        "cell_degenerate": 1,
    }
    assert totals["struct_valid"] == totals["comp_valid"] == pytest.approx(3 / 6)
    assert totals["valid"] == pytest.approx(2 / 6)
    text = format_summary(totals)
    for status in totals["status"]:
        assert status in text
    assert "6 structures" in text and "33.3 %" in text
    assert format_summary(summary([])) == "no structures to check"


def test_check_program_writes_a_row_a_structure(tmp_path, capsys):
    source = tmp_path / "crystals"
    source.mkdir()
    for crystal in (quartz(), perovskite()):
        (source / f"{crystal.uid}.cif").write_text(crystal.to_cif())
    (source / "broken.cif").write_text("data_broken\n_cell_length_a 3.0\n")
    assert run_program(validity.main, [str(source), f"--output_dir={tmp_path / 'out'}"]) == 0
    assert "3 structures" in capsys.readouterr().out
    with (tmp_path / "out" / "validity.csv").open(newline="") as file:
        rows = {row["uid"]: row for row in csv.DictReader(file)}
    assert rows["quartz"]["status"] == rows["SrTiO3"]["status"] == "valid"
    assert rows["broken"]["valid"] == "False"
    totals = json.loads((tmp_path / "out" / "validity.json").read_text())
    assert totals["num_structures"] == 3 and totals["valid"] == pytest.approx(2 / 3)


def test_check_program_names_what_the_user_can_fix(tmp_path, capsys):
    assert run_program(validity.main, [str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    (tmp_path / "a.cif").write_text(quartz().to_cif())
    assert run_program(validity.main, [str(tmp_path / "a.cif"), f"--output_dir={tmp_path / 'file'}"]) == 2
    assert "--output_dir" in capsys.readouterr().err
