"""Every file format there and back, and every kind of broken structure with its reason."""

import bz2
import csv
import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import ase.db
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from crystal_cases import difference, perovskite, quartz, random_crystal, space_group
from pymatgen.entries.computed_entries import ComputedStructureEntry

from unimat_jax.crystal import Crystal, CrystalError
from unimat_jax.errors import UserError
from unimat_jax.structure_files import Failure, parse, read_structures, scan


def _named(crystal: Crystal, uid: str, **properties: float) -> Crystal:
    return Crystal.create(crystal.atomic_numbers, crystal.frac_coords, crystal.lattice, uid, properties)


def _samples() -> list[Crystal]:
    """Alpha-quartz (chiral), SrTiO3 and random triclinic crystals, which are chiral too; each with one property."""
    rng = np.random.default_rng(0)
    found = [quartz(), perovskite(), *(random_crystal(rng, 9) for _ in range(4))]
    return [_named(c, f"0{i:02d}", band_gap=0.5 * i) for i, c in enumerate(found)]  # a leading 0 must survive


def _write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _cif_dir(path: Path, crystals: list[Crystal]) -> Path:
    for crystal in crystals:
        (path / "cifs").mkdir(exist_ok=True)
        (path / "cifs" / f"{crystal.uid}.cif").write_text(crystal.to_cif())
    return path / "cifs"


def _cif_zip(path: Path, crystals: list[Crystal]) -> Path:
    return Path(shutil.make_archive(str(path / "cifs"), "zip", _cif_dir(path, crystals)))


def _cif_blocks(path: Path, crystals: list[Crystal]) -> Path:
    (path / "all.cif").write_text("data_global\n_journal_year 2024\n" + "".join(c.to_cif() for c in crystals))
    return path / "all.cif"


def _poscar_dirs(path: Path, crystals: list[Crystal]) -> Path:
    for crystal in crystals:
        (path / "runs" / crystal.uid).mkdir(parents=True)
        (path / "runs" / crystal.uid / "POSCAR").write_text(crystal.to_poscar())
    return path / "runs"


def _vasp_files(path: Path, crystals: list[Crystal]) -> Path:
    (path / "flat").mkdir()
    for crystal in crystals:
        (path / "flat" / f"{crystal.uid}.vasp").write_text(crystal.to_poscar())
    return path / "flat"


def _extxyz(path: Path, crystals: list[Crystal]) -> Path:
    (path / "frames.extxyz").write_text("".join(c.to_extxyz() for c in crystals))
    return path / "frames.extxyz"


def _csv(path: Path, crystals: list[Crystal]) -> Path:
    _write_csv(
        path / "train.csv",
        [{"": i, "material_id": c.uid, **c.properties, "cif": c.to_cif()} for i, c in enumerate(crystals)],
    )
    return path / "train.csv"


def _csv_gz(path: Path, crystals: list[Crystal]) -> Path:
    with gzip.open(path / "train.csv.gz", "wb") as file:
        file.write(_csv(path, crystals).read_bytes())
    return path / "train.csv.gz"


def _json_by_id(path: Path, crystals: list[Crystal]) -> Path:
    (path / "by_id.json").write_text(json.dumps({c.uid: c.to_pymatgen().as_dict() for c in crystals}))
    return path / "by_id.json"


def _json_rows(path: Path, crystals: list[Crystal]) -> Path:
    rows = [{"material_id": c.uid, "structure": c.to_pymatgen().as_dict(), **c.properties} for c in crystals]
    with bz2.open(path / "rows.json.bz2", "wt") as file:
        json.dump(rows, file)
    return path / "rows.json.bz2"


def _json_columns(path: Path, crystals: list[Crystal]) -> Path:
    columns = {
        "structure": [c.to_pymatgen().as_dict() for c in crystals],
        "band_gap": [c.properties["band_gap"] for c in crystals],
    }
    (path / "columns.json").write_text(json.dumps({"Si": columns}))
    return path / "columns.json"


