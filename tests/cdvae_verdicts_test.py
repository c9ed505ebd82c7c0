"""Validity and matching against verdicts of the unchanged CDVAE code."""

import json
from pathlib import Path

import numpy as np
import pytest
from shared_data import golden_dir

from unimat_jax.crystal import Crystal, lattice_from_parameters
from unimat_jax.evaluation.matching import MATCHER_SETTINGS, match_pairs, match_rms
from unimat_jax.evaluation.validity import check, summary

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "cdvae_verdicts.json").read_text(encoding="utf-8"))


def crystal_of(values: dict, uid: str = "") -> Crystal:
    cell = lattice_from_parameters(np.array(values["lengths"]), np.array(values["angles"]))
    return Crystal.create(values["atomic_numbers"], values["frac_coords"], cell, uid)


@pytest.mark.parametrize(
    "case", FIXTURE["cases"], ids=lambda case: f"{case['data_set']}-{case['index']}-{case['kind']}"
)
def test_verdicts_equal_those_of_cdvaes_code(case):
    generated, original = crystal_of(case["generated"]), crystal_of(case["original"])
    verdict = check(generated)
    assert (verdict.struct_valid, verdict.comp_valid) == (case["struct_valid"], case["comp_valid"])
    rms = match_rms(generated, original)
    if case["rms_dist"] is None:
        assert rms is None
    else:
        assert rms == pytest.approx(case["rms_dist"], abs=1e-6)


def test_fixture_has_every_kind_of_verdict():
    assert FIXTURE["matcher"] == MATCHER_SETTINGS
    for name in ("struct_valid", "comp_valid"):
        assert {case[name] for case in FIXTURE["cases"]} == {True, False}
    assert {case["rms_dist"] is None for case in FIXTURE["cases"]} == {True, False}


@pytest.mark.parametrize("name", ["perov_5_val", "carbon_24_val"])
def test_all_reference_values(name):
    golden = json.loads((golden_dir() / f"{name}.json").read_text())
    generated, originals = ([crystal_of(c) for c in golden[key]] for key in ("generated", "originals"))
    rows = [check(crystal) for crystal in generated]
    for row, expected in zip(rows, golden["per_generated"], strict=True):
        assert (row.struct_valid, row.comp_valid) == (expected["struct_valid"], expected["comp_valid"])
    totals = summary(rows)
    for key in ("struct_valid", "comp_valid"):
        assert totals[key] == pytest.approx(golden["aggregate"][key])
    assert sum(totals["status"].values()) == len(generated)
    matches = match_pairs(list(zip(generated, originals, strict=True)), num_workers=1, progress=False)
    for rms, expected in zip(matches.rms_dist, golden["per_generated"], strict=True):
        assert rms == (expected["rms_dist_to_original"] and pytest.approx(expected["rms_dist_to_original"], abs=1e-6))
