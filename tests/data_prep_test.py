"""From source files to records on disk, through the program that users start."""

import csv
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from bomb import Bomb
from crystal_cases import difference, perovskite, quartz, random_crystal, same_up_to_proper_rotation, space_group
from shared_data import data_dir, load

from data_prep.outcome import read_outcome
from data_prep.parse_pool import CellOptions, parse_all
from data_prep.prepare import main, prepare
from data_prep.statistics import Statistics
from unimat_jax.crystal import Crystal, lattice_from_parameters
from unimat_jax.errors import UserError
from unimat_jax.representation import LATTICE_FORMS, crystal_of_record, encode, lattice_vector
from unimat_jax.structure_files import RawStructure, scan


def _crystals(number: int, seed: int = 0) -> list[Crystal]:
    rng = np.random.default_rng(seed)
    found = [random_crystal(rng, 8, elements=(3, 8, 22, 57)) for _ in range(number)]
    return [Crystal.create(c.atomic_numbers, c.frac_coords, c.lattice, f"id-{i}") for i, c in enumerate(found)]


def _write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _table(path: Path, crystals: list[Crystal], **columns) -> Path:
    rows = [
        {"material_id": c.uid, "cif": c.to_cif()} | {k: v[i] for k, v in columns.items()}
        for i, c in enumerate(crystals)
    ]
    _write_csv(path, rows)
    return path


def _records(directory: Path, split: str) -> dict[str, dict]:
    source = tfds.builder_from_directory(str(directory)).as_data_source(split)
    return {record["material_id"].decode(): record for record in source}


def _read(directory: Path) -> dict[str, Crystal]:
    splits = json.loads((directory / "statistics.json").read_text())["num_examples"]
    found = {uid: record for split in splits for uid, record in _records(directory, split).items()}
    return {uid: crystal_of_record(record, uid) for uid, record in found.items()}


def _report(directory: Path) -> dict:
    return json.loads((directory / "data_report.json").read_text())