def _json_entries(path: Path, crystals: list[Crystal]) -> Path:
    entries = [ComputedStructureEntry(c.to_pymatgen(), -1.0, entry_id=c.uid, data=c.properties) for c in crystals]
    with gzip.open(path / "entries.json.gz", "wt") as file:
        json.dump([entry.as_dict() for entry in entries], file)
    return path / "entries.json.gz"


def _json_split(path: Path, crystals: list[Crystal]) -> Path:
    data = [[c.to_pymatgen().as_dict(), c.properties["band_gap"]] for c in crystals]
    content = {"index": [c.uid for c in crystals], "columns": ["structure", "band_gap"], "data": data}
    (path / "matbench.json").write_text(json.dumps(content))
    return path / "matbench.json"


def _ase_db(path: Path, crystals: list[Crystal]) -> Path:
    with ase.db.connect(path / "all.db") as database:
        for c in crystals:
            database.write(c.to_ase(), uid=f"id{c.uid}", **c.properties)  # ase keeps no key that looks like a number
    return path / "all.db"


def _parquet(path: Path, crystals: list[Crystal], **columns: list) -> Path:
    columns = {
        "material_id": [c.uid for c in crystals],
        "band_gap": [c.properties["band_gap"] for c in crystals],
        **columns,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path / "all.parquet")
    return path / "all.parquet"


def _parquet_cif(path: Path, crystals: list[Crystal]) -> Path:
    return _parquet(path, crystals, cif=[c.to_cif() for c in crystals])


def _parquet_structure(path: Path, crystals: list[Crystal]) -> Path:
    return _parquet(path, crystals, structure=[json.dumps(c.to_pymatgen().as_dict()) for c in crystals])


def _parquet_arrays(path: Path, crystals: list[Crystal]) -> Path:
    return _parquet(
        path,
        crystals,
        numbers=[c.atomic_numbers.tolist() for c in crystals],
        frac_coords=[c.frac_coords.tolist() for c in crystals],
        lattice=[c.lattice.tolist() for c in crystals],
    )


def _parquet_positions(path: Path, crystals: list[Crystal]) -> Path:
    return _parquet(
        path,
        crystals,
        species_at_sites=[c.symbols for c in crystals],
        cartesian_site_positions=[(c.frac_coords @ c.lattice).tolist() for c in crystals],
        lattice_vectors=[c.lattice.tolist() for c in crystals],
    )


def _npz(path: Path, crystals: list[Crystal]) -> Path:
    np.savez(
        path / "train.npz",
        material_id=np.array([c.uid for c in crystals]),
        n_atoms=np.array([c.num_atoms for c in crystals], np.uint8),
        numbers=np.concatenate([c.atomic_numbers for c in crystals]),
        frac_coords=np.concatenate([c.frac_coords for c in crystals]),
        lattice=np.stack([c.lattice for c in crystals]),
        band_gap=np.array([c.properties["band_gap"] for c in crystals]),
    )
    return path / "train.npz"


WITH_PROPERTIES = [
    *(_extxyz, _csv, _csv_gz, _json_rows, _json_columns, _json_entries, _json_split, _ase_db),
    *(_parquet_cif, _parquet_structure, _parquet_arrays, _parquet_positions, _npz),
]
WITHOUT = [_cif_dir, _cif_zip, _cif_blocks, _poscar_dirs, _vasp_files, _json_by_id]


@pytest.mark.parametrize("write", WITH_PROPERTIES + WITHOUT)
def test_round_trip(write, tmp_path):
    crystals = _samples()
    found = [c for c in read_structures(write(tmp_path, crystals)) if isinstance(c, Crystal)]
    uids = [f"id{c.uid}" if write is _ase_db else c.uid for c in crystals]
    assert [c.uid for c in found] == (uids if write is not _json_columns else [f"Si-{i}" for i in range(len(crystals))])
    for before, after in zip(crystals, found, strict=True):
        assert difference(before, after) < 1e-6
        if write in WITH_PROPERTIES:
            assert after.properties["band_gap"] == before.properties["band_gap"]
    assert space_group(found[0]) == 152


