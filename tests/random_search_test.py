"""Random structures: volumes, distances and symmetry as asked for, the same each time, every candidate accounted for.

AIRSS's `buildcell` is stood in for by a script: what is tested is the seed file and the parsing. The real one was never
run.
"""

import json
import os
from collections import Counter

import numpy as np
import pytest
import spglib

pytest.importorskip("pyxtal")
pytest.importorskip("ase_ga")

from unimat_jax.crystal import CrystalError
from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.requests import parse_formula
from unimat_jax.stability import buildcell, random_structures
from unimat_jax.stability.atomic_volumes import estimated_volume
from unimat_jax.stability.random_search import random_search
from unimat_jax.stability.random_structures import MIN_RATIO, OPERATIONS, SOFT_RATIO, Draw, draw, pair_distances
from unimat_jax.stability.soft_sphere import SoftSphere
from unimat_jax.structure_files import MANIFEST

SRTIO3 = tuple(sorted(parse_formula("SrTiO3").items()))


@pytest.fixture(scope="module")
def raw():
    """Without soft spheres, two of each number of operations."""
    return [draw(Draw(SRTIO3, index, seed=3, soft_sphere="none")) for index in range(8)]


def test_volumes_lie_in_the_papers_range_of_the_estimate(raw):
    estimate = estimated_volume(dict(SRTIO3))
    assert estimate == pytest.approx(28.5 + 13.8 + 3 * 8.2), "the table's own numbers"
    assert estimate == pytest.approx(59.5, rel=0.15), "SrTiO3 has 59.5 A^3"
    fractions = [drawn.crystal.volume / estimate for drawn in raw]
    assert fractions == pytest.approx([drawn.volume_fraction for drawn in raw])
    assert 0.4 <= min(fractions) < 0.8 < max(fractions) <= 1.2 and len(set(fractions)) == 8


def test_the_cell_holds_what_was_asked_for_and_no_two_atoms_are_too_close(raw):
    for drawn in raw:
        crystal = drawn.crystal
        assert Counter(crystal.atomic_numbers.tolist()) == Counter(dict(SRTIO3))
        ratio = MIN_RATIO * min(1.0, drawn.volume_fraction ** (1 / 3))
        closest = pair_distances(dict(SRTIO3), ratio)
        frac, numbers = crystal.frac_coords, crystal.atomic_numbers
        images = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), -1).reshape(-1, 3)
        for i, a in enumerate(numbers):
            for j, b in enumerate(numbers):
                distances = np.linalg.norm((frac[j] - frac[i] + images) @ crystal.lattice, axis=1)
                assert distances[distances > 1e-9].min() >= closest[a, b] - 1e-9


def test_cells_with_two_to_four_operations_take_turns_with_those_of_none(raw):
    for drawn, asked in zip(raw, 2 * OPERATIONS, strict=True):
        cell = (drawn.crystal.lattice, drawn.crystal.frac_coords, drawn.crystal.atomic_numbers)
        operations = len(spglib.get_symmetry(cell, symprec=1e-3)["rotations"])
        assert drawn.operations == drawn.asked_operations == asked
        assert operations % asked == 0 and operations >= asked, "by accident it may have more"
        assert (drawn.space_group == 1) == (asked == 1)


def test_a_candidate_depends_on_seed_composition_and_index_alone(raw):
    again = draw(Draw(SRTIO3, 2, seed=3, soft_sphere="none"))
    np.testing.assert_array_equal(again.crystal.frac_coords, raw[2].crystal.frac_coords)
    np.testing.assert_array_equal(again.crystal.lattice, raw[2].crystal.lattice)
    others = [draw(Draw(SRTIO3, 0, seed=4)), draw(Draw(((8, 3), (22, 1), (56, 1)), 0, seed=3))]
    assert all(other.volume_fraction != raw[0].volume_fraction for other in others)


def overlap(crystal):
    """Energy of the soft spheres, eV."""
    atoms = crystal.to_ase()
    atoms.calc = SoftSphere(pair_distances(dict(SRTIO3), SOFT_RATIO))
    return atoms.get_potential_energy()


def test_soft_spheres_move_the_atoms_apart_and_are_counted(raw):
    for index in (0, 4):
        found = draw(Draw(SRTIO3, index, seed=3, max_soft_calls=15))
        assert 1 <= found.soft_calls <= 15 and found.volume_fraction == raw[index].volume_fraction
        assert found.crystal.volume == pytest.approx(raw[index].crystal.volume), "in a fixed cell"
        assert overlap(found.crystal) < 0.3 * overlap(raw[index].crystal)
    grown = draw(Draw(SRTIO3, 0, seed=3, soft_sphere="variable"))
    assert grown.crystal.volume != pytest.approx(raw[0].crystal.volume, rel=1e-3)