def _adds_up(directory: Path) -> bool:
    report = _report(directory)
    dropped = sum(report["dropped"].values())
    lines = [json.loads(line) for line in (directory / "dropped.jsonl").read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == report["dropped"]
    named = len({(line["id"], line["origin"]) for line in lines})
    kept = sum(split["crystals"] for split in report["splits"].values())
    return report["read"] == report["kept"] + dropped and dropped == named and report["kept"] == kept


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """100 random crystals in a table, and the data set made of them."""
    root = tmp_path_factory.mktemp("hundred")
    crystals = _crystals(100)
    energy = [0.01 * i if i % 10 else "" for i in range(100)]
    source = _table(root / "mine.csv", crystals, energy=energy, note=["text"] * 100)
    options = {
        "niggli": False,
        "properties": ["energy:eV/atom:PBE:none"],
        "split_fractions": (0.7, 0.2, 0.1),
        "seed": 3,
    }
    return crystals, source, prepare("crystals", source, root / "data", num_workers=0, quiet=True, **options), options


def test_records_hold_the_crystals(hundred):
    crystals, _, directory, _ = hundred
    found = _read(directory)
    assert found.keys() == {c.uid for c in crystals}
    assert max(difference(c, found[c.uid]) for c in crystals) < 1e-5
    record = next(iter(_records(directory, "train").values()))
    assert record["slots"].dtype == np.uint8 and record["frac_coords"].dtype == np.float32
    assert record["lattice"].shape == (6,) and set(record["properties"]) == {"energy"}


def test_missing_property_is_nan_and_has_its_meaning(hundred):
    _, _, directory, _ = hundred
    values = {
        uid: r["properties"]["energy"]
        for s in ("train", "validation", "test")
        for uid, r in _records(directory, s).items()
    }
    assert {uid for uid, value in values.items() if np.isnan(value)} == {f"id-{i}" for i in range(0, 100, 10)}
    assert values["id-7"] == pytest.approx(0.07)
    about = json.loads((directory / "statistics.json").read_text())["properties"]["energy"]
    assert (about["unit"], about["functional"], about["correction"]) == ("eV/atom", "PBE", "none")
    metadata = tfds.builder_from_directory(str(directory)).info.metadata
    assert metadata["properties"]["energy"]["unit"] == "eV/atom"
    assert _report(directory)["columns_not_used"] == {"note": "text"}


def test_statistics_are_those_of_the_train_records(hundred):
    _, _, directory, _ = hundred
    statistics = json.loads((directory / "statistics.json").read_text())
    records = list(_records(directory, "train").values())
    assert statistics["num_examples"]["train"] == len(records) < 100 == sum(statistics["num_examples"].values())
    cells, sizes = np.stack([r["lattice"] for r in records]), np.array([len(r["slots"]) for r in records])
    for form in ("parameters", "log_metric"):
        vectors = lattice_vector(cells, sizes, form)
        np.testing.assert_allclose(statistics["lattice"][form]["mean"], vectors.mean(0), atol=1e-6)
        np.testing.assert_allclose(statistics["lattice"][form]["std"], vectors.std(0), atol=1e-6)
    positions = [
        (r["frac_coords"] - 0.5) @ lattice_from_parameters(r["lattice"][:3], r["lattice"][3:]) for r in records
    ]
    assert statistics["coordinate_radius"] == pytest.approx(max(np.abs(p).max() for p in positions), abs=1e-4)
    assert statistics["max_atoms"] == sizes.max()
    assert statistics["max_atoms_per_element"] == max(r["slots"][:, 0].max() for r in records) + 1
    assert sum(statistics["elements"].values()) == sizes.sum() and set(statistics["elements"]) <= {
        "Li",
        "O",
        "Ti",
        "La",
    }
    energies = np.array([r["properties"]["energy"] for r in records])
    energies = energies[np.isfinite(energies)]
    about = statistics["properties"]["energy"]
    assert about["count"] == len(energies)
    expected = [energies.mean(), energies.std(), energies.min(), energies.max()]
    np.testing.assert_allclose([about[k] for k in ("mean", "std", "min", "max")], expected, atol=1e-6)
    assert (statistics["niggli"], statistics["primitive"]) == (False, False)


def test_statistics_do_not_depend_on_batches_and_the_cubic_std_has_a_floor():
    from data_prep.statistics import _BATCH

    crystals = [Crystal.create([38], [[0, 0, 0]], (3 + i / 5000) * np.eye(3)) for i in range(_BATCH + 7)]
    statistics = Statistics()
    for crystal in crystals:
        statistics.add(encode(crystal), {})
    lattice = statistics.to_json({})["lattice"]
    expected = lattice_vector(
        np.stack([[*c.lengths, 90, 90, 90] for c in crystals]), np.ones(len(crystals)), "parameters"
    )
    np.testing.assert_allclose(lattice["parameters"]["mean"], expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(lattice["parameters"]["std"], [*expected.std(0)[:3], 0.01, 0.01, 0.01], atol=1e-6)


def test_matrix_statistics_are_those_of_rotated_cells():
    from unimat_jax.augmentation import random_rotations

    crystals = _crystals(40)
    statistics = Statistics()
    for crystal in crystals:
        statistics.add(encode(crystal), {})
    lattice = statistics.to_json({})["lattice"]["matrix"]
    rng = np.random.default_rng(0)
    cells = np.concatenate([(c.lattice / np.cbrt(c.num_atoms)) @ random_rotations(rng, 2000) for c in crystals])
    vectors = cells.reshape(-1, LATTICE_FORMS["matrix"])
    np.testing.assert_allclose(lattice["std"], vectors.std(0), rtol=0.02)
    np.testing.assert_allclose(lattice["mean"], vectors.mean(0), atol=0.05)


def test_same_source_and_seed_give_the_same_bytes_whatever_the_workers(hundred, tmp_path):
    _, source, directory, options = hundred
    again = prepare("crystals", source, tmp_path, num_workers=2, quiet=True, **options)
    shards = sorted(p.name for p in directory.glob("*.array_record*"))
    assert shards and shards == sorted(p.name for p in again.glob("*.array_record*"))
    for name in [*shards, "statistics.json", "features.json"]:
        assert (directory / name).read_bytes() == (again / name).read_bytes(), name
    other = prepare("crystals", source, tmp_path / "other", num_workers=0, quiet=True, **{**options, "seed": 4})
    assert _records(other, "test").keys() != _records(directory, "test").keys()


def test_shards(hundred, tmp_path):
    crystals, source, _, options = hundred
    directory = prepare("crystals", source, tmp_path, num_workers=0, num_shards=3, quiet=True, **options)
    assert len(list(directory.glob("crystals-train.array_record-*-of-00003"))) == 3
    assert len(_read(directory)) == len(crystals)


def test_a_second_run_says_that_it_is_done(hundred, tmp_path, capsys):
    _, source, _, _ = hundred
    argv = ["--dataset=crystals", f"--source={source}", f"--data-dir={tmp_path}", "--num-workers=0", "--no-niggli"]
    assert main(argv) == 0
    assert "100 read, 100 kept, 0 dropped" in capsys.readouterr().out
    changed = (tmp_path / "crystals/1.0.0/dataset_info.json").stat().st_mtime_ns
    assert main(argv) == 0
    assert "is done already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"max_atoms: None, now 4.*--overwrite"):
        main([*argv, "--max_atoms=4"])
    assert (tmp_path / "crystals/1.0.0/dataset_info.json").stat().st_mtime_ns == changed
    assert main([*argv, "--max_atoms=4", "--overwrite"]) == 0
    assert "too_many_atoms" in capsys.readouterr().out


def test_an_interrupted_run_continues(hundred, tmp_path, capsys, monkeypatch):
    from data_prep import parse_pool

    crystals, source, directory, options = hundred
    real, calls = parse_pool.prepare_one, []

    def dies_at_30(item, cell):
        calls.append(item[1].uid)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return real(item, cell)

    monkeypatch.setattr(parse_pool, "prepare_one", dies_at_30)
    with pytest.raises(KeyboardInterrupt):
        prepare("crystals", source, tmp_path, num_workers=0, quiet=True, **options)
    spool = tmp_path / "crystals/1.0.0.parsing/parts/000000.outcomes"
    with spool.open("ab") as file:  # as if killed in the middle of a write
        file.write(b"\x40\x00\x00\x00\x02\x00\x00\x00[half")
    assert not (tmp_path / "crystals/1.0.0").exists()
    again = prepare("crystals", source, tmp_path, num_workers=0, **options)
    assert "continuing after 29" in capsys.readouterr().out
    assert len(calls) == 30 + 100 - 29
    for shard in directory.glob("*.array_record*"):
        assert shard.read_bytes() == (again / shard.name).read_bytes()
    assert not spool.parents[1].exists() and len(_read(again)) == len(crystals)


def test_a_folder_with_every_kind_of_trouble(tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    good = _crystals(12)
    for crystal in good:
        (source / f"{crystal.uid}.cif").write_text(crystal.to_cif())
    cif = perovskite().to_cif()
    (source / "cut.cif").write_text(cif[:-60])
    (source / "partial.cif").write_text(cif.replace("0.00000000  1\n", "0.00000000  0.5\n", 1))
    (source / "deuterium.cif").write_text(cif.replace("  Sr  Sr0", "  D  D0").replace("Sr1", "D1"))
    (source / "vacancy.cif").write_text(cif.replace("  Sr  Sr0", "  Vac  Vac0"))
    (source / "nan.cif").write_text(cif.replace("_cell_length_a   3.9", "_cell_length_a   nan", 1))
    (source / "empty.cif").write_text("")
    (source / "README.txt").write_text("hello")
    rows = "\n".join(f"{i / 300} 0.25 0.5" for i in range(300))
    (source / "long.vasp").write_text(f"long\n1.0\n900 0 0\n0 4 0\n0 0 4\nC\n300\nDirect\n{rows}\n")
    (source / "id-0.extxyz").write_text(perovskite().to_extxyz().replace("uid=SrTiO3", "uid=id-1"))
    program = [sys.executable, "-m", "data_prep.prepare", "--dataset=crystals", f"--source={source}"]
    flags = [f"--data_dir={tmp_path}/data", "--split_fractions=1,0,0", "--num_workers=2"]
    done = subprocess.run([*program, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = _report(tmp_path / "data/crystals/1.0.0")
    assert _adds_up(tmp_path / "data/crystals/1.0.0") and (report["read"], report["kept"]) == (21, 13)
    expected = {"unparsable": "cut", "disordered": "partial", "bad_element": "vacancy", "not_finite": "nan"}
    expected |= {
        "empty_file": "empty",
        "not_a_structure_file": "README.txt",
        "too_many_of_element": "long",
        "duplicate_id": "id-1",
    }
    assert {reason: [item["id"] for item in items] for reason, items in report["dropped_structures"].items()} == {
        reason: [uid] for reason, uid in expected.items()
    }
    assert report["changed"]["isotopes_read_as_H"] == 1
    for reason in expected:
        assert reason in done.stdout


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    (tmp_path / "a.cif").write_text("")
    program = [sys.executable, "-m", "unimat_jax.cli", "prepare", "--dataset=crystals", f"--source={tmp_path}/a.cif"]
    done = subprocess.run([*program, f"--data_dir={tmp_path}/d"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: no crystal is left of 1 read (1 empty_file)") and "data_report.json" in line
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "d/crystals/1.0.0.parsing/data_report.json").read_text())["dropped"] == {
        "empty_file": 1
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset=perov"], ("perov", "perov_5")),
        (["--dataset=crystals"], ("--source",)),
        (["--dataset=crystals", "--source=nowhere"], ("nowhere", "does not exist")),
        (["--dataset=mp_20", "--source={}"], ("mp_20", "train")),
        (["--dataset=crystals", "--source={}/no_cif.csv"], ("'cif'", "formula")),
        (["--dataset=starter", "--source=x"], ("--source=x",)),
        (["--dataset=starter", "--elements=Xx"], ("Xx",)),
        (["--dataset=starter", "--split_fractions=0,1,0"], ("train",)),
        (["--dataset=starter", "--split_fractions=a,b,c"], ("a",)),
        (["--dataset=starter", "--property=nonsense"], ("NAME:UNIT",)),
        (["--dataset=crystals", "--source={}/one.csv", "--property=nothing:eV"], ("nothing", "gap")),
        (["--dataset=starter", "--split_ids=nothing.csv"], ("nothing.csv",)),
        (["--dataset=starter", "--time_limit=0"], ("time_limit",)),
        (["--dataset=starter", "--part_size=0"], ("part_size",)),
        (["--dataset=starter", "--num_shards=0"], ("num_shards",)),
        (["--dataset=crystals", "--source={}/one.csv", "--max_atoms=4"], ("no crystal is left", "1 too_many_atoms")),
    ],
)
def test_wrong_flags_are_one_line_with_the_remedy(flags, words, tmp_path):
    (tmp_path / "no_cif.csv").write_text("id,formula\n1,SrTiO3\n")
    _table(tmp_path / "one.csv", [perovskite()], gap=[1.0])
    with pytest.raises(UserError) as error:
        main([f.format(tmp_path) for f in flags] + [f"--data_dir={tmp_path}/d", "--num_workers=0"])
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("flag", ["--elemnts=Sr", "--max_atoms=many", "--split_by=colour"])
def test_unknown_flags_and_values_are_one_line(flag):
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.prepare", "--dataset=starter", flag],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert flag.split("=")[0] in done.stderr and "--help" in done.stderr


def test_a_directory_that_is_no_data_set_is_left_alone(hundred, tmp_path):
    _, source, _, options = hundred
    (tmp_path / "crystals/1.0.0").mkdir(parents=True)
    (tmp_path / "crystals/1.0.0/thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no data set"):
        prepare("crystals", source, tmp_path, num_workers=0, quiet=True, **options)
    assert (tmp_path / "crystals/1.0.0/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["mp_20", "mpts_52"])
def test_cdvae_layout_with_a_missing_split(name, tmp_path):
    crystals = _crystals(20)
    energies = [0.1 * i for i in range(20)]
    _table(tmp_path / "mp/train.csv", crystals[:15], formation_energy_per_atom=energies[:15], elements=["Li"] * 15)
    values = {"formation_energy_per_atom": [*energies[15:], 0.0], "elements": ["Li"] * 6}
    _table(tmp_path / "mp/val.csv", [*crystals[15:], crystals[0]], **values)
    directory = prepare(name, tmp_path / "mp", tmp_path / "data", quiet=True, num_workers=0)
    report = _report(directory)
    assert _records(directory, "train").keys() == {c.uid for c in crystals[:15]}
    assert _records(directory, "validation").keys() == {c.uid for c in crystals[15:]}
    assert report["dropped"] == {"duplicate_id": 1} and _adds_up(directory)
    assert report["notes"] == ["no test split in the source"]
    assert report["properties"]["formation_energy_per_atom"]["unit"] == "eV/atom"
    assert report["properties"]["formation_energy_per_atom"]["functional"].startswith("PBE")
    statistics = json.loads((directory / "statistics.json").read_text())
    assert statistics["niggli"] is True and statistics["tolerance"]["niggli"] == 1e-5


def test_niggli_keeps_reduced_cells_and_chirality(tmp_path):
    stretched = quartz()  # the same crystal in a cell that is not reduced
    change = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    frac = stretched.frac_coords @ np.linalg.inv(change)
    sheared = Crystal.create(stretched.atomic_numbers, frac, change @ stretched.lattice, "sheared")
    shifted = perovskite().frac_coords + np.array([0.1, 0.2, 0.3])
    given = Crystal.create([38, 22, 8, 8, 8], shifted, perovskite().lattice, "cubic")
    source = _table(tmp_path / "a.csv", [sheared, given])
    directory = prepare("crystals", source, tmp_path, quiet=True, num_workers=0, split_fractions=(1, 0, 0))
    found = _read(directory)
    assert _report(directory)["changed"] == {"niggli_reduced": 1}
    assert space_group(found["sheared"], 1e-2) == 152 and found["sheared"].volume == pytest.approx(
        quartz().volume, rel=1e-5
    )
    assert difference(given, found["cubic"]) < 1e-6  # axes and origin as given


def test_primitive_flag(tmp_path):
    face_centred = Crystal.create(
        [29] * 4, [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], 3.6 * np.eye(3), "Cu"
    )
    source = _table(tmp_path / "a.csv", [face_centred])
    options = {"quiet": True, "num_workers": 0, "split_fractions": (1, 0, 0)}
    assert _read(prepare("crystals", source, tmp_path / "given", **options))["Cu"].num_atoms == 4
    made = prepare("crystals", source, tmp_path / "primitive", primitive=True, **options)
    assert _read(made)["Cu"].num_atoms == 1 and _report(made)["changed"]["made_primitive"] == 1
    assert json.loads((made / "statistics.json").read_text())["primitive"] is True


def test_a_chiral_supercell_becomes_the_same_primitive_crystal(tmp_path):
    cell = quartz()
    frac = np.concatenate([cell.frac_coords, cell.frac_coords + np.array([0, 0, 1])]) / [1, 1, 2]
    double = Crystal.create(
        [*cell.atomic_numbers, *cell.atomic_numbers], frac, cell.lattice * [[1], [1], [2]], "double"
    )
    source = _table(tmp_path / "a.csv", [double])
    found = _read(
        prepare("crystals", source, tmp_path, primitive=True, quiet=True, num_workers=0, split_fractions=(1, 0, 0))
    )["double"]
    assert found.num_atoms == 9 and same_up_to_proper_rotation(cell, found) and space_group(found, 1e-2) == 152


@pytest.mark.parametrize("kind", ["csv", "bare.csv", "json", "lists.json", "txt"])
def test_split_ids(kind, tmp_path):
    crystals = _crystals(6)
    split_of = {"id-0": "train", "id-1": "train", "id-2": "val", "id-3": "test", "id-9": "train"}
    path = tmp_path / f"ids.{kind}"
    if kind == "csv":
        _write_csv(path, [{"split": split, "material_id": uid} for uid, split in split_of.items()])
    elif kind == "json":
        path.write_text(json.dumps(split_of))
    elif kind == "lists.json":
        path.write_text(
            json.dumps({s: [uid for uid, t in split_of.items() if t == s] for s in ("train", "val", "test")})
        )
    else:
        separator = "," if kind == "bare.csv" else " "
        path.write_text("".join(f"{uid}{separator}{split}\n" for uid, split in split_of.items()))
    source = _table(tmp_path / "a.csv", crystals)
    directory = prepare("crystals", source, tmp_path, split_ids=path, quiet=True, num_workers=0)
    report = _report(directory)
    assert [set(_records(directory, s)) for s in ("train", "validation", "test")] == [
        {"id-0", "id-1"},
        {"id-2"},
        {"id-3"},
    ]
    assert report["dropped"] == {"not_in_split_ids": 2} and report["split_ids_not_found"] == ["id-9"]


def test_mixed_functionals_are_an_error_with_three_ways_out(tmp_path):
    crystals = _crystals(4)
    run_types = ["GGA", "GGA+U", "GGA", "GGA"]
    source = _table(tmp_path / "a.csv", crystals, e_form=[1.0, 2.0, 3.0, 4.0], gap=[0.0] * 4, run_type=run_types)
    options = {"quiet": True, "num_workers": 0, "split_fractions": (1, 0, 0)}
    with pytest.raises(
        UserError, match=r"mixed functionals.*e_form.*GGA \(3\), GGA\+U \(1\).*--property.*--ignore_property"
    ):
        prepare("crystals", source, tmp_path, **options)
    told = prepare("crystals", source, tmp_path / "told", properties=["e_form:eV/atom:PBE and PBE+U:MP2020"], **options)
    assert _report(told)["properties"]["e_form"]["correction"] == "MP2020"
    without = prepare("crystals", source, tmp_path / "without", ignore_properties=["e_form"], **options)
    assert set(_report(without)["properties"]) == {"gap"}
    one = _table(tmp_path / "b.csv", crystals, e_form=[1.0, 2.0, 3.0, 4.0], run_type=["r2SCAN"] * 4)
    assert _report(prepare("crystals", one, tmp_path / "one", **options))["properties"]["e_form"] == {
        "unit": "unknown",
        "functional": "r2SCAN",
        "correction": "",
    }


def test_property_table_and_odd_column_names(tmp_path):
    (tmp_path / "cifs").mkdir()
    for crystal in _crystals(3):
        (tmp_path / "cifs" / f"{crystal.uid}.cif").write_text(crystal.to_cif())
    _write_csv(tmp_path / "targets.csv", [{"id": "id-0", "band gap (eV)": 1.5}, {"id": "id-2", "band gap (eV)": 2.5}])
    options = {"split_fractions": (1, 0, 0), "quiet": True, "num_workers": 0}
    directory = prepare("crystals", tmp_path / "cifs", tmp_path, property_table=tmp_path / "targets.csv", **options)
    values = {uid: float(r["properties"]["band_gap_eV"]) for uid, r in _records(directory, "train").items()}
    assert values.pop("id-1") != values.get("id-1") and values == {"id-0": 1.5, "id-2": 2.5}
    assert json.loads((directory / "statistics.json").read_text())["properties"]["band_gap_eV"]["mean"] == 2.0
    (tmp_path / "targets.csv").write_text("id,formula\nid-0,SrTiO3\n")
    with pytest.raises(UserError, match=r"no numbers.*id, formula"):
        prepare("crystals", tmp_path / "cifs", tmp_path / "b", property_table=tmp_path / "targets.csv", **options)


def test_filters_name_each_crystal(tmp_path):
    crystals = [perovskite(), quartz(), Crystal.create([3], [[0, 0, 0]], 3 * np.eye(3), "Li")]
    source = _table(tmp_path / "a.csv", crystals)
    argv = ["--dataset=crystals", f"--source={source}", f"--data_dir={tmp_path}", "--split_fractions=1,0,0"]
    assert main([*argv, "--num_workers=0", "--elements=Sr,Ti,O,Si", "--max_atoms=8"]) == 0
    report = _report(tmp_path / "crystals/1.0.0")
    ids = {reason: items[0]["id"] for reason, items in report["dropped_structures"].items()}
    assert ids == {"too_many_atoms": "quartz", "element_not_allowed": "Li"} and report["kept"] == 1
    again = prepare(
        "crystals",
        source,
        tmp_path / "again",
        elements="Sr-Ti-O-Si",
        max_atoms=8,
        quiet=True,
        num_workers=0,
        split_fractions=(1, 0, 0),
    )
    assert _report(again)["dropped"] == report["dropped"]


def _hangs_or_dies(kind: str) -> RawStructure:
    return RawStructure(kind, kind, "arrays", Bomb(kind))


def test_a_crash_and_a_hang_cost_one_structure_each(tmp_path):
    good = list(scan(_table(tmp_path / "a.csv", _crystals(70))))
    raws = [*good[:40], _hangs_or_dies("dies"), *good[40:50], _hangs_or_dies("hangs"), *good[50:]]
    found = b"".join(parse_all([("", raw) for raw in raws], CellOptions(), num_workers=2, time_limit=2.0))
    with io.BytesIO(found) as file:
        outcomes = list(iter(lambda: read_outcome(file), None))
    assert [o.uid for o in outcomes] == [raw.uid for raw in raws]
    assert {o.uid: o.reason for o in outcomes if o.reason} == {"dies": "crashed", "hangs": "timeout"}


def test_a_script_without_main_guard_still_works(tmp_path):
    source = _table(tmp_path / "a.csv", _crystals(3))
    script = tmp_path / "script.py"
    call = f"prepare('crystals', {str(source)!r}, {str(tmp_path)!r}, num_workers=2, split_fractions=(1, 0, 0))"
    script.write_text(f"from data_prep.prepare import prepare\nprint(prepare.__name__)\n{call}\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "3 kept" in done.stdout, done.stderr


def test_building_and_reading_import_neither_jax_nor_tensorflow(tmp_path):
    source = _table(tmp_path / "a.csv", _crystals(3))
    call = (
        f"prepare('crystals', {str(source)!r}, {str(tmp_path)!r}, num_workers=0, quiet=True, split_fractions=(1, 0, 0))"
    )
    code = f"""
import sys
from data_prep.prepare import prepare
path = {call}
import tensorflow_datasets as tfds
assert len(list(tfds.builder_from_directory(str(path)).as_data_source("train"))) == 3
print([name for name in ("tensorflow", "jax", "flax", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("name", "split"), [("perov_5", "val"), ("carbon_24", "val"), ("mp_20", "val")])
def test_real_data_sets(name, split, tmp_path):
    source = data_dir() / name
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{split}.npz").symlink_to(source / f"{split}.npz")
    directory = prepare(name, tmp_path / name, tmp_path / "data", niggli=False, quiet=True, num_workers=0)
    report = _report(directory)
    crystals = load(f"{name}/{split}")
    found = _read(directory)
    assert report["dropped"] == {} and len(found) == len(crystals) == report["read"]
    chosen = np.random.default_rng(0).choice(len(crystals), 200, replace=False)
    assert max(difference(crystals[i], found[crystals[i].uid]) for i in chosen) < 1e-5
    size = sum(p.stat().st_size for p in directory.glob("*.array_record*"))
    percent = 100 * size / len(crystals) / (20 * 9 * 18 * 3 * 4)
    assert report["splits"]["validation"]["percent_of_dense_mp_20_tensor"] == pytest.approx(percent, abs=1e-3)
    assert percent < 2.0


def test_partial_train_is_called_so(tmp_path):
    source = tmp_path / "mp_20"
    source.mkdir()
    with np.load(data_dir() / "mp_20" / "train_partial.npz") as whole:
        number = 100
        atoms = int(whole["n_atoms"][:number].sum())
        cut = {name: whole[name][: atoms if name in ("numbers", "frac_coords") else number] for name in whole.files}
    np.savez(source / "train_partial.npz", **cut)
    directory = prepare("mp_20", source, tmp_path / "data", quiet=True, num_workers=0)
    assert set(_report(directory)["columns_not_used"]) == {"row_index", "source"}
    for content in (_report(directory), json.loads((directory / "statistics.json").read_text())):
        assert any(note.startswith("partial train") for note in content["notes"])
    metadata = tfds.builder_from_directory(str(directory)).info.metadata
    assert any(note.startswith("partial train") for note in metadata["notes"])