def _left_handed(crystal: Crystal) -> Crystal:
    """The same crystal with its first two axes exchanged: a left-handed basis (Crystal.create would right it)."""
    swap = [1, 0, 2]
    return Crystal(
        crystal.atomic_numbers, crystal.frac_coords[:, swap], crystal.lattice[swap], "left", {"band_gap": 0.0}
    )


def _left_handed_poscar(path: Path, crystals: list[Crystal]) -> Path:
    # By hand: pymatgen's writer turns a left-handed cell round without the coordinates, which mirrors the crystal.
    rows = [" ".join(map(repr, row)) for row in crystals[0].lattice.tolist()]
    frac = [" ".join(map(repr, row)) for row in crystals[0].frac_coords.tolist()]
    (path / "left.vasp").write_text("\n".join(["left", "1.0", *rows, "Si O", "3 6", "Direct", *frac]) + "\n")
    return path / "left.vasp"


@pytest.mark.parametrize(
    "write",
    [_left_handed_poscar, _extxyz, _json_by_id, _ase_db, _parquet_structure, _parquet_arrays, _parquet_positions, _npz],
)
def test_left_handed_cell_is_not_mirrored(write, tmp_path):
    assert np.linalg.det(_left_handed(quartz()).lattice) < 0
    raws = list(scan(write(tmp_path, [_left_handed(quartz())])))
    crystal, changes = parse(raws[0])
    assert changes["left_handed_cell_inverted"] == 1
    assert np.linalg.det(crystal.lattice) > 0
    assert space_group(crystal) == 152  # 154 would be its mirror image


CIF = perovskite().to_cif()
POSCAR = perovskite().to_poscar()
EXTXYZ = perovskite().to_extxyz()


def _structure(**changes) -> str:
    return json.dumps(perovskite().to_pymatgen().as_dict() | changes)


def _with_species(species: list[dict]) -> str:
    content = perovskite().to_pymatgen().as_dict()
    content["sites"][0] |= {"species": species, "label": species[0]["element"]}
    return json.dumps(content)


def _long_poscar(number: int) -> str:
    rows = "\n".join(f"{i / number} 0.25 0.5" for i in range(number))
    return f"long\n1.0\n900 0 0\n0 4 0\n0 0 4\nC\n{number}\nDirect\n{rows}\n"