def test_symmetry_that_cannot_be_is_given_up_and_counted(monkeypatch):
    monkeypatch.setattr(random_structures, "ATTEMPTS", 3)
    monkeypatch.setattr(random_structures, "GROUPS", {2: [2], 3: [147], 4: [75]})
    # Group 147 has two places for single atoms, and here are four elements of one atom each.
    counts = tuple(sorted(parse_formula("LiNaOS").items()))
    found = draw(Draw(counts, 2, seed=0))
    assert found.crystal is not None and (found.asked_operations, found.operations, found.space_group) == (3, 1, 1)
    assert found.failures["composition_does_not_fit_group"] == 3 and found.attempts >= 4


def test_every_candidate_has_a_row_and_failures_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(random_structures, "ATTEMPTS", 2)
    wanted = [(parse_formula("NaCl"), "known-1"), (parse_formula("XeF2"), ""), (parse_formula("Cs"), "")]
    times = random_search(wanted, 3, tmp_path, seed=1, num_workers=0)
    rows = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    assert [row["uid"] for row in rows] == [f"rss_{i:06d}" for i in range(9)]
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["no_volume"] * 3 + ["ok"] * 3
    entries = read_entries(tmp_path, progress=False)
    assert len(entries) == 9 and sum(entry.crystal is not None for entry in entries) == 6
    assert {entry.reason for entry in entries} == {"", "no_volume"}
    assert [entry.reference_uid for entry in entries if entry.reference_uid] == ["known-1"] * 3
    assert times["candidates"] == 9 and times["made"] == 6
    assert times["attempts"] == 6 + sum(times["failed_attempts"].values())
    assert times["soft_calls"] == sum(row.get("soft_calls", 0) for row in rows) > 0


def test_what_never_fits_is_a_failure_and_not_a_hang(monkeypatch):
    monkeypatch.setattr(random_structures, "ATTEMPTS", 3)
    monkeypatch.setattr(random_structures, "PLACEMENTS", 20)
    monkeypatch.setattr(random_structures, "estimated_volume", lambda counts: 20.0)
    found = draw(Draw(SRTIO3, 0, seed=0))
    assert found.crystal is None and found.attempts == 6 and sum(found.failures.values()) == 6


FAKE = """#!{python}
import json, re, sys
seed = sys.stdin.read()
open({log!r}, "a").write(seed + "=====")
atoms = re.findall(r"^([A-Z][a-z]?) 0.0 0.0 0.0 # ", seed, re.M)
print("#  Generated by a stand-in\\n%BLOCK LATTICE_ABC\\n 5.0 5.1 5.2\\n 90.0 95.0 90.0 # degrees")
print("%ENDBLOCK LATTICE_ABC\\n")
print("%BLOCK POSITIONS_FRAC")
for i, symbol in enumerate(atoms):
    print(f"  {{symbol}}   {{0.1 + 0.5 * (i % 2)}}  {{0.1 + 0.5 * (i // 2 % 2)}}  {{0.1 + 0.5 * (i // 4)}} # a comment")
print("%ENDBLOCK POSITIONS_FRAC\\n\\n#SYMMOPS=1")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A `buildcell` on PATH that writes down its seeds in the file that is returned."""
    import sys

    folder = tmp_path / "bin"
    folder.mkdir()
    program, log = folder / "buildcell", tmp_path / "seeds"
    program.write_text(FAKE.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def test_buildcells_seed_and_answer(stand_in):
    buildcell.require()
    found = draw(Draw(SRTIO3, 1, seed=0, soft_sphere="none", generator="buildcell"))
    crystal = found.crystal
    assert crystal is not None and (found.operations, found.space_group) == (2, 0)
    assert Counter(crystal.symbols) == {"Sr": 1, "Ti": 1, "O": 3}
    estimate = estimated_volume(dict(SRTIO3))
    assert crystal.volume == pytest.approx(found.volume_fraction * estimate), "scaled to what was drawn"
    assert crystal.angles == pytest.approx([90, 95, 90])
    seed = stand_in.read_text()
    assert f"#VARVOL={found.volume_fraction * estimate:.3f}\n" in seed and "#SYMMOPS=2\n" in seed
    assert seed.count("NUM=1") == 5 and "#NFORM=1\n" in seed
    minimum = MIN_RATIO * min(1.0, found.volume_fraction ** (1 / 3))
    assert f"O-Ti={minimum * (0.66 + 1.60):.3f}" in seed, "Cordero's radii"


def test_a_cartesian_cell_is_understood_and_nonsense_is_a_failure():
    text = "%BLOCK lattice_cart\nANG\n4 0 0\n0 4 0\n0 0 5\n%ENDBLOCK lattice_cart\n"
    text += "%BLOCK positions_frac\nCu 0 0 0\nAu 0.5 0.5 0.5 SPIN=1\n%ENDBLOCK positions_frac\n"
    crystal = buildcell.parse_cell(text)
    assert crystal.symbols == ["Cu", "Au"] and crystal.volume == pytest.approx(80)
    for broken in ("", text.replace("Cu", "Qq"), text.replace("4 0 0", "4 0")):
        with pytest.raises(CrystalError) as caught:
            buildcell.parse_cell(broken)
        assert caught.value.reason in ("buildcell_output", "no_atoms")


def test_without_buildcell_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no buildcell on PATH"):
        random_search([({3: 1}, "")], 1, tmp_path, generator="buildcell", num_workers=0)
