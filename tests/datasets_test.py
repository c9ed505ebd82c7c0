"""The big public data sets: small files in exactly their formats, made of real structures, through `prepare`."""

import bz2
import csv
import itertools
import json
import zipfile
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from crystal_cases import difference
from pymatgen.entries.computed_entries import ComputedStructureEntry

from data_prep.builders import BUILDERS
from data_prep.datasets import DATASETS, source_files
from data_prep.prepare import prepare
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.representation import crystal_of_record
from unimat_jax.structure_files import Failure, read_structures

GNOME_COLUMNS = (
    ",Composition,MaterialId,Reduced Formula,Elements,NSites,Volume,Density,Point Group,Space Group,Space Group Number,"
    "Crystal System,Uncorrected Energy,Corrected Energy,Formation Energy Per Atom,Decomposition Energy Per Atom,"
    "Dimensionality Cheon,Bandgap,Is Train,Decomposition Energy Per Atom All,Decomposition Energy Per Atom Relative,"
    "Decomposition Energy Per Atom MP,Decomposition Energy Per Atom MP OQMD,Data Directory"
)
GNOME_HEADER = GNOME_COLUMNS.split(",")


@pytest.fixture(scope="module")
def starter() -> list[Crystal]:
    (path,) = source_files("starter", None).values()
    found = itertools.islice(read_structures(path), 12)
    return [crystal for crystal in found if isinstance(crystal, Crystal)]


def _prepare(dataset: str, source: Path, tmp_path: Path, **options) -> tuple[dict[str, Crystal], dict, dict]:
    """Crystals and properties by id, and the report."""
    options = {"split_fractions": (1, 0, 0), "niggli": False} | options
    directory = prepare(dataset, source, tmp_path / "data", num_workers=0, quiet=True, **options)
    report = json.loads((directory / "data_report.json").read_text())
    builder = tfds.builder_from_directory(str(directory))
    crystals, properties = {}, {}
    for split in report["splits"]:
        for record in builder.as_data_source(split):
            uid = record["material_id"].decode()
            crystals[uid] = crystal_of_record(record, uid)
            properties[uid] = record["properties"]
    assert report["read"] == report["kept"] + sum(report["dropped"].values()) and report["kept"] == len(crystals)
    return crystals, properties, report


