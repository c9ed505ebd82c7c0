"""The benchmarks of cost and learning: their settings load, and their arithmetic gives back what was put in."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from crystal_cases import diamond

from benchmarks import big_cells, cost_curves, learning, profile_step
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.structure_files import read_structures


def test_the_model_of_a_step_finds_its_own_coefficients():
    rng = np.random.default_rng(0)
    rows = [
        {"batch": 8, "channels": 32, "L": level, "table": (9, 18), "train_flops": f, "num_params": n}
        for level, f, n in zip((1, 3, 6, 12, 24), rng.uniform(1e9, 1e11, 5), rng.uniform(1e5, 1e7, 5), strict=True)
    ]
    wanted = [0.01, 1e-11, 2e-9, 3e-9]
    for row in rows:
        row["train_s"] = float(np.dot(wanted, cost_curves.features(row)))
    found = cost_curves.fit(rows)
    np.testing.assert_allclose(list(found["seconds"].values()), wanted, rtol=1e-4)
    assert found["largest_relative_error"] < 1e-6


def test_operations_of_the_papers_model_are_a_polynomial_of_its_levels():
    found = cost_curves.paper_levels((4, 10, 20, 40))
    flops, p = found["train_flops_per_crystal"], found["polynomial"]
    predicted = p["constant"] + p["linear"] * 4 + p["quadratic"] * 4**2
    assert predicted == pytest.approx(flops[4], rel=1e-3)
    assert 0 < p["quadratic"] * 20**2 < 0.05 * flops[20]


def test_the_strongest_reflection_falls_as_debye_and_waller_have_it():
    cell = big_cells.supercell(diamond(), 300)

    def moved_by(frac):
        return big_cells.reflection(Crystal.create(cell.atomic_numbers, cell.frac_coords + frac, cell.lattice, "moved"))

    rng = np.random.default_rng(0)
    thermal = rng.normal(0, 0.1, cell.frac_coords.shape) @ np.linalg.inv(cell.lattice)
    edge = (8 * diamond().volume / diamond().num_atoms) ** (1 / 3)
    strongest = 2 * np.pi / edge * np.sqrt(8)  # of (2, 2, 0), in which all atoms of diamond scatter as one
    assert strongest < big_cells.LONGEST_WAVE and moved_by(0) == pytest.approx(1, abs=1e-6)
    assert moved_by(thermal) == pytest.approx(np.exp(-((0.1 * strongest) ** 2)), abs=0.06)
    assert moved_by(rng.random(cell.frac_coords.shape)) < 0.1


def test_big_cells_are_supercells_and_have_their_costs(tmp_path, monkeypatch):
    slots, changes = big_cells.VARIANTS["neighbours"]
    tiny = {"model.width": 8, "model.depth": 1, "model.heads": 2, "model.pair_width": 4, "model.neighbours": 8}
    variants = {"neighbours": (slots, changes | tiny), "unet": big_cells.VARIANTS["unet"]}
    monkeypatch.setattr(big_cells, "VARIANTS", variants)
    source, cells = tmp_path / "source.extxyz", tmp_path / "cells.extxyz"
    source.write_text(diamond().to_extxyz())
    assert big_cells.main([f"--source={source}", f"--write={cells}", "--number=3"]) == 0
    written = [c for c in read_structures(cells) if isinstance(c, Crystal)]
    assert [100 <= c.num_atoms <= big_cells.MOST_OF_ONE for c in written] == [True] * 3
    assert [c.volume / c.num_atoms for c in written] == pytest.approx([diamond().volume / diamond().num_atoms] * 3)
    salt = Crystal.create([11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], 2.82 * (1 - np.eye(3)), "NaCl")
    assert big_cells.distances([salt, diamond()])["nearest_is_of_another_element"] == 1
    caesium = Crystal.create([55, 55, 17], [[0, 0, 0], [0.5, 0, 0], [0.5, 0.5, 0.4]], 6 * np.eye(3), "x")
    np.testing.assert_array_equal(big_cells.meets_another_element(caesium), [False, False, True])
    output = tmp_path / "costs.json"
    assert big_cells.main([f"--source={source}", "--sizes=16", "--rounds=1", f"--output={output}"]) == 0
    rows = {row.pop("variant"): row for row in json.loads(output.read_text())["rows"]}
    assert {name: row["atoms"] for name, row in rows.items()} == {"neighbours": 16, "unet": 16}
    assert all(rows["neighbours"][cost] > 0 for cost in big_cells.COSTS)
    assert rows["unet"]["flops"] > rows["neighbours"]["flops"]


def test_a_profile_goes_into_kinds():
    hlo = """
  %dot.1 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(step)/UNet3D/x/dot_general"}
  ROOT %loop_fusion.2 = f32[8]{0} fusion(%a), metadata={op_name="jit(step)/adam/mul"}
  copy.3 = f32[8]{0} copy(%a)
"""
    names = ("dot.1", "dot.1", "loop_fusion.2", "copy.3", "not of the program")
    events = [{"ph": "X", "name": name, "dur": 1e6} for name in names]
    kinds, number = profile_step.by_kind(events, profile_step.scopes(hlo))
    assert number == 4
    assert kinds == {"products and convolutions": 2.0, profile_step.OUTSIDE: 1.0, "transposes and copies": 1.0}


def test_the_spread_is_that_of_pairs_of_seeds_and_of_precisions():
    steps = range(0, 500, 5)
    rows = {
        "float32, seed 0": {"train_loss": {step: 1.0 for step in steps}},
        "float32, seed 1": {"train_loss": {step: 1.5 for step in steps}},
        "bfloat16, seed 0": {"train_loss": {step: 1.25 for step in steps}},
    }
    assert learning.spread(rows) == {
        "float32, seed 0 - float32, seed 1": {"mean_absolute": 0.5, "mean": -0.5},
        "bfloat16, seed 0 - float32, seed 0": {"mean_absolute": 0.25, "mean": 0.25},
    }


@pytest.mark.parametrize("name", learning.STUDIES)
def test_every_study_is_made_of_fields_that_exist(name, tmp_path):
    arguments = SimpleNamespace(data_dir="data", num_steps=None)
    study = learning.STUDIES[name]
    for changes in study["variants"].values():
        config = learning.variant_config(study, changes, arguments, tmp_path)
        assert config.data.data_dir == "data" and config.train.num_steps == study["changes"]["train.num_steps"]


def test_what_does_not_exist_is_named(tmp_path):
    given = [f"--workdir={tmp_path}", "--data_dir=data"]
    with pytest.raises(UserError, match="--study=colour: choose from precision"):
        learning.main([*given, "--study=colour"])
    with pytest.raises(UserError, match="--variants=8 channels: choose from 16 channels;"):
        learning.main([*given, "--study=size", "--variants=8 channels"])
