"""The crystals in the package: what they are, that they can be remade, and how they are split."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from crystal_cases import difference
from shared_data import data_dir, load

from data_prep.datasets import source_files
from data_prep.make_starter import main as make_starter
from data_prep.prepare import prepare
from data_prep.splits import reduced_formula
from unimat_jax.crystal import Crystal
from unimat_jax.representation import crystal_of_record
from unimat_jax.structure_files import read_structures

FILE = source_files("starter", None)[""]


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    return prepare("starter", data_dir=tmp_path_factory.mktemp("starter"), niggli=False, quiet=True)


def _records(directory, split):
    return list(tfds.builder_from_directory(str(directory)).as_data_source(split))


def test_content():
    crystals = list(read_structures(FILE))
    assert len(crystals) == 3420 and all(isinstance(c, Crystal) for c in crystals)
    assert FILE.stat().st_size < 1_000_000
    assert max(c.num_atoms for c in crystals) == 20 and len({c.uid for c in crystals}) == 3420
    assert len({z for c in crystals for z in c.atomic_numbers.tolist()}) == 86
    arsenic = next(c for c in crystals if c.uid == "mp-10")
    assert arsenic.symbols == ["As", "As"] and arsenic.properties["e_above_hull"] == pytest.approx(0.107405060)
    assert all(c.properties["e_above_hull"] > -1e-6 for c in crystals)


def test_licences_and_attribution_lie_beside_it():
    text = (FILE.parent / "README.md").read_text()
    for words in ("CC BY 4.0", "Materials Project", "10.1063/1.4812323", "Redistributions of source code must retain"):
        assert words in text


def test_it_is_the_expected_content():
    expected = {c.uid: c for c in load("starter_source/flla_le20")}
    found = {c.uid: c for c in read_structures(FILE) if isinstance(c, Crystal)}
    assert found.keys() == expected.keys()
    assert max(difference(found[uid], expected[uid]) for uid in expected) < 1e-9
    with np.load(data_dir() / "starter_source/flla_le20.npz") as source, np.load(FILE) as ours:
        for name in ("formation_energy_per_atom", "e_above_hull", "numbers", "frac_coords"):
            np.testing.assert_array_equal(source[name], ours[name])


def test_another_file_than_the_source_distribution_is_refused(tmp_path):
    (tmp_path / "matminer-0.4.0.tar.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256"):
        make_starter([f"--sdist={tmp_path}/matminer-0.4.0.tar.gz", f"--output={tmp_path}/out.npz"])
    with pytest.raises(ValueError, match="does not exist"):
        make_starter([f"--sdist={tmp_path}/nothing.tar.gz"])


def test_no_formula_is_in_two_splits_and_nothing_is_lost(starter):
    splits = {name: _records(starter, name) for name in ("train", "validation", "test")}
    sizes = {name: len(records) for name, records in splits.items()}
    assert sum(sizes.values()) == 3420 and min(sizes.values()) > 100 and sizes["train"] > 2900
    formulas = [{reduced_formula(r["slots"]) for r in records} for records in splits.values()]
    assert not (formulas[0] & formulas[1] or formulas[0] & formulas[2] or formulas[1] & formulas[2])
    found = {r["material_id"].decode(): crystal_of_record(r) for records in splits.values() for r in records}
    worst = max(difference(c, found[c.uid]) for c in read_structures(FILE) if isinstance(c, Crystal))
    assert worst < 1e-5


def test_split_by_id_is_another_split(starter, tmp_path):
    other = prepare("starter", data_dir=tmp_path, niggli=False, split_by="id", quiet=True)
    ids = [{r["material_id"] for r in _records(directory, "test")} for directory in (starter, other)]
    assert ids[0] != ids[1] and min(map(len, ids)) > 100


def test_a_slice(tmp_path):
    directory = prepare(
        "starter", data_dir=tmp_path, max_atoms=6, elements=["Sr", "Ba", "Ca", "Ti", "Zr", "O"], quiet=True
    )
    report = json.loads((directory / "data_report.json").read_text())
    statistics = json.loads((directory / "statistics.json").read_text())
    assert statistics["max_atoms"] <= 6 and set(statistics["elements"]) <= {"Sr", "Ba", "Ca", "Ti", "Zr", "O"}
    assert report["kept"] + sum(report["dropped"].values()) == 3420 and report["kept"] >= 10
    assert statistics["properties"]["e_above_hull"]["unit"] == "eV/atom"
    energies = [r["properties"]["formation_energy_per_atom"] for r in _records(directory, "train")]
    assert statistics["properties"]["formation_energy_per_atom"]["min"] == pytest.approx(min(energies), abs=1e-6)
