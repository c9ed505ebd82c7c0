"""`unimat stability` end to end: real relaxations with EMT, known energies with a table, comparisons, users' errors."""

import csv
import gzip
import json
import shutil
import zipfile

import ase.io
import numpy as np
import pyarrow.parquet
import pytest
import shared_data
from stability_calculators import EMT_PATH
from stability_relaxation_test import metal

from unimat_jax.cli import run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.outputs import CSV, PARQUET
from unimat_jax.stability import command, outputs
from unimat_jax.stability.comparison import compare_sets
from unimat_jax.stability.metrics import set_metrics

NUMBER = 7
EMT_FLAGS = ["--energy_scale=own", f"--energy_model={EMT_PATH}"]


def write(path, crystals):
    path.write_text("".join(crystal.to_extxyz() for crystal in crystals))
    return path


def run(*flags):
    return run_program(command.main, [str(flag) for flag in flags])


def read(directory):
    rows = pyarrow.parquet.read_table(directory / PARQUET).to_pylist()
    return {row["uid"]: row for row in rows}, json.loads((directory / outputs.SUMMARY).read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stability")
    # L1_0 CuAu lies below the elements under EMT; the third site pattern of the cell makes it, as ABBA.
    ordered = [metal(["Cu", "Au", "Au", "Cu"], a=a, uid=f"l10-{a}", rattle=0.02) for a in (3.8, 3.9)]
    candidates = [
        *ordered,
        Crystal.create([29, 79], [[0, 0, 0], [0.5, 0.5, 0.5]], 3.1 * np.eye(3), "b2"),
        metal(["Cu"], a=3.5, uid="copper"),
        metal(["Fe"], a=3.6, uid="iron"),
        Crystal.create([29, 29], [[0, 0, 0], [0, 0, 0.01]], 4 * np.eye(3), "overlap"),
    ]
    text = "".join(crystal.to_extxyz() for crystal in candidates)
    broken = text.splitlines(keepends=True)[0] + "uid=broken\nX 0 0 0\n"
    (folder / "candidates.extxyz").write_text(text + broken)
    hull = [metal(["Cu"], uid="Cu"), metal(["Au"], a=4.1, uid="Au"), metal(["Ag"], a=4.1, uid="Ag"),
            Crystal.create([79], [[0, 0, 0]], 3.0 * np.eye(3), "sc-Au")]  # fmt: skip
    write(folder / "hull.extxyz", hull)
    return folder


@pytest.fixture(scope="module")
def finished(files):
    flags = [f"--structures={files / 'candidates.extxyz'}", f"--hull_structures={files / 'hull.extxyz'}"]
    flags += [*EMT_FLAGS, "--num_workers=1", f"--known={files / 'hull.extxyz'}", f"--output_dir={files / 'out'}"]
    assert run(*flags) == 0
    return flags


def test_a_row_a_structure_and_the_energies_of_emt(files, finished):
    rows, about = read(files / "out")
    with (files / "out" / CSV).open(newline="") as file:
        assert [row["uid"] for row in csv.DictReader(file)] == list(rows)
    assert len(rows) == NUMBER == about["num_structures"] == sum(about["status"].values())
    assert [row["status"] for row in rows.values()] == [
        *["converged"] * 4, "failed(calculator_error)", "failed(overlapping_atoms)", "failed(unparsable)",
    ]  # fmt: skip
    best = rows["l10-3.9"]
    # EMT's own numbers: the elements at their minimum, the alloy at its own.
    assert best["formation_energy_per_atom"] == pytest.approx(best["decomposition_energy"], abs=1e-9)
    assert best["decomposition_energy"] < -0.005
    assert best["decomposition"] in ("0.500 Cu (Cu) + 0.500 Au (Au)", "0.500 Au (Au) + 0.500 Cu (Cu)")
    assert best["space_group_number_loose"] == 123 and best["e_above_hull"] == 0
    assert best["scaled_energy_per_atom"] == best["energy_per_atom"] and best["correction_per_atom"] is None
    assert rows["l10-3.8"]["energy_per_atom"] == pytest.approx(best["energy_per_atom"], abs=1e-3)
    assert 0.05 < rows["l10-3.8"]["volume_change"] - best["volume_change"] < 0.15 and best["relax_rmsd"] > 0.005
    copper = rows["copper"]
    assert copper["same_as"] == "Cu" and copper["energy_status"] == "missing_terminal(Cu)"
    assert copper["formation_energy_per_atom"] == pytest.approx(0, abs=1e-3)


def test_everything_that_decides_the_numbers_is_written_down(files, finished):
    _, about = read(files / "out")
    assert about["energy_model"] == EMT_PATH and about["package"].startswith("ase ")
    assert about["hull"] == "self_consistent" and about["correction"].startswith("own") and not about["mp2020_added"]
    assert about["reference_left_out"] == {"in no candidate's chemical system": 1}
    assert about["num_reference_phases"] == 3 and len(about["reference_hash"]) == 16
    assert about["tolerances"]["stol"] == 0.3 and about["protocol"]["pressure"] == 0 and about["created"]
    metrics = about["metrics"]
    assert metrics["converged"]["value"] == pytest.approx(4 / NUMBER) and metrics["converged"]["n"] == NUMBER
    assert metrics["stable"]["value"] == pytest.approx(3 / NUMBER) and metrics["stable"]["failures"] == 4
    assert metrics["composition_converged"]["n"] == 3 and metrics["composition_converged"]["note"]
    assert metrics["sun/lemat"]["value"] <= metrics["stable"]["value"]


def test_candidates_are_ranked_and_have_cifs(files, finished):
    with (files / "out" / outputs.CANDIDATES).open(newline="") as file:
        ranked = list(csv.DictReader(file))
    assert tuple(ranked[0]) == outputs.RANKED_COLUMNS
    assert [row["rank"] for row in ranked] == ["1", "2", "3", "4"] and ranked[-1]["uid"] == "copper"
    energies = [float(row["decomposition_energy"]) for row in ranked[:3]]
    assert energies == sorted(energies) and {row["energy_model"] for row in ranked} == {EMT_PATH}
    with zipfile.ZipFile(files / "out" / outputs.CIFS) as archive:
        names = archive.namelist()
        text = archive.read("b2_symmetrised.cif").decode()
    assert len(names) == 8 and "Pm-3m" in text


def test_relaxed_structures_keep_the_uid_of_the_raw_ones(files, finished):
    rows, _ = read(files / "out")
    frames = {frame.info["uid"]: frame for frame in ase.io.read(files / "out" / outputs.RELAXED, ":")}
    assert set(frames) == {uid for uid, row in rows.items() if row["status"] == "converged"}
    assert frames["b2"].info["e_above_hull"] == rows["b2"]["e_above_hull"]
    assert frames["b2"].get_volume() / 2 == pytest.approx(rows["b2"]["volume_per_atom"], rel=1e-6)


def test_again_it_takes_all_from_the_journal(files, finished, capsys):
    rows, _ = read(files / "out")
    before = (files / "out" / outputs.JOURNAL).read_text()
    assert run(*finished) == 2 and "--resume or --overwrite" in capsys.readouterr().err
    other = shutil.copytree(files / "out", files / "other")
    assert run(*finished, "--resume", f"--against={other}") == 0
    again, about = read(files / "out")
    assert again == rows and (files / "out" / outputs.JOURNAL).read_text() == before
    comparison = about["comparison"][str(other)]
    assert comparison["delta_formation_energy_lowest"]["value"] == 0
    assert comparison["reduction_rate_lowest"]["value"] == 0
    # CuAu has three converged candidates, so nine pairs; Cu one; Fe one pair that is dropped; the overlap's Cu2 is Cu.
    assert comparison["delta_formation_energy_all"]["n"] == 10
    assert comparison["delta_formation_energy_all"]["failures"] == 1 + 3


def test_equations_3_and_4():
    def rows(*values):
        return [{"reduced_formula": f, "status": "converged" if e is not None else "timeout",
                 "scaled_energy_per_atom": e} for f, e in values]  # fmt: skip

    a = rows(("NaCl", -3.0), ("NaCl", -3.4), ("MgO", -5.0), ("MgO", None), ("KBr", -2.0), ("CaO", None))
    b = rows(("NaCl", -3.1), ("MgO", -5.5), ("MgO", -4.9), ("LiF", -4.0), ("CaO", -6.0))
    found = compare_sets(a, b)
    pairs = [0.1, -0.3, 0.5, -0.1]
    assert found["delta_formation_energy_all"].value == pytest.approx(np.mean(pairs))
    assert found["reduction_rate_all"].value == 0.5 and found["reduction_rate_all"].n == 4
    assert found["reduction_rate_all"].failures == 3, "two of MgO, one of CaO"
    assert found["delta_formation_energy_lowest"].value == pytest.approx((-0.3 + 0.5) / 2)
    assert found["reduction_rate_lowest"].value == 0.5 and found["delta_formation_energy_lowest"].failures == 1
    swapped = compare_sets(b, a)
    assert swapped["delta_formation_energy_all"].value == pytest.approx(-np.mean(pairs))


def test_stable_and_metastable_are_counted_over_all_that_were_asked_for():
    def row(energy, same="", status="converged", formula="A"):
        return {"status": status, "decomposition_energy": energy, "same_as": same, "reduced_formula": formula}

    rows = [row(-0.1), row(-0.1, "mp-1"), row(0.0), row(0.02), row(0.05, formula="B"), row(0.3), row(None),
            row(-1.0, status="not_converged"), row(None, status="timeout", formula="C")]  # fmt: skip
    found = set_metrics(rows, "mattergen", has_hull=True)
    counts = {name: round(found[name].value * 9) for name in found if name.startswith(("stable", "meta"))}
    assert counts == {"stable": 1, "stable_or_known": 2, "metastable_25": 4, "metastable_25_new": 3,
                      "metastable_100": 5, "metastable_100_new": 4}  # fmt: skip
    assert found["stable"].failures == 3
    assert found["composition_converged"].value == pytest.approx(2 / 3)


KNOWN = {"mp-1960": -2.062, "mp-19770": -1.707, "mp-19006": -1.979, "mp-13061": -3.899}
"""Formation energies in eV/atom of Li2O, Fe2O3, MnO and Y2O3 (in a cell of 5 atoms): the Materials Project's."""


@pytest.fixture(scope="module")
def known_energies(tmp_path_factory):
    """The real structures, the raw energies that DFT gave them, and the entries that they are from."""
    folder = tmp_path_factory.mktemp("known")
    files = [shared_data.data_dir() / "hull_refs" / f"rn_{n}_entries.json.gz" for n in ("Fe_Li_O_P", "Mn_O_Y")]
    entries = [entry for path in files for entry in json.loads(gzip.decompress(path.read_bytes()))]
    chosen = [entry for entry in entries if entry["entry_id"] in KNOWN]
    (folder / "structures.json").write_text(json.dumps({e["entry_id"]: e["structure"] for e in chosen}))
    for name, corrected in (("raw", 0), ("corrected", 1)):
        table = {}
        for e in chosen:
            correction = sum(a["adj_per_atom"] * a["n_atoms"] for a in e["energy_adjustments"])
            formula = ase.Atoms([s["species"][0]["element"] for s in e["structure"]["sites"]]).symbols.formula
            energy = e["energy"] + corrected * correction
            table[formula.reduce()[0].format("hill")] = energy / len(e["structure"]["sites"])
        (folder / f"{name}.json").write_text(json.dumps(table))
    return folder, files


def tabulated(folder, table, scale, output_dir, *flags):
    kwargs = json.dumps({"table": str(folder / f"{table}.json")})
    return run(f"--structures={folder / 'structures.json'}", "--energy_model=stability_calculators:Tabulated",
               f"--energy_scale={scale}", f"--energy_model_kwargs={kwargs}", f"--output_dir={output_dir}",
               "--num_workers=0", *flags)  # fmt: skip


@pytest.mark.parametrize(("table", "scale"), [("raw", "pbe"), ("corrected", "mp2020")])
def test_real_energies_give_the_materials_projects_formation_energies(known_energies, tmp_path, table, scale):
    """A correction that is left out, or added twice, is off by 0.2 eV/atom and more."""
    folder, files = known_energies
    assert tabulated(folder, table, scale, tmp_path / "out", "--hull", *files) == 0
    rows, about = read(tmp_path / "out")
    assert about["mp2020_added"] == (scale == "pbe") and about["correction"] == about["hull_scheme"] == "MP2020"
    for uid, expected in KNOWN.items():
        assert rows[uid]["formation_energy_per_atom"] == pytest.approx(expected, abs=0.002), uid
        assert uid in rows[uid]["same_as"].split(";")
        if scale == "pbe":
            assert abs(rows[uid]["correction_per_atom"]) > 0.2
    assert rows["mp-1960"]["decomposition_energy"] < 0 and rows["mp-13061"]["e_above_hull"] > 0.05
    assert "Y2O3 (mp-2652)" in rows["mp-13061"]["decomposition"], "its ground state is in the hull"


def test_elements_alone_give_formation_energies_and_no_hull(known_energies, tmp_path):
    folder, _ = known_energies
    elements = shared_data.data_dir() / "hull_refs" / "mp-elemental-reference-entries.json.gz"
    assert tabulated(folder, "raw", "pbe", tmp_path / "out", f"--elements={elements}") == 0
    rows, about = read(tmp_path / "out")
    assert about["hull"] == "elements" and "stable" not in about["metrics"]
    for uid, expected in KNOWN.items():
        assert rows[uid]["formation_energy_per_atom"] == pytest.approx(expected, abs=0.01), uid
        assert rows[uid]["decomposition_energy"] is None


def test_schemes_are_not_mixed_unasked(known_energies, tmp_path, capsys):
    folder, files = known_energies
    cases = {
        "none": (["--correction=none"], "pbe", "'none', the reference's in 'MP2020'"),
        "own": ([], "own", "energies on a scale of their own (own: stability_calculators:Tabulated)"),
        "pressed": (["--pressure=10"], "pbe", "reference entries are at zero pressure"),
        "twice": (["--correction=mp2020"], "mp2020", "it would count twice"),
    }
    for name, (flags, scale, message) in cases.items():
        assert tabulated(folder, "raw", scale, tmp_path / name, "--hull", *files, *flags) == 2
        assert message in capsys.readouterr().err, name
    out = tmp_path / "mixed"
    assert tabulated(folder, "raw", "pbe", out, "--hull", *files, "--correction=none", "--mixed_schemes") == 0
    rows, about = read(out)
    assert about["mixed_schemes"] and rows["mp-1960"]["formation_energy_per_atom"] == pytest.approx(-1.833, abs=0.003)


def test_sets_of_other_models_are_not_compared_unasked(known_energies, finished, files, tmp_path, capsys):
    folder, _ = known_energies
    flags = [f"--against={files / 'out'}"]
    assert tabulated(folder, "raw", "pbe", tmp_path / "out", *flags) == 2
    assert "was made otherwise (energy_model" in capsys.readouterr().err
    assert tabulated(folder, "raw", "pbe", tmp_path / "out", f"--against={tmp_path}") == 2
    assert "give the --output_dir of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--energy_model=magic"], "choose from sevennet, chgnet"),
        (["--energy_model_kwargs=[1]"], "write a JSON object"),
        (["--known=x.cif"], "--known is for S.U.N., which needs a hull"),
        (["--fmax=-1"], "--fmax=-1.0: must be positive"),
        (["--hull=nowhere.json"], "nowhere.json does not exist"),
        (["--structures=nowhere.cif"], "nowhere.cif does not exist"),
        (["--hull=a.json", "--elements=b.json"], "not allowed with"),
    ],
)
def test_what_a_user_can_mend_is_one_line(files, tmp_path, capsys, flags, message):
    base = [f"--structures={files / 'candidates.extxyz'}", *EMT_FLAGS, f"--output_dir={tmp_path / 'out'}"]
    if flags[0].startswith("--hull"):
        base = [flag.replace("own", "pbe") for flag in base]
    assert run(*base, "--num_workers=0", *flags) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
