"""Composition fingerprints against matminer's values and by hand; the table of elements and what makes it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.make_magpie import OUTPUT, PROPERTIES, main, read_pymatgen, write
from unimat_jax.cli import run_program
from unimat_jax.evaluation import magpie
from unimat_jax.evaluation.magpie import FEATURE_NAMES, composition_fingerprint, element_data, standardise

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "matminer_fingerprints.json").read_text(encoding="utf-8"))


def by_name(composition, **settings) -> dict[str, float]:
    values = composition_fingerprint(composition, **settings)
    return {name.removeprefix("MagpieData "): value for name, value in zip(FEATURE_NAMES, values, strict=True)}


@pytest.mark.parametrize("case", FIXTURE["compositions"], ids=lambda case: str(case["composition"]))
def test_equals_matminer(case):
    raw = np.array([np.nan if value is None else value for value in case["raw"]])
    np.testing.assert_allclose(composition_fingerprint(case["composition"]), case["imputed"], rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(composition_fingerprint(case["composition"], impute=False), raw, rtol=1e-12, atol=1e-9)


def test_fixture_is_worth_its_name():
    assert list(FEATURE_NAMES) == FIXTURE["labels"]["comp"]
    assert any(None in case["raw"] for case in FIXTURE["compositions"])


def test_by_hand():
    values = by_name([(38, 1), (22, 1), (8, 3)])  # SrTiO3
    mean = (38 + 22 + 3 * 8) / 5
    assert values["mean Number"] == pytest.approx(mean)
    assert values["avg_dev Number"] == pytest.approx((38 - mean + 22 - mean + 3 * (mean - 8)) / 5)
    assert (values["minimum Number"], values["maximum Number"], values["range Number"]) == (8, 38, 30)
    assert values["mode Number"] == 8
    assert values["maximum Electronegativity"] == 3.44
    assert by_name([(38, 1), (22, 1)])["mode Number"] == 22  # the lower of equally frequent ones


def test_only_ratios_count_and_the_order_does_not():
    expected = composition_fingerprint([(38, 1), (22, 1), (8, 3)])
    np.testing.assert_allclose(composition_fingerprint([(8, 12), (22, 4), (38, 4)]), expected, rtol=1e-12)
    expected[:] = 0  # the caller's array is the caller's own
    assert composition_fingerprint([(38, 1), (22, 1), (8, 3)])[0] == 8


def test_what_is_missing():
    helium = by_name([(2, 1), (8, 1)], impute=False)
    assert np.isnan(helium["mean Electronegativity"]) and np.isnan(helium["mean MeltingT"])
    assert helium["mean Number"] == 5
    table = [x for x in element_data()["Electronegativity"] if x is not None]
    assert by_name([(2, 1)])["mean Electronegativity"] == pytest.approx(np.mean(table))
    for number in range(1, 119):
        assert np.isfinite(composition_fingerprint([(number, 1)])).all()


def test_standardise():
    data = element_data()
    means, deviations = np.array(data["cdvae_scaler_means"]), np.array(data["cdvae_scaler_stds"])
    assert means.shape == deviations.shape == (132,)
    np.testing.assert_allclose(
        standardise(np.stack([means, means + 2 * deviations])), [[0] * 132, [2] * 132], atol=1e-9
    )
    assert standardise(np.full(132, np.nan)).tolist() == [0] * 132


def test_the_table_agrees_with_the_installed_pymatgen():
    for name, values in read_pymatgen().items():
        assert values == element_data()[name], name


def test_the_maker_writes_what_is_there(tmp_path):
    assert PROPERTIES == magpie.PROPERTIES
    write(tmp_path / "again.json", json.loads(OUTPUT.read_text(encoding="utf-8")))
    assert (tmp_path / "again.json").read_bytes() == OUTPUT.read_bytes()


def test_another_wheel_is_refused(tmp_path, capsys):
    (tmp_path / "matminer.whl").write_bytes(b"not it")
    assert run_program(main, [f"--wheel={tmp_path / 'matminer.whl'}", f"--output={tmp_path / 'x.json'}"]) == 2
    assert re.search("SHA-256 .* has [0-9a-f]{64}", capsys.readouterr().err)
    assert not (tmp_path / "x.json").exists()
    assert run_program(main, ["--wheel=nowhere.whl"]) == 2
    assert "nowhere.whl does not exist" in capsys.readouterr().err