def _write_gnome(path: Path, crystals: list[Crystal]) -> Path:
    path.mkdir()
    ids = [f"{0xB5B2F1AE + i:010x}" for i in range(len(crystals))]
    with (path / "stable_materials_summary.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(GNOME_HEADER)
        for number, (uid, c) in enumerate(zip(ids, crystals, strict=True)):
            structure = c.to_pymatgen()
            row = {
                "Composition": structure.composition.alphabetical_formula.replace(" ", ""),
                "MaterialId": uid,
                "Reduced Formula": structure.composition.reduced_formula,
                "Elements": str(sorted(set(c.symbols))),
                "Formation Energy Per Atom": -0.5 - 0.1 * number,
                "Decomposition Energy Per Atom": -0.01,
                "Bandgap": "" if number == 0 else 1.5,
                "Is Train": number % 2 == 0,
            }
            writer.writerow([number if not column else row.get(column, "") for column in GNOME_HEADER])
    with zipfile.ZipFile(path / "by_id.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("by_id/", "")
        for uid, c in zip(ids, crystals, strict=True):
            archive.writestr(f"by_id/{uid}.CIF", c.to_cif())
    return path


def test_gnome(starter, tmp_path):
    source = _write_gnome(tmp_path / "gnome_data", starter)
    crystals, properties, report = _prepare("gnome", source, tmp_path)
    assert len(crystals) == len(starter) and report["dropped"] == {}
    for uid, crystal in zip(sorted(crystals), starter, strict=True):
        assert difference(crystals[uid], crystal) < 1e-5
    first, second = (properties[uid] for uid in sorted(crystals)[:2])
    assert second["formation_energy_per_atom"] == pytest.approx(-0.6) and second["band_gap"] == 1.5
    assert first["band_gap"] != first["band_gap"]  # NaN where the cell is empty
    assert set(first) == {"formation_energy_per_atom", "decomposition_energy_per_atom", "band_gap"}
    assert BUILDERS["gnome"].__doc__ and "BY-NC" in BUILDERS["gnome"].__doc__


def test_gnome_counts_what_stands_in_one_of_the_two_only(starter, tmp_path):
    source = _write_gnome(tmp_path / "gnome_data", starter)
    with (source / "stable_materials_summary.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["0", "O2", "without_cif", *[""] * (len(GNOME_HEADER) - 3)])
        writer.writerow(["1", "O2", "cut_off"])
    with zipfile.ZipFile(source / "by_id.zip", "a") as archive:
        archive.writestr("by_id/without_row.CIF", starter[0].to_cif())
        archive.writestr("../outside.CIF", starter[0].to_cif())
    _, _, report = _prepare("gnome", source, tmp_path)
    assert report["dropped"] == {"no_cif": 1, "no_row": 1, "unparsable": 1, "unsafe_path": 1}
    assert report["kept"] == len(starter)


def test_a_cif_of_gnome_that_cannot_be_decompressed_costs_itself(starter, tmp_path):
    source = _write_gnome(tmp_path / "gnome_data", starter)
    with zipfile.ZipFile(source / "by_id.zip") as archive:
        member = archive.infolist()[3]
    content = bytearray((source / "by_id.zip").read_bytes())
    start = member.header_offset + 30 + len(member.filename)
    content[start + 5 : start + 60] = b"\xff" * 55
    (source / "by_id.zip").write_bytes(content)
    _, _, report = _prepare("gnome", source, tmp_path)
    assert report["dropped"] == {"unreadable_file": 1} and report["kept"] == len(starter) - 1


def _entry(crystal: Crystal, number: int) -> dict:
    structure = crystal.to_pymatgen()
    structure.add_site_property("magmom", [0.001] * len(structure))
    structure.add_site_property("forces", [[0.0, 1e-4, -1e-4]] * len(structure))
    data = {
        **{"mat_id": f"agm{number:09d}", "formula": crystal.formula, "nsites": len(structure), "spg": 225},
        **{"e_form": -0.1 * number, "e_above_hull": 0.01 * number, "e_phase_separation": 0.01 * number},
        **{"band_gap_ind": 0.0, "band_gap_dir": float("nan"), "total_mag": 1e-3, "dos_ef": 2.5, "energy_total": -30.1},
        **{"energy_corrected": -30.2, "decomposition": "Fe O2", "elements": sorted(set(crystal.symbols))},
        **{"stress": [[0.1, 0, 0], [0, 0.1, 0], [0, 0, 0.1]], "location": "cgat_comp/x", "prototype_id": "A_225"},
    }
    return ComputedStructureEntry(structure, -30.1, correction=-0.1, entry_id=None, data=data).as_dict()


def _write_alexandria(path: Path, crystals: list[Crystal], infix: str = "") -> Path:
    path.mkdir(exist_ok=True)
    half = len(crystals) // 2
    for number, part in enumerate((crystals[:half], crystals[half:])):
        entries = [_entry(c, number * half + i) for i, c in enumerate(part)]
        with bz2.open(path / f"alexandria{infix}_{number:03d}.json.bz2", "wt") as file:
            json.dump({"entries": entries}, file)
    return path


def test_alexandria(starter, tmp_path):
    source = _write_alexandria(tmp_path / "alexandria", starter)
    crystals, properties, report = _prepare("alexandria", source, tmp_path)
    assert sorted(crystals) == [f"agm{i:09d}" for i in range(len(starter))] and report["dropped"] == {}
    for uid, crystal in zip(sorted(crystals), starter, strict=True):
        assert difference(crystals[uid], crystal) < 1e-5
    assert properties["agm000000003"]["e_form"] == pytest.approx(-0.3)
    assert set(properties["agm000000003"]) == {
        *("e_form", "e_above_hull", "e_phase_separation", "band_gap_ind", "total_mag", "dos_ef")
    }
    assert report["changed"]["magnetic_moments_dropped"] == len(starter)


@pytest.mark.parametrize(("dataset", "infix", "functional"), [("pbesol", "_ps", "PBEsol"), ("scan", "_scan", "SCAN")])
def test_alexandria_of_other_functionals_is_a_data_set_of_its_own(dataset, infix, functional, starter, tmp_path):
    source = _write_alexandria(tmp_path / "alexandria", starter[:4], infix)
    with pytest.raises(UserError, match="from https://alexandria"):
        source_files("alexandria", str(source))
    _, _, report = _prepare(f"alexandria_{dataset}", source, tmp_path)
    directory = tmp_path / "data" / f"alexandria_{dataset}" / "1.0.0"
    assert json.loads((directory / "statistics.json").read_text())["properties"]["e_form"]["functional"] == functional
    _write_alexandria(source, starter[:4])
    with pytest.raises(UserError, match="put it in another directory"):
        source_files(f"alexandria_{dataset}", str(source))
    assert report["kept"] == 4


def test_a_cut_off_file_of_alexandria_keeps_what_is_whole(starter, tmp_path):
    source = _write_alexandria(tmp_path / "alexandria", starter)
    file = source / "alexandria_000.json.bz2"
    text = bz2.decompress(file.read_bytes())
    file.write_bytes(bz2.compress(text[: text.index(b"agm000000004")]))
    _, _, report = _prepare("alexandria", source, tmp_path)
    assert report["kept"] == len(starter) - 2 and report["dropped"] == {"unreadable_file": 1}
    (failure,) = [found for found in read_structures(source) if isinstance(found, Failure)]
    assert "alexandria_000" in failure.origin and "the rest is not read" in failure.message


def _write_splits(path: Path, crystals: list[Crystal], columns: list[str], splits: tuple[str, ...]) -> Path:
    path.mkdir()
    for number, split in enumerate(splits):
        with (path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["", "material_id", "cif", *columns])
            for i, c in enumerate(crystals[number :: len(splits)]):
                values = [
                    0.05 * (i + 1) if not name.startswith(("space", "chem", "reduced")) else "Fm-3m" for name in columns
                ]
                writer.writerow([i, f"agm{number}-{i}", c.to_cif(), *values])
    return path


def test_alex_mp_20(starter, tmp_path):
    columns = "reduced_formula,space_group,chemical_system,num_sites,energy_above_hull,dft_band_gap,dft_mag_density"
    columns += ",dft_bulk_modulus,ml_bulk_modulus,hhi_score"
    source = _write_splits(tmp_path / "alex_mp_20", starter, columns.split(","), ("train", "val"))
    crystals, properties, report = _prepare("alex_mp_20", source, tmp_path)
    assert {split: numbers["crystals"] for split, numbers in report["splits"].items()} == {"train": 6, "validation": 6}
    assert difference(crystals["agm0-0"], starter[0]) < 1e-5 and difference(crystals["agm1-0"], starter[1]) < 1e-5
    assert properties["agm0-1"]["dft_mag_density"] == pytest.approx(0.1)
    assert set(properties["agm0-0"]) == {
        *("energy_above_hull", "dft_band_gap", "dft_mag_density", "dft_bulk_modulus", "ml_bulk_modulus", "hhi_score")
    }
    assert "no test split in the source" in report["notes"]


def test_mp_20_in_the_columns_of_cdvae_and_of_mattergen(starter, tmp_path):
    cdvae = "formation_energy_per_atom,band_gap,pretty_formula,e_above_hull,elements,spacegroup.number"
    splits = ("train", "val", "test")
    _, properties, _ = _prepare("mp_20", _write_splits(tmp_path / "a", starter, cdvae.split(","), splits), tmp_path)
    assert set(properties["agm0-0"]) == {"formation_energy_per_atom", "band_gap", "e_above_hull"}
    mattergen = "dft_bulk_modulus,dft_mag_density,energy_above_hull,dft_band_gap"
    source = _write_splits(tmp_path / "b", starter, mattergen.split(","), splits)
    _, properties, _ = _prepare("mp_20", source, tmp_path / "again")
    assert set(properties["agm0-0"]) == set(mattergen.split(","))


@pytest.mark.parametrize(
    ("dataset", "held", "words"),
    [
        ("gnome", "by_id.zip", ("stable_materials_summary.csv", "gdm_materials_discovery")),
        ("gnome", "other.txt", ("stable_materials_summary.csv and by_id.zip", "gdm_materials_discovery")),
        ("alexandria", "entries.json", ("entries.json", "alexandria.icams.rub.de")),
        ("alex_mp_20", "alex_mp_20.zip", ("alex_mp_20.zip", "microsoft/mattergen", "unzipped")),
        ("mp_20", "README.md", ("README.md", "cdvae")),
    ],
)
def test_a_wrong_directory_is_told_what_is_missing_and_where_it_is(dataset, held, words, tmp_path):
    (tmp_path / held).write_text("")
    with pytest.raises(UserError) as error:
        source_files(dataset, str(tmp_path))
    for word in words:
        assert word in str(error.value)


def test_every_data_set_has_a_builder_that_says_where_it_comes_from():
    assert BUILDERS.keys() == DATASETS.keys()
    for name in BUILDERS.keys() - {"starter", "crystals", "alexandria_pbesol", "alexandria_scan"}:
        text = BUILDERS[name].__doc__ or ""
        assert "https://" in text and "hecksum" in text, name
        assert DATASETS[name].licence and DATASETS[name].citation, name