BAD = [
    ("empty.cif", "", "empty_file"),
    ("POSCAR", " \n", "empty_file"),
    ("empty.extxyz", "", "empty_file"),
    ("cut_in_cell.cif", CIF[:120], "unparsable"),
    ("cut_before_cell.cif", CIF[:60], "no_structure"),
    ("cut_in_atoms.cif", CIF[:-60], "unparsable"),
    ("cut_at_line.cif", "\n".join(CIF.splitlines()[:-1]) + "\n", "formula_mismatch"),
    ("text.cif", "this is no CIF\n", "no_structure"),
    ("partial.cif", CIF.replace("0.00000000  1\n", "0.00000000  0.5\n", 1), "disordered"),
    ("nan.cif", CIF.replace("_cell_length_a   3.90500000", "_cell_length_a   nan"), "not_finite"),
    ("unknown_cell.cif", CIF.replace("_cell_length_a   3.90500000", "_cell_length_a   ?"), "unparsable"),
    ("vacancy.cif", CIF.replace("  Sr  Sr0", "  Vac  Vac0"), "bad_element"),
    ("dummy.cif", CIF.replace("  Sr  Sr0", "  X  X0"), "bad_element"),
    (
        "overlap.cif",
        CIF.replace("0.00000000  0.00000000  0.00000000", "0.50000000  0.50000000  0.50000000"),
        "bad_occupancy",
    ),
    ("flat.cif", CIF.replace("_cell_angle_gamma   90.0", "_cell_angle_gamma   0.0"), None),
    ("cut.poscar", "\n".join(POSCAR.splitlines()[:9]), "unparsable"),
    ("short.poscar", POSCAR[:40], "unparsable"),
    ("no_symbols.poscar", "\n".join(line for i, line in enumerate(POSCAR.splitlines()) if i != 5), "no_symbols"),
    ("vacancy.poscar", POSCAR.replace("Sr Ti O", "Vac Ti O"), "bad_element"),
    ("nan.poscar", POSCAR.replace("3.905000000000", "nan", 1), "not_finite"),
    ("cut.extxyz", "\n".join(EXTXYZ.splitlines()[:-1]) + "\n", "unparsable"),
    ("cut_in_line.extxyz", EXTXYZ[: EXTXYZ.rstrip().rindex(" ")] + "\n", "unparsable"),
    ("dummy.extxyz", EXTXYZ.replace("Sr ", "X  "), "bad_element"),
    ("molecule.xyz", "2\nhydrogen\nH 0 0 0\nH 0 0 0.74\n", "not_periodic"),
    ("slab.extxyz", EXTXYZ.replace('pbc="T T T"', 'pbc="T T F"'), "not_periodic"),
    ("nan.extxyz", EXTXYZ.replace("3.905", "nan", 1), "not_finite"),
    ("nan.json", _structure(lattice={"matrix": [[float("nan"), 0, 0], [0, 4, 0], [0, 0, 4]]}), "not_finite"),
    ("mixed.json", _with_species([{"element": "Sr", "occu": 0.5}, {"element": "Ba", "occu": 0.5}]), "disordered"),
    ("vacancy.json", _with_species([{"element": "X0+", "occu": 1}]), "bad_element"),
    ("entry.json", json.dumps([{"entry_id": "mp-1", "energy": -1.0}]), "unreadable_file"),
    ("manifest.jsonl", '{"uid": 1}\n{"uid": 2}\n', "unreadable_file"),
    ("._resource.cif", "Mac OS X", "not_a_structure_file"),
    ("pointer.cif", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "lfs_pointer"),
]


@pytest.mark.parametrize(("name", "text", "reason"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_structure_has_a_reason_and_does_not_end_the_run(name, text, reason, tmp_path):
    (tmp_path / "before.cif").write_text(CIF)
    (tmp_path / name).write_text(text)
    (tmp_path / "zz_after.cif").write_text(CIF)
    results = list(read_structures(tmp_path))
    failures = [r for r in results if isinstance(r, Failure)]
    assert len(results) == 3 and len(failures) == 1
    assert reason in (failures[0].reason, None)
    assert name in failures[0].origin
    assert name in failures[0].message or failures[0].uid in failures[0].message
    assert "\n" not in failures[0].message


CHANGES = [
    ("d.cif", CIF.replace("  Sr  Sr0", "  D  D0").replace("Sr1", "D1"), "isotopes_read_as_H", "TiHO3"),
    ("t.poscar", POSCAR.replace("Sr Ti O", "T Ti O"), "isotopes_read_as_H", "TiHO3"),
    ("d.extxyz", EXTXYZ.replace("Sr ", "D  "), "isotopes_read_as_H", "TiHO3"),
    ("d.json", _with_species([{"element": "D", "occu": 1}]), "isotopes_read_as_H", "TiHO3"),
    ("oxidation.cif", CIF.replace("  Sr  Sr0", "  Sr2+  Sr0"), "oxidation_states_stripped", "SrTiO3"),
    (
        "oxidation.json",
        _with_species([{"element": "Sr", "oxidation_state": 2, "occu": 1}]),
        "oxidation_states_stripped",
        "SrTiO3",
    ),
    ("spin.json", _with_species([{"element": "Sr", "occu": 1, "spin": 2}]), "magnetic_moments_dropped", "SrTiO3"),
    ("label.cif", CIF.replace("Sr0", "SrA_x"), "labels_dropped", "SrTiO3"),
    ("zero.cif", CIF + "  Ba  Ba9  1  0.25  0.25  0.25  0\n", "zero_occupancy_sites_dropped", "SrTiO3"),
]


@pytest.mark.parametrize(("name", "text", "change", "formula"), CHANGES, ids=[c[0] for c in CHANGES])
def test_what_is_changed_is_counted(name, text, change, formula, tmp_path):
    (tmp_path / name).write_text(text)
    crystal, changes = parse(next(iter(scan(tmp_path / name))))
    assert changes == {change: 1}
    assert crystal.formula.replace("1", "") == formula.replace("1", "")
    untouched, none = parse(next(iter(scan(_cif_dir(tmp_path, [_named(perovskite(), "x")])))))
    assert not none and untouched.formula == perovskite().formula


def test_magnetic_moments_and_site_properties_are_counted(tmp_path):
    structure = perovskite().to_pymatgen()
    structure.add_site_property("magmom", [1.0] * 5)
    structure.add_site_property("forces", [[0.0] * 3] * 5)
    (tmp_path / "a.json").write_text(json.dumps(structure.as_dict()))
    _, changes = parse(next(scan(tmp_path / "a.json")))
    assert changes == {"magnetic_moments_dropped": 1, "site_properties_dropped": 1}
    atoms = perovskite().to_ase()
    atoms.set_initial_magnetic_moments([1.0] * 5)
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(atoms)
    atoms.write(tmp_path / "a.extxyz")
    for name in ("a.db", "a.extxyz"):
        assert parse(next(scan(tmp_path / name)))[1] == {"magnetic_moments_dropped": 1}


def test_symmetry_operations_are_applied(tmp_path):
    from pymatgen.io.cif import CifWriter

    text = str(CifWriter(quartz().to_pymatgen(), symprec=1e-3, significant_figures=4))  # 1/3 is written as 0.3333
    assert text.count("  Si  ") == 1
    (tmp_path / "quartz.cif").write_text(text)
    crystal, changes = parse(next(scan(tmp_path / "quartz.cif")))
    assert crystal.num_atoms == 9 and space_group(crystal, 0.01) == 152
    assert changes == {"coordinates_rounded_to_ideal": 1}


def test_zip_members_outside_the_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("../up.cif", "/absolute.cif", "c:\\windows.cif", "fine/inside.cif"):
            archive.writestr(name, CIF)
    results = list(read_structures(tmp_path / "a.zip"))
    assert sorted(getattr(r, "reason", "kept") for r in results) == [
        "kept",
        "unsafe_path",
        "unsafe_path",
        "unsafe_path",
    ]


def test_zip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("unimat_jax.structure_files.MAX_MEMBER_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.cif", " " * 100_000)
        archive.writestr("fine.cif", CIF)
    assert [getattr(r, "reason", "kept") for r in read_structures(tmp_path / "a.zip")] == ["too_large", "kept"]


def test_other_files_in_a_directory_are_named(tmp_path):
    (tmp_path / "notes.docx").write_bytes(b"\x00\x01")
    (tmp_path / "ids.csv").write_text("id,target\n1,2\n")
    (tmp_path / "good.cif").write_text(CIF)
    reasons = {r.origin: r.reason for r in read_structures(tmp_path) if isinstance(r, Failure)}
    assert reasons == {"notes.docx": "not_a_structure_file", "ids.csv": "unreadable_file"}


def test_files_of_one_name_in_two_directories_keep_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "relaxed.cif").write_text(CIF)
    assert [raw.uid for raw in scan(tmp_path)] == ["a/relaxed.cif", "b/relaxed.cif"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.cif", None, ("missing.cif", "does not exist")),
        ("table.csv", b"id,formula\n1,SrTiO3\n", ("'cif'", "id, formula")),
        ("table.parquet", None, ()),
        ("entries.json", b'[{"entry_id": "mp-1"}]', ("entries.json", "no pymatgen Structure", "entry_id")),
        ("model.pkl", b"\x80\x04", ("model.pkl", ".extxyz")),
        ("broken.json", b'{"a": [1,', ("broken.json", "cut off")),
        ("broken.zip", b"PK\x03\x04", ("broken.zip", "no valid zip")),
        ("other.npz", None, ("n_atoms",)),
        ("objects.npz", None, ("pickle",)),
    ],
)
def test_a_wrong_file_is_one_line_with_the_remedy(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif name == "table.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"formula": ["SrTiO3"]}), tmp_path / name)
        words = ("formula", "'cif'")
    elif name == "other.npz":
        np.savez(tmp_path / name, x=np.zeros(3))
    elif name == "objects.npz":
        np.savez(tmp_path / name, n_atoms=np.array([{"a": 1}], object))
    with pytest.raises(UserError) as error:
        list(scan(tmp_path / name))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_scan_of_a_wrong_path_fails_at_once(tmp_path):
    with pytest.raises(UserError):
        scan(tmp_path / "nothing")  # not only when the first structure is asked for


def test_numeric_columns_become_properties_and_the_rest_texts(tmp_path):
    rows = [{"material_id": "a", "gap": "1.5", "e": "nan", "run_type": "GGA", "metal": True, "cif": CIF}]
    _write_csv(tmp_path / "t.csv", rows)
    raw = next(scan(tmp_path / "t.csv"))
    assert raw.properties == {"gap": 1.5} and raw.texts == {"run_type": "GGA", "metal": "True"}
    assert parse(raw)[0].properties == {"gap": 1.5}


def test_one_entry_without_a_structure_does_not_end_the_others(tmp_path):
    entries = [{"entry_id": "mp-1"}, {"entry_id": "mp-2", "structure": json.loads(_structure())}, 7]
    (tmp_path / "entries.json").write_text(json.dumps(entries))
    results = list(read_structures(tmp_path / "entries.json"))
    assert [(r.uid, getattr(r, "reason", "kept")) for r in results] == [
        ("entries-0", "no_structure"),
        ("mp-2", "kept"),
        ("entries-2", "no_structure"),
    ]


def test_atomic_numbers_in_extxyz(tmp_path):
    text = '2\nLattice="4 0 0 0 4 0 0 0 4" Properties=Z:I:1:pos:R:3 pbc="T T T"\n55 0 0 0\n17 2 2 2\n'
    (tmp_path / "a.extxyz").write_text(text)
    assert parse(next(scan(tmp_path / "a.extxyz")))[0].symbols == ["Cs", "Cl"]


def test_long_structures_are_read(tmp_path):
    (tmp_path / "long.poscar").write_text(_long_poscar(300))
    assert parse(next(scan(tmp_path / "long.poscar")))[0].num_atoms == 300


def test_reason_survives_the_way_through_a_process(tmp_path):
    import pickle

    error = pickle.loads(pickle.dumps(CrystalError("disordered", "x has 1 partly occupied site")))
    assert error.reason == "disordered" and "partly" in str(error)


def test_reading_imports_neither_jax_nor_tensorflow():
    code = (
        "import sys, unimat_jax.structure_files; print([m for m in ('jax', 'tensorflow', 'flax') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_output_directory_of_generate_is_read_once_and_with_its_failures(tmp_path):
    crystals = _samples()
    _cif_zip(tmp_path, crystals)
    (tmp_path / "generated_crystals.extxyz").write_text("".join(c.to_extxyz() for c in crystals))
    rows = [{"uid": c.uid, "status": "ok", "message": "", "formula": c.formula} for c in crystals]
    rows.append({"uid": "gen_9", "status": "no_atoms", "message": "no slot is occupied"})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text("{}")
    found = list(read_structures(tmp_path))
    assert [f.uid for f in found] == [row["uid"] for row in rows]
    assert isinstance(found[-1], Failure) and found[-1].reason == "no_atoms"
    assert all(difference(a, b) < 1e-5 for a, b in zip(crystals, found[:-1], strict=True))
